"""Predictions against exact sizes and closed forms."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from passes.base import Figures, ModelProfile, PassError
from passes.loop import LoopPass, targets
from passes.loop.layout import LoopPlan
from profilers.meta import meta_model
from profilers.peaks import Peaks, WorkingSetBandwidth
from tests.passes.loop.small import CONFIGS

PEAKS = Peaks(
    device="cpu",
    copy_bytes_per_second=1e10,
    read_bytes_per_second=1e10,
    memory_bytes_per_second=1e10,
    by_working_set=(WorkingSetBandwidth(1 << 20, 1e10),),
    flops_per_second={"bfloat16": 1e11, "float32": 5e10},
    op_overhead_seconds=1e-6,
    seconds_spent=0.0,
)
MEASURED = Figures(
    weight_bytes=10**6, kv_bytes_per_token=128.0, ttft_seconds=0.5, tpot_seconds=0.01, peak_memory_bytes=10**9
)


def profile(name: str = "llama6", figures: Figures = MEASURED, **changes: Any) -> ModelProfile:
    known = ModelProfile(
        model=meta_model(CONFIGS[name](), torch.bfloat16),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        peaks=PEAKS,
        batch=2,
        context=64,
        figures=figures,
        report={"profiles": {}},
    )
    return dataclasses.replace(known, **changes)


def predicted(values: dict[str, Any], known: ModelProfile) -> Any:
    return LoopPass.from_mapping(values).plan(known)


def test_bytes_and_times_by_hand() -> None:
    known = profile()
    structure = targets.find(known.model)
    sizes = LoopPlan.even(structure, ((0, 1), (2, 3), (4, 5)), 4).sizes(structure)
    found = predicted({"blocks": 3, "loops": 2, "rank": 4}, known)
    assert found.figures.weight_bytes == 10**6 - sizes.bytes_before + sizes.bytes_after
    assert found.figures.peak_memory_bytes == 10**9 - sizes.bytes_before + sizes.bytes_after
    assert found.figures.kv_bytes_per_token == 128.0
    assert found.bits_per_parameter == pytest.approx(8 * sizes.bytes_after / sizes.parameters_before)
    ops = 6 * 7 * 3 * 1e-6  # each linear of each layer has two products and a sum more
    assert found.figures.tpot_seconds == pytest.approx(0.01 + 2 * sizes.delta_parameters / 1e10 + ops)
    assert found.figures.ttft_seconds == pytest.approx(0.5 + 2 * sizes.delta_parameters * 128 / (0.5 * 1e11))
    assert found.pass_seconds > 0 and found.pass_memory_bytes > sizes.bytes_after and found.fits
    assert any("a shared block is read again in each of its loops" in line for line in found.notes)


def test_without_own_parts_a_step_takes_what_it_took() -> None:
    found = predicted({"blocks": 3, "loops": 2, "rank": 0}, profile())
    assert found.figures.tpot_seconds == 0.01
    assert found.slower is False


def test_small_ops_can_make_decode_slower() -> None:
    found = predicted(
        {"blocks": 3, "loops": 2, "rank": 4}, profile(figures=dataclasses.replace(MEASURED, tpot_seconds=1e-3))
    )
    assert found.slower is True


def test_several_plans_are_compared() -> None:
    found = predicted({"rank": 16}, profile())
    assert found.notes[0].startswith(
        "neither blocks and loops nor a target is given: figures are those of blocks=3,loops=2"
    )
    lines = [line for line in found.notes if line.startswith("blocks=")]
    assert [line.partition(":")[0] for line in lines] == ["blocks=3,loops=2,rank=16", "blocks=2,loops=3,rank=16"]
    assert all("FLOP a token for each byte stored" in line and "decode" in line for line in lines)


def test_a_target_is_met_as_predicted() -> None:
    known = profile()
    found = predicted({"target": 0.9, "rank": 2}, known)
    assert found.bits_per_parameter <= 16 * 0.9
    assert found.bits_per_parameter > 16 * 0.7
    with pytest.raises(PassError, match="target=0.1 cannot be met"):
        predicted({"target": 0.1, "rank": 2}, known)


def test_without_measured_times_none_are_predicted() -> None:
    found = predicted({"blocks": 3, "loops": 2, "rank": 4}, profile(figures=Figures()))
    assert found.figures.tpot_seconds is None and found.figures.ttft_seconds is None and found.slower is None
    assert any("holds no measured times" in line for line in found.notes)


def test_later_passes_plan_from_the_looped_model() -> None:
    known = profile()
    item = LoopPass.from_mapping({"blocks": 3, "loops": 2, "rank": 4})
    after = item.shapes_after(known.model)
    assert type(after).__name__ == "LoopedLlamaForCausalLM"
    assert targets.stored(after)[1] == item.plan(profile(figures=Figures())).figures.weight_bytes
    assert type(known.model).__name__ == "LlamaForCausalLM"
