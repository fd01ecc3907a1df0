from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from effcli.reports.model import plain
from profilers.base import DoesNotFitError, ProfileContext, ProfileRequest, ProfilerError
from profilers.intensity import OVERHEAD_BELOW, PROFILER, count, measure_intensity, run
from profilers.meta import meta_model
from profilers.peaks import Peaks, WorkingSetBandwidth
from profilers.timing import Distribution, PhaseTiming
from tests.tiny_models import CONFIGS, build

PEAKS = Peaks(
    device="test",
    copy_bytes_per_second=1e10,
    read_bytes_per_second=2e10,
    memory_bytes_per_second=2e10,
    by_working_set=(WorkingSetBandwidth(1 << 20, 8e10), WorkingSetBandwidth(1 << 30, 2e10)),
    flops_per_second={"float32": 1e11, "bfloat16": 2e11},
    op_overhead_seconds=1e-6,
    seconds_spent=0.0,
)


class FixedTimings:
    """Stands for the clock: each phase takes as long as the test says."""

    def __init__(self, prefill, decode):
        self.prefill, self.decode = prefill, decode

    def measure(self, batch, context):
        def every(seconds):
            return Distribution(seconds, 9 * seconds, 9 * seconds, seconds, seconds, 0.0, 3)

        return PhaseTiming(batch, context, every(self.prefill), every(self.decode), None, "not measured")


def _context(model, *, contexts=None, batches=(1,), peaks=PEAKS, timings=None, config_only=False):
    return ProfileContext(
        model=model,
        config=model.config,
        tokenizer=None,
        device=torch.device("cpu"),
        dtype=model.dtype,
        request=ProfileRequest(batches=batches, contexts=contexts),
        peaks=peaks,
        timings=timings or FixedTimings(1.0, 1.0),
        config_only=config_only,
    )


