"""Gates: rules that the measured result must keep, or nothing is published. ``ppl<=+3%``, ``size<=0.5x``, ``kl<=0.05``.

::

    METRIC  OP  LIMIT        OP: <=  <  >=  >
                 +3%  -20%   change: after / before - 1
                 0.5x        ratio: after / before
                 0.05        the value itself, in SI base units (seconds, bytes, joules)

See ``docs/optimize.md``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from effcli.errors import BadInputError, did_you_mean
from effcli.formatting import data_size, percent, seconds, short
from effcli.reports.optimize_model import GateResult

_OPERATORS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "<=": (operator.le, "at most {} allowed"),
    "<": (operator.lt, "less than {} required"),
    ">=": (operator.ge, "at least {} required"),
    ">": (operator.gt, "more than {} required"),
}
_GATE = re.compile(r"\s*([A-Za-z0-9_]+)\s*(<=|>=|<|>)\s*([+-]?)(\d+(?:\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*(%|x)?\s*")

Kind = Literal["change", "ratio", "value"]


@dataclass(frozen=True)
class Metric:
    """What a gate can ask for.

    Attributes
    ----------
    name : str
        As gates write it.
    title : str
    show : callable
        Formats a value of it.
    compared : bool
        Whether there is a value before; what already compares with the original has none.
    """

    name: str
    title: str
    show: Callable[[float], str] = short
    compared: bool = True


METRICS = {
    metric.name: metric
    for metric in (
        Metric("ppl", "perplexity"),
        Metric("kl", "KL divergence to the original", compared=False),
        Metric("kl_p99", "99th percentile of the KL divergence", compared=False),
        Metric("top1", "top-1 agreement with the original", compared=False),
        Metric("accuracy", "accuracy on the tasks"),
        Metric("size", "size of the weights", data_size),
        Metric("bits", "bits per parameter"),
        Metric("ttft", "time to first token", seconds),
        Metric("tpot", "time per output token", seconds),
        Metric("tokens_per_second", "decode tokens per second"),
        Metric("peak_memory", "peak memory", data_size),
        Metric("kv_bytes", "KV bytes per token", data_size),
        Metric("joules_per_token", "joules per token"),
        Metric("sinks", "sink rate"),
    )
}


PIPELINE_METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR against all steps, in dB", compared=False),
        Metric("ssim", "SSIM against all steps", compared=False),
        Metric("lpips", "LPIPS against all steps", compared=False),
        Metric("latent_l1", "difference of the final latents", compared=False),
        Metric("time", "time of a run", seconds),
        Metric("denoiser_time", "time of the denoiser in a run", seconds),
    )
}
"""Of a diffusion pipeline and the schedule that it follows by default."""


@dataclass(frozen=True)
class Gate:
    """One parsed gate.

    Attributes
    ----------
    text : str
        As given.
    metric : str
        Key of ``METRICS``.
    op : str
    limit : float
        0.03 for ``+3%``, 0.5 for ``0.5x``.
    kind : str
    """

    text: str
    metric: str
    op: str
    limit: float
    kind: Kind


def parse(text: str, known: Mapping[str, Metric] = METRICS) -> Gate:
    """Parse one gate on the metrics that are ``known``.

    Raises
    ------
    BadInputError
        If it has not the form METRIC OP LIMIT, names an unknown metric, or a limit that the metric cannot have.
    """
    found = _GATE.fullmatch(text)
    if found is None:
        raise BadInputError(
            f"gate '{text}' is not METRIC OP LIMIT; write e.g. 'ppl<=+3%', 'size<=0.5x' or 'kl<=0.05' "
            f"(metrics: {', '.join(known)})"
        )
    name, op, sign, digits, exponent, unit = found.groups()
    metric = known.get(name.lower())
    if metric is None:
        raise BadInputError(
            f"gate '{text}' names the unknown metric '{name}'{did_you_mean(name.lower(), known)}; "
            f"known: {', '.join(known)}"
        )
    number = float(f"{sign}{digits}{exponent or ''}")
    if unit == "%":
        if not sign:
            raise BadInputError(
                f"gate '{text}': write '+{digits}%' or '-{digits}%' for a change against the original, "
                f"or {number / 100:g} for the value itself"
            )
        kind: Kind = "change"
        number /= 100
    elif unit == "x":
        kind = "ratio"
    else:
        kind = "value"
    if kind != "value" and not metric.compared:
        raise BadInputError(
            f"gate '{text}': {name} already compares with the original; give the value itself, e.g. '{name}{op}0.05'"
        )
    return Gate(text.strip(), metric.name, op, number, kind)


def holds(gate: Gate, measured: float) -> bool:
    """Say whether a measured value keeps a gate; the value is of the gate's kind: a change, a ratio or itself."""
    return _OPERATORS[gate.op][0](measured, gate.limit) if math.isfinite(measured) else False


def evaluate(
    gates: Sequence[Gate],
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    reasons: Mapping[str, str],
    known: Mapping[str, Metric] = METRICS,
) -> tuple[GateResult, ...]:
    """Hold every gate against what was measured.

    Parameters
    ----------
    gates : sequence of Gate
    before, after : mapping of str to float or None
        By metric.
    reasons : mapping of str to str
        Why a metric was not measured, by metric.
    known : mapping of str to Metric
        As for :func:`parse`.

    Returns
    -------
    tuple of GateResult
        One a gate, in order. A metric that was not measured fails its gate.
    """
    return tuple(
        _evaluate(gate, known[gate.metric], before.get(gate.metric), after.get(gate.metric), reasons) for gate in gates
    )


def _evaluate(
    gate: Gate, metric: Metric, before: float | None, after: float | None, reasons: Mapping[str, str]
) -> GateResult:
    missing = None
    if after is None or (gate.kind != "value" and before is None):
        when = "" if after is None else " before"
        missing = f"{metric.title} was not measured{when}: {reasons.get(gate.metric, 'no reason is recorded')}"
    elif gate.kind != "value" and before == 0:
        missing = f"{metric.title} was 0 before, so its change has no ratio; give a limit without % or x"
    if missing is not None or after is None:
        return GateResult(gate.text, gate.metric, None, gate.limit, False, missing or "")
    measured = after
    if gate.kind != "value" and before is not None:
        measured = after / before - (1 if gate.kind == "change" else 0)
    passed = holds(gate, measured)
    return GateResult(
        gate.text, gate.metric, measured, gate.limit, passed, _explain(gate, metric, before, after, measured)
    )


def _explain(gate: Gate, metric: Metric, before: float | None, after: float, measured: float) -> str:
    bound = _OPERATORS[gate.op][1]
    if gate.kind == "value" or before is None:
        return f"{metric.title} is {metric.show(after)}, {bound.format(metric.show(gate.limit))}"
    span = f"({metric.show(before)} → {metric.show(after)})"
    if gate.kind == "ratio":
        return f"{metric.title} is {short(measured)} x the original's {span}, {bound.format(f'{short(gate.limit)} x')}"
    moved = f"rose by {percent(measured)}" if measured > 0 else f"fell by {percent(-measured)}"
    if measured == 0:
        moved = "is unchanged"
    sign = "+" if gate.limit >= 0 else "-"
    return f"{metric.title} {moved} {span}, {bound.format(f'{sign}{percent(abs(gate.limit))}')}"
