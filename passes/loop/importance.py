"""How much the model's output depends on an error in the output of each linear.

The second-order loss of an error e in what a linear gives out is ``½ eᵀ F e``. F is taken as one number a linear: the
mean over tokens and channels of the squared gradient of the log-likelihood of tokens drawn from the model itself (the
Fisher information). Errors of different linears and layers are then of one unit, nats, and can be weighed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes import fisher
from passes.loop.statistics import Key
from passes.loop.targets import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from profilers.base import Task

TOKENS = 4096
"""That are run backwards, at most: one number a linear is known from few."""


def measure(
    model: PreTrainedModel,
    structure: Structure,
    layers: Sequence[int],
    batches: Sequence[torch.Tensor],
    *,
    generator: torch.Generator,
    task: Task | None = None,
) -> dict[Key, float]:
    """Return the mean squared gradient of each linear's output.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    structure : Structure
    layers : sequence of int
    batches : sequence of torch.Tensor
        Token ids, shape (B, T) each.
    generator : torch.Generator
        Draws the next tokens.
    task : Task, optional
        Advanced by one a batch.
    """
    stack = model.get_submodule(structure.stack)
    sums: dict[Key, float] = {}
    counts: dict[Key, int] = {}

    def watch(key: Key) -> Any:
        def on_gradient(gradient: torch.Tensor) -> None:
            sums[key] = sums.get(key, 0.0) + float(gradient.float().square().sum())
            counts[key] = counts.get(key, 0) + gradient.numel()

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return hook

    handles = [
        stack[index].get_submodule(name).register_forward_hook(watch((index, name)))
        for index in layers
        for name in structure.linears[index]
    ]
    try:
        for batch in batches:
            fisher.backward(model, batch.to(model.device), generator)
            if task is not None:
                task.advance()
    finally:
        for handle in handles:
            handle.remove()
    return {key: sums[key] / counts[key] for key in sums}
