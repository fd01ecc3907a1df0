"""Hold what was predicted beside what was measured, and say why a prediction missed, from facts in the reports.

A miss is over 20 %. What explains it is looked for in this order; where nothing does, that is said:

1. layers for which no fast kernel ran (any figure),
2. timings that are themselves uncertain (TTFT, TPOT),
3. decode that neither memory nor compute explains (TPOT): a roofline says nothing about such time,
4. memory that is not weights, cache or activations (peak memory).

All but the second explain only figures that came out worse than predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from effcli.formatting import data_size, percent
from effcli.reports.optimize_model import PlannedPass, Predicted, PredictedMetric
from passes.base import Figures, KernelUse

MISS = 0.2
"""|predicted / measured - 1| above which a prediction missed."""
SHAKY_SPREAD = 0.25
"""(p90 - p10) / p50 above which a time is uncertain, as in :mod:`profilers.latency`."""
OVERHEAD_SHARE = 0.3
"""Share of a decode step that memory and compute leave unexplained, above which it explains a miss."""
_TIMES = {"ttft_seconds": "prefill", "tpot_seconds": "decode"}


def fit(
    planned: Sequence[PlannedPass],
    before: Figures,
    measured: Figures,
    report: Mapping[str, Any],
    kernels: Sequence[KernelUse],
    pass_seconds: float,
) -> tuple[Predicted | None, str | None]:
    """Return the plan's figures held against the measured ones, or None and why there are none.

    Parameters
    ----------
    planned : sequence of PlannedPass
        The chain; its last prediction is of the result.
    before, measured : Figures
    report : mapping
        The profile of the result, ``effcli.profile/1``.
    kernels : sequence of KernelUse
    pass_seconds : float
        What the passes took.
    """
    predictions = [item.prediction for item in planned]
    last = predictions[-1] if predictions else None
    if last is None:
        return None, "nothing was predicted"
    metrics = []
    for entry in fields(Figures):
        name = entry.name
        said, found = getattr(last.figures, name), getattr(measured, name)
        error = said / found - 1 if said is not None and found else None
        explanation = None
        if error is not None and abs(error) > MISS:
            explanation = _explain(name, report, kernels, over=error > 0)
        metrics.append(PredictedMetric(name, getattr(before, name), said, found, error, explanation))
    times = [item.pass_seconds for item in predictions if item is not None and item.pass_seconds is not None]
    return (
        Predicted(
            figures=last.figures,
            metrics=tuple(metrics),
            pass_seconds=sum(times) if len(times) == len(predictions) else None,
            measured_pass_seconds=pass_seconds,
            notes=tuple(note for item in predictions if item is not None for note in item.notes),
        ),
        None,
    )


def _explain(metric: str, report: Mapping[str, Any], kernels: Sequence[KernelUse], *, over: bool) -> str:
    """Return why a prediction missed; ``over``: more was predicted than measured, which no extra cost explains."""
    slow = [use for use in kernels if use.fallback_reason is not None and not over]
    if slow and metric != "kv_bytes_per_token":
        layers = sum(use.layers for use in slow)
        classes = ", ".join(dict.fromkeys(use.layer_class for use in slow))
        return f"{layers} layers ({classes}) run on {slow[0].kernel}: {slow[0].fallback_reason}"
    point = _first(report, "latency")
    if metric in _TIMES and point is not None:
        times = point[metric]
        spread = times["relative_spread"]
        if spread > SHAKY_SPREAD:
            return f"the measured time is uncertain: 10th to 90th percentile span {percent(spread)} of the median"
        unexplained = _unexplained(report, _TIMES[metric])
        if not over and unexplained is not None and unexplained > OVERHEAD_SHARE:
            return (
                f"{percent(unexplained)} of the measured time is neither memory nor compute at this device's peaks: "
                "launching operations and Python, which a roofline does not predict"
            )
    if not over and metric == "peak_memory_bytes" and point is not None and point["peak_memory_bytes"] is not None:
        beside = point["peak_memory_bytes"] - report["model"]["weight_bytes"]
        if report["environment"]["device"] == "cpu" and beside > MISS * point["peak_memory_bytes"]:
            return (
                f"{data_size(beside)} of the measured peak are not weights: on a CPU it is the whole process, "
                "libraries and what loading left to the allocator included"
            )
    return "not known; it came out better than predicted" if over else "not known"


def _first(report: Mapping[str, Any], profiler: str) -> Mapping[str, Any] | None:
    points = (report["profiles"].get(profiler) or {}).get("points") or []
    return points[0] if points else None


def _unexplained(report: Mapping[str, Any], phase: str) -> float | None:
    """Return the share of a phase's time beyond what the roofline allows it."""
    for point in (report["profiles"].get("intensity") or {}).get("points") or []:
        if point["phase"] == phase and point["time_seconds"] and point["attainable_seconds"] is not None:
            return 1.0 - float(point["attainable_seconds"]) / float(point["time_seconds"])
    return None
