"""What changed between two measured models, and whether that is more than noise.

::

    saved reports ──> Side (profile, size, quality) ──> measured() ──> Value ─┐
                                                                             ├─> Change, one a metric
    the other     ──> Side                          ──> measured() ──> Value ─┘

A change of a time counts only outside its noise. Samples of one run are not independent (clocks and other processes
drift), so their spread is not divided by the root of their number:

    sigma = (p90 - p10) / p50 / 2.563 x (1 + 2.7 / samples)      p10 to p90 of a normal distribution is 2.563 sigma;
                                                                 the last factor makes up for few samples
    noise = exp(1.96 sqrt(sigma_before^2 + sigma_after^2)) - 1   but at least 3 %
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from effcli.reports.blocks import Report, items, main_point, profile
from effcli.reports.sections.sinks import quoted_points

P10_TO_P90_SIGMAS = 2.563
CONFIDENCE_SIGMAS = 1.96
FEW_SAMPLES = 2.7  # at least what 10^5 simulated normal samples ask for, at every count from 3
FEWEST_SAMPLES = 3
LEAST_TIMING_NOISE = 0.03
MEMORY_NOISE = {"cpu": 0.02}  # resident size of a process; CUDA's live tensors are exact
ENERGY_NOISE = 0.05  # NVML's stated accuracy
EXACT = 1e-9

Status = Literal["better", "worse", "noise", "same", "changed", "unknown"]
Better = Literal["lower", "higher"] | None


@dataclass(frozen=True)
class Metric:
    """What is compared: its key, its name for readers, its unit, and which way is better."""

    key: str
    label: str
    unit: str
    better: Better = None


METRICS = (
    Metric("stored_bytes", "weights on disk", "bytes", "lower"),
    Metric("bits_per_parameter", "bits per parameter", "number", "lower"),
    Metric("weight_bytes", "weights in memory", "bytes", "lower"),
    Metric("peak_memory_bytes", "peak memory", "bytes", "lower"),
    Metric("ttft_seconds", "time to first token", "seconds", "lower"),
    Metric("tpot_seconds", "time per token", "seconds", "lower"),
    Metric("tokens_per_second", "decode, tokens/s", "number", "higher"),
    Metric("joules_per_token", "energy a token", "joules", "lower"),
    Metric("decode_flops_per_byte", "decode, FLOP/byte", "number"),
    Metric("decode_bound", "decode is bound by", "text"),
    Metric("kv_bytes_per_token", "KV cache a token", "bytes", "lower"),
    Metric("kv_held_bytes", "KV cache held", "bytes", "lower"),
    Metric("perplexity", "perplexity", "perplexity", "lower"),
    Metric("kl_mean", "KL to original, mean", "number", "lower"),
    Metric("kl_p99", "KL to original, p99", "number", "lower"),
    Metric("top1_agreement", "same top token", "fraction", "higher"),
    Metric("sink_rate", "sink rate", "fraction"),
)
SPEED = ("tpot_seconds", "ttft_seconds")


@dataclass(frozen=True)
class Value:
    """One figure of one side.

    Attributes
    ----------
    value : float or str or None
    sigma : float or None
        Relative standard deviation of one measurement; 0 for what is counted, None where it is not known.
    interval : tuple of float or None
        Confidence interval.
    reason : str or None
        Why there is no value.
    """

    value: float | str | None = None
    sigma: float | None = 0.0
    interval: tuple[float, float] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Change:
    """One metric before and after.

    Attributes
    ----------
    metric, label, unit : str
    better : str or None
        ``lower`` or ``higher``; None where neither is.
    before, after : float or str or None
    before_interval, after_interval, ratio_interval : tuple of float or None
    ratio : float or None
        after / before.
    noise : float or None
        Relative change that chance alone may make; 0 for what is counted, None where it is not known.
    status : str
        ``better``, ``worse``, ``noise`` (inside it), ``same``, ``changed`` (neither way is better), or ``unknown``.
    reason : str or None
        Why a figure is missing or the status is not known.
    """

    metric: str
    label: str
    unit: str
    better: Better
    before: float | str | None
    after: float | str | None
    ratio: float | None
    noise: float | None
    status: Status
    reason: str | None = None
    before_interval: tuple[float, float] | None = None
    after_interval: tuple[float, float] | None = None
    ratio_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Side:
    """One model as it was measured.

    Attributes
    ----------
    profile : dict
        ``effcli.profile/1``.
    stored_bytes, parameters : int or None
        Bytes of the weights as stored, and parameters of the original model.
    bits_per_parameter : float or None
    figures : dict
        :class:`passes.base.Figures` as data, for what the profile does not hold.
    perplexity, kl_mean, kl_p99, top1_agreement : Value
    tasks : dict
        Accuracy by task.
    text : str or None
        What quality was measured on.
    """

    profile: Report
    stored_bytes: float | None = None
    bits_per_parameter: float | None = None
    figures: Report = field(default_factory=dict)
    perplexity: Value = Value(reason="quality was not measured")
    kl_mean: Value = Value()
    kl_p99: Value = Value()
    top1_agreement: Value = Value()
    tasks: dict[str, Value] = field(default_factory=dict)
    text: str | None = None


def number(value: Any) -> float | None:
    """Return ``value`` if it is a finite number, else None: a saved report may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def mapping(value: Any) -> Report:
    """Return ``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def interval(value: Any) -> tuple[float, float] | None:
    """Return two numbers as an interval, or None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def timing_sigma(timing: Report) -> float | None:
    """Return the relative standard deviation of a timing from its spread, or None where that is not known.

    Parameters
    ----------
    timing : dict
        :class:`profilers.timing.Distribution` as data.
    """
    spread, samples = number(timing.get("relative_spread")), number(timing.get("samples"))
    if spread is None or samples is None or samples < FEWEST_SAMPLES:
        return None
    return spread / P10_TO_P90_SIGMAS * (1 + FEW_SAMPLES / samples)


