"""Reports to render, built from the very dataclasses that the instruments return, so that they cannot drift apart."""

from __future__ import annotations

import math
from dataclasses import replace

from effcli.reports.model import PROFILE_SCHEMA, Environment, ModelInfo, ProfileReport
from profilers.energy import EnergyResult
from profilers.intensity import IntensityPoint, IntensityResult, ModuleIntensity, OpIntensity
from profilers.kv_cache import KVLayer, KVPoint, KVResult
from profilers.latency import LatencyPoint, LatencyResult
from profilers.outliers import OutlierRow, OutliersResult
from profilers.peaks import Peaks, WorkingSetBandwidth
from profilers.redundancy import LayerRedundancy, RedundancyResult, TiedGroup
from profilers.sinks import MassiveActivation, PerturbationSpread, SinkPoint, SinkPosition, SinksResult
from profilers.timing import Distribution

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 30, 9, 3, 64, 576
WEIGHTS = 269_030_016
BYTES_PER_TOKEN = 23_040
MEMORY_PEAK, COMPUTE_PEAK = 19.2e9, 1.2e12
NO_NVML = "NVML does not answer: no NVIDIA driver on this machine"


def peaks() -> Peaks:
    return Peaks(
        device="Example CPU",
        copy_bytes_per_second=17.5e9,
        read_bytes_per_second=MEMORY_PEAK,
        memory_bytes_per_second=MEMORY_PEAK,
        by_working_set=(WorkingSetBandwidth(1 << 20, 80e9), WorkingSetBandwidth(1 << 30, MEMORY_PEAK)),
        flops_per_second={"bfloat16": COMPUTE_PEAK, "float32": 0.31e12},
        op_overhead_seconds=1.4e-6,
        seconds_spent=2.5,
    )


def op(name: str, calls: int, flops: int, bytes_: int, best: float, measured: float | None) -> OpIntensity:
    return OpIntensity(
        name=name,
        calls=calls,
        flops=flops,
        bytes=bytes_,
        flops_per_byte=flops / bytes_ if bytes_ else None,
        attainable_seconds=best,
        measured_seconds=measured,
        flops_per_second=None if measured is None else flops / measured,
        bytes_per_second=None if measured is None else bytes_ / measured,
        attained_fraction=None if measured is None else best / measured,
        bound="compute" if flops / COMPUTE_PEAK > bytes_ / MEMORY_PEAK else "memory",
    )


def modules(tokens: int) -> tuple[ModuleIntensity, ...]:
    """A small tree: the whole, its layers, and in each an attention with its own work and an MLP."""
    found: list[ModuleIntensity] = []

    def add(name: str, kind: str, flops: int, bytes_: int) -> None:
        found.append(ModuleIntensity(name, kind, flops, bytes_, flops / bytes_, bytes_, 0, 0))

    q, mlp, own = 2 * tokens * HIDDEN * HIDDEN, 2 * tokens * HIDDEN * 1536 * 3, 4 * tokens * 512 * HIDDEN
    for layer in range(LAYERS):
        base = f"model.layers.{layer}"
        add(f"{base}.self_attn.q_proj", "Linear", q, 2 * HIDDEN * HIDDEN)
        add(f"{base}.self_attn", "LlamaAttention", q + own, 2 * HIDDEN * HIDDEN + 512 * 768)
        add(f"{base}.mlp", "LlamaMLP", mlp, 2 * HIDDEN * 1536 * 3)
    head = 2 * tokens * HIDDEN * 49152
    add("lm_head", "Linear", head, 2 * HIDDEN * 49152)
    add("", "LlamaForCausalLM", (q + own + mlp) * LAYERS + head, WEIGHTS)
    return tuple(found)


