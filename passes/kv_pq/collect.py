"""Keys and values of calibration text, and how much the model's output depends on each channel of them.

The second-order loss of an error d in a key or value is ``½ dᵀ F d``; its diagonal F is the mean of the squared
gradient of the log-likelihood (the Fisher information; KVQuant, section 3.4, weighs keys and values so). One backward
pass over text whose next tokens are drawn from the model itself gives F for every layer, head and channel in the same
unit, so errors can be weighed against each other across channels, layers, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from passes import fisher
from passes.kv_pq.rope import Rope
from profilers.base import Progress

NAME = "effcli_pq_collect"


@dataclass
class Side:
    """The keys, or the values, of one layer.

    Attributes
    ----------
    x : torch.Tensor
        Shape (H, N, D), float32, on the CPU; keys before rotary embedding where that can be undone.
    gradient : torch.Tensor or None
        Shape (H, N', D): of the log-likelihood, at the tokens of the batches that were run backwards.
    """

    x: torch.Tensor
    gradient: torch.Tensor | None = None


@dataclass
class _Taken:
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    key_gradients: list[torch.Tensor] = field(default_factory=list)
    value_gradients: list[torch.Tensor] = field(default_factory=list)


def collect(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    ropes: Mapping[int, Rope | None],
    *,
    kv_heads: int,
    kept: int,
    vectors: int,
    gradient_batches: int,
    generator: torch.Generator,
    progress: Progress,
) -> dict[int, dict[str, Side]]:
    """Run text through the model and keep a sample of keys and values.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    batches : sequence of torch.Tensor
        Token ids, shape (B, T) each.
    ropes : mapping of int to Rope or None
        Of the layers that are wanted; None: keys as the cache receives them.
    kv_heads : int
        H.
    kept : int
        First tokens of each sequence, which are left out: they are never encoded.
    vectors : int
        To keep, at most, of each head; memory does not grow with the text.
    gradient_batches : int
        So many batches are run backwards, too.
    generator : torch.Generator
    progress : Progress

    Returns
    -------
    dict of int to dict of str to Side
        By layer, then ``keys`` and ``values``.
    """
    taken = {layer: _Taken() for layer in ropes}
    tokens = sum(batch.shape[0] * (batch.shape[1] - kept) for batch in batches)
    share = min(1.0, vectors / tokens)
    live: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask, **kwargs):  # type: ignore[no-untyped-def]
        layer = getattr(module, "layer_idx", None)
        if layer in taken:
            if key.requires_grad:
                key.retain_grad()
                value.retain_grad()
            live[layer] = key, value
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    def own(x: torch.Tensor, layer: int, chosen: torch.Tensor, *, is_key: bool) -> torch.Tensor:
        x = x.detach().float()
        rope = ropes[layer]
        if is_key and rope is not None:
            x = rope.rotate(x, torch.arange(x.shape[2], device=x.device), back=True)
        x = x[:, :, kept:].transpose(0, 1).flatten(1, 2)  # (H, B (T - kept), D)
        return x[:, chosen.to(x.device)].cpu()

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation_internal = NAME
    try:
        with progress.task("keys and values of text", total=len(batches)) as task:
            for number, batch in enumerate(batches):
                backward = number < gradient_batches
                count = batch.shape[0] * (batch.shape[1] - kept)
                chosen = torch.randperm(count, generator=generator)[: max(1, round(share * count))].sort().values
                live.clear()
                if backward:
                    fisher.backward(model, batch.to(model.device), generator)
                else:
                    with torch.no_grad():
                        model.get_decoder()(input_ids=batch.to(model.device), use_cache=False)
                for layer, (key, value) in live.items():
                    group = key.shape[1] // kv_heads  # some architectures repeat keys for their query heads
                    into = taken[layer]
                    into.keys.append(own(key[:, ::group], layer, chosen, is_key=True))
                    into.values.append(own(value[:, ::group], layer, chosen, is_key=False))
                    if backward:
                        everything = torch.arange(count)
                        assert key.grad is not None and value.grad is not None
                        key_grad = key.grad.reshape(key.shape[0], kv_heads, group, *key.shape[2:]).sum(2)
                        value_grad = value.grad.reshape(value.shape[0], kv_heads, group, *value.shape[2:]).sum(2)
                        into.key_gradients.append(own(key_grad, layer, everything, is_key=True))
                        into.value_gradients.append(own(value_grad, layer, everything, is_key=False))
                task.advance()
    finally:
        live.clear()
        config._attn_implementation_internal = before
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)
    return {
        layer: {
            "keys": Side(torch.cat(found.keys, 1), torch.cat(found.key_gradients, 1) if found.key_gradients else None),
            "values": Side(
                torch.cat(found.values, 1), torch.cat(found.value_gradients, 1) if found.value_gradients else None
            ),
        }
        for layer, found in taken.items()
    }
