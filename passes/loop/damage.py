"""What sharing one set of weights would cost each group of neighbouring layers, measured before anything is changed.

The damage without low-rank parts is measured: the KL divergence of the model with one group run with the mean of its
weights. With parts of rank r it is taken to be that, times the share of the differences' squared length which the parts
leave: damage is quadratic in small errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from passes.base import PassContext, PassError
from passes.loop import align
from passes.loop.modeling_looped import weight_of
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

    for one, two in zip(layers, layers[1:], strict=False):
        if structure.kinds[one] == structure.kinds[two] and not structure.unshareable.keys() & {one, two}:
            for units in align.find(stack[one], structure.linears[one]):
                align.align([stack[one], stack[two]], (one, two), units, alike)


class Remaining:
    """What low-rank parts leave of the differences between layers' weights, as a share of the squared length.

    Parameters
    ----------
    model : PreTrainedModel
    structure : Structure
    """

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        self._stack, self._structure = model.get_submodule(structure.stack), structure
        self._spectra = lru_cache(maxsize=None)(self._measured)

    def share(self, group: tuple[int, ...], rank: int) -> float:
        """Return the share that parts of a rank on each layer of a group leave, 0 to 1.

        With n layers, n parts of rank r make up for n − 1 differences, so each for rank r · n / (n − 1) of one: exact
        for two layers.
        """
        covered = rank * len(group) // (len(group) - 1)
        spectra = self._spectra(group)
        whole = sum(float(values.sum()) for values in spectra)
        return sum(float(values[covered:].sum()) for values in spectra) / whole if whole else 0.0

    def _measured(self, group: tuple[int, ...]) -> list[torch.Tensor]:
        """Return the squared singular values of each layer's distance to the mean, by linear, descending."""
        found = []
        for name in self._structure.linears[group[0]]:
            weights = [weight_of(self._stack[index].get_submodule(name)).detach().float() for index in group]
            mean = torch.stack(weights).mean(0)
            found += [torch.linalg.svdvals(weight - mean).square() for weight in weights]
        return found