def intensity_point(phase: str, context: int, *, batch: int = 1, timed: bool = True) -> IntensityPoint:
    tokens = batch * (context if phase == "prefill" else 1)
    flops = 2 * 134_515_008 * tokens + 4 * tokens * context * HIDDEN * LAYERS
    weights, kv, activations = WEIGHTS, BYTES_PER_TOKEN * context * batch, 18_000 * tokens
    bytes_ = weights + kv + activations
    best = max(flops / COMPUTE_PEAK, bytes_ / MEMORY_PEAK)
    time = best / (0.41 if phase == "prefill" else 0.3835)
    classes = (("linear", 0.7), ("attention", 0.2), ("normalization", 0.06), ("copy", 0.04))
    return IntensityPoint(
        phase=phase,
        batch=batch,
        context=context,
        flops=flops,
        flops_needed=flops - (2 * tokens * context * HIDDEN * LAYERS if phase == "prefill" else 0),
        bytes=bytes_,
        weight_bytes=weights,
        activation_bytes=activations,
        kv_bytes=kv,
        cache_copy_bytes=47_000_000 if phase == "decode" else 0,
        flops_per_byte=flops / bytes_,
        time_seconds=time if timed else None,
        time_reason=None if timed else "counted from the config alone; nothing was run",
        attainable_seconds=best,
        bound="compute" if phase == "prefill" else "memory",
        mfu=flops / time / COMPUTE_PEAK if timed else None,
        mbu=bytes_ / time / MEMORY_PEAK if timed else None,
        modules=modules(tokens),
        op_classes=tuple(
            op(name, 30, int(flops * share), int(bytes_ * share), best * share, time * share if timed else None)
            for name, share in classes
        ),
        ops=(op("aten.mm", 211, flops, bytes_, best, time if timed else None),),
        uncounted_ops=("aten.cumsum",) if phase == "prefill" else (),
        notes=(),
    )


def intensity(*, timed: bool = True) -> IntensityResult:
    return IntensityResult(
        dtype="bfloat16",
        peak_flops_per_second=COMPUTE_PEAK,
        peak_bytes_per_second=MEMORY_PEAK,
        ridge_flops_per_byte=COMPUTE_PEAK / MEMORY_PEAK,
        experts=None,
        points=(
            *(intensity_point(phase, 512, timed=timed) for phase in ("prefill", "decode")),
            intensity_point("prefill", 2048, timed=timed),
            # What is widest in a table: the longest word and the smallest share.
            replace(intensity_point("decode", 2048, timed=timed), bound="overhead", mfu=0.0003 if timed else None),
        ),
    )


def alpha(strength: float) -> tuple[tuple[float, ...], ...]:
    """A pattern like a trained model's: little in the first layers, then most heads, some never."""
    return tuple(
        tuple(
            min(
                1.0,
                strength * (0.05 if layer < 2 else 0.9 + 0.1 * math.sin(3 * head)) * (0.2 if head % 4 == 1 else 1.0),
            )
            for head in range(HEADS)
        )
        for layer in range(LAYERS)
    )


def sinks() -> SinksResult:
    points = tuple(
        SinkPoint(
            context=64,
            bos=bos,
            sequences=100,
            sink_rate=rate,
            sink_rate_by_epsilon={"0.3": rate, "0.8": rate / 2},
            alpha=alpha(strength),
            positions=(SinkPosition(1, 0.55, rate), SinkPosition(9, 0.04, 0.01)),
            positions_reason=None,
            value_norm_ratio=tuple(0.2 + 0.01 * layer for layer in range(LAYERS)),
            uniform_alpha=0.0741,
        )
        for bos, rate, strength in ((False, 0.62, 0.7), (True, 0.71, 0.85))
    )
    return SinksResult(
        epsilon=0.3,
        epsilons=(0.3, 0.8),
        sequences=100,
        text="Python language reference (pydoc_data.topics)",
        points=points,
        bos_reason=None,
        not_applicable={},
        massive_activations=tuple(
            MassiveActivation(layer, 1, "<|im_start|>", 124, -2190.5 - layer, 5400.0, True) for layer in (3, 5, 6, 7)
        ),
        massive_activation_count=12,
        perturbation=(
            PerturbationSpread(False, 64, 2, 8, ((0.1, 0.2), (0.2, 0.4)), tuple(0.02 * (1 + n) for n in range(LAYERS))),
        ),
    )