def profile_side(report: Report) -> Side:
    """Return the side that a profile is."""
    return Side(report)


def optimize_sides(report: Report) -> tuple[Side, Side]:
    """Return both sides of an ``effcli.optimize/1`` report."""
    size, quality = mapping(report.get("size")), mapping(report.get("quality"))
    perplexity, kl = mapping(quality.get("perplexity")), mapping(quality.get("kl"))
    reason = str(report.get("quality_reason") or "quality was not measured")
    text = quality.get("text")
    common = {"text": str(text)} if text is not None else {}
    before_bytes, parameters = number(size.get("before_bytes")), number(size.get("parameters"))
    tasks = [task for task in items(quality, "tasks") if isinstance(task, dict) and task.get("name")]

    before = Side(
        mapping(report.get("before")),
        stored_bytes=before_bytes,
        bits_per_parameter=8 * before_bytes / parameters if before_bytes is not None and parameters else None,
        figures=mapping(report.get("figures_before")),
        perplexity=_with_interval(perplexity, "before", "before_interval", reason),
        kl_mean=Value(reason="the original is what KL is measured from"),
        kl_p99=Value(reason="the original is what KL is measured from"),
        top1_agreement=Value(reason="the original is what agreement is measured with"),
        tasks={str(task.get("name")): Value(number(task.get("before")), None) for task in tasks},
        **common,
    )
    after = Side(
        mapping(report.get("after")),
        stored_bytes=number(size.get("after_bytes")),
        bits_per_parameter=number(size.get("bits_per_parameter")),
        figures=mapping(report.get("figures_after")),
        perplexity=_with_interval(perplexity, "after", "interval", reason),
        kl_mean=_with_interval(kl, "mean", "interval", reason),
        kl_p99=_with_interval(kl, "p99", "p99_interval", reason),
        top1_agreement=_with_interval(quality, "top1_agreement", "top1_interval", reason),
        tasks={str(task.get("name")): _with_interval(task, "after", "interval", reason) for task in tasks},
        **common,
    )
    return before, after


ONNX_METRICS = (
    *("stored_bytes", "perplexity", "kl_mean", "kl_p99", "top1_agreement", "ttft_seconds", "tpot_seconds"),
    *("tokens_per_second", "peak_memory_bytes", "joules_per_token"),
)
"""What is measured of an export as it is of a model in torch."""


