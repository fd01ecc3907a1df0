"""Exact lexicographic minimax paths through an error graph, and the baselines that they are compared with.

::

    weights {(i, j): error}      cost of an edge, one integer              paths of 2 … B full steps
    (0, 2): 0.3   (0, 3): 0.5    lexicographic: one digit for each           best[j][n] = least sum of costs from j
    (1, 3): 0.3   …         ──>  distinct error, the largest first      ──>  to the end over n full steps
                                 shortest sum: the error itself              (from the last step back to 0)

The vector of a path is its edges' errors sorted descending; the lexicographically least one is wanted. Which of two
vectors of equal length is less depends only on how often each distinct error occurs: the larger count of the largest
error that differs loses. Counts written as digits of one integer, the largest error first, compare in the same way, and
an integer addition appends an edge. Adding one edge to two multisets keeps their order, ties included, so Bellman's
principle holds and dynamic programming over (step, full steps) is exact.

To find the least bottleneck, drop it and solve again is not the same: two paths that share the bottleneck may hold it a
different number of times.

Source: LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation (NeurIPS 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

from passes.base import PassError

Edge = tuple[int, int]
Weights = Mapping[Edge, float]
"""Error of edge (i, j): full steps at i and j, reuse between. Edges (j − 1, j) weigh 0 and may be left out; other edges
that are left out are forbidden."""
Solver = Callable[[int, Weights, int], tuple[int, ...]]
"""From (steps, weights, budget) to ``budget`` full steps, ascending, the first 0 and the last ``steps - 1``."""


def lexicographic(steps: int, weights: Weights, budget: int) -> tuple[int, ...]:
    """Return the full steps whose segment errors, sorted descending, are lexicographically least.

    Among paths with equal errors it is the one whose sequence of full steps is the lexicographically least (earliest).

    Parameters
    ----------
    steps : int
        Sampling steps T.
    weights : mapping of (int, int) to float
        See :data:`Weights`.
    budget : int
        Full steps, exactly, first and last included.

    Raises
    ------
    PassError
        If the budget is not in 2 … T, no path fits it, or an edge or its error is not valid.
    """
    _check_budget(steps, budget)
    paths = _paths(steps, _rank_costs(steps, weights, budget), budget)
    if budget not in paths:
        raise _infeasible(steps, weights, f"exactly {budget}", budget)
    return paths[budget]


def lexicographic_at_most(steps: int, weights: Weights, budget: int) -> tuple[int, ...]:
    """Return the best path over all of up to ``budget`` full steps, the shorter vectors filled up with zeros.

    Errors need not grow with the gap, so fewer full steps may be better. Among equal errors the path with the fewest
    full steps is taken, then the earliest.

    Raises
    ------
    PassError
        As :func:`lexicographic`.
    """
    _check_budget(steps, budget)
    costs = _rank_costs(steps, weights, budget)
    paths = _paths(steps, costs, budget)
    if not paths:
        raise _infeasible(steps, weights, f"at most {budget}", budget)
    return min(paths.values(), key=lambda path: (sum(costs[edge] for edge in pairwise(path)), len(path)))


def all_budgets(steps: int, weights: Weights, largest: int | None = None) -> dict[int, tuple[int, ...]]:
    """Return :func:`lexicographic` for each budget from 2 to ``largest`` (default: T); budgets without a path lack.

    Raises
    ------
    PassError
        If ``largest`` is not in 2 … T, or an edge or its error is not valid.
    """
    largest = steps if largest is None else largest
    _check_budget(steps, largest)
    return _paths(steps, _rank_costs(steps, weights, largest), largest)


def shortest_sum(steps: int, weights: Weights, budget: int) -> tuple[int, ...]:
    """Return the full steps with the least sum of segment errors; among equal sums the earliest.

    The sums are exact: no rounding decides between two paths. Parameters and errors as :func:`lexicographic`.
    """
    _check_budget(steps, budget)
    allowed = _checked(steps, weights)
    # A float is an integer over a power of two, so all of them are integers over the largest of these powers.
    ratios = {edge: error.as_integer_ratio() for edge, error in allowed.items()}
    unit = max(below for _, below in ratios.values())
    costs = {edge: above * (unit // below) for edge, (above, below) in ratios.items()}
    paths = _paths(steps, costs, budget)
    if budget not in paths:
        raise _infeasible(steps, weights, f"exactly {budget}", budget)
    return paths[budget]


def uniform(steps: int, weights: Weights, budget: int) -> tuple[int, ...]:
    """Return evenly spaced full steps, halves rounded up.

    The largest gap is ceil((T − 1) / (B − 1)), the least that is possible. ``weights`` are not looked at: that gap may
    be larger than any of the graph.

    Raises
    ------
    PassError
        If the budget is not in 2 … T.
    """
    _check_budget(steps, budget)
    parts = budget - 1
    return tuple((2 * part * (steps - 1) + parts) // (2 * parts) for part in range(budget))


def greedy(steps: int, weights: Weights, budget: int) -> tuple[int, ...]:
    """Return the full steps that a threshold on the accumulated change chooses, as TeaCache does.

    Walking through time, the change of each step is added up, and the step runs in full once the sum passes the
    threshold, or once no edge of the graph covers the segment. The change of step s is the error of the edge
    (s − 1, s + 1), which skips s alone; a step without this edge runs in full. The threshold is the least that gives at
    most ``budget`` full steps; what is left of the budget then splits the segments with the largest accumulated change,
    each where the larger of its halves is least.

    TeaCache decides while it samples, from the relative change of the denoiser's time-modulated input, and each sample
    has its own schedule; this decides beforehand from errors of the final result, so that it is the rule that is
    compared and not the signal.

    Raises
    ------
    PassError
        As :func:`lexicographic`, and if the rule finds no path although there is one (only where edges within the
        largest gap are missing).
    """
    _check_budget(steps, budget)
    allowed = _checked(steps, weights)
    change = [allowed.get((step - 1, step + 1), math.inf) for step in range(steps)]
    largest_gap = _largest_gap(allowed)
    thresholds = {0.0}
    for start in range(steps):
        accumulated = 0.0
        for step in range(start + 1, min(start + largest_gap, steps - 1)):
            accumulated += change[step]
            if math.isfinite(accumulated):
                thresholds.add(accumulated)
    candidates = sorted(thresholds)

    # Larger thresholds give fewer full steps, or as many; `high` is always one that fits the budget.
    low, high = 0, len(candidates) - 1
    if len(_accumulate(steps, allowed, change, candidates[high])) > budget:
        lexicographic(steps, weights, budget)  # says so where no rule would find a path
        raise _stuck(steps, budget)
    while low < high:
        middle = (low + high) // 2
        if len(_accumulate(steps, allowed, change, candidates[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    full = _accumulate(steps, allowed, change, candidates[high])
    while len(full) < budget:
        splits = [
            (-sum(change[start + 1 : end]), max(sum(change[start + 1 : step]), sum(change[step + 1 : end])), step)
            for start, end in pairwise(full)
            for step in range(start + 1, end)
            if (start, step) in allowed and (step, end) in allowed
        ]
        if not splits:
            raise _stuck(steps, budget)
        full = sorted([*full, min(splits)[2]])
    return tuple(full)


SOLVERS: dict[str, Solver] = {
    "minimax": lexicographic,
    "shortest-sum": shortest_sum,
    "uniform": uniform,
    "greedy": greedy,
}
"""All solvers by name, LeMiCa's first."""


