"""A model's forward passes as if every key and value came from its product-quantized cache.

::

    query ──────────────────────────────────────────────────────────────────────────┐
    keys, values ──> [first kept tokens | encode ──> decode of all the others] ──> the model's own attention

Stricter than generation, where a prompt attends to itself exactly and the latest tokens are in full precision: here
each query sees quantized keys and values even of its own token. Quality is measured so, because it does not depend on
how long a prompt is, and because a forward pass over whole windows would not touch a cache at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from passes.base import PassError
from passes.kv_pq import attention
from passes.kv_pq.placement import on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes.kv_pq.codebooks import Codebooks, LayerCodebooks
    from passes.kv_pq.quantizer import VectorQuantizer

NAME = "effcli_pq_through"


@contextlib.contextmanager
def through_codes(model: PreTrainedModel, codebooks: Codebooks) -> Iterator[None]:
    """Let a model's attention see decoded keys and values of all but the kept tokens, inside the context.

    It concerns forwards over tokens that attend to each other: those without a cache, and the first with one. Steps
    that read a cache are as they are.

    Parameters
    ----------
    model : PreTrainedModel
        Whose attention can be exchanged, in evaluation mode.
    codebooks : Codebooks
        On any device.

    Raises
    ------
    PassError
        If the model does not use transformers' attention interface.
    """
    if not model._can_set_attn_implementation():
        raise PassError(f"{type(model).__name__} does not use transformers' attention interface, which this needs")

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        index = getattr(module, "layer_idx", None)
        books = codebooks.layers.get(index) if index is not None else None
        if books is not None and query.shape[2] == key.shape[2] > codebooks.kept_tokens:
            here = on_device(books, key.device)
            key, value = decoded(here, key, value, codebooks.kept_tokens, _padding(attention_mask, key))
        return attention.forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        # The registries have no public way to take an entry out.
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)


def decoded(
    books: LayerCodebooks, keys: torch.Tensor, values: torch.Tensor, kept: int, padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values after encoding and decoding, but for each row's first tokens.

    Parameters
    ----------
    books : LayerCodebooks
    keys, values : torch.Tensor
        Shape (B, H, T, D), rotary embedding applied to the keys.
    kept : int
    padding : torch.Tensor
        Shape (B,), int64: slots before the first token of each row.

    Returns
    -------
    keys, values : torch.Tensor
        Shapes and dtypes as given.
    """
    slots = torch.arange(keys.shape[2], device=keys.device)
    exact = (slots < padding[:, None] + kept)[:, None, :, None]
    stored = keys.float()
    positions = slots - padding[:, None]
    if books.rope is not None:
        stored = books.rope.rotate(stored, positions, back=True)
    said = _there_and_back(stored, books.keys)
    if books.rope is not None:
        said = books.rope.rotate(said, positions)
    return (
        torch.where(exact, keys, said.to(keys.dtype)),
        torch.where(exact, values, _there_and_back(values, books.values).to(values.dtype)),
    )


def _there_and_back(x: torch.Tensor, quantizer: VectorQuantizer) -> torch.Tensor:
    return quantizer.decode(attention.encode(x, quantizer), torch.float32)


def _padding(mask: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    """Return the left padding that a mask (B, 1, T, S) leaves to the last query."""
    if mask is None:
        return torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
    last = mask[:, 0, -1]
    shown = last if last.dtype == torch.bool else last >= 0
    return shown.int().argmax(-1).expand(keys.shape[0])
