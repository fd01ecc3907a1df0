"""Choose which layers share a block: CYCLE, SEQUENCE, or the grouping of least damage that meets a target.

::

    CYCLE     A B C A B C     layers b, b + blocks, b + 2 blocks, …
    SEQUENCE  A A B B C C     runs of neighbours
    free      A B B C D D D   runs of neighbours of any length, each with a rank, by what sharing was measured to cost
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from passes.base import PassError
from passes.loop.layout import Groups, LoopPlan, check_kinds, check_rank
from passes.loop.parameters import LoopParameters
from passes.loop.targets import Structure


def check(parameters: LoopParameters, structure: Structure) -> None:
    """Refuse parameters that no grouping of this model satisfies.

    Raises
    ------
    PassError
        Naming the value and the remedy.
    """
    looped = looped_layers(parameters, structure)
    of_neighbours = not parameters.is_complete or parameters.chosen_pattern == "free"
    if of_neighbours and not candidates(parameters, structure):
        raise PassError(
            f"no two neighbouring layers of {structure.name} are of one kind, so none can share weights; "
            "pattern=cycle shares layers that are further apart"
        )
    sides = {
        (index, name): min(shape.out_features, shape.in_features)
        for index in looped
        for name, shape in structure.linears[index].items()
    }
    index, name = min(sides, key=lambda key: sides[key])
    check_rank(parameters.rank or 0, 0, name, structure, index)
    if parameters.blocks is not None or (parameters.target is not None and parameters.chosen_pattern != "free"):
        regular(parameters, structure)
    elif parameters.target is not None:
        _check_reachable(parameters, structure)


def looped_layers(parameters: LoopParameters, structure: Structure) -> range:
    """Return the layers that may share.

    Raises
    ------
    PassError
        If fewer than two are left.
    """
    count = structure.layers - parameters.keep_first - parameters.keep_last
    if structure.layers < 2:
        raise PassError(f"{structure.name} has one layer, so there is nothing to share; give a deeper model")
    if count < 2:
        raise PassError(
            f"keep_first={parameters.keep_first} and keep_last={parameters.keep_last} leave {max(count, 0)} of "
            f"{structure.layers} layers, and sharing takes two; keep fewer"
        )
    looped = range(parameters.keep_first, structure.layers - parameters.keep_last)
    if all(index in structure.unshareable for index in looped):
        reason = structure.unshareable[looped.start]
        raise PassError(f"no layer of {structure.name} can share its weights: layer {looped.start} has {reason}")
    return looped


def regular(parameters: LoopParameters, structure: Structure) -> Groups:
    """Return the groups of CYCLE or SEQUENCE: as many blocks as asked for, or as many as meet the target.

    Raises
    ------
    PassError
        If blocks · loops is not the number of layers, layers of different kinds would share, or no number of blocks
        meets the target.
    """
    layers, pattern = looped_layers(parameters, structure), parameters.chosen_pattern
    if parameters.blocks is not None:
        assert parameters.loops is not None
        if parameters.blocks * parameters.loops != len(layers):
            kept = structure.layers - len(layers)
            without = f" without the {kept} that are kept" if kept else ""
            pairs = [f"blocks={len(layers) // loops},loops={loops}" for loops in divisors(len(layers))]
            raise PassError(
                f"blocks={parameters.blocks} times loops={parameters.loops} is "
                f"{parameters.blocks * parameters.loops}, and {structure.name} has {len(layers)} layers{without}; give "
                f"{' or '.join(pairs[:4])}, or other keep_first, keep_last"
            )
        groups = arrange(layers, parameters.blocks, pattern)
        for group in groups:
            check_kinds(structure, group)
        return groups
    least = structure.parameters
    for loops in divisors(len(layers)):
        groups = arrange(layers, len(layers) // loops, pattern)
        if not can_share(structure, groups):
            continue
        size = LoopPlan.even(structure, groups, parameters.even_rank).sizes(structure).parameters_after
        if size <= _budget(parameters, structure):
            return groups
        least = min(least, size)
    raise _too_low(parameters, structure, least)


def can_share(structure: Structure, groups: Groups) -> bool:
    """Whether the layers of every group are of one kind and may share."""
    return all(
        len({structure.kinds[index] for index in group}) == 1 and not structure.unshareable.keys() & set(group)
        for group in groups
    )


def divisors(layers: int) -> list[int]:
    """Return the loops, two at least, that so many layers can be run in, the fewest first."""
    return [loops for loops in range(2, layers + 1) if layers % loops == 0]


def arrange(layers: range, blocks: int, pattern: str) -> Groups:
    """Return the layers of each block, in CYCLE or SEQUENCE."""
    loops = len(layers) // blocks
    if pattern == "cycle":
        return tuple(tuple(layers[block::blocks]) for block in range(blocks))
    return tuple(tuple(layers[start : start + loops]) for start in range(0, len(layers), loops))


# --- free: the least damage that meets a target -----------------------------------------------------------------------


def candidates(parameters: LoopParameters, structure: Structure) -> Groups:
    """Return every run of two to ``max_loops`` neighbouring layers of one kind."""
    layers = looped_layers(parameters, structure)
    return tuple(
        tuple(range(start, start + size))
        for start in layers
        for size in range(2, parameters.max_loops + 1)
        if start + size <= layers.stop and can_share(structure, (tuple(range(start, start + size)),))
    )


def saving(structure: Structure, group: Sequence[int], rank: int) -> int:
    """Return the parameters that sharing one group saves; negative where its deltas take more."""
    return sum(
        (len(group) - 1) * shape.parameters - len(group) * rank * shape.rank_parameters
        for shape in structure.linears[group[0]].values()
    )


@dataclass(frozen=True)
class Option:
    """A group of neighbours that may share, and the rank of their own parts.

    Attributes
    ----------
    layers : tuple of int
    rank : int
    saved : int
        Parameters; negative where the parts take more than sharing saves.
    damage : float
        Nats a token.
    """

    layers: tuple[int, ...]
    rank: int
    saved: int
    damage: float


@dataclass(frozen=True)
class _Partial:
    """A choice for the first layers."""

    saved: int
    damage: float
    options: tuple[Option, ...]


def choose(layers: int, options: Sequence[Option], needed: int) -> tuple[Option, ...]:
    """Return options of disjoint layers that save at least ``needed`` parameters at the least summed damage.

    Exact: for each prefix of the layers, of all its choices those are kept which no other betters in both.

    Parameters
    ----------
    layers : int
    options : sequence of Option
        Of neighbouring layers each.
    needed : int

    Raises
    ------
    PassError
        If no choice saves so much.
    """
    ending: dict[int, list[Option]] = {}
    for option in options:
        ending.setdefault(option.layers[-1] + 1, []).append(option)
    fronts: list[list[_Partial]] = [[_Partial(0, 0.0, ())]]
    for stop in range(1, layers + 1):
        reached = list(fronts[stop - 1])
        for option in ending.get(stop, ()):
            reached += [
                _Partial(part.saved + option.saved, part.damage + option.damage, (*part.options, option))
                for part in fronts[option.layers[0]]
            ]
        fronts.append(_undominated(reached, needed))
    enough = [part for part in fronts[layers] if part.saved >= needed]
    if not enough:
        most = max(part.saved for part in fronts[layers])
        raise PassError(f"sharing saves {most:,} parameters at most, and {needed:,} are needed")
    return min(enough, key=lambda part: (part.damage, -part.saved)).options


def _undominated(parts: list[_Partial], needed: int) -> list[_Partial]:
    """Keep what no other betters in savings and damage; more savings than needed count as enough."""
    kept: list[_Partial] = []
    for part in sorted(parts, key=lambda part: (-min(part.saved, needed), part.damage, -part.saved)):
        if not kept or part.damage < kept[-1].damage:
            kept.append(part)
    return kept


def options(
    parameters: LoopParameters, structure: Structure, damage: Callable[[tuple[int, ...], int], float]
) -> list[Option]:
    """Return every group of neighbours with every rank that it may have.

    Parameters
    ----------
    parameters : LoopParameters
    structure : Structure
    damage : callable
        Of a group and a rank, nats a token.
    """
    found = []
    for group in candidates(parameters, structure):
        side = min(min(shape.out_features, shape.in_features) for shape in structure.linears[group[0]].values())
        for rank in parameters.ranks:
            saved = saving(structure, group, rank)
            if rank <= side and (saved > 0 or parameters.rank is not None):
                found.append(Option(group, rank, saved, damage(group, rank)))
    return found


def free(
    parameters: LoopParameters, structure: Structure, damage: Callable[[tuple[int, ...], int], float]
) -> tuple[Option, ...]:
    """Return the groups and ranks of least summed damage that meet the target."""
    needed = structure.parameters - _budget(parameters, structure)
    return choose(structure.layers, options(parameters, structure, damage), needed)


def _check_reachable(parameters: LoopParameters, structure: Structure) -> None:
    """Refuse a target that no grouping meets, naming the least share possible."""
    # With the savings as the negative damage, the least damage is the most that can be saved.
    most = [replace(option, damage=-float(option.saved)) for option in options(parameters, structure, lambda *_: 0.0)]
    least = structure.parameters - sum(option.saved for option in choose(structure.layers, most, 0))
    if least > _budget(parameters, structure):
        raise _too_low(parameters, structure, least)


def _budget(parameters: LoopParameters, structure: Structure) -> int:
    assert parameters.target is not None
    return int(parameters.target * structure.parameters)


def _too_low(parameters: LoopParameters, structure: Structure, least: int) -> PassError:
    outside = structure.parameters - sum(structure.layer_parameters)
    share = least / structure.parameters
    fixed = f"{outside / structure.parameters:.1%} are embeddings and others outside the layers"
    loops = f", max_loops={parameters.max_loops}" if parameters.chosen_pattern == "free" else ""
    return PassError(
        f"target={parameters.target:g} cannot be met: with rank={_rank(parameters)}, "
        f"pattern={parameters.chosen_pattern}{loops} at least {share:.4f} of the {structure.parameters:,} parameters "
        f"stay ({fixed}); give target={_up(share):g} or more, a smaller rank, or more loops"
    )


def _rank(parameters: LoopParameters) -> int:
    """Return the rank that most is saved with."""
    return min(parameters.ranks) if parameters.chosen_pattern == "free" else parameters.even_rank


def _up(share: float) -> float:
    """Return a share rounded up to four decimals."""
    rounded = round(share, 4)
    return rounded if rounded >= share else round(rounded + 1e-4, 4)