def segment_errors(path: tuple[int, ...], weights: Weights) -> tuple[float, ...] | None:
    """Return the error of each segment of a path in order, 0 where nothing is skipped; None if an edge is not known."""
    edges = list(pairwise(path))
    if any(edge not in weights and edge[1] - edge[0] > 1 for edge in edges):
        return None
    return tuple(weights.get(edge, 0.0) for edge in edges)


def smallest_budget(steps: int, weights: Weights, max_error: float) -> int:
    """Return the smallest budget at which no segment of the best path has an error above ``max_error``.

    It is the fewest full steps of any path of edges within the limit. The limit holds for each segment by itself; what
    several do together is not bounded by it.

    Raises
    ------
    PassError
        If the limit is not a number from 0 up, or an edge or its error is not valid.
    """
    if not max_error >= 0:
        raise PassError(f"max_error={max_error} must be 0 or more")
    allowed = _checked(steps, weights)
    fewest = [1] + [steps + 1] * (steps - 1)
    for (start, end), error in sorted(allowed.items()):
        if error <= max_error:
            fewest[end] = min(fewest[end], fewest[start] + 1)
    return fewest[-1]


def for_speedup(steps: int, speedup: float) -> int:
    """Return the largest budget B with T / B of at least ``speedup``: floor(T / speedup).

    Raises
    ------
    PassError
        If the speed-up is below 1, or leaves fewer than 2 full steps.
    """
    if not 1 <= speedup <= steps / 2:
        raise PassError(f"speedup={speedup} is not in 1 … {steps / 2:g}, what {steps} steps can give with 2 in full")
    # A speed-up that was written as T / B must give B again, however its division was rounded.
    return math.floor(steps / speedup + 1e-9)


