"""What the loop pass says of its work: layers, what was left alone, sizes, and healing's curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from passes.base import LayerRecord, Skipped
from passes.loop.layout import LoopPlan, Sizes
from passes.loop.parameters import LoopParameters
from passes.loop.targets import Structure

if TYPE_CHECKING:
    from passes.loop.blocks import FittedPlan
    from passes.loop.training import Trained


def plain(sizes: Sizes) -> dict[str, Any]:
    """Return sizes as they stand in the record."""
    return {
        **asdict(sizes),
        "share": sizes.share,
        "layers_share": sizes.layers_share,
        "delta_flops_per_token": sizes.delta_flops_per_token,
    }


def curve(healed: Trained) -> dict[str, Any]:
    """Return the curve of healing as reports draw it."""
    return {
        "title": "Healing, by tokens trained on",
        "unit": "nats a token",
        "series": [
            {
                "name": "KL divergence, held-out text",
                "points": [[point.tokens, point.held_out] for point in healed.curve],
            },
            {
                "name": "loss in training",
                "points": [[point.tokens, point.loss] for point in healed.curve if point.loss is not None],
            },
        ],
    }


def healing_notes(healed: Trained | None) -> tuple[str, ...]:
    """Return what healing did, in a line; nothing without healing."""
    if healed is None:
        return ()
    first, last = healed.curve[0], healed.curve[-1]
    rounds = healed.tokens / (healed.windows * healed.tokens_of_window)
    return (
        f"healed on {healed.tokens:,} tokens ({rounds:.1f} rounds through the text, {healed.seconds / 60:.1f} minutes, "
        f"ended by {healed.ended}; {healed.trained_parameters:,} parameters trained): KL divergence on windows that "
        f"were not trained on {first.held_out:.3g} -> {last.held_out:.3g} nats a token",
    )


def records(structure: Structure, plan: LoopPlan, found: FittedPlan | None) -> tuple[LayerRecord, ...]:
    """Return one record for each layer's linear, with the relative squared error of its output where it was fitted."""
    return tuple(
        LayerRecord(
            name=f"{plan.stack}.{index}.{name}",
            kind=name.rpartition(".")[2],
            bits=8.0 * structure.linears[index][name].itemsize,
            group_size=None,
            error=None if found is None else found.fitted[number, name].errors[member],
        )
        for number, block in enumerate(plan.blocks)
        for member, index in enumerate(block.layers)
        for name in structure.linears[index]
    )


def shared_errors(plan: LoopPlan, found: FittedPlan) -> dict[str, float]:
    """Return, by the name of a layer's linear, the relative squared error of the shared weight alone."""
    return {
        f"{plan.stack}.{index}.{name}": found.fitted[number, name].shared_errors[member]
        for number, block in enumerate(plan.blocks)
        for member, index in enumerate(block.layers)
        for name in block.ranks
    }


def skipped(parameters: LoopParameters, structure: Structure, plan: LoopPlan) -> tuple[Skipped, ...]:
    """Return the layers that share with none, and why."""
    skipped = []
    for index in range(structure.layers):
        if index in plan.shared_layers:
            continue
        if index in structure.unshareable:
            reason = structure.unshareable[index]
        elif index < parameters.keep_first:
            reason = f"keep_first={parameters.keep_first} was asked for"
        elif index >= structure.layers - parameters.keep_last:
            reason = f"keep_last={parameters.keep_last} was asked for"
        else:
            reason = "the target is met without sharing it, at less damage"
        skipped.append(Skipped(f"{plan.stack}.{index}", reason))
    return tuple(skipped)


def summary(plan: LoopPlan, sizes: Sizes) -> str:
    """Return layers, blocks, ranks and shares of the parameters, in a line."""
    ranks = sorted({rank for block in plan.blocks for members in block.ranks.values() for rank in members})
    own = "no part of their own" if ranks[-1:] == [0] else f"parts of rank {ranks[0]} to {ranks[-1]} of their own"
    if sizes.sparse_parameters:
        own = f"{sizes.sparse_parameters / sizes.unpacked_entries:.0%} of further layers' entries of their own"
    return (
        f"{len(plan.shared_layers)} of {plan.layers} layers run with {len(plan.blocks)} stored blocks and {own}: "
        f"{sizes.share:.1%} of the parameters, {sizes.layers_share:.1%} of the layers'"
    )


def notes(plan: LoopPlan, sizes: Sizes) -> tuple[str, ...]:
    """Return what a user of the result should know, one line each."""
    loops: Mapping[int, int] = {
        size: sum(len(block.layers) == size for block in plan.blocks)
        for size in sorted({len(block.layers) for block in plan.blocks})
    }
    shown = ", ".join(f"{count} of {size} layers" for size, count in loops.items())
    unpacked: tuple[str, ...] = ()
    if sizes.sparse_parameters:
        unpacked = (
            f"sparse parts have {sizes.sparse_parameters:,} entries of {sizes.unpacked_entries:,}, and "
            f"{sizes.mask_bytes:,} bytes say where; every forward unpacks them, a linear at a time: memory stays small "
            "and decode becomes slower; model.unpack() holds them unpacked",
        )
    return (
        f"blocks: {shown}; {plan.sets} sets of layer weights in place of {plan.layers}",
        f"the layers' own low-rank parts take {sizes.delta_parameters - sizes.sparse_parameters:,} parameters and add "
        f"{sizes.delta_flops_per_token:,} FLOPs a token",
        *unpacked,
        "a step still reads a block's weights in each of its loops: what is stored shrinks, what a step moves does not "
        "by itself",
        "plain transformers reads the folder with trust_remote_code=True; effcli runs no code of it",
    )