def onnx_changes(report: Report) -> tuple[Change, ...]:
    """Return what running the export on ONNX Runtime changes against the result in torch; empty without one.

    Of :data:`ONNX_METRICS`, those that were measured on ONNX Runtime; time to first token and per token always.
    """
    found = mapping(report.get("after_onnx"))
    if not found:
        return ()
    quality = mapping(found.get("quality"))
    kl, reason = mapping(quality.get("kl")), str(found.get("quality_reason") or "quality was not measured")
    export = Side(
        mapping(found.get("profile")),
        stored_bytes=number(found.get("weight_bytes")),
        perplexity=_with_interval(mapping(quality.get("perplexity")), "after", "interval", reason),
        kl_mean=_with_interval(kl, "mean", "interval", reason),
        kl_p99=_with_interval(kl, "p99", "p99_interval", reason),
        top1_agreement=_with_interval(quality, "top1_agreement", "top1_interval", reason),
    )
    place = place_of(report)
    ours, theirs = measured(optimize_sides(report)[1], place), measured(export, place)
    metrics = {metric.key: metric for metric in METRICS}
    return tuple(
        change(metrics[key], ours[key], theirs[key])
        for key in ONNX_METRICS
        if key in SPEED or theirs[key].value is not None
    )


def _with_interval(data: Report, key: str, interval_key: str, reason: str) -> Value:
    return Value(number(data.get(key)), None, interval(data.get(interval_key)), reason)


def places(report: Report) -> list[tuple[int, int]]:
    """Return the batch and context of every point that a profile holds, timed ones first."""
    found = [
        (point.get("batch"), point.get("context"))
        for name in ("latency", "intensity")
        for point in items(profile(report, name), "points")
        if isinstance(point, dict)
    ]
    known = [(batch, context) for batch, context in found if isinstance(batch, int) and isinstance(context, int)]
    return list(dict.fromkeys(known))


def _at(points: Sequence[Any], place: tuple[int, int] | None) -> Report:
    """Return the point at this batch and context; the first where no place is given."""
    records = [point for point in points if isinstance(point, dict)]
    if place is None:
        return next(iter(records), {})
    return next((point for point in records if (point.get("batch"), point.get("context")) == place), {})


def decode_point(report: Report, place: tuple[int, int] | None) -> Report:
    """Return the decode point of the roofline at this batch and context, empty where there is none."""
    points = [point for point in items(profile(report, "intensity"), "points") if isinstance(point, dict)]
    if place is None:
        return main_point(points, "decode") or {}
    return _at([point for point in points if point.get("phase") == "decode"], place)


def measured(side: Side, place: tuple[int, int] | None) -> dict[str, Value]:
    """Return every figure of one side at one batch and context, by metric."""
    report = side.profile
    timed = _at(items(profile(report, "latency"), "points"), place)
    ttft, tpot = mapping(timed.get("ttft_seconds")), mapping(timed.get("tpot_seconds"))
    decode = decode_point(report, place)
    energy, kv = mapping(profile(report, "energy")), mapping(profile(report, "kv"))
    device = str(mapping(report.get("environment")).get("device") or "cpu").partition(":")[0]
    skipped = mapping(report.get("skipped"))
    no_latency = str(skipped.get("latency") or "the profile holds no timing at this batch and context")
    no_energy = str(energy.get("reason") or skipped.get("energy") or "energy was not measured")
    rated, _ = quoted_points(mapping(profile(report, "sinks")))
    rate = number(timed.get("tokens_per_second"))
    bound = decode.get("bound")

    def own(key: str, found: float | None, sigma: float | None, reason: str | None) -> Value:
        if found is not None:
            return Value(found, sigma, None, None if sigma is not None else "too few samples to know the noise")
        kept = number(side.figures.get(key))
        return Value(kept, None if sigma != 0.0 else 0.0, None, reason if kept is None else "its spread is not known")

    memory = number(timed.get("peak_memory_bytes"))
    return {
        "stored_bytes": Value(side.stored_bytes),
        "bits_per_parameter": Value(side.bits_per_parameter),
        "weight_bytes": own("weight_bytes", number(mapping(report.get("model")).get("weight_bytes")), 0.0, None),
        "peak_memory_bytes": own(
            "peak_memory_bytes",
            memory,
            MEMORY_NOISE.get(device, 0.0) / CONFIDENCE_SIGMAS / math.sqrt(2),
            str(timed.get("peak_memory_reason") or no_latency),
        ),
        "ttft_seconds": own("ttft_seconds", number(ttft.get("p50")), timing_sigma(ttft), no_latency),
        "tpot_seconds": own("tpot_seconds", number(tpot.get("p50")), timing_sigma(tpot), no_latency),
        "tokens_per_second": Value(rate, timing_sigma(tpot), None, None if rate is not None else no_latency),
        "joules_per_token": Value(
            number(energy.get("joules_per_token")), ENERGY_NOISE / CONFIDENCE_SIGMAS, None, no_energy
        ),
        "decode_flops_per_byte": Value(number(decode.get("flops_per_byte"))),
        "decode_bound": Value(str(bound) if bound else None),
        "kv_bytes_per_token": own("kv_bytes_per_token", number(kv.get("bytes_per_token")), 0.0, None),
        "kv_held_bytes": Value(number(_at(items(kv, "points"), place).get("measured_bytes"))),
        "perplexity": side.perplexity,
        "kl_mean": side.kl_mean,
        "kl_p99": side.kl_p99,
        "top1_agreement": side.top1_agreement,
        "sink_rate": Value(number((rated or {}).get("sink_rate")), 0.0, None, str(skipped.get("sinks") or "") or None),
    }


