"""The gradient of drawn tokens: it reaches activations, no weight, and leaves the model as it was."""

from __future__ import annotations

import torch

from passes import fisher
from tests.passes.loop.small import build, ids


def test_activations_get_the_gradient_and_weights_none() -> None:
    model = build("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    held: list[torch.Tensor] = []

    def keep(_module: object, _given: object, output: torch.Tensor) -> None:
        output.retain_grad()
        held.append(output)

    handle = model.lm_head.register_forward_hook(keep)
    fisher.backward(model, ids(), torch.Generator().manual_seed(3))
    handle.remove()
    # With respect to logits it is the model's chances, less one where a token was drawn.
    (logits,) = held
    assert logits.grad is not None
    drawn = logits.detach().softmax(-1) - logits.grad
    torch.testing.assert_close(drawn.amax(-1), torch.ones(2, 12))
    torch.testing.assert_close(drawn.sum(-1), torch.ones(2, 12))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
