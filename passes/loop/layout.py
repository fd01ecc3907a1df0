"""Which layers share a block and at which ranks: the plan, its checks, its exact sizes, and its form in the config.

::

    groups of layers ──> LoopPlan ─┬─ sizes(structure)   parameters and bytes, before and after, to the byte
        + rank by member           ├─ check(structure)   or an error that names what does not fit
                                   └─ to_json()          the config's ``loop``, "effcli.loop/1"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from passes.base import PassError
from passes.loop.modeling_looped import FORMAT
from passes.loop.targets import Structure

Groups = tuple[tuple[int, ...], ...]
"""Indices of the layers of each block that has at least two."""


@dataclass(frozen=True)
class Block:
    """Layers that run with one set of linear weights.

    Attributes
    ----------
    layers : tuple of int
        Ascending.
    ranks : mapping of str to tuple of int
        For each linear, by its dotted name in a layer, the rank of every member's own part; 0 for none.
    sparse : mapping of str to tuple of int
        Entries of every member's own sparse part likewise; empty where there are none.
    """

    layers: tuple[int, ...]
    ranks: Mapping[str, tuple[int, ...]]
    sparse: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def entries(self, name: str) -> tuple[int, ...]:
        """Return how many entries every member's own sparse part of a linear has."""
        return self.sparse.get(name, (0,) * len(self.layers))


