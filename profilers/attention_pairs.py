"""How many (query, key) pairs an attention mask lets through: in closed form, or counted where the mask has values."""

from __future__ import annotations

from typing import Any

import torch

# A float mask lets a pair through unless it adds about -inf: transformers writes finfo.min, or adds a bias to it.
_MASKED_FRACTION_OF_MIN = 0.5


def causal_pairs(queries: int, keys: int, window: int | None = None) -> int:
    """Return how many (query, key) pairs a causal mask lets through, the last query seeing the last key.

    Query i stands at position p = keys - queries + i and sees the keys max(0, p - window + 1) .. p.

    Parameters
    ----------
    queries, keys : int
    window : int or None
        Sliding window, the query's own position included; ``None``: no window.
    """
    window = keys if window is None else window
    first = max(0, keys - queries + 1)  # keys that the first query with any sees, before the window
    shrinking = max(0, min(keys, window) - first + 1)  # queries that the window does not cut
    return shrinking * (2 * first + shrinking - 1) // 2 + (keys - first + 1 - shrinking) * window


def upper_left_causal_pairs(queries: int, keys: int) -> int:
    """Return the pairs that ``is_causal=True`` lets through in torch's fused attention: query i sees keys 0..i."""
    ramp = min(queries, keys)
    return ramp * (ramp + 1) // 2 + (queries - ramp) * keys


def visible_pairs(mask: torch.Tensor) -> int:
    """Return how many entries of a boolean or additive mask let their pair through."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min * _MASKED_FRACTION_OF_MIN
    return int(allowed.sum().item())


def sliding_window(module: Any) -> Any:
    """Return an attention module's window: an int, ``None`` for none, ``NotImplemented`` where it cannot be told."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    config: Any = getattr(module, "config", None)
    index = getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if config is None:
        return NotImplemented
    if types is not None and isinstance(index, int):
        if types[index] == "full_attention":
            return None
        return config.sliding_window if types[index] == "sliding_attention" else NotImplemented
    if getattr(config, "attention_chunk_size", None) is not None:
        return NotImplemented
    return getattr(config, "sliding_window", None)
