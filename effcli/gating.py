"""What gates are held against: the figures of a report, saved or just made.

::

    effcli.optimize/1, effcli.pipeline-optimize/1 ── before and after ──┐
    effcli.profile/1, pipeline-profile/1, eval/1 ── one measurement ────┴──> Values ──gates──> GateResult, one a gate
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effcli import gates
from effcli.errors import BadInputError
from effcli.reports.blocks import items, profile
from effcli.reports.changes import mapping, number
from effcli.reports.model import (
    EVAL_SCHEMA,
    OPTIMIZE_SCHEMA,
    PIPELINE_OPTIMIZE_SCHEMA,
    PIPELINE_PROFILE_SCHEMA,
    PROFILE_SCHEMA,
)
from effcli.reports.optimize_model import GateResult

_QUALITY = ("ppl", "kl", "kl_p99", "top1", "accuracy")
_ONE = "the report is one measurement; give a limit without % or x, or name a report of effcli optimize"


@dataclass(frozen=True)
class Values:
    """The figures of one report, by metric.

    Attributes
    ----------
    known : mapping of str to Metric
        What a gate on this report can ask for.
    before, after : dict
        None where it was not measured; a report of one measurement has nothing before.
    reasons : dict
        Why something was not measured.
    """

    known: Mapping[str, gates.Metric]
    before: dict[str, float | None]
    after: dict[str, float | None]
    reasons: dict[str, str]

    def evaluate(self, asked: Sequence[gates.Gate]) -> tuple[GateResult, ...]:
        """Hold parsed gates against the figures."""
        return gates.evaluate(asked, self.before, self.after, self.reasons, self.known)


def check(report: Mapping[str, Any], asked: Sequence[str]) -> tuple[GateResult, ...]:
    """Hold gates against a saved report.

    Parameters
    ----------
    report : mapping
        As :func:`effcli.reports.model.read_report` returns it.
    asked : sequence of str
        ``"ppl<=+3%"``.

    Returns
    -------
    tuple of GateResult
        One a gate, in order. A metric that the report does not hold fails its gate.

    Raises
    ------
    BadInputError
        For a gate that cannot be parsed, or a report that holds no figures to be gated.
    """
    found = values(report)
    return found.evaluate([gates.parse(text, found.known) for text in asked])


def values(report: Mapping[str, Any]) -> Values:
    """Return the figures that a report holds.

    Raises
    ------
    BadInputError
        If it is of a kind that has none.
    """
    readers = {
        OPTIMIZE_SCHEMA: _of_optimize,
        PIPELINE_OPTIMIZE_SCHEMA: _of_pipeline,
        PROFILE_SCHEMA: _of_one_profile,
        PIPELINE_PROFILE_SCHEMA: _of_pipeline_profile,
        EVAL_SCHEMA: _of_evaluation,
    }
    schema = report.get("schema")
    if schema not in readers:
        raise BadInputError(f"a report of schema {schema!r} has no figures for gates; known: {', '.join(readers)}")
    return readers[schema](dict(report))


def _of_optimize(report: dict[str, Any]) -> Values:
    reasons: dict[str, str] = {}
    before, after = (
        _of_profile(mapping(report.get(side)), reasons, mapping(report.get(f"figures_{side}")))
        for side in ("before", "after")
    )
    size = mapping(report.get("size"))
    before_bytes, parameters = number(size.get("before_bytes")), number(size.get("parameters"))
    before |= {
        "size": before_bytes,
        "bits": 8 * before_bytes / parameters if before_bytes is not None and parameters else None,
    }
    after |= {"size": number(size.get("after_bytes")), "bits": number(size.get("bits_per_parameter"))}
    quality = mapping(report.get("quality"))
    if not quality:
        reasons |= dict.fromkeys(_QUALITY, str(report.get("quality_reason") or "not measured"))
    else:
        _add_quality(quality, before, after, reasons)
    return Values(gates.METRICS, before, after, reasons)


def _add_quality(
    quality: Mapping[str, Any],
    before: dict[str, float | None],
    after: dict[str, float | None],
    reasons: dict[str, str],
) -> None:
    perplexity, kl = mapping(quality.get("perplexity")), mapping(quality.get("kl"))
    before["ppl"], after["ppl"] = number(perplexity.get("before")), number(perplexity.get("after"))
    after |= {
        "kl": number(kl.get("mean")),
        "kl_p99": number(kl.get("p99")),
        "top1": number(quality.get("top1_agreement")),
    }
    tasks = [task for task in items(dict(quality), "tasks") if isinstance(task, dict) and task.get("metric") == "acc"]
    if tasks:
        before["accuracy"], after["accuracy"] = number(tasks[0].get("before")), number(tasks[0].get("after"))
    else:
        reasons["accuracy"] = "no tasks were given; add --tasks FILE"


def _of_one_profile(report: dict[str, Any]) -> Values:
    points = [point for point in items(profile(report, "latency"), "points") if isinstance(point, dict)]
    timed = points[0] if points else {}
    reasons = dict.fromkeys(gates.METRICS, _ONE)
    no_latency = str(mapping(report.get("skipped")).get("latency") or "the profile holds no timing")
    reasons |= dict.fromkeys(("ttft", "tpot", "tokens_per_second", "peak_memory"), no_latency)
    figures = {
        "ttft_seconds": mapping(timed.get("ttft_seconds")).get("p50"),
        "tpot_seconds": mapping(timed.get("tpot_seconds")).get("p50"),
        "peak_memory_bytes": timed.get("peak_memory_bytes"),
        "kv_bytes_per_token": mapping(profile(report, "kv")).get("bytes_per_token"),
    }
    after = _of_profile(report, reasons, figures)
    model = mapping(report.get("model"))
    weight_bytes, parameters = number(model.get("weight_bytes")), number(model.get("parameters"))
    after["size"] = weight_bytes
    after["bits"] = 8 * weight_bytes / parameters if weight_bytes is not None and parameters else None
    return Values(gates.METRICS, {}, after, reasons)


def _of_evaluation(report: dict[str, Any]) -> Values:
    before: dict[str, float | None] = {}
    after: dict[str, float | None] = {}
    reasons = dict.fromkeys(gates.METRICS, "effcli eval measures quality alone")
    _add_quality(mapping(report.get("quality")), before, after, reasons)
    return Values(gates.METRICS, before, after, reasons)


def _of_profile(
    report: Mapping[str, Any], reasons: dict[str, str], figures: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return what a profile holds; times, memory and cache come from ``figures``, which may quote another point."""
    whole, skipped = dict(report), mapping(report.get("skipped"))
    points = [point for point in items(profile(whole, "latency"), "points") if isinstance(point, dict)]
    first = points[0] if points else {}
    energy, sinks = mapping(profile(whole, "energy")), mapping(profile(whole, "sinks"))
    rates = [number(mapping(point).get("sink_rate")) for point in items(sinks, "points")]
    reasons["joules_per_token"] = str(energy.get("reason") or skipped.get("energy") or "no energy profile")
    reasons["sinks"] = str(skipped.get("sinks") or "no layer has softmax attention")
    reasons["kv_bytes"] = str(skipped.get("kv") or "the cache was not measured")
    if first.get("peak_memory_reason"):
        reasons["peak_memory"] = str(first["peak_memory_reason"])
    return {
        "tokens_per_second": number(first.get("tokens_per_second")),
        "joules_per_token": number(energy.get("joules_per_token")),
        "sinks": next((rate for rate in rates if rate is not None), None),
        "ttft": number(figures.get("ttft_seconds")),
        "tpot": number(figures.get("tpot_seconds")),
        "peak_memory": number(figures.get("peak_memory_bytes")),
        "kv_bytes": number(figures.get("kv_bytes_per_token")),
    }