@dataclass(frozen=True)
class Sizes:
    """What a plan does to a model's size.

    Attributes
    ----------
    parameters_before, parameters_after : int
        Of the whole model, each shared tensor once.
    bytes_before, bytes_after : int
        Of all tensors as stored, in the dtype of the structure.
    layers_before, layers_after : int
        Parameters of the decoder layers alone.
    delta_parameters : int
        Of the layers' own low-rank and sparse parts.
    sparse_parameters : int
        Of the sparse parts alone.
    unpacked_entries : int
        Of the linears that have a sparse part: each forward unpacks them.
    mask_bytes : int
        That say where the entries of sparse parts are; no parameters, and among the bytes.
    delta_flops_per_token : int
        Multiplications and additions that low-rank parts take for one token: two a parameter.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    layers_before: int
    layers_after: int
    delta_parameters: int
    sparse_parameters: int = 0
    unpacked_entries: int = 0
    mask_bytes: int = 0

    @property
    def delta_flops_per_token(self) -> int:
        """FLOPs that the low-rank parts add for one token; a sparse part is added to the shared weight instead."""
        return 2 * (self.delta_parameters - self.sparse_parameters)

    @property
    def share(self) -> float:
        """Parameters after / before."""
        return self.parameters_after / self.parameters_before

    @property
    def layers_share(self) -> float:
        """Parameters of the decoder layers after / before."""
        return self.layers_after / self.layers_before


@dataclass(frozen=True)
class LoopPlan:
    """Which layers of a model share their linears.

    Attributes
    ----------
    stack : str
        Dotted name of the list of layers.
    layers : int
        In that list.
    blocks : tuple of Block
        Those with at least two layers, by their first.
    """

    stack: str
    layers: int
    blocks: tuple[Block, ...]

    @property
    def shared_layers(self) -> frozenset[int]:
        """Layers that run with a block's weights."""
        return frozenset(index for block in self.blocks for index in block.layers)

    @property
    def sets(self) -> int:
        """Sets of layer weights that are stored: blocks, and layers on their own."""
        return self.layers - sum(len(block.layers) - 1 for block in self.blocks)

    @classmethod
    def even(
        cls,
        structure: Structure,
        groups: Sequence[Sequence[int]],
        rank: int | Sequence[int],
        density: float = 0.0,
    ) -> LoopPlan:
        """Return the plan with one rank for every linear and member, the same for all groups or one for each.

        With a density, that share of every linear's entries is each further member's own; the shared weight is then
        the first member's in them, which has no part of its own.
        """
        ranks = (rank,) * len(groups) if isinstance(rank, int) else rank
        blocks = []
        for group, own in zip(groups, ranks, strict=True):
            if len(group) < 2:
                continue
            shapes, others = structure.linears[min(group)], len(group) - 1
            first = 0 if density else own
            sparse = {name: (0,) + (round(density * shape.parameters),) * others for name, shape in shapes.items()}
            even = {name: (first,) + (own,) * others for name in shapes}
            blocks.append(Block(tuple(sorted(group)), even, sparse if density else {}))
        return cls(structure.stack, structure.layers, tuple(sorted(blocks, key=lambda block: block.layers[0])))

    @classmethod
    def from_json(cls, data: Any) -> LoopPlan:
        """Read the config's ``loop``.

        Raises
        ------
        PassError
            Naming what is missing or wrong.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else data
            raise PassError(f"the config's 'loop' has format {found!r}; this release reads {FORMAT!r}")
        try:
            blocks = tuple(
                Block(
                    tuple(int(index) for index in block["layers"]),
                    {str(name): tuple(int(rank) for rank in ranks) for name, ranks in block["ranks"].items()},
                    {str(name): tuple(int(one) for one in counts) for name, counts in block.get("sparse", {}).items()},
                )
                for block in data["blocks"]
            )
            return cls(str(data["stack"]), int(data["layers"]), blocks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PassError(f"the config's 'loop' lacks a part or has a wrong one: {error!r}") from None

    def to_json(self, sizes: Sizes | None = None) -> dict[str, Any]:
        """Return the config's ``loop``; with ``sizes``, what the checkpoint must hold before anything quantizes it."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "stack": self.stack,
            "layers": self.layers,
            "blocks": [
                {"layers": list(block.layers), "ranks": {name: list(ranks) for name, ranks in block.ranks.items()}}
                | ({"sparse": {name: list(counts) for name, counts in block.sparse.items()}} if block.sparse else {})
                for block in self.blocks
            ],
        }
        if sizes is not None:
            data["stored"] = {"parameters": sizes.parameters_after, "bytes": sizes.bytes_after}
        return data

    def check(self, structure: Structure) -> None:
        """Hold the plan against a model.

        Raises
        ------
        PassError
            Naming the layer, linear or rank that does not fit.
        """
        if (self.stack, self.layers) != (structure.stack, structure.layers):
            raise PassError(
                f"the plan is of {self.layers} layers at '{self.stack}', {structure.name} has {structure.layers} at "
                f"'{structure.stack}'"
            )
        seen: set[int] = set()
        for block in self.blocks:
            if len(block.layers) < 2 or list(block.layers) != sorted(set(block.layers)):
                raise PassError(f"block {list(block.layers)} is no ascending list of at least two layers")
            if not all(0 <= index < self.layers for index in block.layers):
                raise PassError(f"block {list(block.layers)} names a layer that is not there: there are {self.layers}")
            if twice := seen & set(block.layers):
                raise PassError(f"layer {min(twice)} is in two blocks")
            seen |= set(block.layers)
            check_kinds(structure, block.layers)
            shapes = structure.linears[block.layers[0]]
            if odd := sorted(set(block.ranks) ^ set(shapes)):
                raise PassError(f"block {list(block.layers)} does not list the layers' linears: {odd[0]}")
            for name, ranks in block.ranks.items():
                check_rank(max(ranks), min(ranks), name, structure, block.layers[0])
                if len(ranks) != len(block.layers):
                    raise PassError(f"{name} of block {list(block.layers)} has {len(ranks)} ranks")
            for name, counts in block.sparse.items():
                most = shapes[name].parameters if name in shapes else 0
                if len(counts) != len(block.layers) or counts[0] or not all(0 <= one <= most for one in counts):
                    raise PassError(
                        f"{name} of block {list(block.layers)} has sparse parts of {list(counts)} entries; one for "
                        f"each layer is needed, 0 for the first, at most {most}"
                    )

    def sizes(self, structure: Structure) -> Sizes:
        """Return parameters and bytes before and after, exactly."""
        saved = saved_bytes = deltas = sparse = unpacked = masks = 0
        for block in self.blocks:
            for name, shape in structure.linears[block.layers[0]].items():
                counts = block.entries(name)
                added = sum(block.ranks[name]) * shape.rank_parameters + sum(counts)
                fewer = (len(block.layers) - 1) * shape.parameters - added
                members = sum(count > 0 for count in counts)
                mask_bytes = members * -(-shape.parameters // 8)
                deltas += added
                sparse += sum(counts)
                unpacked += members * shape.parameters
                masks += mask_bytes
                saved += fewer
                saved_bytes += fewer * shape.itemsize - mask_bytes
        layers = sum(structure.layer_parameters)
        return Sizes(
            parameters_before=structure.parameters,
            parameters_after=structure.parameters - saved,
            bytes_before=structure.stored_bytes,
            bytes_after=structure.stored_bytes - saved_bytes,
            layers_before=layers,
            layers_after=layers - saved,
            delta_parameters=deltas,
            sparse_parameters=sparse,
            unpacked_entries=unpacked,
            mask_bytes=masks,
        )


def check_rank(most: int, least: int, name: str, structure: Structure, layer: int) -> None:
    """Refuse a rank that a linear cannot have.

    Raises
    ------
    PassError
        Naming the matrix and its smallest side.
    """
    shape = structure.linears[layer][name]
    side = min(shape.out_features, shape.in_features)
    if least < 0 or most > side:
        raise PassError(
            f"rank={most if most > side else least} does not fit {structure.stack}.{layer}.{name}, which is "
            f"{shape.out_features} x {shape.in_features}; give a rank from 0 to {side}"
        )


def check_kinds(structure: Structure, group: Sequence[int]) -> None:
    """Refuse layers of different kinds in one block.

    Raises
    ------
    PassError
    """
    first = group[0]
    for index in group:
        if index in structure.unshareable:
            raise PassError(
                f"layer {index} of {structure.name} cannot share its weights: {structure.unshareable[index]}; give a "
                "target, which leaves it alone, or keep_first, keep_last"
            )
    for other in group[1:]:
        if structure.kinds[other] != structure.kinds[first]:
            raise PassError(
                f"layers {first} and {other} of {structure.name} cannot share weights: layer {first} is "
                f"{structure.kinds[first]}, layer {other} is {structure.kinds[other]}; give a target, which groups "
                "layers of one kind only, or keep_first, keep_last"
            )
