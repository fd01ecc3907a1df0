r"""Which bits each group of layers gets, so that the summed loss is least and the stored size stays within a budget.

::

    group 1: (cost, loss) per choice ─┐
    group 2: ...                      ├─ dynamic program over the Pareto frontier of partial sums ──> one choice a group
    group n: ...                     ─┘

        loss │ x
             │   x      a partial sum is kept only where no cheaper one has as little loss,
             │      x   and where the best that the rest can add does not already exceed a known solution
             └──────────── stored bits

A multiple-choice knapsack, solved exactly: costs are whole bits, losses are rounded once to whole units of
2^-40 of the largest possible sum, and everything after that is integer arithmetic. The bound that prunes is Lagrangian
(Dyer, Riha & Walker, "A hybrid dynamic programming/branch-and-bound algorithm for the multiple-choice knapsack
problem", 1995). See ``docs/passes/mixed-bits.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from passes.base import PassError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]

LOSS_BITS = 40
"""The largest possible sum of losses becomes 2^LOSS_BITS units."""
BOUND_MARGIN = 1 << 10
"""Units by which the bound, computed in float64, must exceed a known solution before it prunes."""
DISPLAYED = 1000
"""A budget in an error message is rounded up to one part in this many of a bit."""


@dataclass(frozen=True)
class Choice:
    """One way to store a group of layers.

    Attributes
    ----------
    bits : int
        Of one weight.
    group_size : int or None
        Weights that share a scale; None for whole rows.
    stored_bits : int
        Of the whole group, scales included.
    loss : float
        What it costs in quality; any unit that adds up over groups.
    """

    bits: int
    group_size: int | None
    stored_bits: int
    loss: float


@dataclass(frozen=True)
class Group:
    """Layers that must be stored alike.

    Attributes
    ----------
    name : str
    parameters : int
        Weights in all its layers.
    choices : tuple of Choice
        At least one.
    """

    name: str
    parameters: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Solution:
    """The best choice of every group.

    Attributes
    ----------
    chosen : tuple of int
        Index into each group's choices, in the order of the groups.
    stored_bits : int
    bits_per_parameter : float
    loss : float
        Summed, of the choices taken.
    """

    chosen: tuple[int, ...]
    stored_bits: int
    bits_per_parameter: float
    loss: float


def solve(groups: Sequence[Group], bits: float) -> Solution:
    """Choose for every group so that the summed loss is least and at most ``bits`` are stored per parameter.

    Of solutions with equal loss one with the fewest stored bits is returned.

    Parameters
    ----------
    groups : sequence of Group
    bits : float
        Stored bits per parameter over all groups together, scales included. Taken as the decimal that it prints as.

    Returns
    -------
    Solution

    Raises
    ------
    PassError
        If no choice fits, naming the smallest number of bits that does; or if a loss is not finite.
    """
    if not groups:
        raise PassError("there is no layer to allocate bits to; leave out scheme=auto or ignore fewer layers")
    for group in groups:
        if not all(math.isfinite(choice.loss) for choice in group.choices):
            raise PassError(f"the loss of '{group.name}' is not finite; the model's weights or activations overflow")
    parameters = sum(group.parameters for group in groups)
    budget = math.floor(Fraction(repr(float(bits))) * parameters)
    cheapest = sum(min(choice.stored_bits for choice in group.choices) for group in groups)
    if cheapest > budget:
        least = math.ceil(Fraction(cheapest, parameters) * DISPLAYED) / DISPLAYED
        raise PassError(f"bits={bits:g} cannot be reached: these layers need at least {least:g}; give bits={least:g}")
    chosen = _solve(groups, budget - cheapest)
    taken = [group.choices[index] for group, index in zip(groups, chosen, strict=True)]
    stored = sum(choice.stored_bits for choice in taken)
    return Solution(tuple(chosen), stored, stored / parameters, math.fsum(choice.loss for choice in taken))


def _solve(groups: Sequence[Group], budget: int) -> list[int]:
    """Return the choice of each group; ``budget`` in bits above the cheapest choice of every group."""
    import numpy as np

    options = [_options(group) for group in groups]
    unit = _loss_unit(options)
    costs = [np.array([cost for _, cost, _ in option], dtype=np.int64) for option in options]
    losses = [np.array([round(Fraction(loss) / unit) for _, _, loss in option], dtype=np.int64) for option in options]
    price, known = _relaxed(costs, losses, budget)
    # What groups i, i + 1, … add at least: sum of min(loss + price * cost), less price * what is left of the budget.
    rest = np.zeros(len(groups) + 1)
    for index in reversed(range(len(groups))):
        rest[index] = rest[index + 1] + float((losses[index] + price * costs[index]).min())

    spent, lost = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    steps: list[tuple[Integers, Integers]] = []
    for index in range(len(groups)):
        next_spent = (spent[:, None] + costs[index]).ravel()
        next_lost = (lost[:, None] + losses[index]).ravel()
        bound = next_lost + rest[index + 1] - price * (budget - next_spent)
        alive = np.flatnonzero((next_spent <= budget) & (bound <= known + BOUND_MARGIN))
        order = alive[np.lexsort((next_lost[alive], next_spent[alive]))]
        best_before = np.minimum.accumulate(np.concatenate(([np.iinfo(np.int64).max], next_lost[order][:-1])))
        kept = order[next_lost[order] < best_before]
        parent, choice = np.divmod(kept, len(costs[index]))
        steps.append((parent, choice))
        spent, lost = next_spent[kept], next_lost[kept]
    position = int(np.argmin(lost))
    chosen = []
    for (parent, choice), option in zip(reversed(steps), reversed(options), strict=True):
        chosen.append(option[int(choice[position])][0])
        position = int(parent[position])
    return chosen[::-1]


def _options(group: Group) -> list[tuple[int, int, float]]:
    """Return (index, bits above the cheapest, loss) of a group's choices that no other beats, cheapest first."""
    least = min(choice.stored_bits for choice in group.choices)
    ordered = sorted(enumerate(group.choices), key=lambda item: (item[1].stored_bits, item[1].loss, item[0]))
    kept: list[tuple[int, int, float]] = []
    for index, choice in ordered:
        if not kept or choice.loss < kept[-1][2]:
            kept.append((index, choice.stored_bits - least, choice.loss))
    return kept


