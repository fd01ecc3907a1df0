"""Attention over keys and values that went through a quantizer and back, as if the cache had held them quantized.

::

    query ──────────────────────────────────────────────────┐
    keys, values (after rotary embedding) ──> [first kept | transform(the rest)] ──> the model's own attention

Every query sees the quantized keys and values, its own token's too: what a cache costs with no recent block in full
precision. The model computes all else as before.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

Transform = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``transform(layer, keys (B, H, T, D), values (B, H, T, D), positions (T,)) -> (keys, values)``, shapes unchanged."""

KEPT_TOKENS = 4
_names = itertools.count()


@contextlib.contextmanager
def fake_quantized(
    model: PreTrainedModel,
    transform: Transform,
    *,
    kept: int = KEPT_TOKENS,
    layers: Collection[int] | None = None,
) -> Iterator[None]:
    """Put ``transform`` between a model and its attention inside the context.

    The model must be run without a cache and without padding, so that a token's slot is its position.

    Parameters
    ----------
    model : PreTrainedModel
        Of an architecture that uses transformers' attention interface.
    transform : callable
        Gets a layer's keys and values, positions already applied to the keys, without the kept tokens.
    kept : int
        First tokens of each sequence that are left as they are; ``transform`` never sees them.
    layers : collection of int or None
        Layers that are transformed; None means all.

    Raises
    ------
    ValueError
        When the model runs: with a cache, or if a transform changes a shape or gives values that are not finite.
    RuntimeError
        On leaving, if no attention went through ``transform``.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    saved = [(config, config._attn_implementation_internal) for config in configs.values()]
    inner = model.config._attn_implementation
    name = f"fake_quantized_{next(_names)}"
    calls = 0

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal calls
        layer: Any = module.layer_idx
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"{query.shape[2]} queries over {key.shape[2]} keys: run the model with use_cache=False")
        if (layers is None or layer in layers) and key.shape[2] > kept:
            positions = torch.arange(kept, key.shape[2], device=key.device)
            key, value = _replaced(transform, layer, key, value, positions)
        calls += 1
        return _attention_function(inner, module)(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[inner])
    try:
        for config, _ in saved:
            config._attn_implementation_internal = name
        yield
        if not calls:
            raise RuntimeError(
                f"no attention of {type(model).__name__} went through the transform: it was not run, or it does not "
                "use transformers' attention interface"
            )
    finally:
        for config, before in saved:
            config._attn_implementation_internal = before
        # the registries have no public way to take an entry out
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _attention_function(implementation: str, module: torch.nn.Module) -> Callable[..., Any]:
    """Return what an attention module would have called; eager attention is each architecture's own."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = AttentionInterface().get_interface(implementation, own)
    return found


def _replaced(
    transform: Transform, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kept = keys.shape[2] - positions.numel()
    given = (keys[:, :, kept:], values[:, :, kept:])
    replaced = []
    for what, whole, before, after in zip(
        ("keys", "values"), (keys, values), given, transform(layer, *given, positions), strict=True
    ):
        if after.shape != before.shape or not after.isfinite().all():
            raise ValueError(
                f"layer {layer}: the transform made {what} of shape {tuple(before.shape)} into shape "
                f"{tuple(after.shape)}, or not finite"
            )
        replaced.append(torch.cat([whole[:, :, :kept], after.to(whole.dtype)], dim=2))
    return replaced[0], replaced[1]
