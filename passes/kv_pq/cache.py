"""A transformers ``Cache`` that holds keys and values as codes, and models that use it by themselves.

``PQCache.from_pretrained(folder, model.config)`` works with any model and any attention implementation: where the model
does not run :data:`passes.kv_pq.attention.NAME`, keys and values of one layer at a time are decoded for its attention.
:func:`attach` makes a model attend over the codes themselves, tell the cache about left padding, and create this cache
where it would have created a ``DynamicCache``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from passes.base import PassError
from passes.kv_pq import attention
from passes.kv_pq.codebooks import Codebooks
from passes.kv_pq.layer import PQLayer
from passes.kv_pq.layer_views import Rows
from passes.kv_pq.placement import on_device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["PQCache", "PQLayer", "attach", "describe", "detach", "fallback_reason"]

_PREPARE = "_prepare_cache_for_generation"
_STATE = "_effcli_kv_pq"


class PQCache(Cache):  # type: ignore[misc]
    """Product-quantized keys and values of full-attention layers; transformers' own layers for all others.

    MILLION (DAC 2025), section 4. Sliding-window, linear-attention and other layers are not compressed.

    Parameters
    ----------
    config : PreTrainedConfig
        ``model.config`` itself, not a copy: which attention the model runs is read from it.
    codebooks : Codebooks
    device : torch.device or None
        Where to put the codebooks now; None: where the first keys are.
    dtype : torch.dtype or None
        Of kept and recent tokens; None: that of the model's keys.
    capacity : int or None
        Slots to preallocate. Longer contexts are not refused: storage then grows in steps, as it does without.

    Raises
    ------
    PassError
        If the codebooks are of another model, or the model is an encoder-decoder.
    """

    cache_kind: ClassVar = "quantized"
    cache_shared: ClassVar = ("codebooks",)

    def __init__(
        self,
        config: PreTrainedConfig,
        codebooks: Codebooks,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ) -> None:
        _check(config, codebooks)
        if capacity is not None and capacity < 1:
            raise PassError(f"capacity={capacity} is not a number of slots; give at least 1, or leave it out")
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=config).layers
        for index, books in codebooks.layers.items():
            layers[index] = PQLayer(
                index,
                books if device is None else on_device(books, torch.device(device)),
                kept_tokens=codebooks.kept_tokens,
                recent_tokens=codebooks.recent_tokens,
                config=text,
                capacity=capacity or 0,
                dtype=dtype,
            )
        super().__init__(layers=layers)
        self.config = text
        self.codebooks = codebooks

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: PreTrainedConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ) -> PQCache:
        """Return an empty cache with the codebooks of a folder that ``kv-pq`` has written.

        Raises
        ------
        PassError
            If there are no codebooks, or they are damaged or of another model.
        """
        codebooks = Codebooks.load(Path(folder))
        return cls(config, codebooks, device=device, dtype=dtype, capacity=capacity)

    def save(self, folder: str | Path) -> Path:
        """Write what the cache holds as safetensors, and return the file; codebooks are not written again."""
        from passes.kv_pq.cache_files import save

        return save(self, Path(folder))

    @classmethod
    def restore(
        cls,
        folder: str | Path,
        config: PreTrainedConfig,
        codebooks: Codebooks,
        *,
        device: torch.device | str | None = None,
        capacity: int | None = None,
    ) -> PQCache:
        """Return the cache that :meth:`save` wrote into a folder.

        Raises
        ------
        PassError
            If there is none, if it is damaged, or if it was made with other codebooks.
        """
        from passes.kv_pq.cache_files import fill

        cache = cls(config, codebooks, device=device, capacity=capacity)
        fill(cache, Path(folder), torch.device(device or "cpu"))
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> PQCache:
        """Copy what is held; the model's config and the codebooks are shared, as a prefix is copied to be reused."""
        for layer in self.compressed:
            layer.share(memo)
        memo |= {id(item): item for item in (self.config, self.codebooks)}
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    @property
    def compressed(self) -> list[PQLayer]:
        """Layers that are held as codes."""
        return [layer for layer in self.layers if isinstance(layer, PQLayer)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values of one layer; see :meth:`PQLayer.update`.

        Raises
        ------
        PassError
            Also if the model has other layers than the cache.
        """
        if layer_idx >= len(self.layers):
            raise PassError(
                f"the model has a layer {layer_idx}, and this cache was made for a model with {len(self.layers)} "
                "layers; make it from model.config"
            )
        layer, compressed = self.layers[layer_idx], self.compressed
        if compressed and layer is compressed[0] and compressed[-1].length != layer.length:
            raise PassError(
                f"layer {compressed[-1].index} of the cache holds {compressed[-1].length} tokens and layer {layer_idx} "
                f"{layer.length}: the model skipped layers that this cache was made for; make it from model.config"
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def see_mask(self, mask: Any) -> None:
        """Take the left padding of the batch from the attention mask of the forward pass that comes.

        Parameters
        ----------
        mask : torch.Tensor or None
            (B, S), 1 for a token, over all slots; or (B, 1, T, S) as an attention is given it.

        Raises
        ------
        PassError
            If a mask shows slots that were padding when they were cached.
        """
        compressed = self.compressed
        if not compressed:
            return
        first = compressed[0]
        if isinstance(mask, dict):  # one for each kind of layer, as some models prepare them
            mask = mask.get("full_attention")
        if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
            if not first.length:
                self._set_rows(Rows.of(torch.zeros(0, dtype=torch.int64), first.kept_tokens))
            self._set_plain(mask is None)
            return
        shown = mask if mask.ndim == 2 else mask[:, 0, -1]
        shown = shown.bool() if mask.ndim == 2 or mask.dtype == torch.bool else shown >= 0
        if first.rows.most >= first.length:  # none held yet, or a row has had nothing but padding
            self._set_rows(Rows.of(_leading_hidden(shown, first.rows.padding, first.length), first.kept_tokens))
        before = first.rows.padding.to(shown.device)
        if first.length and before.shape[0] != shown.shape[0]:
            raise PassError(f"the cache holds {before.shape[0]} sequences and the attention mask {shown.shape[0]}")
        slots = torch.arange(shown.shape[1], device=shown.device)
        hidden = slots < before[:, None]
        expected = bool((shown != hidden).all())
        if not expected and bool((shown & hidden).any()):
            raise PassError(
                "the attention mask shows slots that were hidden as padding when the cache was filled; "
                "use a new cache, or the mask that it was filled with"
            )
        self._set_plain(expected and mask.ndim == 2)

    def _set_plain(self, plain: bool) -> None:
        for layer in self.compressed:
            if layer.rows.plain is not plain:
                layer.rows = replace(layer.rows, plain=plain)

    def _set_rows(self, rows: Rows) -> None:
        for layer in self.compressed:
            layer.set_rows(rows)


def _leading_hidden(shown: torch.Tensor, before: torch.Tensor, length: int) -> torch.Tensor:
    """Return the left padding (B,) that a mask (B, S) says; it is settled for rows that hold a token already."""
    padding = (shown.int().cumsum(-1) == 0).sum(-1)
    before = before.to(padding.device)
    return torch.where(before < length, before, padding) if length else padding


def _check(config: PreTrainedConfig, codebooks: Codebooks) -> None:
    """Refuse codebooks and a model that are not made for each other."""
    if config.is_encoder_decoder:
        raise PassError(f"kv-pq knows decoder-only models, and {config.model_type} has an encoder; leave kv-pq out")
    codebooks.check(config)
    layers = DynamicCache(config=config).layers
    for index in codebooks.layers:
        if index >= len(layers) or type(layers[index]) is not DynamicLayer:
            found = type(layers[index]).__name__ if index < len(layers) else "no cache"
            raise PassError(
                f"the codebooks have layer {index}, where this model keeps {found}; run kv-pq on this model again"
            )


# --- models that use it by themselves -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attached:
    """What :func:`attach` changed, to be put back."""

    hook: torch.utils.hooks.RemovableHandle
    implementation: str
    reason: str | None


def attach(model: PreTrainedModel, codebooks: Codebooks) -> None:
    """Let a model attend over product-quantized codes, and make such a cache wherever none is given to it.

    ``generate()`` then needs no argument, and neither does a forward pass with ``use_cache``. A cache that the caller
    gives is used as it is. A model whose attention cannot be exchanged keeps its own, which then reads decoded keys and
    values (:func:`fallback_reason`).

    Raises
    ------
    PassError
        If the codebooks are of another model.
    """
    _check(model.config, codebooks)
    detach(model)
    attention.register()
    config = model.config.get_text_config(decoder=True)
    before, reason = config._attn_implementation, _cannot_switch(model)
    if reason is None:
        config._attn_implementation_internal = attention.NAME
    decoder = model.get_decoder()
    names = tuple(inspect.signature(decoder.forward).parameters)

    def before_forward(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(names, args, strict=False)) | kwargs
        config: Any = module.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        cache = named.get("past_key_values")
        wants = named.get("use_cache")
        wants = config.use_cache if wants is None else wants
        if cache is None and wants and not module.training:
            cache = named["past_key_values"] = PQCache(module.config, codebooks)
        if isinstance(cache, PQCache):
            if cache.config is not config:
                raise PassError("this cache was made for another model; make it with PQCache(model.config, codebooks)")
            cache.see_mask(named.get("attention_mask"))
        return (), named

    hook = decoder.register_forward_pre_hook(before_forward, with_kwargs=True)
    setattr(model, _PREPARE, MethodType(_preparing(codebooks), model))
    setattr(model, _STATE, _Attached(hook, before, reason))


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`; a model that is not attached stays as it is."""
    state: _Attached | None = vars(model).pop(_STATE, None)
    if state is None:
        return
    state.hook.remove()
    vars(model).pop(_PREPARE)
    model.config.get_text_config(decoder=True)._attn_implementation_internal = state.implementation


def fallback_reason(model: PreTrainedModel) -> str | None:
    """Return why an attached model reads decoded keys and values instead of codes; None if it reads codes."""
    state: _Attached | None = vars(model).get(_STATE)
    return "the model is not attached" if state is None else state.reason


def describe(model: PreTrainedModel) -> tuple[str, ...]:
    """Return how an attached model reads its cache, one line each."""
    reason = fallback_reason(model)
    if reason is not None:
        return (f"keys and values are decoded a layer at a time for the model's own attention: {reason}",)
    found = attention.kernels(model.device)
    if isinstance(found, str):
        return (f"attention over codes runs in plain torch: {found}",)
    return (f"attention over codes runs in {found.__name__}",)


def _cannot_switch(model: PreTrainedModel) -> str | None:
    if model._can_set_attn_implementation():
        return None
    return f"{type(model).__name__} does not use transformers' attention interface"


def _preparing(codebooks: Codebooks) -> Callable[..., None]:
    """Return ``generate()``'s step that makes a cache, with this cache in place of a new DynamicCache."""

    def prepare(
        model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kw: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        getattr(type(model), _PREPARE)(model, generation_config, model_kwargs, *args, **kw)
        made = model_kwargs.get("past_key_values")
        if given is None and made is not None and type(made) is DynamicCache and not made.offloading:
            cache = PQCache(model.config, codebooks)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache

    return prepare
