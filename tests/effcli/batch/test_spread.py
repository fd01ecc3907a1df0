"""Parts in worker processes: results in order, a worker that dies, a part that fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from effcli.batch.local import LocalEngine
from effcli.batch.spread import EngineSpread
from passes.base import PassError

HERE = "tests.effcli.batch.test_spread"


def square(number: int) -> dict[str, Any]:
    return {"square": number**2, "process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


def die_once(mark: str) -> str:
    path = Path(mark)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number: int) -> None:
    raise PassError(f"part {number} cannot be done; give another")


@pytest.fixture(scope="module")
def spread() -> Iterator[EngineSpread]:
    with EngineSpread(LocalEngine(2, threads=1), 2, memory_bytes=10**6) as made:
        yield made


def test_parts_run_in_two_processes_and_return_in_order(spread: EngineSpread) -> None:
    found = spread.map(f"{HERE}:square", [{"number": number} for number in range(5)])
    assert [item["square"] for item in found] == [0, 1, 4, 9, 16]
    assert {item["threads"] for item in found} == {"1"}
    assert os.getpid() not in {item["process"] for item in found}
    assert 1 <= len({item["process"] for item in found}) <= 2


def test_a_part_whose_worker_died_is_done_again(spread: EngineSpread, tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    assert spread.map(f"{HERE}:die_once", [{"mark": str(tmp_path / name)} for name in "ab"]) == ["done", "done"]


def test_a_part_that_fails_says_why(spread: EngineSpread) -> None:
    with pytest.raises(PassError, match="part 0 cannot be done; give another"):
        spread.map(f"{HERE}:refuse", [{"number": 0}])


@pytest.mark.slow
@pytest.mark.thorough
def test_a_part_that_is_lost_twice_says_how_to_go_on(spread: EngineSpread) -> None:
    with pytest.raises(PassError, match=r"lost twice: its worker was killed \(signal 9\)"):
        spread.map(f"{HERE}:die", [{"number": 0}])
    assert spread.map(f"{HERE}:square", [{"number": 3}])[0]["square"] == 9