@pytest.fixture(scope="module")
def llama2():
    """LLaMA-2-7B's public config, counted in 16 bits."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    result = measure_intensity(meta_model(config, torch.bfloat16), contexts=(2048,), peaks=PEAKS)
    return {point.phase: point for point in result.points}


@pytest.mark.parametrize(
    ("phase", "module", "flops", "moved", "intensity"),
    [
        ("prefill", "self_attn.q_proj", 68.72e9, 67.1e6, 1024),
        ("decode", "self_attn.q_proj", 33.55e6, 33.57e6, 1.00),
        ("prefill", "mlp.gate_proj", 184.7e9, 152.0e6, 1214.7),
        ("decode", "mlp.gate_proj", 90.18e6, 90.21e6, 1.00),
    ],
)
def test_llama2_7b_layers_meet_the_published_figures(llama2, phase, module, flops, moved, intensity):
    for layer in (0, 31):
        row = next(m for m in llama2[phase].modules if m.name == f"model.layers.{layer}.{module}")
        assert row.flops == pytest.approx(flops, rel=5e-4)
        assert row.bytes == pytest.approx(moved, rel=6e-4)
        assert row.flops_per_byte == pytest.approx(intensity, rel=5e-4)


def _rotary_flops(point):
    return next(module.flops for module in point.modules if module.name == "model.rotary_emb")


def test_llama2_7b_decode_as_a_whole(llama2):
    point = llama2["decode"]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    attention = 32 * 2 * 2 * 4096 * 2049  # 2,048 tokens of history and the new one
    rotary = _rotary_flops(point)
    assert rotary in (0, 2 * 64)  # one position times the frequencies of half a head, where that is a matrix product
    assert point.flops == 2 * weights + attention + rotary
    assert point.flops_needed == point.flops
    assert point.bytes == pytest.approx(14.31e9, rel=1e-3)
    assert point.flops_per_byte == pytest.approx(0.99, abs=0.01)
    assert point.kv_bytes == 32 * 2 * 4096 * 2 * (2049 + 1)
    assert point.cache_copy_bytes == 32 * 2 * 4096 * 2 * 2048 * 2
    assert any("8-bit" in note and "16-bit: 1" in note and "4-bit: 4" in note for note in point.notes)


def test_llama2_7b_prefill_needs_half_of_the_attention_rectangle(llama2):
    point = llama2["prefill"]
    per_pair = 32 * 32 * 2 * 2 * 128
    assert point.flops - point.flops_needed == per_pair * (2048 * 2047 // 2)


def test_bytes_are_the_sum_of_their_kinds_everywhere(llama2):
    for point in llama2.values():
        assert point.bytes == point.weight_bytes + point.activation_bytes + point.kv_bytes
        root = point.modules[0]
        assert (root.name, root.kind, root.bytes) == ("(model)", "LlamaForCausalLM", point.bytes)
        assert sum(op.bytes for op in point.ops) == sum(op.bytes for op in point.op_classes) == point.bytes
        assert sum(op.flops for op in point.ops) == sum(op.flops for op in point.op_classes) == point.flops
        for row in point.modules:
            assert row.bytes == row.weight_bytes + row.activation_bytes + row.kv_bytes


def test_roofline_of_a_point(llama2):
    for point in llama2.values():
        compute, memory = point.flops / 2e11, point.bytes / 2e10
        assert point.attainable_seconds == max(compute, memory)
        assert point.bound == {"prefill": "compute", "decode": "memory"}[point.phase]
        assert point.time_seconds is None
        assert "no weights" in point.time_reason
        assert point.mfu is None
        assert point.mbu is None
        assert all(op.measured_seconds is None for op in point.ops)


def test_time_mfu_and_mbu():
    model = build("llama")
    point, _ = measure_intensity(model, contexts=(64,), peaks=PEAKS, timings=FixedTimings(0.5, 0.25)).points
    assert point.time_seconds == 0.5
    assert point.time_reason is None
    assert point.mfu == pytest.approx(point.flops / 0.5 / 1e11)
    assert point.bytes < 1 << 30
    assert point.mbu == pytest.approx(point.bytes / 0.5 / 8e10)  # the ceiling of what fits a cache


def test_nothing_passes_a_ceiling_that_was_measured_too_low():
    low = dataclasses.replace(
        PEAKS,
        memory_bytes_per_second=1.0,
        by_working_set=(WorkingSetBandwidth(1, 2.0), WorkingSetBandwidth(1 << 30, 1.0)),
        flops_per_second={"float32": 1.0},
    )
    context = _context(build("llama"), contexts=(64,), peaks=low, timings=FixedTimings(1e-3, 1e-4))
    for point in run(context).points:
        assert 0 < point.mfu <= 1 and 0 < point.mbu <= 1
        assert all(op.attained_fraction <= 1 + 1e-9 for op in (*point.ops, *point.op_classes))
    assert context.peaks.flops_per_second["float32"] > 1e6
    assert context.peaks.memory_bytes_per_second == 1.0  # nothing as large as that ran
    assert len(context.peaks.notes) == 2


@pytest.mark.parametrize("share", [OVERHEAD_BELOW * 0.99, OVERHEAD_BELOW * 1.01])
def test_overhead_bounds_when_the_roofline_explains_too_little_of_the_time(share):
    model = build("llama")
    counted = {p.phase: p for p in measure_intensity(model, contexts=(64,), peaks=PEAKS).points}
    timings = FixedTimings(*(counted[phase].attainable_seconds / share for phase in ("prefill", "decode")))
    for point in measure_intensity(model, contexts=(64,), peaks=PEAKS, timings=timings).points:
        expected = "overhead" if share < OVERHEAD_BELOW else counted[point.phase].bound
        assert point.bound == expected
        assert counted[point.phase].bound in ("compute", "memory")


def test_ops_are_timed_and_set_against_the_bandwidth_of_their_size():
    point, _ = measure_intensity(build("llama"), contexts=(64,), peaks=PEAKS).points
    for rows in (point.ops, point.op_classes):
        assert all(op.measured_seconds > 0 for op in rows)
        assert [op.measured_seconds for op in rows] == sorted((op.measured_seconds for op in rows), reverse=True)
    head = next(op for op in point.ops if op.name == "linear [1x1x32, 97x32]")
    assert head.bytes == (32 + 97 * 32 + 97) * 4
    assert head.attainable_seconds == pytest.approx(max(head.flops / 1e11, head.bytes / 8e10))
    assert head.attained_fraction == pytest.approx(head.attainable_seconds / head.measured_seconds)
    assert head.bytes_per_second == pytest.approx(head.bytes / head.measured_seconds)
    assert head.flops_per_second == pytest.approx(head.flops / head.measured_seconds)


def test_every_batch_and_context_has_both_phases():
    result = measure_intensity(build("qwen3"), batches=(1, 3), contexts=(8, 24))
    assert [(p.phase, p.batch, p.context) for p in result.points] == [
        (phase, batch, context) for batch in (1, 3) for context in (8, 24) for phase in ("prefill", "decode")
    ]
    prefill = {(p.batch, p.context): p for p in result.points if p.phase == "prefill"}
    rotary = _rotary_flops(prefill[1, 8])  # the same for every sequence
    assert prefill[3, 8].flops - rotary == 3 * (prefill[1, 8].flops - rotary)
    assert result.ridge_flops_per_byte is None
    assert result.points[0].bound is None
    assert result.points[0].attainable_seconds is None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_gives_a_result_that_a_report_can_hold(name):
    model = build(name)
    result = run(_context(model, contexts=(24,)))
    plain(result)
    assert result.dtype == "float32"
    assert result.ridge_flops_per_byte == 5.0
    for point in result.points:
        assert point.flops > 0
        assert point.weight_bytes > 0
        assert point.kv_bytes > 0
        assert 0 < point.flops_needed <= point.flops
        assert point.uncounted_ops == ()
        assert all(math.isfinite(row.flops_per_byte) for row in point.modules if row.flops_per_byte is not None)
    has_experts = any(name.endswith(".experts") for name, _ in model.named_modules())
    assert (result.experts is not None) == has_experts
    assert all(any("experts whose weights" in note for note in p.notes) == has_experts for p in result.points)
    recurrent = name in ("mamba", "jamba", "bamba", "qwen3_next")
    assert all(any("recurrent" in note for note in p.notes) == recurrent for p in result.points)


def test_default_contexts():
    assert {p.context for p in run(_context(build("llama"))).points} == {512}
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 300
    meta = meta_model(config, torch.bfloat16)
    assert {p.context for p in run(_context(meta, config_only=True)).points} == {300}
    config.max_position_embeddings = 4096
    result = run(_context(meta, config_only=True))
    assert {p.context for p in result.points} == {2048}
    assert result.dtype == "bfloat16"


def test_how_experts_were_counted_is_said():
    model = meta_model(CONFIGS["mixtral"](), torch.float32)
    assert "expected" in measure_intensity(model, contexts=(8,)).experts
    assert "really used" in measure_intensity(build("mixtral"), contexts=(8,)).experts


def test_a_full_context_decodes_its_last_position_and_says_so():
    _, point = measure_intensity(build("gpt2"), contexts=(1024,)).points
    assert any("after 1023 tokens" in note for note in point.notes)


def test_count_takes_a_config_or_a_model():
    config = CONFIGS["llama"]()
    from_config = count(config, "decode", 2, 16, dtype=torch.float32)
    assert from_config.total == count(build("llama"), "decode", 2, 16).total
    half = count(config, "decode", 2, 16)
    assert half.total.kv_bytes * 2 == from_config.total.kv_bytes


def test_bad_requests_name_the_value_and_the_limit():
    with pytest.raises(ProfilerError, match="context 1025 is past the model's limit of 1024"):
        run(_context(build("llama"), contexts=(16, 1025)))
    for model in (build("llama"), meta_model(CONFIGS["llama"](), torch.float32)):
        with pytest.raises(ProfilerError, match="batch 0"):
            measure_intensity(model, batches=(0,), contexts=(16,))
    with pytest.raises(DoesNotFitError, match="--batch"):
        measure_intensity(build("llama"), batches=(1 << 40,), contexts=(16,))
    with pytest.raises(ProfilerError, match="no phase named 'training'"):
        count(CONFIGS["llama"](), "training", 1, 16)


def test_profiler_announces_itself():
    assert (PROFILER.name, PROFILER.run, PROFILER.needs_weights) == ("intensity", run, False)


_405B = """
import resource, time, torch
from transformers import LlamaConfig
from profilers.intensity import measure_intensity
from profilers.meta import meta_model
config = LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                     num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)
model = meta_model(config, torch.bfloat16)
prefill, decode = measure_intensity(model, contexts=(2048,)).points
assert sum(p.numel() for p in model.parameters()) == 405_853_388_800
assert 0.9 < decode.flops_per_byte < 1.1, decode.flops_per_byte
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux's unit")
def test_405b_parameters_from_the_config_fit_in_2_gb_and_20_seconds():
    done = subprocess.run([sys.executable, "-c", _405B], capture_output=True, text=True, timeout=300, check=True)
    kibibytes, processor_seconds = map(float, done.stdout.split())
    assert kibibytes * 1024 < 2e9
    assert processor_seconds < 20  # imports included; the clock on the wall is the benchmark's matter
