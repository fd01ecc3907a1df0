"""Parts in worker processes: results in order, a worker that dies, a part that fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from effcli.batch.local import LocalEngine
from effcli.batch.model import Limits
from effcli.batch.ray_engine import RayEngine, _Node
from effcli.batch.spread import EngineSpread
from effcli.errors import BadInputError
from effcli.pipeline import optimize
from effcli.recipes import from_options
from passes.base import PassError
from tests.effcli.batch.fake_engine import job

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
def spread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineSpread]:
    folder = tmp_path_factory.mktemp("staged")
    (folder / "parts-of-a-killed-run").mkdir()
    with EngineSpread(LocalEngine(2, threads=1), folder) as made:
        assert len([*folder.iterdir()]) == 1
        yield made
    assert not [*folder.iterdir()]


def test_parts_run_in_two_processes_and_return_in_order(spread: EngineSpread) -> None:
    found = spread.map(f"{HERE}:square", [{"number": number} for number in range(5)])
    assert [item["square"] for item in found] == [0, 1, 4, 9, 16]
    assert {item["threads"] for item in found} == {"1"}
    assert os.getpid() not in {item["process"] for item in found}
    assert 1 <= len({item["process"] for item in found}) <= 2
    assert not any(psutil.pid_exists(item["process"]) for item in found)  # they hold nothing while the pass goes on


def test_a_part_whose_worker_died_is_done_again(spread: EngineSpread, tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    assert spread.map(f"{HERE}:die_once", [{"mark": str(tmp_path / name)} for name in "ab"]) == ["done", "done"]


def test_a_part_that_fails_says_why(spread: EngineSpread) -> None:
    with pytest.raises(PassError, match="part 0 cannot be done; give another"):
        spread.map(f"{HERE}:refuse", [{"number": 0}])


def test_no_more_parts_than_there_is_room_for(spread: EngineSpread) -> None:
    assert spread.room(10**6) == 2
    assert spread.room(10**15) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("local", "auto", 2), "--address 'auto' is for --engine ray"),
        (("ray", None, 1), "give --workers 2 or more, or leave --engine out"),
        (("rey", None, None), r"engine 'rey' is neither of local, ray \(did you mean 'ray'\?\)"),
        (("local", None, 10**6), "1000000 workers on"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_done(
    given: tuple[Any, ...], said: str, tmp_path: Path
) -> None:
    engine, address, workers = given
    recipe = from_options(["quantize:scheme=w4a16"])
    with pytest.raises(BadInputError, match=said):
        optimize("no-such-model", recipe, tmp_path / "out", engine=engine, address=address, workers=workers)


@pytest.mark.parametrize(
    ("nodes", "gpus", "workers", "threads", "room"),
    [
        (((8, 0), (4, 0)), 0, 3, 4, 3),
        (((8, 0), (4, 0)), 0, None, 1, 12),
        (((8, 0), (4, 0)), 0, 20, 1, 12),
        (((32, 4), (64, 0)), 1, 4, 8, 4),
        (((32, 4), (64, 0)), 1, None, 1, 4),
    ],
)
def test_parts_share_the_cpus_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, nodes: Any, gpus: int, workers: int | None, threads: int, room: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    engine = RayEngine(None, workers=workers, threads=None)
    monkeypatch.setattr(
        engine, "_nodes", lambda: {str(number): _Node("", {}, *has, 10**12) for number, has in enumerate(nodes)}
    )
    part = replace(job("part", limits=Limits(memory_bytes=10**9)), device="cuda" if gpus else "cpu")
    assert engine._need(part).cpus == threads
    assert engine.room_for(part) == room


@pytest.mark.slow
@pytest.mark.thorough
def test_a_part_that_is_lost_twice_says_how_to_go_on(spread: EngineSpread) -> None:
    with pytest.raises(PassError, match=r"lost twice: its worker was killed \(signal 9\)"):
        spread.map(f"{HERE}:die", [{"number": 0}])
    assert spread.map(f"{HERE}:square", [{"number": 3}])[0]["square"] == 9
