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
            logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
            drawn = _drawn(logits.detach().flatten(0, 1), generator)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a token for each row of logits (N, V), shape (N,): by Gumbel's trick, in a generator's hands."""
    drawn = []
    for rows in torch.split(logits, ROWS):
        chance = rows.softmax(-1).clamp_min_(1e-30)
        noise = torch.rand(rows.shape, generator=generator).to(rows.device)
        drawn.append(noise.clamp_min_(1e-20).log_().neg_().div_(chance).argmin(-1))
    return torch.cat(drawn)