def _check_budget(steps: int, budget: int) -> None:
    if steps < 2:
        raise PassError(f"steps={steps} leaves nothing to skip; sample with 2 steps or more")
    if not 2 <= budget <= steps:
        raise PassError(f"budget={budget} is not in 2 … {steps}: the first and the last of {steps} steps run in full")


def _checked(steps: int, weights: Weights) -> dict[Edge, float]:
    """Return all edges that may be used, those that skip nothing included, as floats."""
    allowed = {(step, step + 1): 0.0 for step in range(steps - 1)}
    for (start, end), error in weights.items():
        if not 0 <= start < end < steps:
            raise PassError(f"edge ({start}, {end}) does not lead forward between steps 0 … {steps - 1}")
        if not (math.isfinite(error) and error >= 0):
            raise PassError(f"edge ({start}, {end}) has error {error}; errors are finite and not negative")
        if end == start + 1 and error != 0:
            raise PassError(f"edge ({start}, {end}) skips nothing but has error {error}; it must be 0")
        allowed[start, end] = float(error)
    return allowed


def _largest_gap(weights: Weights) -> int:
    return max((end - start for start, end in weights), default=1)


def _rank_costs(steps: int, weights: Weights, budget: int) -> dict[Edge, int]:
    """Return each edge's cost: 1 at the digit of its error, 0 for error 0. No digit overflows within the budget."""
    allowed = _checked(steps, weights)
    digit_bits = budget.bit_length()
    shifts = {error: place * digit_bits for place, error in enumerate(sorted({*allowed.values()} - {0.0}))}
    return {edge: 1 << shifts[error] if error else 0 for edge, error in allowed.items()}


def _paths(steps: int, costs: Mapping[Edge, int], largest: int) -> dict[int, tuple[int, ...]]:
    """Return the path of least total cost for each number of full steps up to ``largest`` that has one.

    Costs of suffixes are kept only for the steps that an edge can still lead to; memory is O(K · B) costs.
    """
    leaving: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
    for (start, end), cost in sorted(costs.items()):
        leaving[start].append((end, cost))
    reach = _largest_gap(costs)
    best: dict[int, dict[int, int]] = {steps - 1: {1: 0}}
    following: list[dict[int, int]] = [{} for _ in range(steps)]
    for step in range(steps - 2, -1, -1):
        here: dict[int, int] = {}
        # In ascending order and replaced only by less: the earliest of equal paths stays.
        for end, cost in leaving[step]:
            for count, rest in best[end].items():
                if count < largest:
                    total = rest + cost
                    known = here.get(count + 1)
                    if known is None or total < known:
                        here[count + 1] = total
                        following[step][count + 1] = end
        best[step] = here
        best.pop(step + reach, None)

    found = {}
    for budget in sorted(following[0]):
        path = [0]
        for count in range(budget, 1, -1):
            path.append(following[path[-1]][count])
        found[budget] = tuple(path)
    return found


def _accumulate(steps: int, allowed: Weights, change: list[float], threshold: float) -> list[int]:
    full = [0]
    accumulated = 0.0
    for step in range(1, steps - 1):
        accumulated += change[step]
        if accumulated > threshold or (full[-1], step + 1) not in allowed:
            full.append(step)
            accumulated = 0.0
    return [*full, steps - 1]


def _stuck(steps: int, budget: int) -> PassError:
    return PassError(
        f"budget={budget}: a threshold finds no path of {budget} full steps over {steps} steps, as edges are missing; "
        "measure all edges up to the largest gap"
    )


def _infeasible(steps: int, weights: Weights, count: str, budget: int) -> PassError:
    """Say why no path has ``count`` full steps, and what would have one."""
    needed = math.ceil((steps - 1) / (budget - 1))
    gap = _largest_gap(weights)
    if gap < needed:
        return PassError(
            f"budget={budget}: no path over {steps} steps with gaps up to {gap} has {count} full steps; "
            f"set max_gap={needed} or more, or budget={math.ceil((steps - 1) / gap) + 1} or more"
        )
    known = ", ".join(map(str, all_budgets(steps, weights)))
    return PassError(
        f"budget={budget}: edges are missing, so that no path over {steps} steps has {count} full steps; "
        f"use one of {known}, or measure more edges"
    )