def changes(
    before: Side,
    after: Side,
    place: tuple[int, int] | None,
    *,
    ratio_intervals: dict[str, tuple[float, float] | None] | None = None,
    difference_intervals: dict[str, tuple[float, float] | None] | None = None,
) -> tuple[Change, ...]:
    """Return the change of every metric that either side has.

    Parameters
    ----------
    before, after : Side
    place : tuple of int or None
        Batch and context.
    ratio_intervals : dict, optional
        Of after / before by metric, where both sides were measured on the same text block by block.
    difference_intervals : dict, optional
        Of after - before by task, where both sides answered the same samples.
    """
    ratios = ratio_intervals or {}
    left, right = measured(before, place), measured(after, place)
    found = [
        change(metric, left[metric.key], right[metric.key], ratios.get(metric.key))
        for metric in METRICS
        if left[metric.key].value is not None or right[metric.key].value is not None or metric.key in SPEED
    ]
    for name in dict.fromkeys([*before.tasks, *after.tasks]):
        metric = Metric(f"task:{name}", f"task {name}", "fraction", "higher")
        paired = (difference_intervals or {}).get(name)
        found.append(change(metric, before.tasks.get(name, Value()), after.tasks.get(name, Value()), None, paired))
    return tuple(found)


def optimize_changes(report: Report) -> tuple[Change, ...]:
    """Return the changes of an ``effcli.optimize/1`` report, at the batch and context that it quotes."""
    before, after = optimize_sides(report)
    return changes(before, after, place_of(report), **paired_intervals(report))


def paired_intervals(report: Report) -> dict[str, dict[str, tuple[float, float] | None]]:
    """Return the intervals that :func:`changes` takes: both sides were measured on the same text and samples."""
    quality = mapping(report.get("quality"))
    perplexity = mapping(quality.get("perplexity"))
    tasks = [task for task in items(quality, "tasks") if isinstance(task, dict) and task.get("name")]
    return {
        "ratio_intervals": {"perplexity": interval(perplexity.get("ratio_interval"))},
        "difference_intervals": {str(task.get("name")): interval(task.get("difference_interval")) for task in tasks},
    }


def place_of(report: Report) -> tuple[int, int] | None:
    """Return the batch and context that an optimize or plan report quotes."""
    batch, context = report.get("batch"), report.get("context")
    return (batch, context) if isinstance(batch, int) and isinstance(context, int) else None


