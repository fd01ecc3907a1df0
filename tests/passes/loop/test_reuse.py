"""Whether blocks stay in a cache: what is timed, what it is compared with, and what may be claimed from it."""

from __future__ import annotations

import dataclasses
import random
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.base import MeasureContext
from passes.loop import reuse, runtime
from passes.loop.layout import LoopPlan
from passes.loop.reuse import Copies, Group, Reuse
from profilers.intensity import count
from profilers.intervals import median_interval
from profilers.peaks import Peaks, WorkingSetBandwidth

from .small import applied, build, ids

BANDWIDTH = 1e9


def looped(folder: Path, name: str = "llama6", **values: Any) -> tuple[Any, LoopPlan]:
    values = {"blocks": 2, "loops": 2, "keep_first": 1, "keep_last": 1} | values
    _, model, _ = applied(folder, name, **values)
    return model, LoopPlan.from_json(model.config.loop)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoopPlan]:
    return looped(tmp_path_factory.mktemp("looped"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found


@pytest.mark.parametrize("sets", ["one", "own"])
def test_both_ways_to_run_give_the_model_s_own_logits_and_leave_it_as_it_was(made: Any, sets: Any) -> None:
    model, plan = made
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    copies = Copies(model, plan)
    with copies.running(sets) as book:
        assert torch.equal(logits(model), expected)
        timed = book.take()
    assert sorted(timed) == list(range(6))
    assert [name for name, _ in model.named_modules()] == names
    # Spoil every copy: a model that still ran with one would show it.
    for linear in copies._copies.values():
        linear.get_parameter("weight").data.zero_()
    assert torch.equal(logits(model), expected)


def test_one_set_runs_a_block_s_layers_with_one_tensor_and_own_sets_with_one_each(made: Any) -> None:
    model, plan = made
    copies = Copies(model, plan)
    for sets, different in (("one", 1), ("own", 2)):
        with copies.running(sets):  # type: ignore[arg-type]
            for block in plan.blocks:
                used = {copies.linear(index, "mlp.up_proj").shared.linear.weight.data_ptr() for index in block.layers}
                assert len(used) == different
                assert model.model.looped_blocks[0].mlp.up_proj.weight.data_ptr() not in used


def test_the_model_is_whole_again_after_an_error(made: Any) -> None:
    model, plan = made
    copies = Copies(model, plan)
    with pytest.raises(RuntimeError, match="stop"), copies.running("own"):
        raise RuntimeError("stop")
    assert not any(isinstance(module, reuse._TimedLinear) for module in model.modules())
    assert all(copies.linear(1, name).shared is model.get_submodule(f"model.looped_blocks.0.{name}")
               for name in plan.blocks[0].ranks)  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3"])
def test_measuring_counts_bytes_by_hand(name: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"pattern": "cycle"} if name == "gemma3" else {}  # its kinds alternate
    model, plan = looped(tmp_path, name, blocks=2, loops=2, keep_first=0, keep_last=0, **values)
    found = reuse.measure(model, plan, batch=2, context=16, bandwidth_bytes_per_second=BANDWIDTH, clock=_clock(0.2))
    layer = sum(
        parameter.numel()
        for path, parameter in build(name).get_submodule(plan.stack)[0].named_parameters()
        if path.removesuffix(".weight") in plan.blocks[0].ranks
    )
    assert found.largest_block_bytes == 4 * layer
    assert (found.first.layers, found.later.layers, found.looped.layers) == (2, 2, 4)
    assert found.looped.read_bytes == 4 * 4 * layer == found.step.read_bytes
    assert found.alone is None
    assert found.step.interval is not None
    assert found.step.interval[0] <= found.step.ratio <= found.step.interval[1]


def test_rounds_end_by_time_or_by_count(made: Any) -> None:
    model, plan = made
    settings: dict[str, Any] = {"batch": 1, "context": 8, "bandwidth_bytes_per_second": BANDWIDTH}
    # Each reading of this clock is later by a step: four readings and the last one make a round.
    slow = reuse.measure(model, plan, clock=_clock(1.0), **settings)
    assert reuse.FEWEST_ROUNDS > slow.rounds >= 1
    assert slow.verdict[0] == "not known" and "too few" in slow.verdict[1]
    quick = reuse.measure(model, plan, clock=_clock(1e-6), **settings)
    assert quick.rounds == reuse.MOST_ROUNDS
    assert quick.context == (8 + 2 * reuse.WARM_UP_ROUNDS, 8 + 2 * (reuse.WARM_UP_ROUNDS + reuse.MOST_ROUNDS) - 1)


def _clock(step: float) -> Any:
    now = 0.0

    def read() -> float:
        nonlocal now
        now += step
        return now

    return read


def group(ratio: float, low: float, high: float, *, read: int = 10**9, seconds: float = 1.0) -> Group:
    return Group("linears", 4, read, ratio * seconds, seconds, ratio, (low, high))


def found(looped: Group) -> Reuse:
    return Reuse(1, (512, 600), 9, looped, looped, looped, None, looped, 10**6, None, BANDWIDTH)


@pytest.mark.parametrize(
    ("ratio", "verdict", "why"),
    [
        (group(0.80, 0.78, 0.83), "less", ""),
        (group(0.80, 0.78, 1.01), "not known", "noise"),
        (group(0.98, 0.975, 0.985), "same", ""),  # clear of 1, but not by more than a timing can be trusted
        (group(1.00, 0.98, 1.02), "same", ""),
        (group(1.00, 0.90, 1.10), "not known", "noise"),
        (group(1.20, 1.10, 1.30), "not known", "noise"),
        (group(1.00, 0.98, 1.02, read=10**8), "not known", "explains 10%"),
        (group(0.80, 0.78, 0.83, read=10**8), "less", ""),
        (dataclasses.replace(group(0.5, 0, 0), interval=None), "not known", "too few"),
    ],
)
def test_what_is_claimed_from_a_ratio(ratio: Group, verdict: str, why: str) -> None:
    said, reason = found(ratio).verdict
    assert said == verdict
    assert why in reason
    assert bool(reason) == (verdict == "not known")


def test_what_memory_can_deliver_bounds_what_came_from_it() -> None:
    assert found(group(0.5, 0.4, 0.6)).from_memory_bytes(group(0.5, 0.4, 0.6)) == 0.5e9
    slow = group(0.9, 0.8, 1.0, seconds=3.0)
    assert found(slow).from_memory_bytes(slow) == 1e9  # never more than was read


def test_too_little_memory_is_said_in_place_of_a_verdict(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = made
    needed = sum(
        len(block.layers) * parameter.nbytes
        for number, block in enumerate(plan.blocks)
        for parameter in model.model.looped_blocks[number].parameters()
    )
    assert reuse.bytes_of_copies(model, plan) == needed
    assert reuse.why_not(model, plan) is None
    monkeypatch.setattr(reuse, "memory_available_bytes", lambda device: needed)
    measured = runtime.measure(model, context(model))
    assert "whether less is moved is not known" in measured.summary
    assert "own copies" in measured.summary
    assert [table.title for table in measured.tables] == ["FLOP beside bytes"]


def test_the_tables_hold_what_the_profiles_counted(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = made
    monkeypatch.setattr(reuse, "ROUND_SECONDS", 0.0)
    point = context(model)
    measured = runtime.measure(model, point)
    counted, timed = measured.tables
    cells = {row[0]: row[1:] for row in counted.rows}
    after = count(model, "decode", 1, 16).total
    stored = point.after["model"]["weight_bytes"]
    assert cells["FLOP a token"][1] == after.flops
    assert cells["FLOP a token / byte stored"][1] == after.flops / stored
    assert cells["FLOP / byte touched"] == (None, after.flops / after.bytes)  # before has no such point
    assert [row[1] for row in timed.rows] == [2, 2, 4, 2, 6]
    assert all(len(row) == len(timed.columns) for row in timed.rows)
    assert measured.details["reuse"]["rounds"] == reuse.FEWEST_ROUNDS
    assert any("as the system states it" in note or "does not say" in note for note in measured.notes)


def context(model: Any) -> MeasureContext:
    stored = sum(parameter.nbytes for parameter in model.parameters())
    total = count(model, "decode", 1, 16).total
    point = {
        "phase": "decode", "batch": 1, "context": 16, "flops": total.flops, "bytes": total.bytes,
        "flops_per_byte": total.flops / total.bytes,
    }  # fmt: skip
    report = {"model": {"weight_bytes": stored}, "environment": {"device": "cpu"}, "profiles": {"intensity": None}}
    peaks = Peaks("device", BANDWIDTH, BANDWIDTH, BANDWIDTH, (WorkingSetBandwidth(1, BANDWIDTH),), {}, 1e-6, 0.0)
    return MeasureContext(report, report | {"profiles": {"intensity": {"points": [point]}}}, peaks, 1, 16)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, None)
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, (1.0, 6.0))
    assert (
        1 - 2 * sum(comb(20, i) for i in range(6)) / 2**20 >= 0.95 > 1 - 2 * sum(comb(20, i) for i in range(7)) / 2**20
    )
    assert median_interval([float(i) for i in range(20)])[1] == (5.0, 14.0)
    generator = random.Random(0)
    held = 0
    for _ in range(1000):
        _, interval = median_interval([generator.expovariate(1.0) for _ in range(15)])
        assert interval is not None
        held += interval[0] <= 0.6931471805599453 <= interval[1]
    assert 0.95 <= held / 1000 <= 0.99
