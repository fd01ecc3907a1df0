"""A first look at a result's quality on little text, so that what is clearly bad costs no full measurement.

Little text says little: a gate counts as missed only where even the better end of the interval misses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effcli.errors import GivenUpError
from effcli.formatting import percent, short
from effcli.gates import METRICS, Gate, holds
from effcli.preflight import Job
from effcli.staging import Staging


def check(job: Job, staging: Staging, quality: Mapping[str, Any]) -> None:
    """Hold the gates on quality against a measurement on the first windows.

    Parameters
    ----------
    job : Job
    staging : Staging
    quality : mapping
        :class:`profilers.quality.QualityResult` as plain data.

    Raises
    ------
    GivenUpError
        If one is missed by more than the measurement's noise.
    """
    missed = [said for gate in job.gates if (said := _missed(gate, quality)) is not None]
    if missed:
        figures = {
            "ppl": quality["perplexity"]["after"],
            "kl": quality["kl"]["mean"],
            "kl_p99": quality["kl"]["p99"],
            "top1": quality["top1_agreement"],
        }
        what = f"{'; '.join(missed)}, on the first {quality['tokens']} tokens"
        raise GivenUpError(
            f"{what}. Nothing was published; the work is kept in '{staging.folder}': run again with --resume and other "
            "gates to go on",
            what,
            figures,
        )


def _missed(gate: Gate, quality: Mapping[str, Any]) -> str | None:
    """Say how a gate is missed by more than the interval, None where it is not or does not ask for quality."""
    perplexity = quality["perplexity"]
    compared = (perplexity["ratio"], perplexity["ratio_interval"])
    value, interval = {
        "ppl": compared if gate.kind != "value" else (perplexity["after"], perplexity["interval"]),
        "kl": (quality["kl"]["mean"], quality["kl"]["interval"]),
        "kl_p99": (quality["kl"]["p99"], quality["kl"]["p99_interval"]),
        "top1": (quality["top1_agreement"], quality["top1_interval"]),
    }.get(gate.metric, (None, None))
    if value is None or interval is None:
        return None
    shift = 1.0 if gate.kind == "change" else 0.0
    better = interval[0] if gate.op.startswith("<") else interval[1]
    if holds(gate, better - shift):
        return None
    show = percent if gate.kind == "change" else short
    bound = "at least" if gate.op.startswith("<") else "at most"
    return (
        f"gate '{gate.text}' will not hold: {METRICS[gate.metric].title} is {show(value - shift)}"
        f"{' above the original' if gate.kind == 'change' else ''} ({bound} {show(better - shift)})"
    )
