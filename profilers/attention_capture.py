"""Watch every softmax attention of a live model, with its log-sum-exp and without the T x T matrix.

::

    model.forward ──> F.scaled_dot_product_attention ──┐               ┌──> output, back to the model
                                                       ├─ fused kernel ┤
    model.forward ──> transformers' AttentionInterface ┘               └──> log-sum-exp ──> callback(AttentionCall)

A fused kernel already computes the log-sum-exp of each query's scores and normally drops it. With it, any single
attention weight costs one dot product, ``A[i, k] = exp(score(i, k) - lse[i])``, so weights can be read one column or
one block at a time.

Two ways in, chosen from how the model calls its attention:

- loaded with ``sdpa``: calls of :func:`torch.nn.functional.scaled_dot_product_attention` are intercepted; results are
  the same to the bit where torch would take that kernel too, and agree to rounding where it would take another;
- loaded with anything else (``eager``, flash attention, a model with learned sinks): where the architecture uses
  transformers' attention interface, our function is registered there for the time of the context; otherwise the model
  is switched to ``sdpa`` for that time. Results agree to rounding.

An attention that computes its own softmax in neither place cannot be observed and raises, naming the module.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from profilers.attention_kernels import BLOCK_ELEMENTS, additive_mask, attention_scores, attention_with_lse
from profilers.base import ProfilerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AttentionCall", "attention_with_lse", "decoder_layers", "observe_attention", "uses_attention_interface"]

_CROSS_ATTENTION_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
_registrations = itertools.count()


@dataclass(frozen=True)
class AttentionCall:
    """One softmax attention as the model computed it.

    Symbols: B sequences, H query heads, Hkv key/value heads (H a multiple of Hkv; query head h reads key/value head
    h // (H / Hkv)), T queries, S keys, d and dv head sizes.

    Attributes
    ----------
    layer : int or None
        The calling module's ``layer_idx``, else the first number in its name.
    name : str
        Name of the calling module in the model.
    query, key, value : torch.Tensor
        Shapes (B, H, T, d), (B, Hkv, S, d), (B, Hkv, S, dv), in the model's dtype, positions already applied.
        Some architectures repeat keys and values beforehand; then Hkv = H.
    mask : torch.Tensor or None
        Broadcastable to (B, H, T, S); boolean (True: visible) or added to the scores.
    is_causal : bool
        Key j is visible to query i only for j <= i, on top of ``mask``.
    scale : float
        Factor on the dot products.
    softcap : float or None
        Scores are ``softcap * tanh(scores / softcap)``, before the mask.
    log_sum_exp : torch.Tensor
        Shape (B, H, T), float32, natural logarithm; includes a learned sink's logit where the model has one.
    is_cross : bool
        Keys come from another sequence than queries.
    """

    layer: int | None
    name: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    scale: float
    softcap: float | None
    log_sum_exp: torch.Tensor
    is_cross: bool

    def probabilities(self, queries: slice, keys: slice) -> torch.Tensor:
        """Return the block ``A[queries, keys]`` of attention weights, shape (B, H, queries, keys), float32.

        The caller bounds the block. Weights on the visible keys sum to 1 unless the model has a learned sink; a query
        that sees no key has zeros.
        """
        scores = attention_scores(
            self.query, self.key, self.mask, self.is_causal, self.scale, self.softcap, queries=queries, keys=keys
        )
        seen = self.log_sum_exp[:, :, queries, None]
        return torch.exp(scores - seen.masked_fill(seen == -torch.inf, 0.0))

    def first_key_probabilities(self) -> torch.Tensor:
        """Return ``A[i, 1]`` for every query i: shape (B, H, T), float32. One dot product a query."""
        batch, heads, queries, size = self.query.shape
        rows = max(1, BLOCK_ELEMENTS // (batch * heads * size))
        blocks = [
            self.probabilities(slice(start, start + rows), slice(0, 1)).squeeze(-1) for start in range(0, queries, rows)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


@contextlib.contextmanager
def observe_attention(model: PreTrainedModel, callback: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Call ``callback`` for each softmax attention that ``model`` computes inside the context.

    The model must be in evaluation mode, and is best run under :func:`torch.no_grad`: no gradient flows through the
    log-sum-exp. On leaving, the model, its configs and transformers' registries are as they were.

    Parameters
    ----------
    model : PreTrainedModel
    callback : callable
        Receives an :class:`AttentionCall` after the attention is computed and before its output is used. The tensors
        are the model's own: read them, do not change or keep them.

    Raises
    ------
    ProfilerError
        If the model is training, or, when it runs, if it computes an attention that cannot be observed.
    """
    if model.training:
        raise ProfilerError(
            f"{type(model).__name__} is in training mode, where attention has dropout; call model.eval()"
        )
    with contextlib.ExitStack() as stack:
        callers = stack.enter_context(_caller_stack(model))
        observer = _Observer(type(model).__name__, callers, callback)
        stack.enter_context(_reachable_attention(model, observer))
        stack.enter_context(observer)
        yield


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """Return the decoder's stack of layers and its name in the model.

    Raises
    ------
    ProfilerError
        If the model holds no list of layers.
    """
    decoder = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    lists = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 0]
    if not lists:
        raise ProfilerError(f"{type(model).__name__} holds no list of decoder layers, so nothing can be told by layer")
    stack = min(lists, key=lambda module: (names[module].count("."), -len(module)))
    return names[stack], stack


