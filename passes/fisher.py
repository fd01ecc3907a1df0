"""Gradients of the Fisher information: of the log-likelihood of tokens that are drawn from the model itself.

Their mean square is the diagonal of F, and an error d in what they belong to costs about ``½ dᵀ F d`` nats, whatever it
is an error of: keys, values and outputs of linears can be weighed against each other in one unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 128
"""Tokens whose probabilities are in memory at once."""


def backward(model: PreTrainedModel, ids: torch.Tensor, generator: torch.Generator) -> None:
    """Run text, draw a next token at each place, and send the gradient of their log-likelihood back.

    Gradients reach activations, for hooks and ``retain_grad``; weights get none.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    ids : torch.Tensor
        Token ids, shape (B, T), on the model's device.
    generator : torch.Generator
        Of the CPU.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
            logits = model(inputs_embeds=embedded, use_cache=False).logits
        logits.backward(_gradient(logits.detach().flatten(0, 1), generator).view_as(logits))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return what −Σ log p(drawn) has for a gradient with regard to logits (N, V): probabilities less what was drawn.

    A token is drawn for each row, by Gumbel's trick, in a generator's hands. A few rows at a time: float32 copies of
    all logits would take longer to allocate than to fill.
    """
    gradient = torch.empty_like(logits)
    for rows, into in zip(torch.split(logits, ROWS), torch.split(gradient, ROWS), strict=True):
        chance = rows.float().softmax(-1)
        noise = torch.rand(rows.shape, generator=generator).to(rows.device)
        times = noise.clamp_min_(1e-20).log_().neg_().div_(chance.clamp_min(1e-30))
        drawn = times.argmin(-1, keepdim=True)
        into.copy_(chance.scatter_add_(-1, drawn, torch.full_like(drawn, -1, dtype=chance.dtype)))
    return gradient
