"""What sharing one set of weights would cost each group of neighbouring layers, measured before anything is changed.

The damage without low-rank parts is measured: the KL divergence of the model with one group run with the mean of its
weights. With parts of rank r it is taken to be that, times the share of the error which the parts leave, counted as the
fit counts it: damage is quadratic in small errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from passes.base import PassContext, PassError
from passes.loop import align, tie
from passes.loop.blocks import Statistics
from passes.loop.modeling_looped import weight_of
from passes.loop.statistics import exact
from passes.loop.targets import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure(
    model: PreTrainedModel,
    structure: Structure,
    batches: Sequence[torch.Tensor],
    groups: Sequence[tuple[int, ...]],
    context: PassContext,
) -> dict[tuple[int, ...], float]:
    """Return the KL divergence, nats a token, of the model with each group run with one set of weights.

    Parameters
    ----------
    model : PreTrainedModel
        Unchanged afterwards.
    structure : Structure
    batches : sequence of torch.Tensor
        Token ids, shape (B, T) each.
    groups : sequence of tuple of int
    context : PassContext
    """
    from profilers.base import ProfilerError
    from profilers.layer_damage import tie_damage

    try:
        damages = tie_damage(model, batches, groups, progress=context.progress)
    except ProfilerError as error:
        raise PassError(f"the damage of sharing cannot be measured: {error}; give blocks and loops") from error
    return dict(zip(groups, damages, strict=True))


def align_neighbours(model: PreTrainedModel, structure: Structure, layers: Sequence[int]) -> None:
    """Put the hidden units of each layer in the order of the layer before it, where both are of one kind.

    What the model computes stays the same. All inputs and outputs count alike here: no text has been run yet.
    """
    stack = model.get_submodule(structure.stack)

    def alike(index: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        shape = structure.linears[index][name]
        return torch.eye(shape.in_features), torch.ones(shape.out_features)

    finder = align.Finder(structure)
    for one, two in zip(layers, layers[1:], strict=False):
        if structure.kinds[one] == structure.kinds[two] and not structure.unshareable.keys() & {one, two}:
            for units in finder.of(stack[one], one):
                align.align([stack[one], stack[two]], (one, two), units, alike)


class Remaining:
    """What low-rank parts leave of the error of sharing, as a share.

    Parameters
    ----------
    model : PreTrainedModel
    structure : Structure
    known : Statistics or None
        Of all layers that may share; without it errors count alike in all directions.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, known: Statistics | None = None) -> None:
        self._stack, self._structure = model.get_submodule(structure.stack), structure
        self._known = known or Statistics(None, {})
        self._spectra = lru_cache(maxsize=None)(self._measured)

    def share(self, group: tuple[int, ...], rank: int) -> float:
        """Return the share that parts of a rank on each layer of a group leave, 0 to 1.

        With n layers, n parts of rank r make up for n − 1 differences, so each for rank r · n / (n − 1) of one: exact
        for two layers whose inputs are alike.
        """
        covered = rank * len(group) // (len(group) - 1)
        spectra = self._spectra(group)
        whole = sum(float(values.sum()) for values in spectra)
        return sum(float(values[covered:].sum()) for values in spectra) / whole if whole else 0.0

    def _measured(self, group: tuple[int, ...]) -> list[torch.Tensor]:
        """Return what each rank takes off each layer's error with the best shared weight, by linear, descending."""
        known, found = self._known, []
        for name, shape in self._structure.linears[group[0]].items():
            weights = [exact(weight_of(self._stack[index].get_submodule(name)).detach()) for index in group]
            gradients = [known.gradients[index, name] for index in group if (index, name) in known.gradients]
            if gradients:
                factor = tie.output_factor(gradients)
                weights = [factor.t() @ weight for weight in weights]
            plain = torch.eye(shape.in_features, dtype=torch.float64, device=weights[0].device)
            moments = [plain if known.inputs is None else known.inputs.of(index, name) for index in group]
            moments = [moment * known.importance(index, name) for moment, index in zip(moments, group, strict=True)]
            shared = tie.least_squares(weights, moments)
            found += [tie.spectrum(weight - shared, moment) for weight, moment in zip(weights, moments, strict=True)]
        return found