# --- who is calling -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Caller:
    name: str
    layer: int | None
    is_cross: bool


@contextlib.contextmanager
def _caller_stack(model: PreTrainedModel) -> Iterator[list[_Caller]]:
    """Keep the stack of running modules that have children: the innermost one is who computes an attention."""
    running: list[_Caller] = []
    handles = []

    def watch(name: str, module: torch.nn.Module) -> None:
        layer = _layer_index(name, module)

        def enter(_module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            is_cross = any(kwargs.get(argument) is not None for argument in _CROSS_ATTENTION_ARGUMENTS)
            running.append(_Caller(name, layer, is_cross))

        def leave(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
            running.pop()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))

    try:
        for name, module in model.named_modules():
            if next(module.children(), None) is not None:
                watch(name, module)
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _layer_index(name: str, module: torch.nn.Module) -> int | None:
    own = getattr(module, "layer_idx", None)
    if isinstance(own, int):
        return own
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


# --- where it is called ---------------------------------------------------------------------------------------------


class _Observer(TorchFunctionMode):
    """Stands in for ``scaled_dot_product_attention`` and fails where a softmax attention goes past it."""

    def __init__(self, model_name: str, running: list[_Caller], callback: Callable[[AttentionCall], None]) -> None:
        super().__init__()
        self._model_name = model_name
        self._running = running
        self._callback = callback

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._scaled_dot_product_attention(*args, **kwargs)
        if getattr(func, "__name__", "") == "softmax" and _looks_like_attention(args[0] if args else kwargs["input"]):
            raise self._unobservable("computes its softmax itself")
        return func(*args, **kwargs)

    def _unobservable(self, why: str) -> ProfilerError:
        name = self._running[-1].name if self._running else "?"
        return ProfilerError(
            f"the attention of {self._model_name} cannot be observed: module '{name}' {why}; "
            "load the model with attn_implementation='sdpa' if it supports that, or leave this instrument out"
        )

    def _scaled_dot_product_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if dropout_p:
            raise self._unobservable(f"applies dropout {dropout_p} to the attention weights")
        if not (query.ndim == key.ndim == value.ndim == 4):
            raise self._unobservable(f"calls attention with {query.ndim} dimensions instead of 4")
        output, log_sum_exp = attention_with_lse(query, key, value, mask=attn_mask, is_causal=is_causal, scale=scale)
        self._report(query, key, value, attn_mask, is_causal, scale, None, log_sum_exp)
        return output

    def interface(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: torch.Tensor | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_unused: Any,
    ) -> tuple[torch.Tensor, None]:
        """Stand in for an entry of transformers' attention interface (its argument names and return shape).

        ``s_aux`` is a learned logit a head that takes part in the softmax and carries no value (gpt-oss).
        """
        if dropout:
            raise self._unobservable(f"applies dropout {dropout} to the attention weights")
        queries = query.shape[2]
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and queries > 1 and attention_mask is None
        if causal and key.shape[2] > queries:  # prefill into a preallocated cache: the rest of it is empty
            key, value = key[:, :, :queries], value[:, :, :queries]
            position_bias = None if position_bias is None else position_bias[..., :queries]
        mask = attention_mask
        if position_bias is not None:
            mask = position_bias if mask is None else position_bias + additive_mask(mask, query.dtype)
        output, log_sum_exp = attention_with_lse(
            query, key, value, mask=mask, is_causal=causal, scale=scaling, softcap=softcap
        )
        if s_aux is not None:
            with_sink = torch.logaddexp(log_sum_exp, s_aux.detach().float().view(1, -1, 1))
            output = output * torch.exp(log_sum_exp - with_sink)[..., None].to(output.dtype)
            log_sum_exp = with_sink
        self._report(query, key, value, mask, causal, scaling, softcap, log_sum_exp)
        return output.transpose(1, 2).contiguous(), None

    def _report(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        softcap: float | None,
        log_sum_exp: torch.Tensor,
    ) -> None:
        caller = self._running[-1] if self._running else _Caller("", None, False)
        self._callback(
            AttentionCall(
                layer=caller.layer,
                name=caller.name,
                query=query,
                key=key,
                value=value,
                mask=mask,
                is_causal=is_causal,
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
                softcap=softcap,
                log_sum_exp=log_sum_exp,
                is_cross=caller.is_cross,
            )
        )


