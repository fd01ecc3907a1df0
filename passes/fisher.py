"""Gradients of the Fisher information: of the log-likelihood of tokens that are drawn from the model itself.

Their mean square is the diagonal of F, and an error d in what they belong to costs about ``½ dᵀ F d`` nats, whatever it
is an error of: keys, values and outputs of linears can be weighed against each other in one unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
            chance = logits.detach().softmax(-1).flatten(0, 1)
            # Gumbel's trick, in a generator's hands.
            noise = torch.rand(chance.shape, generator=generator).to(chance.device).clamp_min(1e-20).log().neg()
            drawn = (noise / chance.clamp_min(1e-30)).argmin(-1)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