def change(
    metric: Metric,
    before: Value,
    after: Value,
    ratio_interval: tuple[float, float] | None = None,
    difference_interval: tuple[float, float] | None = None,
) -> Change:
    """Hold one figure against the other; an interval of their ratio or difference decides where there is one."""
    ratio: float | None = None
    noise: float | None = None
    if isinstance(before.value, (int, float)) and isinstance(after.value, (int, float)):
        ratio = after.value / before.value if before.value else None
        noise = _noise(metric, before.sigma, after.sigma)
        status = _status(metric, before, after, noise, _outside(ratio_interval, difference_interval))
    elif before.value is None or after.value is None:
        status = "unknown"
    else:
        status = "same" if before.value == after.value else "changed"
    missing = before.value is None or after.value is None or status == "unknown"
    return Change(
        metric=metric.key,
        label=metric.label,
        unit=metric.unit,
        better=metric.better,
        before=before.value,
        after=after.value,
        ratio=ratio,
        noise=noise,
        status=status,
        reason=(before.reason or after.reason) if missing else None,
        before_interval=before.interval,
        after_interval=after.interval,
        ratio_interval=ratio_interval,
    )


def _noise(metric: Metric, before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    noise = math.expm1(CONFIDENCE_SIGMAS * math.hypot(before, after))
    timed = metric.key in (*SPEED, "tokens_per_second")
    return max(LEAST_TIMING_NOISE, noise) if timed else noise


def _outside(ratio: tuple[float, float] | None, difference: tuple[float, float] | None) -> bool | None:
    """Return whether an interval of paired figures leaves out "no change"; None without one."""
    if ratio is not None:
        return not ratio[0] <= 1.0 <= ratio[1]
    return None if difference is None else not difference[0] <= 0.0 <= difference[1]


def _status(
    metric: Metric,
    before: Value,
    after: Value,
    noise: float | None,
    outside: bool | None,
) -> Status:
    assert isinstance(before.value, (int, float)) and isinstance(after.value, (int, float))
    if outside is not None:
        pass  # an interval over pairs says it
    elif before.interval is not None and after.interval is not None:
        outside = before.interval[1] < after.interval[0] or after.interval[1] < before.interval[0]
    elif noise is None:
        same = math.isclose(before.value, after.value, rel_tol=EXACT)
        return "same" if same and metric.unit != "seconds" else "unknown"
    elif math.isclose(before.value, after.value, rel_tol=EXACT):
        return "same" if noise == 0 else "noise"
    elif before.value <= 0 or after.value <= 0:
        outside = True
    else:
        outside = abs(math.log(after.value / before.value)) > math.log1p(noise)
    if not outside:
        return "noise"
    if metric.better is None:
        return "changed"
    return "better" if (after.value < before.value) == (metric.better == "lower") else "worse"


@dataclass(frozen=True)
class SinkShift:
    """Whether the sinks stayed where they were, head by head, at one context.

    Attributes
    ----------
    heads : int
        Heads that both sides have.
    crossed : int
        Heads on the other side of ε.
    mean_difference : float
        Mean distance between α₁ before and after.
    """

    context: int
    bos: bool
    before_rate: float | None
    after_rate: float | None
    heads: int
    crossed: int
    mean_difference: float


def sink_shifts(before: Report, after: Report) -> list[SinkShift]:
    """Compare the sinks of two profiles at every point that both hold with the same ε."""
    left, right = mapping(profile(before, "sinks")), mapping(profile(after, "sinks"))
    epsilon = number(left.get("epsilon"))
    if epsilon is None or epsilon != number(right.get("epsilon")):
        return []
    found = []
    for one in items(left, "points"):
        twins = [p for p in items(right, "points") if (p.get("context"), p.get("bos")) == (one["context"], one["bos"])]
        pairs = [
            (a, b)
            for row, other in zip(one.get("alpha") or [], (twins[0].get("alpha") or []) if twins else [], strict=False)
            for a, b in zip(row or [], other or [], strict=False)
        ]
        if pairs:
            found.append(
                SinkShift(
                    context=one["context"],
                    bos=bool(one["bos"]),
                    before_rate=number(one.get("sink_rate")),
                    after_rate=number(twins[0].get("sink_rate")),
                    heads=len(pairs),
                    crossed=sum((a > epsilon) != (b > epsilon) for a, b in pairs),
                    mean_difference=sum(abs(b - a) for a, b in pairs) / len(pairs),
                )
            )
    return found
