"""What sharing one set of weights would cost each group of neighbouring layers, measured before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from passes.base import PassContext, PassError
from passes.loop.targets import Structure

if TYPE_CHECKING:
    import torch
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
