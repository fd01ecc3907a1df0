"""The solver against brute force: every path of every budget, on thousands of small graphs."""

from __future__ import annotations

import itertools
import math
import random
from itertools import pairwise

import pytest

from passes.base import PassError
from passes.lemica import path as paths

GRAPHS_A_KIND = 1_300
KINDS = ("distinct", "distinct and missing", "ties", "ties and missing")


def make_graph(kind: str, generator: random.Random) -> tuple[int, dict[paths.Edge, float]]:
    """Return steps and errors that do not grow with the gap; where some are tied, from {0, 1, 2, 3}."""
    steps = generator.randint(2, 8)
    largest = generator.randint(2, 5)
    edges = [(i, j) for i in range(steps) for j in range(i + 2, min(i + largest, steps - 1) + 1)]
    if "missing" in kind:
        edges = [edge for edge in edges if generator.random() < 0.7]
    draw = (lambda: float(generator.choice((0, 1, 1, 2, 3)))) if "ties" in kind else generator.random
    return steps, {edge: draw() for edge in edges}


def all_paths(steps: int, weights: dict[paths.Edge, float]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Return every path from the first to the last step, with its errors in order, found without any solver."""
    known = {(step, step + 1): 0.0 for step in range(steps - 1)} | weights
    found = []
    for size in range(steps - 1):
        for inner in itertools.combinations(range(1, steps - 1), size):
            full = (0, *inner, steps - 1)
            edges = list(pairwise(full))
            if all(edge in known for edge in edges):
                found.append((full, tuple(known[edge] for edge in edges)))
    return found


def answer(solver: paths.Solver, steps: int, weights: dict[paths.Edge, float], budget: int) -> tuple[int, ...] | None:
    """Return the solver's path, or None where it says that there is none of this budget."""
    try:
        return solver(steps, weights, budget)
    except PassError as error:
        assert str(error).startswith(f"budget={budget}: ")
        return None


def padded(errors: tuple[float, ...], length: int) -> list[float]:
    return sorted(errors, reverse=True) + [0.0] * (length - len(errors))


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_that_of_brute_force(kind: str) -> None:
    generator = random.Random(f"paths, {kind}")
    not_growing = without_path = 0
    for _ in range(GRAPHS_A_KIND):
        steps, weights = make_graph(kind, generator)
        not_growing += any(weights.get((i, j + 1), math.inf) < error for (i, j), error in weights.items())
        every = [
            (padded(errors, steps), len(full), full, math.fsum(errors)) for full, errors in all_paths(steps, weights)
        ]
        every.sort()
        best: dict[int, tuple[int, ...]] = {}
        for _, count, full, _ in every:
            best.setdefault(count, full)
        assert paths.all_budgets(steps, weights) == best

        for budget in range(2, steps + 1):
            at_most = next((full for _, count, full, _ in every if count <= budget), None)
            assert answer(paths.lexicographic_at_most, steps, weights, budget) == at_most
            assert answer(paths.lexicographic, steps, weights, budget) == best.get(budget)
            shortest = min(((total, full) for _, count, full, total in every if count == budget), default=(0.0, None))
            assert answer(paths.shortest_sum, steps, weights, budget) == shortest[1]
            without_path += budget not in best

        limit = generator.choice((0.0, 0.2, 0.5, 1.0, 2.0))
        assert paths.smallest_budget(steps, weights, limit) == min(
            count for errors, count, *_ in every if errors[0] <= limit
        )
    assert not_growing > GRAPHS_A_KIND / 10
    assert without_path > GRAPHS_A_KIND / 10


def test_dropping_the_bottleneck_and_solving_again_is_wrong() -> None:
    # Errors (3, 3, 1) and (3, 2, 2): both have bottleneck 3, and the second has it once.
    first, second = (0, 2, 6, 12), (0, 4, 8, 12)
    weights = {(0, 2): 3.0, (2, 6): 3.0, (6, 12): 1.0, (0, 4): 3.0, (4, 8): 2.0, (8, 12): 2.0}

    def without_bottleneck(full: tuple[int, ...]) -> list[float]:
        return sorted((error for edge in pairwise(full) if (error := weights[edge]) != 3.0), reverse=True)

    assert [full for full, _ in all_paths(13, weights) if len(full) == 4] == [first, second]
    assert min((first, second), key=without_bottleneck) == first
    assert paths.lexicographic(13, weights, 4) == second


def test_equal_paths_give_the_earliest_full_steps_and_the_fewest() -> None:
    tied = {(i, j): 1.0 for i in range(10) for j in range(i + 2, min(i + 4, 9) + 1)}
    assert paths.lexicographic(10, tied, 6) == (0, 1, 2, 3, 5, 9)
    assert paths.shortest_sum(10, tied, 6) == (0, 1, 2, 3, 5, 9)
    shuffled = dict(random.Random(0).sample(sorted(tied.items()), len(tied)))
    assert paths.lexicographic(10, shuffled, 6) == (0, 1, 2, 3, 5, 9)
    nothing = dict.fromkeys(tied, 0.0)
    assert paths.lexicographic_at_most(10, nothing, 8) == (0, 1, 5, 9)


def test_fewer_full_steps_are_taken_where_they_are_better() -> None:
    weights = {(0, 2): 5.0, (1, 3): 5.0, (2, 4): 5.0, (0, 4): 1.0}
    assert paths.lexicographic(5, weights, 4) == (0, 1, 2, 4)
    assert paths.lexicographic_at_most(5, weights, 4) == (0, 4)
    assert paths.smallest_budget(5, weights, 1.0) == 2


def test_sums_are_exact() -> None:
    # 1e16 + 1 rounds back to 1e16, so that sums of floats would tie and the earlier path would win.
    weights = {(0, 2): 1e16, (2, 6): 1.0, (0, 4): 1e16, (4, 6): 0.5}
    assert paths.shortest_sum(7, weights, 3) == (0, 4, 6)


@pytest.mark.parametrize(("steps", "budget"), [(steps, b) for steps in (2, 3, 50, 97) for b in range(2, steps + 1)])
def test_uniform_is_even(steps: int, budget: int) -> None:
    full = paths.uniform(steps, {}, budget)
    gaps = [end - start for start, end in pairwise(full)]
    assert len(full) == budget and full[0] == 0 and full[-1] == steps - 1
    assert max(gaps) == math.ceil((steps - 1) / (budget - 1))
    assert min(gaps) == (steps - 1) // (budget - 1)


def test_greedy_spends_full_steps_where_the_result_changes() -> None:
    steps = 30
    change = [0.0] + [8.0] * 9 + [1.0] * 20
    weights = {
        (i, j): math.fsum(change[i + 1 : j]) for i in range(steps) for j in range(i + 2, min(i + 8, steps - 1) + 1)
    }
    for budget in range(6, steps + 1):
        full = paths.greedy(steps, weights, budget)
        assert len(full) == budget and full[0] == 0 and full[-1] == steps - 1 and sorted(set(full)) == list(full)
        assert paths.segment_errors(full, weights) is not None
    # A threshold of 4 runs the first ten steps, then every fifth.
    assert paths.greedy(steps, weights, 14) == (*range(10), 14, 19, 24, 29)
    # 3 gives 15, and no threshold 16: one more splits the segments with the most change, the first, in its middle.
    assert paths.greedy(steps, weights, 15) == (*range(10), 13, 17, 21, 25, 29)
    assert paths.greedy(steps, weights, 16) == (*range(10), 11, 13, 17, 21, 25, 29)


def test_greedy_on_random_graphs_keeps_to_the_edges() -> None:
    generator = random.Random(1)
    for _ in range(100):
        steps, largest = generator.randint(4, 25), generator.randint(2, 8)
        weights = {
            (i, j): generator.random() for i in range(steps) for j in range(i + 2, min(i + largest, steps - 1) + 1)
        }
        for budget in range(math.ceil((steps - 1) / min(largest, steps - 1)) + 1, steps + 1):
            full = paths.greedy(steps, weights, budget)
            assert len(full) == budget
            assert paths.segment_errors(full, weights) is not None


def test_greedy_says_where_a_missing_edge_stops_it() -> None:
    # Without (0, 2) step 1 runs in full, and from there nothing skips both 2 and 3.
    weights = {(1, 3): 1.0, (0, 4): 1.0, (2, 4): 1.0}
    assert paths.lexicographic(5, weights, 2) == (0, 4)
    with pytest.raises(PassError, match=r"budget=2: a threshold finds no path of 2 full steps over 5 steps"):
        paths.greedy(5, weights, 2)


def test_solvers_are_one_interface() -> None:
    weights = {(i, j): 1.0 for i in range(12) for j in range(i + 2, min(i + 4, 11) + 1)}
    for solver in paths.SOLVERS.values():
        full = solver(12, weights, 6)
        assert len(full) == 6 and full[0] == 0 and full[-1] == 11


def test_segment_errors() -> None:
    weights = {(0, 2): 0.5}
    assert paths.segment_errors((0, 2, 3), weights) == (0.5, 0.0)
    assert paths.segment_errors((0, 3), weights) is None


@pytest.mark.parametrize("budget", [*range(2, 51)])
def test_a_speedup_is_turned_into_its_budget(budget: int) -> None:
    assert paths.for_speedup(50, 50 / budget) == budget
    assert paths.for_speedup(50, max(1.0, math.nextafter(50 / budget, 0))) == budget


def test_a_speedup_is_reached() -> None:
    assert paths.for_speedup(50, 2.4) == 20
    assert paths.for_speedup(50, 2.6) == 19


@pytest.mark.parametrize("speedup", [0.9, -1.0, 26.0, math.inf, math.nan])
def test_a_speedup_that_cannot_be_is_refused(speedup: float) -> None:
    with pytest.raises(PassError, match=rf"speedup={speedup} is not in 1 … 25"):
        paths.for_speedup(50, speedup)


@pytest.mark.parametrize("solver", [*paths.SOLVERS.values(), paths.lexicographic_at_most, paths.all_budgets])
@pytest.mark.parametrize("budget", [-1, 0, 1, 51])
def test_a_budget_out_of_range_is_refused(solver: paths.Solver, budget: int) -> None:
    with pytest.raises(PassError, match=rf"budget={budget} is not in 2 … 50"):
        solver(50, {}, budget)


def test_one_step_is_refused() -> None:
    with pytest.raises(PassError, match="steps=1 leaves nothing to skip"):
        paths.lexicographic(1, {}, 2)


@pytest.mark.parametrize("solver", [paths.lexicographic, paths.lexicographic_at_most, paths.shortest_sum, paths.greedy])
def test_the_smallest_gap_that_works_is_named_and_works(solver: paths.Solver) -> None:
    def graph(largest: int) -> dict[paths.Edge, float]:
        return {(i, j): 1.0 for i in range(50) for j in range(i + 2, min(i + largest, 49) + 1)}

    with pytest.raises(PassError, match=r"gaps up to 8 .* 6 full steps; set max_gap=10 or more, or budget=8 or more"):
        solver(50, graph(8), 6)
    with pytest.raises(PassError, match="max_gap=10"):
        solver(50, graph(9), 6)
    assert len(solver(50, graph(10), 6)) == 6
    assert len(solver(50, graph(8), 8)) == 8


def test_missing_edges_are_named_as_the_reason() -> None:
    # Gaps of 4 would do, but there is one only.
    with pytest.raises(PassError, match=r"budget=3: edges are missing, .* at most 3 full steps; use one of 4, 7, or m"):
        paths.lexicographic_at_most(7, {(0, 4): 1.0}, 3)
    with pytest.raises(PassError, match=r"budget=5: edges are missing, .* exactly 5 full steps; use one of 4, 7, or m"):
        paths.lexicographic(7, {(0, 4): 1.0}, 5)


@pytest.mark.parametrize("solver", [paths.lexicographic, paths.shortest_sum, paths.greedy, paths.all_budgets])
@pytest.mark.parametrize(
    ("edge", "error", "message"),
    [
        ((1, 3), math.nan, r"edge \(1, 3\) has error nan"),
        ((1, 3), math.inf, r"edge \(1, 3\) has error inf"),
        ((1, 3), -0.5, r"edge \(1, 3\) has error -0.5"),
        ((3, 1), 1.0, r"edge \(3, 1\) does not lead forward between steps 0 … 5"),
        ((3, 6), 1.0, r"edge \(3, 6\) does not lead forward"),
        ((-1, 2), 1.0, r"edge \(-1, 2\) does not lead forward"),
        ((2, 3), 0.1, r"edge \(2, 3\) skips nothing but has error 0.1"),
    ],
)
def test_a_bad_edge_is_named(solver: paths.Solver, edge: paths.Edge, error: float, message: str) -> None:
    with pytest.raises(PassError, match=message):
        solver(6, {(0, 2): 1.0, edge: error}, 4)


@pytest.mark.parametrize("limit", [-0.1, math.nan])
def test_a_limit_below_zero_is_refused(limit: float) -> None:
    with pytest.raises(PassError, match=f"max_error={limit} must be 0 or more"):
        paths.smallest_budget(5, {}, limit)
