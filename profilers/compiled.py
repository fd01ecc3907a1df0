"""Decode with ``torch.compile`` over a static cache, and how much faster that is than without.

A decode step of a small model is many short ops, and most of its time goes into launching them. Compiled, a step is
one graph. It needs a cache whose tensors never change place or size, so the cache is allocated at its full length and
each step attends to all of it under a mask.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from profilers.base import ProfilerError
from profilers.device import synchronize
from profilers.own_cache import of
from profilers.phases import check_context, context_limit, prefill, token_ids
from profilers.timing import check_point, next_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_STEPS = 3
BLOCK_STEPS = 8
"""Steps without, then as many with: what else the machine does falls on both."""
BLOCKS = 4
CACHE_MULTIPLE = 64
"""A static cache is as long as needed, rounded up to a multiple of this."""


@dataclass(frozen=True)
class CompiledTiming:
    """Time of one decode step of one sequence with and without ``torch.compile``.

    Attributes
    ----------
    context : int
        Tokens in the cache before the first step.
    eager_seconds : float
        Median.
    compiled_seconds : float or None
        Median; None where the step could not be compiled.
    compile_seconds : float or None
        Of the first compiled step.
    reason : str or None
        Why it could not be compiled.
    """

    context: int
    eager_seconds: float
    compiled_seconds: float | None
    compile_seconds: float | None
    reason: str | None


def why_not_compiled(model: PreTrainedModel) -> str | None:
    """Return why a model's decode step cannot be compiled over a static cache; None if it can."""
    if model.config.is_encoder_decoder:
        return "an encoder-decoder is not compiled"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers says that {type(model).__name__} cannot be compiled as one graph over a static cache"
    if of(model) is not None:
        return "it keeps a KV cache of its own, and a static one would replace it"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its weights are spread over several devices"
    return None


def compile_decode(model: PreTrainedModel) -> None:
    """Have ``model.generate`` use a static cache and compile the decode step; prefill stays as it is.

    The first call of ``generate`` takes a minute or more. Whoever passes a cache or ``disable_compile=True`` to
    ``generate`` gets it without.

    Raises
    ------
    ProfilerError
        If the model cannot be compiled.
    """
    from transformers import CompileConfig

    reason = why_not_compiled(model)
    if reason is not None:
        raise ProfilerError(f"the decode step is not compiled: {reason}; load it with compile=False")
    config = CompileConfig(**_options(model))
    config._compile_all_devices = True  # else transformers compiles on accelerators only
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = config


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """Return what ``torch.compile`` is called with: CUDA graphs where there is CUDA."""
    return {
        "fullgraph": True,
        "dynamic": False,
        "mode": "reduce-overhead" if model.device.type == "cuda" else "default",
    }


class CompiledDecode:
    """A compiled decode step of one sequence.

    Parameters
    ----------
    model : PreTrainedModel
    input_ids : torch.Tensor
        Shape (1, context): prefilled when this is made, not compiled.
    steps : int
        How many steps the cache has room for.
    """

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor, steps: int) -> None:
        from transformers import StaticCache

        length = math.ceil((input_ids.shape[1] + steps) / CACHE_MULTIPLE) * CACHE_MULTIPLE
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        with torch.inference_mode():
            output = model(input_ids=input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self.tokens = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        self._call: Callable[..., Any] = torch.compile(model.__call__, **_options(model))

    def step(self) -> torch.Tensor:
        """Decode one token; return the next one's logits, shape (1, vocabulary), and keep the likeliest for it."""
        with torch.inference_mode():
            output = self._call(input_ids=self.tokens, past_key_values=self._cache, use_cache=True)
            logits: torch.Tensor = output.logits[:, -1]
            self.tokens = logits.argmax(dim=-1, keepdim=True)
        return logits


def time_compiled_decode(model: PreTrainedModel, context: int, *, seed: int = 0) -> CompiledTiming:
    """Time decode steps of batch 1 with and without ``torch.compile``, in turns.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, on its device.
    context : int
        Tokens in the cache.
    seed : int
        Of the random token ids.

    Raises
    ------
    DoesNotFitError
        If the device has not enough memory.
    ProfilerError
        If the context has no room for the steps, or the model is on meta.
    """
    steps = WARM_UP_STEPS + BLOCKS * BLOCK_STEPS
    limit = context_limit(model.config)
    check_context(model.config, context)
    if limit is not None and context + steps > limit:
        raise ProfilerError(f"context {context} leaves no room for {steps} steps within {limit} positions; give less")
    check_point(model, 1, context)
    ids = token_ids(model, 1, context, seed)
    state = prefill(model, 1, context, input_ids=ids)
    token = state.logits[:, -1].argmax(dim=-1, keepdim=True)

    def eager() -> None:
        nonlocal state, token
        state, token = next_token(model, state, token)

    reason = why_not_compiled(model)
    compiled, compile_seconds = None, None
    if reason is None:
        try:
            compiled = CompiledDecode(model, ids, steps)
            compile_seconds = _time(model, compiled.step, 1)[0]
            _time(model, compiled.step, WARM_UP_STEPS - 1)
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the answer
            compiled, compile_seconds = None, None
            lines = str(error).strip().splitlines()
            reason = f"torch.compile failed: {type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
    _time(model, eager, WARM_UP_STEPS)
    without: list[float] = []
    with_it: list[float] = []
    for _ in range(BLOCKS):
        without += _time(model, eager, BLOCK_STEPS)
        if compiled is not None:
            with_it += _time(model, compiled.step, BLOCK_STEPS)
    return CompiledTiming(
        context=context,
        eager_seconds=statistics.median(without),
        compiled_seconds=statistics.median(with_it) if with_it else None,
        compile_seconds=compile_seconds,
        reason=reason,
    )


def _time(model: PreTrainedModel, step: Callable[[], Any], count: int) -> list[float]:
    samples = []
    for _ in range(count):
        synchronize(model.device)
        start = time.perf_counter()
        step()
        synchronize(model.device)
        samples.append(time.perf_counter() - start)
    return samples
