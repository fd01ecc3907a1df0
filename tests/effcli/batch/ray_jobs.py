"""What the tests on a cluster run there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock


def where(zone: str | None = None) -> dict[str, object]:
    """Say which process this is and what it sees."""
    return {
        "pid": os.getpid(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": os.environ["OMP_NUM_THREADS"],
    }


def nap(seconds: float, told: str) -> float:
    """Write this process's id into a file, then take some time."""
    Path(told).write_text(str(os.getpid()))
    time.sleep(seconds)
    return seconds


def crash() -> None:
    """End this process as a bug in a C library does."""
    os.kill(os.getpid(), signal.SIGSEGV)


def compute(loops: int) -> int:
    """Keep one core busy."""
    total = 0
    for number in range(loops):
        total = (total * 31 + number) % 1_000_003
    return total


def held_llama(work: str) -> Any:
    """Return a tiny llama; a part that measures it stops after each group, for as long as ``work/hold`` exists."""
    from passes.quantize.sensitivity import Store
    from tests.passes.quantize.compressed import tiny_llama

    add = Store.add

    def held(*given: Any) -> None:
        add(*given)
        while (Path(work) / "hold").exists():
            time.sleep(0.05)

    (Path(work) / f"process-{os.getpid()}").touch()
    mock.patch.object(Store, "add", held).start()
    return tiny_llama()
