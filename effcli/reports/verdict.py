"""The report in plain words, what is wrong first. A sentence is said only when the report holds its figures."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, items, main_point, profile, ratio, where
from effcli.reports.sections.intensity import PAPER_CLAIM
from effcli.reports.sections.redundancy import cheapest
from effcli.reports.sections.sinks import quoted_points

NOTABLE_COPY = 0.02  # share of decode's bytes from which copying the cache is worth a sentence
NOTABLE_WEIGHTS = 0.5  # share of decode's bytes from which weights are what to shrink


def verdict(report: Report) -> list[str]:
    """Return the sentences of any saved report, the most pressing first; at least one."""
    from effcli.reports.documents import document

    return list(document(report).verdict)


def profile_verdict(report: Report) -> list[str]:
    """Return the sentences of a profile, the most pressing first; at least one."""
    sentences = [
        *_memory(report),
        *_phases(report),
        *_timed(report),
        *_shaky(report),
        *_elsewhere(report),
        *_advice(report),
        *_kv(report),
        *_sinks(report),
        *_energy(report),
        *cheapest(profile(report, "redundancy") or {}),
    ]
    if sentences:
        return sentences
    ran = ", ".join(printable(name) for name in report.get("profiles") or {})
    return [f"Measured: {ran}; nothing here that a sentence sums up." if ran else "The report holds no measurement."]


def _memory(report: Report) -> list[str]:
    kv = profile(report, "kv")
    if kv is None or kv.get("memory_bytes") is None or kv.get("weight_bytes") is None:
        return []
    if kv["weight_bytes"] <= kv["memory_bytes"]:
        return []
    return [
        f"The model does not fit: {fmt.data_size(kv['weight_bytes'])} of weights against "
        f"{fmt.data_size(kv['memory_bytes'])} of memory on this device."
    ]


def _phases(report: Report) -> list[str]:
    intensity = profile(report, "intensity") or {}
    points = items(intensity, "points")
    quoted = [(phase, main_point(points, phase)) for phase in ("decode", "prefill")]
    return [_phase(phase, point, intensity, report) for phase, point in quoted if point is not None]


def _timed(report: Report) -> list[str]:
    """Say how fast a model is whose roofline was not drawn: one that another runtime runs."""
    points = items(profile(report, "latency"), "points")
    if not points or profile(report, "intensity") is not None:
        return []
    point = points[0]
    prefill, rate = (point.get("ttft_seconds") or {}).get("p50"), point.get("tokens_per_second")
    what = "to the first token" if rate is not None else "a forward pass"
    decode = f"{fmt.short(rate)} tokens/s, " if rate is not None else ""
    runtime = " on ONNX Runtime" if (report.get("model") or {}).get("kind") == "onnx" else ""
    return [f"Timed{runtime}: {decode}{fmt.seconds(prefill)} {what} at {where(point)}."]


def _elsewhere(report: Report) -> list[str]:
    """Name the points whose bound is not that of the quoted one."""
    points = items(profile(report, "intensity"), "points")
    sentences = []
    for phase in ("decode", "prefill"):
        quoted = main_point(points, phase)
        others = [
            f"{other['bound']}-bound at {where(other)}"
            for other in points
            if quoted is not None and quoted.get("bound")
            if other.get("phase") == phase and other.get("bound") not in (None, quoted["bound"])
        ]
        if others:
            sentences.append(f"{phase.capitalize()} is {', '.join(others)}.")
    return sentences


def _phase(phase: str, point: Report, intensity: Report, report: Report) -> str:
    name, bound, time = phase.capitalize(), point.get("bound"), point.get("time_seconds")
    attainable = point.get("attainable_seconds")
    if time is None:
        return _not_run(name, point)
    speed = f"{_speed(phase, point, report)} at {where(point)}"
    if bound == "overhead":
        explained = ratio(attainable, time)
        if explained is None:
            return f"{name} is overhead-bound: launching ops and kernels below their roofline take the time; {speed}."
        return (
            f"{name} is overhead-bound: the roofline explains only {fmt.percent(explained)} of the measured time; "
            f"the rest goes to launching ops and to kernels below their roofline; {speed}."
        )
    if bound == "memory" and point.get("mbu") is not None:
        rate = ratio(point.get("bytes"), time)
        reached = _of(rate, ratio(rate, point["mbu"]), "B/s")
        share = fmt.percent(point["mbu"])
        return f"{name} is memory-bound: {share} of this device's bandwidth reached{reached}, {speed}."
    if bound == "compute" and point.get("mfu") is not None:
        reached = _of(ratio(point.get("flops"), time), intensity.get("peak_flops_per_second"), "FLOP/s")
        share = fmt.percent(point["mfu"])
        return f"{name} is compute-bound: {share} of peak {intensity.get('dtype')}{reached}, {speed}."
    return f"{name}{f' is {bound}-bound' if bound else ''}: {speed}."


def _not_run(name: str, point: Report) -> str:
    work = f"{fmt.data_size(point.get('bytes'))} and {fmt.flops(point.get('flops'))}"
    attainable, bound = point.get("attainable_seconds"), point.get("bound")
    reason = f": {printable(point['time_reason'])}" if point.get("time_reason") else ""
    if attainable is None:
        return f"{name} moves {work} at {where(point)} (counted, not timed{reason})."
    would = f"would be {bound}-bound: it" if bound else ""
    return (
        f"{name} {would} takes at least {fmt.seconds(attainable)} by this device's measured peaks for {work} at "
        f"{where(point)} (counted, not timed{reason})."
    ).replace("  ", " ")


def _shaky(report: Report) -> list[str]:
    """Say when the timings that the sentences before quote are not to be trusted."""
    points = items(profile(report, "intensity"), "points")
    quoted = [point for phase in ("decode", "prefill") if (point := main_point(points, phase)) is not None]
    quoted = quoted or items(profile(report, "latency"), "points")[:1]
    places = [(point.get("batch"), point.get("context")) for point in quoted]
    return [
        f"Shaky timing at {where(timed)}: {printable('; '.join(timed['warnings']))}."
        for timed in items(profile(report, "latency"), "points")
        if timed.get("warnings") and (timed.get("batch"), timed.get("context")) in places
    ]


def _speed(phase: str, point: Report, report: Report) -> str:
    if phase == "decode":
        rate = _tokens_per_second(point, report)
        return f"{fmt.short(rate)} tokens/s" if rate is not None else fmt.seconds(point["time_seconds"])
    return f"{fmt.seconds(point['time_seconds'])} to the first token"


def _tokens_per_second(point: Report, report: Report) -> float | None:
    """Take the latency section's figure where it has this point: both were timed in the same run."""
    for timed in items(profile(report, "latency"), "points"):
        if (timed.get("batch"), timed.get("context")) == (point.get("batch"), point.get("context")):
            found = timed.get("tokens_per_second")
            return float(found) if found is not None else None
    return ratio(point.get("batch"), point.get("time_seconds"))


