"""Watch the updates of every transformers cache, and tell which tensors a cache holds."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from profilers.own_cache import LAYER_KIND, LAYER_SHARED

_CACHE_METHODS = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")


@contextlib.contextmanager
def watch_caches(
    run_update: Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Route the updates of every transformers cache through ``run_update`` inside this block.

    Parameters
    ----------
    run_update : callable
        Gets the cache, its own method, and the arguments and keyword arguments; returns what the method returns.
    """
    from transformers.cache_utils import Cache

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def update(cache: Any, *args: Any, **kwargs: Any) -> Any:
            return run_update(cache, method, args, kwargs)

        return update

    with contextlib.ExitStack() as stack:
        for owner in _subclasses(Cache):
            for name in _CACHE_METHODS:
                if name in vars(owner):
                    original = vars(owner)[name]
                    setattr(owner, name, watched(original))
                    stack.callback(setattr, owner, name, original)
        yield


def _subclasses(root: type) -> Iterator[type]:
    yield root
    child: type
    for child in root.__subclasses__():
        yield from _subclasses(child)


def held_by(cache: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a cache, or one layer of it, holds; single numbers (lengths, positions) are not KV."""
    if isinstance(cache, torch.Tensor):
        if cache.numel() > 1:
            yield cache
    elif isinstance(cache, dict):
        for value in cache.values():
            yield from held_by(value)
    elif isinstance(cache, (list, tuple)):
        for value in cache:
            yield from held_by(value)
    elif hasattr(type(cache), LAYER_KIND):
        shared = getattr(type(cache), LAYER_SHARED, ())
        yield from held_by({name: value for name, value in vars(cache).items() if name not in shared})
    elif type(cache).__module__.startswith("transformers.") and hasattr(cache, "__dict__"):
        yield from held_by(vars(cache))