def _looks_like_attention(scores: Any) -> bool:
    """Tell attention scores (heads, T, S) from a router's or a vocabulary's softmax."""
    if not isinstance(scores, torch.Tensor) or scores.ndim < 3:
        return False
    return scores.ndim >= 4 or scores.shape[-1] == scores.shape[-2] > 1


@contextlib.contextmanager
def _reachable_attention(model: PreTrainedModel, observer: _Observer) -> Iterator[None]:
    """Bring each config of the model to an implementation that ``observer`` sees; put everything back after."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    changed = [config for config in _configs(model) if config._attn_implementation != "sdpa"]
    if not changed:
        yield
        return
    saved = [config._attn_implementation_internal for config in changed]
    if uses_attention_interface(type(model)):
        implementation = f"observed_attention_{next(_registrations)}"
    elif model._supports_sdpa:
        implementation = "sdpa"
    else:  # nothing to switch: an attention in it, if any, is caught at its softmax
        yield
        return
    try:
        if implementation != "sdpa":
            AttentionInterface.register(implementation, observer.interface)
            AttentionMaskInterface.register(implementation, sdpa_mask)
        for config in changed:
            config._attn_implementation_internal = implementation
        yield
    finally:
        for config, before in zip(changed, saved, strict=True):
            config._attn_implementation_internal = before
        if implementation != "sdpa":  # the registries have no public way to take an entry out
            AttentionInterface._global_mapping.pop(implementation, None)
            AttentionMaskInterface._global_mapping.pop(implementation, None)


def _configs(model: PreTrainedModel) -> list[Any]:
    """List every config object that a module of the model reads its attention implementation from."""
    found: dict[int, Any] = {}
    pending = [module.config for module in model.modules() if hasattr(module, "config")]
    while pending:
        config = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        pending.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return list(found.values())


def uses_attention_interface(model_class: type) -> bool:
    """Tell from its source whether the architecture dispatches through transformers' attention interface.

    A class that was made from an architecture, in a module of its own, counts as that architecture.
    """
    from transformers import PreTrainedModel

    for base in itertools.takewhile(lambda base: base is not PreTrainedModel, model_class.__mro__):
        module = inspect.getmodule(base)
        with contextlib.suppress(OSError):
            if module is not None and "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module):
                return True
    return False
