"""What attention reads of a layer beside its codes: padding of rows, full-precision tokens, a decoded history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from passes.kv_pq.layer import PQLayer
    from passes.kv_pq.quantizer import VectorQuantizer

DECODED_TOKENS = 4096
"""Decoded at a time, so that temporaries in float32 do not grow with the context."""


@dataclass(frozen=True)
class Rows:
    """Left padding of the sequences in a batch.

    Attributes
    ----------
    padding : torch.Tensor
        Shape (B,), int64: slots before the first token of each row.
    start : torch.Tensor
        Shape (B,), int64: first slot that is not kept.
    most : int
        No row has more padding.
    plain : bool
        Whether the current attention mask hides nothing but the padding (and what comes later).
    """

    padding: torch.Tensor
    start: torch.Tensor
    most: int = 0
    plain: bool = True

    @classmethod
    def of(cls, padding: torch.Tensor, kept: int, *, plain: bool = True) -> Rows:
        """Return the rows with this padding."""
        return cls(padding, padding + kept, int(padding.max()) if padding.numel() else 0, plain)

    def to(self, device: torch.device) -> Rows:
        """Return the same on another device."""
        if self.padding.device == device:
            return self
        return Rows(self.padding.to(device), self.start.to(device), self.most, self.plain)


def exact(layer: PQLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's kept tokens, where any of them is history, and then its recent ones: (B, H, n, D)."""
    first = 0 if layer.coded else layer.kept_tokens
    last = layer.kept_tokens + _recent(layer)
    return layer.exact_keys[:, :, first:last].to(dtype), layer.exact_values[:, :, first:last].to(dtype)


def exact_mask(layer: PQLayer, queries: int, given: torch.Tensor | None, *, causal: bool) -> torch.Tensor | None:
    """Return what the latest queries see of :func:`exact`: None for all, or a mask (B, 1, queries or 1, n).

    Parameters
    ----------
    layer : PQLayer
    queries : int
        The last slots are theirs.
    given : torch.Tensor or None
        The model's mask over all slots, (B, 1, queries, length), where it says more than padding and causality.
    causal : bool
    """
    rows, kept_tokens, device = layer.rows, layer.kept_tokens, layer.device
    inner = causal and queries > 1 and layer.waiting is None
    clear = layer.coded >= rows.most + kept_tokens or (not layer.coded and not rows.most)
    if given is None and clear and not inner:
        return None
    padding = rows.padding[:, None]
    slots = torch.arange(layer.coded, layer.coded + _recent(layer), device=device).expand(padding.shape[0], -1)
    seen = slots >= padding
    if layer.coded:
        kept = padding + torch.arange(kept_tokens, device=device)
        slots, seen = torch.cat([kept, slots], 1), torch.cat([kept < layer.coded, seen], 1)
    visible = seen[:, None, None, :]
    if given is not None:
        index = slots.clamp(max=given.shape[-1] - 1)[:, None, None, :]
        chosen = given.expand(padding.shape[0], -1, -1, -1)
        chosen = chosen.gather(3, index.expand(-1, chosen.shape[1], chosen.shape[2], -1))
        return visible & chosen if chosen.dtype == torch.bool else chosen.masked_fill(~visible, -torch.inf)
    if inner:
        ends = torch.arange(layer.length - queries, layer.length, device=device)
        visible = visible & (slots[:, None, None, :] <= ends[:, None])
    return visible


def dequantized(layer: PQLayer, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's keys and values of every slot, (B, H, length, D); slots of padding hold no meaning.

    Parameters
    ----------
    layer : PQLayer
    dtype : torch.dtype or None
        None: that of kept and recent tokens.
    """
    dtype = dtype or layer.dtype
    out = []
    for kind, block, stored in (
        ("keys", layer.exact_keys, layer.key_codes),
        ("values", layer.exact_values, layer.value_codes),
    ):
        side: VectorQuantizer = getattr(layer.codebooks, kind)
        rope = layer.codebooks.rope if kind == "keys" else None
        whole = block.new_empty(*block.shape[:2], layer.length, block.shape[3], dtype=dtype)
        for at in range(0, layer.coded, DECODED_TOKENS):
            end = min(at + DECODED_TOKENS, layer.coded)
            part = side.decode(stored[:, at:end], torch.float32)
            if rope is not None:
                slots = torch.arange(at, end, device=layer.device)
                part = rope.rotate(part, slots - layer.rows.padding[:, None])
            whole[:, :, at:end] = part.to(dtype)
        slots = layer.rows.padding[:, None] + torch.arange(layer.kept_tokens, device=layer.device)
        row, item = (slots < layer.coded).nonzero(as_tuple=True)
        whole[row, :, slots[row, item]] = block[row, :, item].to(dtype)
        recent = slice(layer.kept_tokens, layer.kept_tokens + layer.length - layer.coded)
        whole[:, :, layer.coded :] = block[:, :, recent].to(dtype)
        out.append(whole)
    return out[0], out[1]


def _recent(layer: PQLayer) -> int:
    """Return the tokens in the recent block."""
    return (layer.past if layer.waiting is not None else layer.length) - layer.coded