def _loss_unit(options: Sequence[Sequence[tuple[int, int, float]]]) -> Fraction:
    largest = sum((Fraction(max(abs(loss) for _, _, loss in option)) for option in options), Fraction(0))
    return largest / 2**LOSS_BITS if largest else Fraction(1)


def _relaxed(costs: Sequence[Integers], losses: Sequence[Integers], budget: int) -> tuple[float, int]:
    """Return a price of one bit for the Lagrangian bound, and the loss of a solution that fits.

    Steps along each group's convex hull are taken from the steepest down while they fit; the price is the slope of the
    first that does not. Any price gives a valid bound; this one is that of the linear relaxation.
    """
    steps: list[tuple[float, int, int, int]] = []  # slope, group, bits, loss gained
    known = 0
    for index, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        known += int(loss[0])
        steps += [(slope, index, bits, gain) for slope, bits, gain in _hull_steps(cost.tolist(), loss.tolist())]
    left, price, blocked = budget, 0.0, set()
    for slope, index, bits, gain in sorted(steps, key=lambda step: -step[0]):
        if index in blocked:
            continue
        if bits <= left:
            left -= bits
            known -= gain
        else:
            price = price or slope
            blocked.add(index)
    return price, known


def _hull_steps(costs: list[int], losses: list[int]) -> list[tuple[float, int, int]]:
    """Return (loss gained per bit, bits, loss gained) of the steps along the lower convex hull, steepest first."""
    hull = [0]
    for point in range(1, len(costs)):
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point, costs, losses):
            hull.pop()
        hull.append(point)
    steps = []
    for before, after in zip(hull, hull[1:], strict=False):
        bits, gain = costs[after] - costs[before], losses[before] - losses[after]
        steps.append((gain / bits, bits, gain))
    return steps


def _turns_up(first: int, middle: int, last: int, costs: list[int], losses: list[int]) -> bool:
    """Return whether the middle point lies on or above the line between the two others."""
    return (losses[first] - losses[middle]) * (costs[last] - costs[first]) <= (losses[first] - losses[last]) * (
        costs[middle] - costs[first]
    )
