"""How much the model's output depends on an error in the output of each linear.

The second-order loss of an error e in what a linear gives out is ``½ eᵀ F e``, with F = E[g gᵀ] over the gradients g of
the log-likelihood of tokens drawn from the model itself (the Fisher information). Errors of different linears and of
different directions of one output are then of one unit, nats, and can be weighed. That F does not depend on the input
is an approximation (Martens and Grosse, K-FAC, ICML 2015, arXiv:1503.05671, section 3).
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

TOKENS = 8192
"""That are run backwards, at most."""


def measure(
    model: PreTrainedModel,
    structure: Structure,
    layers: Sequence[int],
    batches: Sequence[torch.Tensor],
    *,
    generator: torch.Generator,
    task: Task | None = None,
) -> dict[Key, torch.Tensor]:
    """Return the second moments of the gradient of each linear's output, shape (out, out), float32.

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
    sums: dict[Key, torch.Tensor] = {}
    counts: dict[Key, int] = {}

    def watch(key: Key) -> Any:
        def on_gradient(gradient: torch.Tensor) -> None:
            rows = gradient.flatten(0, -2).float()
            if key in sums:
                sums[key].addmm_(rows.t(), rows)
            else:
                sums[key] = rows.t() @ rows
            counts[key] = counts.get(key, 0) + len(rows)

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
    return {key: sums[key].div_(counts[key]) for key in sums}


def moment_bytes(structure: Structure, index: int) -> int:
    """Return the bytes that one layer's second moments take."""
    return sum(4 * shape.out_features**2 for shape in structure.linears[index].values())
