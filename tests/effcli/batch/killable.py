"""A batch as a process of its own, to be killed: ``python -m tests.effcli.batch.killable OUTPUT [MODEL]``.

It runs on this machine, or on the Ray cluster whose address is in ``KILLABLE_ON``.

Without a model, twenty calls of a function, on one worker. With one, twenty jobs that end the same whenever they are
run: function calls, profiles without timing, and quantized copies of a tiny model, each of them read by another job.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

from effcli.batch import driver, local
from effcli.batch.engine import Engine
from effcli.batch.fingerprint import Fingerprints
from effcli.batch.model import Job, Limits
from effcli.batch.ray_engine import RayEngine
from effcli.errors import EffcliError

_HERE = "tests.effcli.batch.killable"
JOBS = 20
CALLS = 14
"""Of the jobs with a model."""


def work(number: int, seconds: float) -> dict[str, Any]:
    """Take some time and return what depends on nothing but the number."""
    time.sleep(seconds)
    return {"number": number, "sha256": [hashlib.sha256(f"{number}.{row}".encode()).hexdigest() for row in range(99)]}


def seconds_of(number: int) -> float:
    """Return how long a call takes."""
    return 0.1 + number % 4 / 10


def calls(count: int) -> list[Job]:
    """Return the jobs that call :func:`work`."""
    arguments = [{"number": number, "seconds": seconds_of(number)} for number in range(count)]
    return [
        Job(f"call-{number}", "call", "", "none", "work", {"function": f"{_HERE}:work", "arguments": given})
        for number, given in enumerate(arguments)
    ]


def jobs(model: str) -> list[Job]:
    """Return the batch with a model."""
    limits = Limits(retries=1)
    profiles = [
        Job(f"tiny.kv-{context}", "profile", model, "tiny", "kv", {"only": ["kv"], "context": [context]}, limits=limits)
        for context in (64, 128)
    ]
    optimizes = [
        Job(f"tiny.w{bits}", "optimize", model, "tiny", f"w{bits}", _rtn(f"w{bits}a16"), limits=limits)
        for bits in (4, 8)
    ]
    after = [
        Job(
            f"tiny-w{bits}.kv", "profile", "", "tiny-w4", "kv", {"only": ["kv"], "context": [64]}, limits=limits,
            model_from=f"tiny.w{bits}", needs=(f"tiny.w{bits}",),
        )
        for bits in (4, 8)
    ]  # fmt: skip
    called, half = calls(CALLS), CALLS // 2
    return [optimizes[0], *called[:half], *profiles, optimizes[1], *called[half:], *after]


def _rtn(scheme: str) -> dict[str, Any]:
    step = {"quantize": {"scheme": scheme, "method": "rtn", "group_size": 16}}
    if scheme == "w8a16":
        del step["quantize"]["group_size"]
    return {"recipe": {"version": 1, "passes": [step], "evaluation": {"tokens": 256, "context": 64}}, "context": 32}


LIGHT = """import os, sys
from effcli.batch import worker
worker._PRELOADED = ()
del os.environ["OMP_NUM_THREADS"]
sys.exit(worker.main())
"""
"""A worker that imports neither torch nor transformers before a job needs them: calls of a function do not."""


def main() -> int:
    """Run the batch; say on the last line how it ended."""
    output, *model = sys.argv[1:]
    prints = Fingerprints(device_class=lambda name: {"type": "cpu"})  # without torch, so that it starts at once
    if not model:
        local.WORKER = (sys.executable, "-P", "-c", LIGHT)
    address = os.environ.get("KILLABLE_ON")
    engine: Engine = local.LocalEngine(workers=2 if model else 1, threads=1)
    if address is not None:
        engine = RayEngine(address, workers=3)
    try:
        run = driver.run(jobs(*model) if model else calls(JOBS), output, engine, fingerprints=prints)
    except EffcliError as error:
        print(error)  # noqa: T201
        return error.exit_code
    print(json.dumps({state.job.name: state.stage for state in run.states}))  # noqa: T201
    for state in run.states:
        if state.stage not in ("kept", "passed"):
            print(state.job.name, state.stage, state.outcome and state.outcome.message)  # noqa: T201
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