def _of(reached: float | None, peak: float | None, unit: str) -> str:
    """Return `` (5.4 of 19.2 GB/s)``, both in the peak's prefix."""
    if reached is None or not peak:
        return ""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if peak >= size:
            return f" ({fmt.short(reached / size)} of {fmt.short(peak / size)} {prefix}{unit})"
    return f" ({fmt.short(reached)} of {fmt.short(peak)} {unit})"


def _advice(report: Report) -> list[str]:
    """Say what the decode measurement points at."""
    points = items(profile(report, "intensity"), "points")
    point = main_point(points, "decode")
    if point is None:
        return []
    sentences = []
    copied = ratio(point.get("cache_copy_bytes"), point.get("bytes"))
    if copied is not None and copied >= NOTABLE_COPY:
        sentences.append(
            f"The cache class re-copies {fmt.data_size(point['cache_copy_bytes'])} of history a step: "
            f"{fmt.percent(copied)} on top of the bytes the model needs; a preallocated cache avoids it."
        )
    weights = ratio(point.get("weight_bytes"), point.get("bytes"))
    cached = ratio(point.get("kv_bytes"), point.get("bytes"))
    if point.get("bound") == "overhead" and point.get("time_seconds") is not None:
        sentences.append(
            "Fewer, larger ops (compilation, CUDA graphs, fused kernels) or a larger batch help before fewer bits do."
        )
    elif point.get("bound") == "memory" and weights is not None and weights >= NOTABLE_WEIGHTS:
        sentences.append(
            f"Weights are {fmt.percent(weights)} of the bytes that decode moves: weights in fewer bits, or a larger "
            "batch to share each read, cut the most."
        )
    elif point.get("bound") == "memory" and cached is not None and weights is not None and cached > weights:
        sentences.append(
            f"The KV cache is {fmt.percent(cached)} of the bytes that decode moves: a smaller cache cuts the most."
        )
    single = next((found for found in points if found.get("phase") == "decode" and found.get("batch") == 1), None)
    if single is not None and single.get("flops_per_byte") is not None:
        sentences.append(f"Decode does {fmt.short(single['flops_per_byte'])} FLOP/byte ({PAPER_CLAIM}).")
    return sentences


def _kv(report: Report) -> list[str]:
    kv = profile(report, "kv")
    if kv is None:
        return []
    sentences = []
    crossover, limit = kv.get("crossover_context"), kv.get("model_context_limit")
    if crossover is not None:
        beyond = f", past the model's limit of {limit:,}" if limit is not None and crossover > limit else ""
        sentences.append(f"The KV cache passes the weights in size at {fmt.short(crossover)} tokens{beyond}.")
    for bits, longest in (kv.get("max_context") or {}).items():
        if longest is not None and limit is not None and 0 < longest < limit:
            sentences.append(
                f"With the cache in {bits} bits, {longest:,} of the model's {limit:,} tokens of context fit this "
                "device."
            )
    off = [point for point in items(kv, "points") if point.get("difference_bytes")]
    if off:
        sentences.append(
            f"The cache does not hold what was predicted: {off[0]['difference_bytes']:+,} bytes at {where(off[0])}."
        )
    return sentences


def _sinks(report: Report) -> list[str]:
    sinks = profile(report, "sinks") or {}
    quoted, with_bos = quoted_points(sinks)
    if quoted is None:
        return []
    own = " with BOS" if quoted.get("bos") else ""
    more = f" ({fmt.percent(with_bos['sink_rate'])} with BOS)" if with_bos else ""
    return [
        f"Sinks: {fmt.percent(quoted['sink_rate'])} of heads put more than {fmt.short(sinks.get('epsilon'))} of their "
        f"attention on the first token{own}{more}."
    ]


def _energy(report: Report) -> list[str]:
    energy = profile(report, "energy")
    joules = energy.get("joules_per_token") if energy else None
    return [f"A decoded token costs {fmt.short(joules)} J."] if joules is not None else []
