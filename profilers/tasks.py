"""Multiple-choice and cloze tasks."""

from __future__ import annotations

from dataclasses import dataclass

from profilers.intervals import Interval


@dataclass(frozen=True)
class TaskComparison:
    """One task before and after.

    Attributes
    ----------
    name : str
    kind : str
        ``multiple-choice`` or ``cloze``.
    samples : int
    before : float or None
        Share that the original got right; None without it.
    after : float
    interval : tuple of float
        Of ``after``, Wilson's.
    difference : float or None
        ``after - before``.
    difference_interval : tuple of float or None
        Paired by sample.
    metric : str
        As lm-evaluation-harness calls it: ``acc``, ``acc_norm``, ``acc_bytes``.
    """

    name: str
    kind: str
    samples: int
    before: float | None
    after: float
    interval: Interval
    difference: float | None
    difference_interval: Interval | None
    metric: str = "acc"
