"""Time and memory of LeMiCa's exact solver at the sizes that users have; no ties, the hardest case for it."""

from __future__ import annotations

import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable

from passes.lemica import path

REPEATS = 7
CASES = (("all budgets", 50, 8, None, 0.050), ("one budget", 250, 16, 60, 2.0), ("all budgets", 250, 16, None, None))
"""What is asked for, steps, largest gap, budget, and the limit in seconds where there is one."""


def random_errors(steps: int, max_gap: int) -> path.Weights:
    """Return an error for each edge; they grow with the gap in the mean only."""
    generator = random.Random(0)
    edges = ((i, j) for i in range(steps) for j in range(i + 2, min(i + max_gap, steps - 1) + 1))
    return {(i, j): generator.random() * (j - i) for i, j in edges}


def solver_of(steps: int, weights: path.Weights, budget: int | None) -> Callable[[], object]:
    """Return the call to be measured."""
    if budget is None:
        return lambda: path.all_budgets(steps, weights)
    return lambda: path.lexicographic(steps, weights, budget)


def main() -> int:
    """Print one JSON line a case; return 1 if one takes longer than its limit."""
    reached = True
    for name, steps, max_gap, budget, limit_seconds in CASES:
        solve = solver_of(steps, random_errors(steps, max_gap), budget)
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            solve()
            times.append(time.perf_counter() - started)
        tracemalloc.start()
        solve()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        within = None if limit_seconds is None else statistics.median(times) <= limit_seconds
        reached = reached and within is not False
        line = {
            "benchmark": "lemica_path",
            "case": name,
            "steps": steps,
            "max_gap": max_gap,
            "budget": budget,
            "best_seconds": min(times),
            "median_seconds": statistics.median(times),
            "peak_bytes": peak_bytes,
            "must_reach_seconds": limit_seconds,
            "reached": within,
        }
        print(json.dumps(line), flush=True)
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
