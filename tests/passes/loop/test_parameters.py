"""Parameters that do not agree are refused before anything is loaded, each by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from passes.base import PassError
from passes.loop import LoopParameters, LoopPass


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": 2}, "blocks needs loops beside it"),
        ({"loops": 2}, "loops needs blocks beside it"),
        ({"blocks": 2, "loops": 2, "target": 0.5}, "target and blocks, loops exclude each other"),
        ({"blocks": 2, "loops": 2, "pattern": "free"}, "pattern=free chooses the blocks itself"),
        ({"target": 1.5}, "parameter 'target'"),
        ({"target": 0}, "parameter 'target'"),
        ({"blocks": 4, "loops": 1}, "parameter 'loops'"),
        ({"rank": -1}, "parameter 'rank'"),
        ({"pattern": "abab"}, "parameter 'pattern'"),
        ({"init": "first"}, "parameter 'init'"),
        ({"lops": 2}, "did you mean 'loops'"),
    ],
)
def test_what_does_not_agree_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        LoopPass.from_mapping(values)


def test_running_takes_blocks_and_loops_or_a_target_and_planning_does_not() -> None:
    with pytest.raises(PassError, match="loop needs blocks and loops .* or a target"):
        LoopPass.from_mapping({}).check_complete()
    LoopPass.from_mapping({"target": 0.8}).check_complete()
    LoopPass.from_mapping({"blocks": 2, "loops": 2}).check_complete()


def test_auto_is_sequence_with_blocks_and_free_with_a_target() -> None:
    assert LoopParameters(blocks=2, loops=2).chosen_pattern == "sequence"
    assert LoopParameters(target=0.5).chosen_pattern == "free"
    assert LoopParameters(target=0.5, pattern="cycle").chosen_pattern == "cycle"


def test_text_is_needed_to_fit_or_to_measure_damage() -> None:
    assert LoopPass(LoopParameters(blocks=2, loops=2)).needs_calibration
    assert not LoopPass(LoopParameters(blocks=2, loops=2, rank=0, init="average")).needs_calibration
    assert LoopPass(LoopParameters(target=0.5, rank=0, init="average")).needs_calibration


def test_tokens_of_healing_can_be_short_numbers() -> None:
    given = {"5M": 5_000_000, "1.5M": 1_500_000, "500k": 500_000, 4096: 4096, "4096": 4096}
    for value, tokens in given.items():
        item = LoopPass.from_mapping({"target": 0.8, "heal_tokens": value})
        assert item.parameters.model_dump()["heal_tokens"] == tokens


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"heal_tokens": "5X"}, "heal_tokens"),
        ({"heal_tokens": -1}, "heal_tokens"),
        ({"heal_tokens": 100}, "less than one step of heal_batch=4 windows of heal_length=512 tokens: give 2048"),
        ({"heal_minutes": 3}, "give heal_tokens too"),
        ({"heal_tokens": "1M", "learning_rate": 0}, "learning_rate"),
    ],
)
def test_healing_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(PassError, match=re.escape(said)):
        LoopPass.from_mapping({"target": 0.8} | values)
