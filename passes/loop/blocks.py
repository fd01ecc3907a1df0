"""Fit every block of a plan: statistics of calibration text, hidden units in one order, ranks, weights.

::

    batches ──> moments of inputs and of gradients of a few layers ──> hidden units of a block's layers in one order
                  (again for the next few)                                 └──> ranks ──> fit, linear by linear
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from passes.loop import align, importance, sparse, statistics, tie
from passes.loop.layout import Block, LoopPlan
from passes.loop.modeling_looped import weight_of
from passes.loop.parameters import LoopParameters
from passes.loop.statistics import Key, Moments
from passes.loop.targets import Shape, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from profilers.base import Progress

MEMORY_SHARE = 0.25
"""Of the free memory that second moments may take at a time."""


@dataclass(frozen=True)
class FittedPlan:
    """What fitting gave.

    Attributes
    ----------
    plan : LoopPlan
        With the ranks that were chosen.
    fitted : dict
        By block number and name of the linear.
    importance : dict
        Mean squared gradient by layer and linear; empty where it was not measured.
    runs : int
        Times that the calibration text was run for moments.
    similarity : dict
        By the layers of a block, how alike their hidden units were before and after they were put in one order:
        inner products as a share of squared lengths. Empty where that was not done.
    """

    plan: LoopPlan
    fitted: dict[tuple[int, str], tie.Fitted]
    importance: dict[Key, float]
    runs: int
    similarity: dict[tuple[int, ...], tuple[float, float]]


def fit(
    model: PreTrainedModel,
    structure: Structure,
    plan: LoopPlan,
    parameters: LoopParameters,
    batches: Sequence[torch.Tensor],
    *,
    seed: int,
    progress: Progress,
    observed: Statistics | None = None,
) -> FittedPlan:
    """Fit the blocks of a plan on calibration text.

    Parameters
    ----------
    model : PreTrainedModel
        The original. What it computes stays the same; hidden units may be in another order afterwards.
    structure : Structure
    plan : LoopPlan
        With even ranks; each block's parameters stay what it says.
    parameters : LoopParameters
    batches : sequence of torch.Tensor
        Token ids, shape (B, T) each; empty where nothing is to be fitted to text.
    seed : int
    progress : Progress
    observed : Statistics, optional
        Of all layers that share, where they are known already; changed with the order of hidden units.
    """
    parts = [list(range(len(plan.blocks)))]
    if batches and observed is None:
        parts = _parts(structure, plan, model.device, parameters.uses_importance)
    blocks, finder = list(plan.blocks), align.Finder(structure)
    found = FittedPlan(plan, {}, {}, len(parts) if batches else 0, {})
    for number, part in enumerate(parts, start=1):
        layers = sorted(index for block in part for index in plan.blocks[block].layers)
        label = f", part {number} of {len(parts)}" if len(parts) > 1 else ""
        known = observed or observe(
            model, structure, layers, parameters, batches, seed=seed, progress=progress, label=label
        )
        found.importance.update({key: known.importance(*key) for key in known.gradients})
        with progress.task("fitting blocks", total=len(part)) as task:
            for index in part:
                members = plan.blocks[index].layers
                if parameters.aligns:
                    found.similarity[members] = _align(model, structure, members, known, finder)
                blocks[index], fitted = _fit_block(model, structure, plan, index, parameters, known)
                found.fitted.update({(index, name): item for name, item in fitted.items()})
                task.advance()
    return replace(found, plan=replace(plan, blocks=tuple(blocks)))


@dataclass
class Statistics:
    """What is known of some layers.

    Attributes
    ----------
    inputs : Moments or None
        None where no text is run.
    gradients : dict
        E[g gᵀ] of outputs, (out, out); empty where errors are not weighed.
    """

    inputs: Moments | None
    gradients: dict[Key, torch.Tensor]

    def importance(self, index: int, name: str) -> float:
        """Return what a squared error of a linear's output counts."""
        found = self.gradients.get((index, name))
        return 1.0 if found is None else float(found.diagonal().mean())


