"""What the results of a search's trials are worth: which is best, which no other beats, how far one misses a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from effcli import gates
from effcli.batch.model import Outcome
from effcli.batch.search_space import HIGHER_IS_BETTER, QUALITY, SearchSpec

_UNKNOWN_EXCESS = 1.0
"""How far a trial is said to be beyond a gate where only that it is beyond is known."""


@dataclass(frozen=True)
class Result:
    """What became of one job of a search."""

    job: str
    status: str
    figures: Mapping[str, float | None]


class Judge:
    """Compares results as a search wants them.

    Parameters
    ----------
    spec : SearchSpec
    """

    def __init__(self, spec: SearchSpec) -> None:
        self._spec = spec

    @cached_property
    def quality(self) -> str:
        """The metric of quality that the front is over: the target's or the first gate's, else the divergence."""
        asked = [self._spec.metric, *(gates.parse(text).metric for text in self._spec.subject_to)]
        return next((metric for metric in asked if metric in QUALITY), "kl")

    @cached_property
    def cost(self) -> str:
        """The metric that the front sets against quality: the target's or the first gate's, else the size."""
        asked = [self._spec.metric, *(gates.parse(text).metric for text in self._spec.subject_to)]
        return next((metric for metric in asked if metric not in QUALITY), "size")

    def excess(self, outcome: Outcome, judged: Mapping[str, Mapping[str, Any]]) -> tuple[float, ...] | None:
        """Return how far a result is beyond each gate, relative to its limit; at most 0 where it keeps it.

        Parameters
        ----------
        outcome : Outcome
        judged : mapping
            What its report says of each gate, by the gate's text.

        Returns
        -------
        tuple of float, or None of a job that failed
        """
        if outcome.status == "failed":
            return None
        found = []
        for text in self._spec.subject_to:
            gate = gates.parse(text)
            result = judged.get(gate.text)
            measured = outcome.figures.get(gate.metric) if gate.kind == "value" else None
            if result is not None:
                measured = result["measured"]
            if measured is None:
                found.append(0.0 if outcome.status == "passed" else _UNKNOWN_EXCESS)
                continue
            beyond = measured - gate.limit if gate.op.startswith("<") else gate.limit - measured
            if gate.kind == "value" and gate.limit:
                beyond /= abs(gate.limit)
            found.append(min(beyond, 0.0) if gates.holds(gate, measured) else max(beyond, 1e-9))
        return tuple(found)

    def best(self, passed: Sequence[Result]) -> Result | None:
        """Return the result with the target's best value, None where none has any."""
        measured = [result for result in passed if result.figures.get(self._spec.metric) is not None]
        sign = 1 if self._spec.minimize is not None else -1
        return min(measured, key=lambda result: sign * (result.figures[self._spec.metric] or 0.0), default=None)

    def front(self, passed: Sequence[Result]) -> list[Result]:
        """Return the results that no other beats in quality and in cost at once."""
        points = []
        for result in passed:
            quality, cost = (self._signed(metric, result.figures.get(metric)) for metric in (self.quality, self.cost))
            if quality is not None and cost is not None:
                points.append(((quality, cost), result))
        return [
            result
            for point, result in points
            if not any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other, _ in points)
        ]

    def _signed(self, metric: str, value: float | None) -> float | None:
        """Return a value so that less is better."""
        large = self._spec.maximize is not None if metric == self._spec.metric else metric in HIGHER_IS_BETTER
        return -value if large and value is not None else value

    def kept(self, results: Sequence[Result]) -> list[Result]:
        """Return the results whose weights stay; one that is beaten now stays beaten."""
        passed = [result for result in results if result.status == "passed"]
        best = self.best(passed)
        if self._spec.keep == "all" or best is None:
            return passed
        return [best] if self._spec.keep == "best" else [best, *self.front(passed)]
