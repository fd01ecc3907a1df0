"""Sensitivities that two processes measured are those of one, to the last bit; a kill loses one measurement a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.base import PassContext, PassError
from passes.quantize import spreading, targets
from passes.quantize.parameters import QuantizeParameters
from passes.quantize.sensitivity import Allocation, allocate
from profilers.base import Progress, SilentProgress
from profilers.text import TokenStream
from tests.passes.quantize.compressed import tiny_llama
from tests.tiny_models import VOCABULARY

pytest.importorskip("compressed_tensors")

TEXT = TokenStream(torch.randint(0, VOCABULARY, (4000,), generator=torch.Generator().manual_seed(1)), "random")


class Here:
    """Parts one after another in this process; ends before the part ``fails``."""

    def __init__(self, fails: int | None = None, most: int = 2) -> None:
        self.fails, self.most = fails, most
        self.names: list[str] = []

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
        assert function == "passes.quantize.spreading:measure"
        found = []
        for number, part in enumerate(parts):
            if number == self.fails:
                raise PassError("lost")
            self.names += part["names"]
            found.append(spreading.measure(**part, progress=SilentProgress()))
        return found


def run(folder: Path, spread: Here | None = None) -> Allocation:
    folder.mkdir(exist_ok=True)
    model, wanted = tiny_llama(), QuantizeParameters(scheme="auto", bits=5.0)
    opening = {"function": "tests.passes.quantize.compressed:tiny_llama", "arguments": {}}
    context = PassContext(None, torch.device("cpu"), TEXT, folder, spread=spread, opening=opening)
    return allocate(model, wanted, context, targets.find(model, wanted).layers)


def test_parts_give_what_one_process_gives(tmp_path: Path) -> None:
    spread = Here()
    alone, shared = run(tmp_path / "alone"), run(tmp_path / "shared", spread)
    assert (shared.table, shared.choices, shared.notes) == (alone.table, alone.choices, alone.notes)
    assert sorted(spread.names) == sorted(entry.name for entry in alone.table)


def test_what_a_part_has_measured_is_kept(tmp_path: Path) -> None:
    alone, again = run(tmp_path / "alone"), Here()
    with pytest.raises(PassError, match="lost"):
        run(tmp_path / "cut", Here(fails=1))
    assert run(tmp_path / "cut", again).table == alone.table
    assert 0 < len(again.names) < len(alone.table)
    assert not [*(tmp_path / "cut").glob("*part*")]


def test_copies_that_do_not_fit_are_not_made(tmp_path: Path) -> None:
    spread = Here(most=1)
    found = run(tmp_path / "one", spread)
    assert spread.names == []
    assert "two copies of the model do not fit" in found.notes[0]
