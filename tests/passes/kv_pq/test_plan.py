"""Predictions against closed forms, against what a cache then holds, and against the figures that they start from."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from passes.base import Figures, ModelProfile, PassError
from passes.kv_pq import KVPQPass, plan, step_times
from passes.kv_pq.cache import PQCache
from passes.kv_pq.step_times import StepShape, StepTimes, time_step
from profilers.cache_contents import cache_bytes
from profilers.meta import meta_model
from profilers.peaks import Peaks, WorkingSetBandwidth
from tests.passes.kv_pq.small import random_codebooks
from tests.tiny_models import CONFIGS, build

CPU = torch.device("cpu")
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
    weight_bytes=10**5, kv_bytes_per_token=128.0, ttft_seconds=0.5, tpot_seconds=0.01, peak_memory_bytes=10**9
)
TIMES = StepTimes(plain_seconds=0.002, coded_seconds=0.0005)


def profile(name: str = "llama", figures: Figures = MEASURED, **changes: Any) -> ModelProfile:
    known = ModelProfile(
        model=meta_model(CONFIGS[name](), torch.bfloat16),
        dtype=torch.bfloat16,
        device=CPU,
        peaks=PEAKS,
        batch=1,
        context=512,
        figures=figures,
        report={"profiles": {}},
    )
    return dataclasses.replace(known, **changes)


@pytest.fixture(autouse=True)
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "time_step", lambda *args: TIMES)


def predicted(values: dict[str, Any], known: ModelProfile) -> Any:
    return KVPQPass.from_mapping(values).plan(known)


def test_bytes_a_token_are_the_budget_of_the_compressed_layers() -> None:
    # llama: 2 layers x keys and values x 2 heads, 8 channels each: 4.25 bits are 4 whole codes
    assert predicted({"bits": 4}, profile()).figures.kv_bytes_per_token == 8 * 4
    assert predicted({"bits": 2, "gains": False, "allocation": "even"}, profile()).figures.kv_bytes_per_token == 16
    # gemma3: 2 of 4 layers; the others keep a window, whose bytes do not grow
    assert predicted({"bits": 4}, profile("gemma3")).figures.kv_bytes_per_token == 8 * 4


def test_the_step_changes_by_what_attention_was_timed_to() -> None:
    found = predicted({}, profile())
    assert found.figures.tpot_seconds == pytest.approx(0.01 - 2 * 0.002 + 2 * 0.0005)
    assert found.slower is False
    # 1,024 positions: no other context is planned for
    assert sum(note.startswith("context ") for note in found.notes) == 1


def test_longer_contexts_have_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(shape: StepShape, context: int, *rest: Any) -> StepTimes:
        asked.append(context)
        return StepTimes(plain_seconds=context * 1e-6, coded_seconds=context * 2e-6)

    monkeypatch.setattr(step_times, "time_step", timed)
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 10_000
    found = predicted({"recent": 64}, profile(model=meta_model(config, torch.bfloat16)))
    assert asked == [512, 2048, 8192]
    lines = [note for note in found.notes if note.startswith("context ")]
    # 128 bytes a token in bfloat16; after: 68 tokens as they are, the others at 32 bytes
    after = 68 * 128 + (8192 - 68) * 32
    assert lines[2].startswith(f"context 8,192: KV cache {8192 * 128 / 1e6:.3g} MB -> {after / 1e6:.3g} MB")
    # 10 ms at 512; two layers of attention grow by 1 us a token
    now = 10 + 2 * (8192 - 512) * 1e-3
    assert f"a step takes {now:.3g} ms -> {now + 2 * 8.192:.3g} ms" in lines[2]
    assert found.slower is True
    assert any("slower on this device at context 512" in note for note in found.notes)


def test_a_context_whose_buffers_do_not_fit_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from profilers import device

    monkeypatch.setattr(device, "memory_available_bytes", lambda _: 10**5)
    found = predicted({}, profile())
    assert found.figures.tpot_seconds is None
    assert found.slower is None
    assert found.fits is False
    assert any("attention not timed: its buffers need" in note for note in found.notes)


def test_without_measured_times_none_are_predicted() -> None:
    found = predicted({}, profile(figures=Figures(weight_bytes=10**5)))
    assert (found.figures.tpot_seconds, found.figures.ttft_seconds, found.figures.peak_memory_bytes) == (None,) * 3
    assert found.figures.kv_bytes_per_token is not None
    assert any("holds no measured times" in note for note in found.notes)


def test_prefill_pays_for_encoding_and_memory_for_codebooks() -> None:
    found = predicted({}, profile())
    flops = 2 * 256 * 64 * 512  # a multiply-add for each value and centroid
    assert found.figures.ttft_seconds == pytest.approx(0.5 + flops / (0.5 * 5e10))
    held = 132 * 128 + (512 - 132) * 32
    codebooks = 64 * 256 * 4
    assert found.figures.peak_memory_bytes == 10**9 + held - 512 * 128 + codebooks


def test_what_is_planned_is_near_what_a_cache_holds() -> None:
    model = build("llama", dtype=torch.bfloat16)
    item = KVPQPass.from_mapping({"bits": 8, "gains": False, "allocation": "even", "recent": 64})
    books = random_codebooks(model, parts=8, kept=4, recent=64)  # a code for each of 8 channels
    cache = PQCache(model.config, books)
    with torch.no_grad():
        model(torch.full((1, 1000), 5), past_key_values=cache, use_cache=True)
    planned = plan.stored(item.parameters, item._targets(model), 2)
    assert cache_bytes(cache) == pytest.approx(planned.after(1000), rel=0.03)
    assert planned.before(1000) == 1000 * 128
    centroids = sum(side.centroids.nbytes for layer in books.layers.values() for side in (layer.keys, layer.values))
    assert plan.codebook_bytes(item._targets(model)) == centroids


def test_a_model_that_does_not_suit_is_refused_with_its_reason() -> None:
    with pytest.raises(PassError, match="interface"):
        predicted({}, profile("falcon"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_attentions_are_really_run(dtype: torch.dtype) -> None:
    shape = StepShape(batch=2, query_heads=4, kv_heads=2, head_dim=8, codes=4, kept=4, recent=16, gains=True, rope=True)
    config = CONFIGS["llama"]()
    before = config._attn_implementation
    found = time_step(shape, 300, config, CPU, dtype)
    assert 0 < found.plain_seconds < 1
    assert 0 < found.coded_seconds < 1
    assert config._attn_implementation == before