def _of_pipeline(report: dict[str, Any]) -> Values:
    schedules = [entry for entry in items(report, "schedules") if isinstance(entry, dict)]
    default = mapping(report.get("lemica")).get("default")
    result = next((entry for entry in schedules if entry.get("name") == default), {})
    like = mapping(result.get("likeness"))
    before = {
        "time": number(result.get("run_seconds_before")),
        "denoiser_time": number(result.get("denoiser_seconds_before")),
    }
    after = {
        "psnr": number(mapping(like.get("psnr_db")).get("mean")),
        "ssim": number(mapping(like.get("ssim")).get("mean")),
        "lpips": number(mapping(like.get("lpips")).get("mean")),
        "latent_l1": number(mapping(like.get("latent_l1")).get("mean")),
        "time": number(result.get("run_seconds_after")),
        "denoiser_time": number(result.get("denoiser_seconds_after")),
    }
    reasons = {
        "psnr": "all pictures are the same to the bit, so it has no finite value",
        "lpips": str(like.get("lpips_reason") or "not measured"),
    }
    return Values(gates.PIPELINE_METRICS, before, after, reasons)


def _of_pipeline_profile(report: dict[str, Any]) -> Values:
    denoising = mapping(report.get("denoising"))
    after = {
        "time": number(mapping(denoising.get("run_seconds")).get("p50")),
        "denoiser_time": number(denoising.get("denoiser_seconds")),
    }
    reasons = dict.fromkeys(gates.PIPELINE_METRICS, _ONE)
    if not denoising:
        reasons |= dict.fromkeys(after, "the profile holds no timing")
    return Values(gates.PIPELINE_METRICS, {}, after, reasons)