def observe(
    model: PreTrainedModel,
    structure: Structure,
    layers: Sequence[int],
    parameters: LoopParameters,
    batches: Sequence[torch.Tensor],
    *,
    seed: int,
    progress: Progress,
    label: str = "",
) -> Statistics:
    """Run text and return the second moments of some layers' inputs and gradients, as far as they are needed."""
    known = Statistics(None, {})
    if batches and parameters.uses_importance:
        few = batches[: max(1, importance.TOKENS // batches[0].numel())]
        with progress.task(f"weighing layers{label}", total=len(few)) as task:
            generator = torch.Generator().manual_seed(seed)
            known.gradients = importance.measure(model, structure, layers, few, generator=generator, task=task)
    if batches:
        with progress.task(f"inputs of layers{label}", total=len(batches)) as task:
            known.inputs = statistics.collect(model, structure, layers, batches, task)
    return known


def fits_at_once(structure: Structure, layers: Sequence[int], device: torch.device) -> bool:
    """Whether the second moments of so many layers may be in memory together."""
    from profilers.device import memory_available_bytes

    return sum(_needed_bytes(structure, index, True) for index in layers) <= MEMORY_SHARE * memory_available_bytes(
        device
    )


def _needed_bytes(structure: Structure, index: int, weighs: bool) -> int:
    return statistics.moment_bytes(structure, index) + (importance.moment_bytes(structure, index) if weighs else 0)


def _align(
    model: PreTrainedModel, structure: Structure, members: Sequence[int], known: Statistics, finder: align.Finder
) -> tuple[float, float]:
    """Put the hidden units of a block's layers in one order, in the model and in what is known of them."""
    stack = model.get_submodule(structure.stack)
    layers, shapes = [stack[index] for index in members], structure.linears[members[0]]

    def weighing(index: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        shape = shapes[name]
        gradient = known.gradients.get((index, name))
        outputs = torch.ones(shape.out_features) if gradient is None else gradient.diagonal()
        inputs = torch.eye(shape.in_features) if known.inputs is None else known.inputs.of(index, name)
        return inputs, outputs

    before, after, found = [], [], finder.of(layers[0], members[0])
    for units in found:
        orders, plain, aligned = align.align(layers, members, units, weighing)
        before.append(plain)
        after.append(aligned)
        for index, (order, signs) in orders.items():
            if known.inputs is not None:
                known.inputs.permute(index, units.consumer, order, signs)
            for name in units.producers:
                if (index, name) in known.gradients:
                    turned = signs if name == units.signed else torch.ones_like(signs)
                    known.gradients[index, name] = statistics.permuted(known.gradients[index, name], order, turned)
    count = max(1, len(found))
    return sum(before) / count, sum(after) / count


def _fit_block(
    model: PreTrainedModel,
    structure: Structure,
    plan: LoopPlan,
    number: int,
    parameters: LoopParameters,
    known: Statistics,
) -> tuple[Block, dict[str, tie.Fitted]]:
    """Return a block with the ranks chosen for it, and its weights."""
    block = plan.blocks[number]
    shapes = structure.linears[block.layers[0]]
    stack = model.get_submodule(structure.stack)
    alike = [item.layers for item in plan.blocks if structure.kinds[item.layers[0]] == structure.kinds[block.layers[0]]]
    place = alike.index(block.layers)
    weights: dict[str, list[torch.Tensor]] = {}
    initial: dict[str, torch.Tensor | None] = {}
    factors: dict[str, list[float]] = {}
    outputs: dict[str, torch.Tensor | None] = {}
    moments = known.inputs
    for name in shapes:
        held = {
            index: statistics.exact(weight_of(stack[index].get_submodule(name)).detach())
            for index in _needed(parameters.init, place, alike)
        }
        weights[name] = [held[index] for index in block.layers]
        initial[name] = tie.initial_weight(parameters.init, place, alike, held)
        factors[name] = [known.importance(index, name) for index in block.layers]
        gradients = [known.gradients[index, name] for index in block.layers if (index, name) in known.gradients]
        outputs[name] = tie.output_factor(gradients) if gradients else None

    def inputs(name: str) -> list[torch.Tensor]:  # in float64 they are large: those of one linear at a time
        if moments is not None:
            return [moments.of(index, name) for index in block.layers]
        plain = torch.eye(shapes[name].in_features, dtype=torch.float64, device=weights[name][0].device)
        return [plain] * len(block.layers)

    if block.sparse:
        fitted = sparse.fit(
            {
                name: sparse.Linear(
                    [weight.double() for weight in weights[name]],
                    inputs(name),
                    [_entry_weights(known, index, name, shapes[name]) for index in block.layers],
                    block.ranks[name],
                )
                for name in shapes
            },
            block.sparse,
            even=parameters.allocation == "even",
        )
        counts = {
            name: tuple(0 if own is None else len(own[1]) for own in item.sparse) for name, item in fitted.items()
        }
        return Block(block.layers, block.ranks, counts), fitted

    def fit_all(ranks: Mapping[str, tuple[int, ...]]) -> dict[str, tie.Fitted]:
        return {
            name: tie.fit(
                weights[name], inputs(name), ranks[name],
                initial=initial[name], rounds=parameters.rounds, importance=factors[name], outputs=outputs[name],
            )
            for name in shapes
        }  # fmt: skip

    if parameters.allocation == "even" or not any(map(any, block.ranks.values())) or moments is None:
        return block, fit_all(block.ranks)
    gains = {}
    for name in shapes:
        scaled = [moment * factor for moment, factor in zip(inputs(name), factors[name], strict=True)]
        start, factor = initial[name], outputs[name]
        targets = weights[name] if factor is None else [factor.t() @ weight for weight in weights[name]]
        if start is None:
            deltas = tie.joint_deltas(targets, scaled, block.ranks[name], rounds=1)
            gains[name] = tie.spectra(targets, scaled, deltas)
        else:
            start = start if factor is None else factor.t() @ start
            gains[name] = [tie.spectrum(weight - start, moment) for weight, moment in zip(targets, scaled, strict=True)]
    ranks = share_ranks(gains, shapes, block.ranks)
    return Block(block.layers, ranks), fit_all(ranks)


def _entry_weights(known: Statistics, index: int, name: str, shape: Shape) -> torch.Tensor:
    """Return what a squared error of each output of a linear counts, shape (out,)."""
    found = known.gradients.get((index, name))
    return torch.ones(shape.out_features) if found is None else found.diagonal()


def share_ranks(
    gains: Mapping[str, Sequence[torch.Tensor]],
    shapes: Mapping[str, Shape],
    even: Mapping[str, Sequence[int]],
) -> dict[str, tuple[int, ...]]:
    """Share a block's delta parameters out over its linears and members, where each rank takes most off the error.

    Parameters
    ----------
    gains : mapping
        For each linear, of each member, what every further rank takes off, descending.
    shapes : mapping
    even : mapping
        The ranks whose parameters are shared out; never more are used.
    """
    budget = sum(sum(ranks) * shapes[name].rank_parameters for name, ranks in even.items())
    steps = []
    for name, members in gains.items():
        cost = shapes[name].rank_parameters
        # With more than this, a weight of the layer's own would be smaller; what was asked for is not cut.
        most = max(shapes[name].parameters // cost, *even[name])
        for member, values in enumerate(members):
            steps += [(value / cost, name, member, cost) for value in values[:most].tolist() if value > 0]
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    ranks = {name: [0] * len(members) for name, members in gains.items()}
    closed: set[tuple[str, int]] = set()
    for _, name, member, cost in steps:
        if (name, member) in closed:
            continue
        if cost > budget:
            closed.add((name, member))
            continue
        ranks[name][member] += 1
        budget -= cost
    return {name: tuple(members) for name, members in ranks.items()}


def _needed(init: str, place: int, alike: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the layers whose weights a block is made from."""
    needed = set(alike[place])
    if init == "stepwise":
        needed.add(tie.step_layer(place, alike))
        # initial_weight() finds its layer among all that share, and needs only that one.
    return tuple(sorted(needed))


def _parts(structure: Structure, plan: LoopPlan, device: torch.device, weighs: bool) -> list[list[int]]:
    """Return the blocks in as few parts as keeps their moments within a share of the free memory."""
    from profilers.device import memory_available_bytes

    limit = MEMORY_SHARE * memory_available_bytes(device)
    parts: list[list[int]] = [[]]
    held = 0
    for number, block in enumerate(plan.blocks):
        needed = sum(_needed_bytes(structure, index, weighs) for index in block.layers)
        if parts[-1] and held + needed > limit:
            parts.append([])
            held = 0
        parts[-1].append(number)
        held += needed
    return parts