def kv() -> KVResult:
    free = 8_000_000_000
    room = free - WEIGHTS
    return KVResult(
        dtype="bfloat16",
        attention="GQA",
        bytes_per_token=float(BYTES_PER_TOKEN),
        fixed_bytes=0,
        bytes_per_token_growing=float(BYTES_PER_TOKEN),
        latent_bytes_per_token=None,
        latent_reason=None,
        cross_attention_bytes_per_token=None,
        layers=tuple(
            KVLayer(layer, "full", "DynamicLayer", 768.0, 0, None, 768.0, 0, KV_HEADS) for layer in range(LAYERS)
        ),
        points=tuple(
            KVPoint(
                batch=1,
                context=context,
                predicted_bytes=BYTES_PER_TOKEN * context,
                measured_bytes=BYTES_PER_TOKEN * context,
                measured_reason=None,
                difference_bytes=0,
                allocator_bytes=None,
                allocator_reason="only CUDA's allocator reports what it holds",
                predicted_prefill_bytes=BYTES_PER_TOKEN * (context - 1),
                measured_prefill_bytes=BYTES_PER_TOKEN * (context - 1),
            )
            for context in (512, 2048)
        ),
        weight_bytes=WEIGHTS,
        memory_bytes=free,
        memory_reason=None,
        workspace_bytes=1_500_000,
        model_context_limit=8192,
        max_context={bits: room * 16 // (BYTES_PER_TOKEN * int(bits)) for bits in ("16", "8", "4")},
        max_batch={
            bits: {"512": room * 16 // (BYTES_PER_TOKEN * int(bits) * 512), "8192": 40} for bits in ("16", "8", "4")
        },
        crossover_context=-(-WEIGHTS // BYTES_PER_TOKEN),
    )


def distribution(p50: float) -> Distribution:
    return Distribution(
        p50=p50, p90=p50 * 1.1, p99=p50 * 1.3, mean=p50 * 1.02, minimum=p50 * 0.97, relative_spread=0.12, samples=20
    )


def latency() -> LatencyResult:
    prefill, decode = intensity_point("prefill", 512), intensity_point("decode", 512)
    assert prefill.time_seconds is not None and decode.time_seconds is not None
    point = LatencyPoint(
        batch=1,
        context=512,
        ttft_seconds=distribution(prefill.time_seconds),
        tpot_seconds=distribution(decode.time_seconds),
        tokens_per_second=1 / decode.time_seconds,
        prefill_tokens_per_second=512 / prefill.time_seconds,
        peak_memory_bytes=None,
        peak_memory_reason="no allocator statistics on cpu",
        warnings=("TPOT spread of 12 %: another process may be running",),
    )
    return LatencyResult(points=(point,), load_seconds=1.9, threads=2, attention_implementation="sdpa")


def no_energy() -> EnergyResult:
    return EnergyResult(
        joules_per_token=None,
        average_power_watts=None,
        power_limit_watts=None,
        sm_clock_hertz=None,
        memory_clock_hertz=None,
        temperature_celsius=None,
        throttle_reasons=None,
        tokens=None,
        seconds=None,
        reason=NO_NVML,
    )


def outliers() -> OutliersResult:
    rows = tuple(
        OutlierRow(
            kind, f"model.layers.{layer}.{kind}", layer, 12.0 + 40 * layer, 3.0 + layer, 2.9, 2.2, suits, 0.031, 0.12
        )
        for layer in range(3)
        for kind, suits in (("key", "per-channel"), ("value", "per-token"))
    )
    return OutliersResult(
        bits=4, tokens=2048, text="Python language reference", rows=rows, notes=("3 embeddings left out",)
    )


def redundancy() -> RedundancyResult:
    """Six layers of two kinds; the middle ones are cheap."""
    skips = (8.62, 0.62, 0.17, 0.153, 0.31, 3.24)

    def layer(index: int) -> LayerRedundancy:
        damage = skips[index]
        kind, reason = (1, "not the weight of a linear layer: experts (4×8×8)") if index == 5 else (0, None)
        return LayerRedundancy(
            index, kind, 0.97 - 0.01 * index, 0.08, damage, (0.9 * damage, 1.1 * damage), None, reason
        )

    def group(first: int, size: int) -> TiedGroup:
        damage = size * 0.2 + abs(first - 2) * 0.5
        return TiedGroup(tuple(range(first, first + size)), damage, (0.8 * damage, 1.2 * damage), None)

    return RedundancyResult(
        text="Python language reference",
        context=128,
        similarity_tokens=1024,
        cka_tokens=1016,
        damage_tokens=381,
        tie_weights="average",
        confidence=0.95,
        kinds=("DecoderLayer, q_proj 8×8", "DecoderLayer, router 4×8"),
        layers=tuple(layer(index) for index in range(6)),
        block_angular_distances=tuple(tuple(0.1 * size for _ in range(7 - size)) for size in range(1, 7)),
        cka=tuple(tuple(1 - abs(i - j) / 6 for j in range(6)) for i in range(6)),
        cka_reason=None,
        groups=tuple(group(first, size) for size in (2, 3, 4) for first in range(6 - size)),
        notes=("groups of 5 layers were not tied",),
    )


def unknown_redundancy(reason: str) -> RedundancyResult:
    """Nothing is known, for this reason."""
    known = redundancy()
    nothing = {"skip_kl_nats_per_token": None, "skip_kl_interval": None, "skip_reason": reason}
    return replace(
        known,
        text=reason,
        kinds=(reason, reason),
        layers=tuple(
            replace(
                layer,
                input_output_cosine=None,
                input_output_angular_distance=None,
                unshareable_reason=reason,
                **nothing,
            )
            for layer in known.layers
        ),
        block_angular_distances=tuple((None,) * (7 - size) for size in range(1, 7)),
        cka=(),
        cka_reason=reason,
        groups=tuple(replace(group, kl_nats_per_token=None, kl_interval=None, reason=reason) for group in known.groups),
        notes=(reason,),
    )


def redundant() -> ProfileReport:
    """What ``--only redundancy`` gives."""
    return replace(full(), profiles={"redundancy": redundancy()})


def model_info() -> ModelInfo:
    return ModelInfo(
        source="smollm2-135m",
        kind="builtin",
        architecture="LlamaForCausalLM",
        model_type="llama",
        parameters=134_515_008,
        weight_bytes=WEIGHTS,
        dtype="bfloat16",
        dtype_reason="the CPU multiplies bfloat16 natively",
        layers=LAYERS,
        hidden_size=HIDDEN,
        attention_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        context_limit=8192,
        revision=None,
        fingerprint="9c1f" * 16,
        load_seconds=1.9,
        notes=(),
    )


def environment() -> Environment:
    return Environment(
        device="cpu",
        device_name="Example CPU",
        device_reason="no CUDA device",
        threads=2,
        memory_total_bytes=25_325_260_800,
        memory_available_bytes=8_000_000_000,
        peaks=peaks(),
        peaks_reason=None,
        versions={"effcli": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.17.0", "python": "3.11.9"},
        platform="Linux-6.1-x86_64",
    )


def full() -> ProfileReport:
    """Everything measured, as on a CPU (no energy)."""
    return ProfileReport(
        schema=PROFILE_SCHEMA,
        created="2026-01-02T03:04:05Z",
        command="effcli profile smollm2-135m",
        seconds_spent=48.2,
        config_only=False,
        model=model_info(),
        environment=environment(),
        profiles={
            "intensity": intensity(),
            "sinks": sinks(),
            "kv": kv(),
            "latency": latency(),
            "energy": no_energy(),
            "outliers": outliers(),
        },
        skipped={},
        warnings=(),
    )


def config_only() -> ProfileReport:
    """Counted on the meta device: no time, no sinks, no device memory figures beyond the peaks."""
    return replace(
        full(),
        config_only=True,
        profiles={"intensity": intensity(timed=False), "kv": kv()},
        skipped={"sinks": "needs weights (--config-only)"},
    )


def bare() -> ProfileReport:
    """The least a report holds: no peaks, unknown shapes, and the figures that may be missing all missing."""
    point = replace(
        intensity_point("decode", 512, timed=False),
        attainable_seconds=None,
        bound=None,
        op_classes=(),
        ops=(),
        modules=(),
    )
    counted = replace(
        intensity(timed=False),
        peak_flops_per_second=None,
        peak_bytes_per_second=None,
        ridge_flops_per_byte=None,
        points=(point,),
    )
    shapeless = replace(
        model_info(),
        layers=None,
        hidden_size=None,
        attention_heads=None,
        kv_heads=None,
        head_dim=None,
        context_limit=None,
        fingerprint=None,
        load_seconds=None,
    )
    unknown_kv = replace(
        kv(),
        layers=(),
        memory_bytes=None,
        memory_reason="the device's memory is not known",
        model_context_limit=None,
        max_context={"16": None, "8": None, "4": None},
        max_batch={"16": {"512": None}, "8": {"512": None}, "4": {"512": None}},
        crossover_context=None,
        points=(replace(kv().points[0], measured_bytes=None, measured_reason="not run", difference_bytes=None),),
    )
    no_sinks = replace(
        sinks(),
        points=(
            replace(
                sinks().points[0],
                sink_rate=None,
                sink_rate_by_epsilon={},
                alpha=(None,) * LAYERS,
                positions=(),
                positions_reason="no softmax attention",
                value_norm_ratio=(None,) * LAYERS,
            ),
        ),
        bos_reason="the tokenizer has no BOS token",
        not_applicable={str(layer): "state-space layer" for layer in range(LAYERS)},
        massive_activations=(),
        massive_activation_count=0,
        perturbation=(),
    )
    return replace(
        full(),
        model=shapeless,
        environment=replace(
            environment(),
            peaks=None,
            peaks_reason="not measured with --no-peaks",
            threads=None,
            memory_total_bytes=None,
            memory_available_bytes=None,
        ),
        profiles={
            "intensity": counted,
            "kv": unknown_kv,
            "sinks": no_sinks,
            "energy": no_energy(),
            "outliers": replace(outliers(), rows=()),
            "redundancy": unknown_redundancy("not measured"),
        },
        skipped={"latency": "needs weights"},
        warnings=("the machine was busy",),
    )


HOSTILE = "</script><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>|`*[bold red]\x1b[31m\n"


def hostile() -> ProfileReport:
    """Names and reasons that try to leave their place in every rendering, and a profiler nobody knows."""
    return replace(
        full(),
        command=HOSTILE,
        model=replace(model_info(), source=HOSTILE, architecture=HOSTILE, notes=(HOSTILE,)),
        environment=replace(environment(), device_name=HOSTILE, versions={HOSTILE: HOSTILE}),
        profiles={
            **full().profiles,
            "sinks": replace(sinks(), text=HOSTILE),
            "redundancy": unknown_redundancy(HOSTILE),
            "third_party": {
                HOSTILE: HOSTILE,
                "score": 0.25,
                "rows": [{"name": HOSTILE, "seconds": 3}],
                "nested": {"a": [1]},
            },
        },
        skipped={"other": HOSTILE},
        warnings=(HOSTILE,),
    )
