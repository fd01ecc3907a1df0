"""Edges measured by two processes are those of one, to the last bit; a kill loses only what was not journaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.lemica import spreading
from passes.lemica.graph import build
from passes.lemica.inputs import Sample
from profilers.base import Progress, SilentProgress
from tests.passes.lemica.tiny_pipelines import dit

SAMPLES = (Sample(3, 11), Sample(7, 12))
ASKED: dict[str, Any] = {"steps": 8, "max_gap": 4, "arguments": {}}
OPENING = {"function": "tests.passes.lemica.test_spreading:opened", "arguments": {"layers": 2}}


def opened(layers: int) -> Any:
    torch.set_num_threads(1)
    return dit(layers=layers)


class Here:
    """Parts one after another in this process; stops before the part ``fails``."""

    def __init__(self, fails: int | None = None, most: int = 2) -> None:
        self.fails, self.most = fails, most
        self.parts: list[Mapping[str, Any]] = []

    def room(self, memory_bytes: int) -> int:
        assert memory_bytes > 0
        return self.most

    def map(
        self,
        function: str,
        parts: Sequence[Mapping[str, Any]],
        progress: Progress | None = None,
        *,
        memory_bytes: int = 0,
    ) -> list[Any]:
        self.parts += parts
        assert function == "passes.lemica.spreading:measure"
        found = []
        for number, part in enumerate(parts):
            if number == self.fails:
                raise KeyboardInterrupt
            found.append(spreading.measure(**part, progress=SilentProgress()))
        return found


def test_parts_give_what_one_process_gives(tmp_path: Path) -> None:
    alone = build(dit(layers=2), SAMPLES, **ASKED, work=tmp_path / "alone")
    spread = Here()
    shared = build(dit(layers=2), SAMPLES, **ASKED, work=tmp_path / "shared", spread=spread, opening=OPENING)
    assert shared == alone
    assert len(spread.parts) == 2
    groups = [tuple(group) for part in spread.parts for group in part["groups"]]
    assert len(set(groups)) == len(groups)
    assert not [*(tmp_path / "shared").glob("part-*")]


def test_what_a_part_has_done_before_a_kill_is_not_done_again(tmp_path: Path) -> None:
    alone = build(dit(layers=2), SAMPLES, **ASKED, work=tmp_path / "alone")
    with pytest.raises(KeyboardInterrupt):
        build(dit(layers=2), SAMPLES, **ASKED, work=tmp_path / "cut", spread=Here(fails=1), opening=OPENING)
    assert [*(tmp_path / "cut").glob("part-0.jsonl")]
    again = Here()
    assert build(dit(layers=2), SAMPLES, **ASKED, work=tmp_path / "cut", spread=again, opening=OPENING) == alone
    groups = sum(len(part["groups"]) for part in again.parts)
    assert 0 < groups < 6


def test_parts_have_about_the_same_to_do() -> None:
    costs = {(0, end): 8 - end for end in range(2, 8)}
    parts = spreading.shared(costs, 2)
    assert sorted(key for part in parts for key in part) == sorted(costs)
    totals = [sum(costs[key] for key in part) for part in parts]
    assert abs(totals[0] - totals[1]) <= 1
    assert spreading.shared({(0, 2): 1}, 3) == [[(0, 2)], [], []]
