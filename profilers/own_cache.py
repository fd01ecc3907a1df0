"""How a model that makes a KV cache of its own tells instruments about it.

::

    model.own_cache = OwnCache        made by whoever changed how the model keeps keys and values
    model(ids, use_cache=True)        makes such a cache when it is given none, as every model makes its own

Instruments run the model as they run any other. What they cannot see from outside they ask here: how many bytes such a
cache will hold at a size that is not run, and what a forward pass without a cache gives when its keys and values are
those that the cache would give back. The cache's layers say what they are by :data:`LAYER_KIND`.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

ATTRIBUTE = "own_cache"
LAYER_KIND = "cache_kind"
"""Class attribute of a cache, and of its layers, that transformers does not ship: its kind in reports."""
LAYER_SHARED = "cache_shared"
"""Class attribute of such a cache or layer: names of attributes that hold what all caches share, which is not cache."""


@dataclass(frozen=True)
class LayerGrowth:
    """What one layer of a cache keeps of one sequence, once its full-precision blocks are full.

    Attributes
    ----------
    cache_class : str
    kind : str
    bytes_per_token : int
    fixed_bytes : int
        Most that stays in full precision.
    growing_bytes_per_token : int
        Before that; 0 where the blocks are allocated at once.
    """

    cache_class: str
    kind: str
    bytes_per_token: int
    fixed_bytes: int
    growing_bytes_per_token: int


class OwnCache(Protocol):
    """What a model says of its cache."""

    @property
    def shared_bytes(self) -> int:
        """Bytes that are held once, whatever the sequences: codebooks."""

    @property
    def layers(self) -> dict[int, LayerGrowth]:
        """By layer index; layers that are not there keep what transformers gives them."""

    def layer_bytes(self, layer: int, batch: int, prompt: int, decoded: int) -> int:
        """Return what a layer holds after a prompt and so many single steps, to the byte."""

    def applied(self) -> AbstractContextManager[None]:
        """Return a context in which forward passes see keys and values as the cache would give them back."""


def of(model: Any) -> OwnCache | None:
    """Return what a model says of its cache, None if that is transformers' own."""
    found: OwnCache | None = getattr(model, ATTRIBUTE, None)
    return found


def applied(model: Any) -> AbstractContextManager[None]:
    """Return a context in which the model computes as with its own cache; for other models it does nothing."""
    own = of(model)
    return contextlib.nullcontext() if own is None else own.applied()
