"""Open a transformers cache: what each layer holds, in bytes of whole storages.

A cache or cache layer that transformers does not ship is refused by name, unless its class says what it is
(:mod:`profilers.own_cache`); nothing is estimated. What counts and what does not: ``docs/profilers/kv.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from profilers.base import NotApplicableError
from profilers.own_cache import LAYER_KIND, LAYER_SHARED
from profilers.storages import address_of

_PLAIN = (type(None), bool, int, float, str, type, torch.dtype, torch.device, torch.Stream)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of the storages that one layer of a cache holds now.

    Attributes
    ----------
    index : int
    kind : str
        As in :class:`profilers.kv_cache.KVLayer`.
    cache_class : str
    bytes : int
        All of it. A storage that two layers share is counted with the first.
    state_bytes : int
        Part that is recurrent or convolution state.
    window : int or None
        Tokens.
    kv_heads : int or None
    element_bits : int or None
        Bits of one cached value outside the states; None where they differ.
    """

    index: int
    kind: str
    cache_class: str
    bytes: int
    state_bytes: int
    window: int | None
    kv_heads: int | None
    element_bits: int | None


def cache_bytes(cache: object) -> int:
    """Return the bytes of the storages that a transformers cache holds.

    A tensor that is a view of a larger storage keeps all of it, so the storage counts, each once.
    Single integers that the cache keeps as tensors (lengths, the window) are bookkeeping and not counted.

    Raises
    ------
    NotApplicableError
        For a cache or cache-layer class that transformers does not ship, or one that holds something unknown.
    """
    return sum(layer.bytes for layer in cache_layers(cache))


def cache_layers(cache: object) -> tuple[LayerBytes, ...]:
    """Return what each layer of a transformers cache holds; see :func:`cache_bytes`."""
    from transformers.cache_utils import EncoderDecoderCache

    seen: set[int] = set()
    if isinstance(cache, EncoderDecoderCache):
        _check_cache(cache, but={"self_attention_cache", "cross_attention_cache"})
        own = list(_opened(cache.self_attention_cache, seen))
        return (*own, *_opened(cache.cross_attention_cache, seen, cross=True))
    return tuple(_opened(cache, seen))


def _known(thing: object) -> bool:
    """Whether transformers ships a cache or layer, or its class says what it is."""
    return type(thing).__module__.split(".")[0] == "transformers" or hasattr(type(thing), LAYER_KIND)


def _check_cache(cache: object, but: set[str]) -> None:
    """Refuse a cache that is not transformers' own or keeps tensors outside its layers."""
    from transformers.cache_utils import Cache

    name = type(cache).__name__
    if not isinstance(cache, Cache) or not _known(cache):
        raise NotApplicableError(
            f"unknown cache class '{name}': its footprint would be a guess; "
            "profile the model with the cache that transformers gives it"
        )
    for attribute, value in vars(cache).items():
        if attribute in getattr(type(cache), LAYER_SHARED, ()):
            continue
        if attribute not in but and list(_tensors(value, f"cache class '{name}', attribute '{attribute}'")):
            raise NotApplicableError(
                f"cache class '{name}' holds tensors in '{attribute}', outside its layers: whose they are is unknown"
            )


def _opened(cache: object, seen: set[int], *, cross: bool = False) -> Iterator[LayerBytes]:
    from transformers import cache_utils

    _check_cache(cache, but={"layers"})
    kinds = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin)
    for index, layer in enumerate(cache.layers):  # type: ignore[attr-defined]
        name = type(layer).__name__
        if not isinstance(layer, kinds) or not _known(layer):
            raise NotApplicableError(
                f"layer {index} keeps an unknown cache layer class '{name}': its footprint would be a guess; "
                "profile the model with the cache that transformers gives it"
            )
        states = held = 0
        element_bits = None
        for attribute, value in vars(layer).items():
            if attribute in getattr(type(layer), LAYER_SHARED, ()):
                continue
            is_state = attribute in ("conv_states", "recurrent_states")
            for tensor in _tensors(value, f"layer {index} ('{name}'), attribute '{attribute}'"):
                storage = tensor.untyped_storage()
                if (tensor.dim() == 0 and not tensor.is_floating_point()) or address_of(tensor) in seen:
                    continue
                seen.add(address_of(tensor))
                held += storage.nbytes()
                if is_state:
                    states += storage.nbytes()
                elif not hasattr(type(layer), LAYER_KIND):
                    element_bits = max(element_bits or 0, 8 * tensor.element_size())
        keys = getattr(layer, "keys", None)
        yield LayerBytes(
            index=index,
            kind=_kind(layer, held, cross),
            cache_class=name,
            bytes=held,
            state_bytes=states,
            window=getattr(layer, "sliding_window", None),
            kv_heads=int(keys.shape[1]) if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None,
            element_bits=element_bits,
        )


def _tensors(value: Any, where: str) -> Iterator[torch.Tensor]:
    """Yield every tensor inside plain containers; refuse whatever could hide one."""
    from transformers import PreTrainedConfig

    if type(value) in (torch.Tensor, torch.nn.Parameter):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, where)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, where)
    elif not isinstance(value, (*_PLAIN, PreTrainedConfig)):
        raise NotApplicableError(
            f"{where} holds a '{type(value).__name__}', whose bytes are not known; this cache is refused"
        )


def _kind(layer: object, held: int, cross: bool) -> str:
    from transformers import cache_utils

    if not held:
        return "none"
    if cross:
        return "cross"
    if hasattr(type(layer), LAYER_KIND):
        return str(getattr(type(layer), LAYER_KIND))
    sliding = isinstance(layer, cache_utils.DynamicSlidingWindowLayer | cache_utils.StaticSlidingWindowLayer)
    if isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin):
        if not isinstance(layer, cache_utils.CacheLayerMixin):
            return "linear"
        return "hybrid_sliding" if sliding else "hybrid"
    if type(layer).__module__ != cache_utils.__name__:
        return "compressed"  # defined beside one model: compressed or sparse attention
    if "indexer_keys" in vars(layer):
        return "indexed"
    return "sliding" if sliding else "full"
