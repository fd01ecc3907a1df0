"""The allocation is the best there is: against trying every combination, in exact arithmetic."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable
from fractions import Fraction

import pytest

from passes.base import PassError
from passes.quantize.allocation import LOSS_BITS, Choice, Group, solve

INSTANCES = 200  # of each kind of losses


def brute_force(groups: list[Group], bits: float) -> tuple[Fraction, int] | None:
    """Return the least loss within the budget and the fewest stored bits that reach it; None where nothing fits."""
    budget = Fraction(str(bits)) * sum(group.parameters for group in groups)
    sums = (
        (sum(Fraction(choice.loss) for choice in picked), sum(choice.stored_bits for choice in picked))
        for picked in itertools.product(*(group.choices for group in groups))
    )
    return min(((loss, stored) for loss, stored in sums if stored <= budget), default=None)


LOSSES: dict[str, Callable[[random.Random], float]] = {
    "uniform": lambda rng: rng.random(),
    "ties": lambda rng: float(rng.randint(0, 3)),
    "many magnitudes": lambda rng: 10 ** rng.uniform(-9, 2),
    "zeros": lambda rng: rng.choice([0.0, 0.0, 1e-3]),
    "negative too": lambda rng: rng.uniform(-1, 1),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_as_good_as_trying_everything(kind: str) -> None:
    rng = random.Random(kind)
    infeasible = 0
    for _ in range(INSTANCES):
        groups = []
        for index in range(rng.randint(1, 5)):
            parameters = rng.choice([8, 16, 24, 80])
            choices = tuple(
                Choice(4, 32, parameters * rng.randint(1, 10) // rng.choice([1, 2]), LOSSES[kind](rng))
                for _ in range(rng.randint(1, 5))
            )
            groups.append(Group(f"g{index}", parameters, choices))
        bits = round(rng.uniform(0.3, 12), rng.choice([0, 1, 3]))
        best = brute_force(groups, bits)
        if best is None:
            infeasible += 1
            with pytest.raises(PassError, match="need at least"):
                solve(groups, bits)
            continue
        found = solve(groups, bits)
        taken = [group.choices[index] for group, index in zip(groups, found.chosen, strict=True)]
        loss = sum(Fraction(choice.loss) for choice in taken)
        largest = sum(max(abs(choice.loss) for choice in group.choices) for group in groups)
        assert loss - best[0] <= Fraction(largest) * len(groups) / 2**LOSS_BITS
        assert found.stored_bits == sum(choice.stored_bits for choice in taken)
        assert found.stored_bits <= Fraction(str(bits)) * sum(group.parameters for group in groups)
        assert found.loss == math.fsum(choice.loss for choice in taken)
        if loss == best[0]:
            assert found.stored_bits == best[1], "equal loss for more bits"
    assert 0 < infeasible < INSTANCES


def test_budget_is_the_decimal_that_was_given() -> None:
    # 4.3 in binary is less than 4.3: a budget of exactly 4.3 bits must still fit.
    group = Group("g", 10, (Choice(4, 32, 43, 0.5), Choice(4, 64, 42, 1.0)))
    assert solve([group], 4.3).chosen == (0,)
    assert solve([group], 4.29).chosen == (1,)


def test_infeasible_budget_names_one_that_is_feasible() -> None:
    groups = [Group("a", 7, (Choice(4, 32, 30, 0.0),)), Group("b", 6, (Choice(4, 32, 25, 0.0),))]
    with pytest.raises(PassError, match=r"bits=4 cannot be reached.*give bits=4\.231") as caught:
        solve(groups, 4.0)
    named = float(str(caught.value).rpartition("bits=")[2])
    assert solve(groups, named).stored_bits == 55


def test_a_dominated_choice_is_never_taken() -> None:
    group = Group("g", 10, (Choice(4, 32, 50, 1.0), Choice(4, 64, 40, 1.0), Choice(8, None, 80, 2.0)))
    assert solve([group], 8.0).chosen == (1,)


def test_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(PassError, match=r"loss of 'g' is not finite"):
        solve([Group("g", 1, (Choice(4, 32, 4, math.nan),))], 8.0)


def test_no_groups() -> None:
    with pytest.raises(PassError, match="no layer to allocate"):
        solve([], 4.0)


LAYOUTS = (
    (4, 128, (1.0, 1.4)),
    (4, 64, (0.8, 1.2)),
    (4, 32, (0.6, 1.0)),
    (8, None, (0.004, 0.006)),
    (8, 128, (0.003, 0.005)),
)


@pytest.mark.parametrize("odd_shapes", [False, True])
def test_eighty_layers_take_moments(odd_shapes: bool) -> None:
    rng = random.Random(0)
    groups = []
    for layer in range(80):
        for name, size in (("qkv", 10240 * 8192), ("o", 8192 * 8192), ("up", 2 * 28672 * 8192), ("down", 28672 * 8192)):
            parameters = size + (rng.randrange(1_000_000) if odd_shapes else 0)
            scale = 10 ** rng.uniform(-4, -1)
            choices = tuple(
                Choice(
                    bits, columns, parameters * bits + 16 * parameters // (columns or 8192), scale * rng.uniform(*loss)
                )
                for bits, columns, loss in LAYOUTS
            )
            groups.append(Group(f"{layer}.{name}", parameters, choices))
    for bits in (4.14, 4.5, 5.0, 7.9):
        started = time.process_time()
        found = solve(groups, bits)
        assert time.process_time() - started < 5
        assert bits - 0.01 < found.bits_per_parameter <= bits
