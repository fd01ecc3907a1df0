"""Optimize and plan reports to render, built from the dataclasses that the pipeline, the plan and the passes return."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from effcli.recipes import from_mapping
from effcli.reports.model import ProfileReport
from effcli.reports.optimize_model import (
    OPTIMIZE_SCHEMA,
    PLAN_SCHEMA,
    AuditedClass,
    CompiledDecode,
    GateResult,
    KernelAgreement,
    OnnxResult,
    OptimizeReport,
    PlannedPass,
    PlanReport,
    Predicted,
    PredictedMetric,
    Size,
    StageTime,
)
from passes.base import (
    Figures,
    KernelUse,
    LayerRecord,
    Measured,
    MeasuredColumn,
    MeasuredTable,
    PassRecord,
    Prediction,
    Skipped,
)
from profilers.quality import Divergence, Perplexity, QualityResult
from profilers.tasks import TaskComparison
from profilers.timing import Distribution

from . import samples

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INT4_KERNEL = "aten._weight_int4pack_mm_for_cpu"
BEFORE = Figures(269_030_016, 23_040.0, 0.8, 0.0375, 700_000_000)
AFTER = Figures(98_400_000, 23_040.0, 0.79, 0.0175, 510_000_000)


def spread(p50: float, relative: float = 0.06, count: int = 40) -> Distribution:
    """A timing with a symmetric spread."""
    return Distribution(
        p50=p50,
        p90=p50 * (1 + relative / 2),
        p99=p50 * (1 + relative),
        mean=p50,
        minimum=p50 * (1 - relative / 2),
        relative_spread=relative,
        samples=count,
    )


def profiled(figures: Figures, *, relative: float = 0.06, count: int = 40, memory: int | None = None) -> ProfileReport:
    """A profile whose latency, roofline and weights are those of ``figures``."""
    base = samples.full()
    assert figures.ttft_seconds is not None and figures.tpot_seconds is not None and figures.weight_bytes is not None
    (point,) = samples.latency().points
    timed = replace(
        point,
        ttft_seconds=spread(figures.ttft_seconds, relative, count),
        tpot_seconds=spread(figures.tpot_seconds, relative, count),
        tokens_per_second=1 / figures.tpot_seconds,
        peak_memory_bytes=memory or figures.peak_memory_bytes,
        warnings=(),
    )
    points = []
    for phase, time in (("prefill", figures.ttft_seconds), ("decode", figures.tpot_seconds)):
        counted = samples.intensity_point(phase, 512)
        moved = counted.bytes - counted.weight_bytes + figures.weight_bytes
        points.append(
            replace(
                counted,
                bytes=moved,
                weight_bytes=figures.weight_bytes,
                flops_per_byte=counted.flops / moved,
                time_seconds=time,
                mfu=counted.flops / time / samples.COMPUTE_PEAK,
                mbu=moved / time / samples.MEMORY_PEAK,
            )
        )
    return replace(
        base,
        model=replace(base.model, weight_bytes=figures.weight_bytes),
        profiles={
            **base.profiles,
            "latency": replace(samples.latency(), points=(timed,)),
            "intensity": replace(samples.intensity(), points=tuple(points)),
        },
    )


def quality(after: float = 17.05, ratio_interval: tuple[float, float] | None = (1.091, 1.148)) -> QualityResult:
    before = 15.24
    return QualityResult(
        perplexity=Perplexity(
            before=before,
            after=after,
            interval=(after * 0.94, after * 1.06),
            before_interval=(before * 0.94, before * 1.06),
            ratio=after / before,
            ratio_interval=ratio_interval,
        ),
        kl=Divergence(mean=0.1102, p99=1.31, interval=(0.101, 0.119), p99_interval=None),
        top1_agreement=0.8514,
        top1_interval=(0.842, 0.86),
        tokens=8176,
        blocks=16,
        context=512,
        text="Python documentation (pydoc_data.topics), part kept for evaluation",
        tasks=(TaskComparison("arc-like", "multiple-choice", 200, 0.41, 0.395, (0.33, 0.46), -0.015, (-0.04, 0.01)),),
    )


def layers(bits: tuple[float, ...] = (4.0,)) -> tuple[LayerRecord, ...]:
    """Every projection; error grows with depth, and with fewer bits."""
    found = [
        LayerRecord(
            name=f"model.layers.{layer}.{'mlp' if kind in KINDS[4:] else 'self_attn'}.{kind}",
            kind=kind,
            bits=bits[(layer + number) % len(bits)],
            group_size=64,
            error=0.004 * (1 + number) * (1 + layer / 10) * (2 if bits[(layer + number) % len(bits)] < 4 else 1),
        )
        for layer in range(samples.LAYERS)
        for number, kind in enumerate(KINDS)
    ]
    return (*found, LayerRecord("lm_head", "lm_head", 8.0, 64, None))


def record(bits: tuple[float, ...] = (4.0,)) -> PassRecord:
    return PassRecord(
        name="quantize",
        parameters={"scheme": "w4a16", "algorithm": "gptq", "group_size": 64, "ignore": []},
        summary="210 layers to 4 bits in groups of 64 (GPTQ)",
        seed=0,
        seconds=87.0,
        layers=layers(bits),
        skipped=(Skipped("model.embed_tokens", "tied to lm_head"),),
        notes=("group size 64: the preset's 128 does not divide 576 columns",),
        versions={"llmcompressor": "0.14.0.1", "compressed-tensors": "0.19.0"},
    )


def audit() -> tuple[AuditedClass, ...]:
    rows = [AuditedClass(kind, "int4", 4.25, 30, 10_000_000, 5_312_500, True, None) for kind in KINDS]
    return (
        *rows,
        AuditedClass("embed_tokens", "bfloat16", 16.0, 1, 28_311_552, 56_623_104, False, "tied to lm_head"),
        AuditedClass("input_layernorm", "bfloat16", 16.0, 30, 17_280, 34_560, False, None),
    )


def predicted() -> Predicted:
    figures = replace(AFTER, tpot_seconds=0.0125)
    pairs = {
        "weight_bytes": (BEFORE.weight_bytes, figures.weight_bytes, AFTER.weight_bytes),
        "tpot_seconds": (BEFORE.tpot_seconds, figures.tpot_seconds, AFTER.tpot_seconds),
        "ttft_seconds": (BEFORE.ttft_seconds, None, AFTER.ttft_seconds),
    }
    return Predicted(
        figures=figures,
        metrics=tuple(
            PredictedMetric(
                metric,
                before,
                said,
                measured,
                said / measured - 1 if said is not None and measured else None,
                "launching ops takes 6 ms a token, which the roofline leaves out" if metric == "tpot_seconds" else None,
            )
            for metric, (before, said, measured) in pairs.items()
        ),
        pass_seconds=95.0,
        measured_pass_seconds=87.0,
        notes=("the first token is not predicted: int4 products of many rows were not timed",),
    )


RECIPE: dict[str, Any] = {
    "version": 1,
    "seed": 0,
    "passes": [{"quantize": {"scheme": "w4a16"}}],
    "evaluation": {"tokens": 8192},
    "gates": ["ppl<=+15%"],
}


def measured(text: str = "stored less and moved less: 0.800 (0.780 to 0.830)") -> Measured:
    columns = (MeasuredColumn("time of", "text"), MeasuredColumn("layers", "number"), MeasuredColumn("read", "bytes"),
               MeasuredColumn("one set", "seconds"), MeasuredColumn("share", "fraction"))  # fmt: skip
    rows = ((text, 15, 106_168_320, 0.0123, 0.85), ("FLOP a token", 329_384_448, None, None, 0.5))
    tables = (MeasuredTable("A decode step", columns, rows), MeasuredTable("", columns[:2], ((text, 0.5),)))
    return Measured(text, tables, (text, "medians over rounds"), {"reuse": {"rounds": 9}})


def optimized() -> OptimizeReport:
    """A run that gained size and decode speed, at a loss of perplexity outside noise."""
    return OptimizeReport(
        schema=OPTIMIZE_SCHEMA,
        created="2026-01-02T03:04:05Z",
        command="effcli optimize smollm2-135m --pass quantize:scheme=w4a16 -o out",
        seconds_spent=212.0,
        status="passed",
        source={
            "spec": "smollm2-135m",
            "kind": "builtin",
            "revision": None,
            "licence": "Apache-2.0",
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "files": {"model.safetensors": "9c1f" * 16},
            "quantized": None,
        },
        recipe=from_mapping(RECIPE).model_dump(mode="json"),
        seed=0,
        before=profiled(BEFORE).to_dict(),
        after=profiled(AFTER).to_dict(),
        batch=1,
        context=512,
        figures_before=BEFORE,
        figures_after=AFTER,
        quality=quality(),
        quality_reason=None,
        size=Size(
            before_bytes=269_030_016,
            after_bytes=98_400_000,
            bits_per_parameter=5.85,
            parameters=134_515_008,
            before_file_bytes=269_060_552,
            after_file_bytes=98_460_000,
        ),
        predicted=predicted(),
        predicted_reason=None,
        passes=(record(),),
        audit=audit(),
        audit_notes=("every tensor of the original is accounted for; no NaN or infinity",),
        gates=(GateResult("ppl<=+15%", "perplexity", 0.1188, 0.15, True, "perplexity rose by 11.9 %, 15 % allowed"),),
        kernels=(
            KernelUse("q_proj", INT4_KERNEL, 30),
            KernelUse("down_proj", INT4_KERNEL, 30),
            KernelUse("lm_head", "aten.linear", 1, "tied to the embedding, which is not quantized"),
        ),
        kernel_agreement=KernelAgreement(2044, 0.0031, 0.21, 0.991),
        compiled=CompiledDecode(512, 0.0175, 0.0121, 48.0, None),
        stages=(
            StageTime("before", 41.0, False),
            StageTime("pass: quantize", 87.0, False),
            StageTime("save", 1.1, True),
            StageTime("audit", 0.9, True),
            StageTime("after", 40.0, False),
            StageTime("quality", 42.0, False),
        ),
        overhead_fraction=0.0094,
        warnings=("decode after: spread of 6 %",),
        measured=(measured(),),
    )


def mixed() -> OptimizeReport:
    return replace(optimized(), passes=(record((3.0, 4.0, 8.0)),), measured=(None,))


def slower() -> OptimizeReport:
    """Smaller, but decode became slower and prefill did not change."""
    after = replace(AFTER, tpot_seconds=0.081, ttft_seconds=0.81)
    return replace(optimized(), after=profiled(after).to_dict(), figures_after=after, compiled=None, kernels=())


def no_gain() -> OptimizeReport:
    """Nothing changed outside noise, in size, time or quality."""
    after = replace(BEFORE, tpot_seconds=0.0368, ttft_seconds=0.79)
    return replace(
        optimized(),
        before=profiled(BEFORE, relative=0.2).to_dict(),
        after=profiled(after, relative=0.2).to_dict(),
        figures_after=after,
        size=replace(optimized().size, after_bytes=269_030_016, bits_per_parameter=16.0),
        quality=quality(15.26, (0.996, 1.006)),
        compiled=None,
    )


def failed() -> OptimizeReport:
    gate = GateResult("ppl<=+3%", "perplexity", 0.1188, 0.03, False, "perplexity rose by 11.9 %, at most 3 % allowed")
    return replace(optimized(), status="gate failed", gates=(gate,))


def from_gguf() -> OptimizeReport:
    report = optimized()
    return replace(
        report,
        size=replace(report.size, source_quantized="GGUF types Q4_1, Q6_K", source_bits_per_parameter=5.85),
    )


def partial() -> OptimizeReport:
    """Everything that may be missing is missing."""
    bare = samples.bare().to_dict()
    return replace(
        optimized(),
        before=bare,
        after=bare,
        figures_before=Figures(),
        figures_after=Figures(),
        quality=None,
        quality_reason="the model has no tokenizer",
        predicted=None,
        predicted_reason="the device's peaks are not known",
        passes=(),
        audit=(),
        audit_notes=(),
        gates=(),
        kernels=(),
        kernel_agreement=None,
        compiled=CompiledDecode(512, 0.0175, None, None, "no C++ compiler"),
        stages=(),
        warnings=(),
        size=replace(report_size(), before_file_bytes=None),
    )


def report_size() -> Size:
    return optimized().size


def hostile() -> OptimizeReport:
    """Every text tries to leave its place."""
    text = samples.HOSTILE
    report = optimized()
    return replace(
        report,
        command=text,
        source={"spec": text, "kind": text, "licence": text, "base_model": text, "files": {text: text}},
        recipe={"version": 1, "passes": [{"name": text, "parameters": {text: text}}], text: text},
        before=samples.hostile().to_dict(),
        after=samples.hostile().to_dict(),
        quality=replace(
            quality(), text=text, tasks=(TaskComparison(text, text, 2, 0.5, 0.5, (0.1, 0.9), 0.0, (-1.0, 1.0), text),)
        ),
        size=replace(report.size, source_quantized=text),
        predicted=replace(predicted(), metrics=(PredictedMetric(text, 1.0, 2.0, 1.0, 1.0, text),), notes=(text,)),
        passes=(
            replace(
                record(),
                name=text,
                parameters={text: text},
                summary=text,
                layers=(
                    LayerRecord(f"model.layers.3.{text}", text, 4.0, 64, 0.01),
                    LayerRecord(f"model.layers.999999999999.{text}", "x", 3.0, None, None),
                ),
                skipped=(Skipped(text, text),),
                notes=(text,),
                versions={text: text},
            ),
        ),
        audit=(AuditedClass(text, text, 4.0, 1, 1, 1, False, text),),
        audit_notes=(text,),
        gates=(GateResult(text, text, 1.0, 2.0, True, text),),
        kernels=(KernelUse(text, text, 1, None), KernelUse(text, text, 1, text)),
        compiled=CompiledDecode(1, 1.0, None, None, text),
        stages=(StageTime(text, 1.0, True),),
        warnings=(text,),
        measured=(measured(text),),
    )


def exported() -> OptimizeReport:
    """A run whose result was exported too: faster to decode on ONNX Runtime, slower to the first token."""
    base = optimized()
    assert AFTER.tpot_seconds is not None and AFTER.ttft_seconds is not None
    figures = replace(AFTER, tpot_seconds=AFTER.tpot_seconds / 2, ttft_seconds=AFTER.ttft_seconds * 1.5)
    found = profiled(figures)
    hidden = "measured on ONNX Runtime, which shows nothing of what happens inside a graph"
    report = replace(
        found,
        profiles={"latency": found.profiles["latency"]},
        skipped=dict.fromkeys(("intensity", "kv", "sinks"), hidden),
    )
    return replace(
        base,
        after_onnx=OnnxResult(
            folder="onnx",
            profile=report.to_dict(),
            quality=replace(quality(17.07), tasks=()),
            quality_reason=None,
            provider="CPUExecutionProvider",
            provider_reason="no CUDA GPU",
            opset=23,
            dtype="float32",
            dtype_reason="what onnxruntime computes in on a CPU",
            quantization="int4",
            weight_bytes=102_000_000,
            file_bytes=103_400_000,
            tolerance=0.001,
            max_absolute_error=0.00012,
            mean_absolute_error=9e-6,
            positions=1_407,
            notes=("1 quantized tensor that is no linear layer is written dequantized",),
        ),
    )


OPTIMIZED = {
    "optimized": optimized,
    "exported": exported,
    "mixed": mixed,
    "slower": slower,
    "no_gain": no_gain,
    "failed": failed,
    "from_gguf": from_gguf,
    "partial": partial,
    "hostile": hostile,
}


def planned(label: str, figures: Figures, bits: float, **settings: Any) -> PlannedPass:
    name, _, rest = label.partition(":")
    parameters = dict(part.split("=") for part in rest.split(",")) if rest else {}
    prediction = Prediction(
        figures=figures,
        bits_per_parameter=bits,
        pass_seconds=settings.pop("seconds", 95.0),
        pass_memory_bytes=2_400_000_000,
        fits=settings.pop("fits", True),
        slower=settings.pop("slower", False),
        notes=settings.pop("notes", ()),
    )
    assert not settings
    return PlannedPass(name, parameters, label, prediction, None)


def plan() -> PlanReport:
    """Alternatives: one that wins, one that is slower here, one that does not fit, one that does not apply."""
    return PlanReport(
        schema=PLAN_SCHEMA,
        created="2026-01-02T03:04:05Z",
        command="effcli plan smollm2-135m",
        seconds_spent=31.0,
        model=samples.model_info(),
        environment=samples.environment(),
        batch=1,
        context=512,
        measured=BEFORE,
        alternatives=True,
        passes=(
            planned("quantize:scheme=w4a16", AFTER, 5.85, notes=("4-bit products timed one by one on this device",)),
            planned("quantize:scheme=w8a16", replace(AFTER, weight_bytes=150_000_000, tpot_seconds=0.026), 8.9),
            planned(
                "quantize:scheme=fp8",
                replace(AFTER, weight_bytes=160_000_000, tpot_seconds=0.071),
                9.5,
                slower=True,
                seconds=None,
                notes=("this CPU has no FP8 product: weights are decompressed at each step",),
            ),
            planned("quantize:scheme=nvfp4", replace(AFTER, ttft_seconds=None, tpot_seconds=0.01), 5.9, fits=False),
            PlannedPass(
                "quantize", {"scheme": "mxfp4"}, "quantize:scheme=mxfp4", None, "576 columns are not whole blocks"
            ),
        ),
        warnings=(),
    )


def chain() -> PlanReport:
    return replace(plan(), alternatives=False, passes=plan().passes[:1])


def all_slower() -> PlanReport:
    return replace(plan(), passes=plan().passes[2:3])


def bare_plan() -> PlanReport:
    return replace(
        plan(),
        measured=Figures(),
        passes=(replace(plan().passes[0], prediction=Prediction(Figures())), plan().passes[4]),
    )


def hostile_plan() -> PlanReport:
    text = samples.HOSTILE
    one = planned("quantize", AFTER, 4.0, notes=(text,))
    return replace(
        plan(),
        command=text,
        model=replace(samples.model_info(), source=text),
        passes=(replace(one, name=text, label=text), PlannedPass(text, {text: text}, text, None, text)),
        warnings=(text,),
    )


PLANS = {"plan": plan, "chain": chain, "all_slower": all_slower, "bare_plan": bare_plan, "hostile_plan": hostile_plan}
