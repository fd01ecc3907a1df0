"""Time prefill and decode of a live model apart: warmed up, synchronized, with percentiles and spread."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch

from profilers.base import DoesNotFitError, NotApplicableError, ProfilerError
from profilers.cache_prediction import predictor_of
from profilers.device import PeakMemory, memory_available_bytes, synchronize, track_peak_memory
from profilers.phases import (
    PhaseState,
    check_batch,
    check_context,
    context_limit,
    decode_step,
    generates,
    prefill,
    runtime_of,
    token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Result = TypeVar("Result")
Run: TypeAlias = tuple[PhaseState, torch.Tensor]
"""State after a forward, and the tokens chosen from its logits."""

CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"
"""Names PyTorch's CPU allocator in the RuntimeError that it raises."""


@dataclass(frozen=True)
class Repeats:
    """How often to repeat a timing.

    At least ``minimum`` times and for ``seconds``, at most ``maximum`` times; but no longer than ``limit_seconds`` once
    there is one sample.
    """

    minimum: int
    maximum: int
    seconds: float
    limit_seconds: float

    def enough(self, samples: Sequence[float]) -> bool:
        """Return whether these samples, in seconds, suffice."""
        if not samples:
            return False
        spent = sum(samples)
        done = len(samples) >= self.minimum and spent >= self.seconds
        return done or len(samples) >= self.maximum or spent >= self.limit_seconds


PREFILL_REPEATS = Repeats(minimum=3, maximum=32, seconds=1.5, limit_seconds=10.0)
DECODE_REPEATS = Repeats(minimum=16, maximum=64, seconds=1.5, limit_seconds=10.0)
DECODE_WARM_UP = 2
"""Steps before the first that is timed."""


@dataclass(frozen=True)
class Distribution:
    """Percentiles of repeated timings.

    Attributes
    ----------
    p50, p90, p99, mean, minimum : float
        Seconds. Percentiles interpolate linearly between samples.
    relative_spread : float
        (p90 - p10) / p50: how shaky the number is.
    samples : int
    """

    p50: float
    p90: float
    p99: float
    mean: float
    minimum: float
    relative_spread: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Distribution:
        """Summarize samples in seconds."""
        p10, p50, p90, p99 = (float(value) for value in np.percentile(samples, [10, 50, 90, 99]))
        return cls(p50, p90, p99, float(np.mean(samples)), min(samples), (p90 - p10) / p50, len(samples))


@dataclass(frozen=True)
class PhaseTiming:
    """Measured times of one batch and context.

    ``prefill`` is the time to process the context and produce the first token (TTFT); ``decode`` the time of one
    further token for every sequence of the batch, at that context (TPOT).

    Attributes
    ----------
    decode : Distribution or None
        None for a model that does not generate.
    decode_context : tuple of int
        Tokens in the cache before the first and before the last step that was timed: each step adds one.
    peak_memory_bytes : int or None
        Over this point: CUDA, live tensors with the weights; CPU, resident size of the process.
    peak_memory_reason : str or None
        Why that is None.
    """

    batch: int
    context: int
    prefill: Distribution
    decode: Distribution | None
    peak_memory_bytes: int | None
    peak_memory_reason: str | None
    decode_context: tuple[int, int] | None = None


class PhaseTimings:
    """Times each batch x context once, on first use, and remembers it.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, on its device.
    seed : int
        Of the random token ids; times depend on them only through routed experts.
    clock : callable
        Returns seconds.
    """

    def __init__(
        self, model: PreTrainedModel, *, seed: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._model = model
        self._seed = seed
        self._clock = clock
        self._known: dict[tuple[int, int], PhaseTiming] = {}

    def measure(self, batch: int, context: int) -> PhaseTiming:
        """Return the timing of this point, measuring it if this is the first time it is asked for.

        The work is that of :func:`profilers.phases.prefill` and :func:`profilers.phases.decode_step`, each followed by
        the choice of the next token, greedily.

        Parameters
        ----------
        batch, context : int
            Sequences, and tokens in each.

        Raises
        ------
        DoesNotFitError
            If the device has not enough memory.
        ProfilerError
            If the batch or context is not positive, the context is past the model's limit, or the model is on meta.
        """
        key = (batch, context)
        if key not in self._known:
            self._known[key] = self._measure(batch, context)
        return self._known[key]

    def _measure(self, batch: int, context: int) -> PhaseTiming:
        model, device = self._model, self._model.device
        check_point(model, batch, context)
        if not generates(model):
            return self._measure_forward(batch, context)
        held, steps = decode_room(model.config, context, DECODE_WARM_UP + DECODE_REPEATS.maximum)
        ids = token_ids(model, batch, context, self._seed)
        prefills: list[float] = []
        decodes: list[float] = []
        with out_of_memory_as_error(batch, context, device), track_peak_memory(device) as peak:
            run = first_token(model, ids[:, :held])  # warms up, and decoding goes on from it
            for step in range(steps):
                elapsed, run = self._timed(functools.partial(next_token, model, *run))
                if step >= DECODE_WARM_UP:
                    decodes.append(elapsed)
                if DECODE_REPEATS.enough(decodes):
                    break
            while not PREFILL_REPEATS.enough(prefills):
                del run  # its cache is gone before the next one is made
                elapsed, run = self._timed(functools.partial(first_token, model, ids))
                prefills.append(elapsed)
            del run
        first = held + DECODE_WARM_UP
        return PhaseTiming(
            batch=batch,
            context=context,
            prefill=Distribution.of(prefills),
            decode=Distribution.of(decodes),
            **_memory(model, peak),
            decode_context=(first, first + len(decodes) - 1),
        )

    def _measure_forward(self, batch: int, context: int) -> PhaseTiming:
        model, times = self._model, list[float]()
        ids = token_ids(model, batch, context, self._seed)

        def forward() -> None:
            with torch.inference_mode():
                model(input_ids=ids)

        with out_of_memory_as_error(batch, context, model.device), track_peak_memory(model.device) as peak:
            forward()  # warms up
            while not PREFILL_REPEATS.enough(times):
                times.append(self._timed(forward)[0])
        return PhaseTiming(batch, context, Distribution.of(times), None, **_memory(model, peak))

    def _timed(self, function: Callable[[], Result]) -> tuple[float, Result]:
        synchronize(self._model.device)
        start = self._clock()
        result = function()
        synchronize(self._model.device)
        return self._clock() - start, result


def _memory(model: Any, peak: PeakMemory) -> dict[str, Any]:
    """Return the peak memory, or why it is not known: torch counts on a GPU only what it allocates itself."""
    runtime = runtime_of(model)
    if runtime is not None and model.device.type == "cuda":
        return {"peak_memory_bytes": None, "peak_memory_reason": f"torch does not see {runtime}'s memory on a GPU"}
    return {"peak_memory_bytes": peak.bytes, "peak_memory_reason": peak.reason}


def first_token(model: PreTrainedModel, input_ids: torch.Tensor) -> Run:
    """Prefill and choose the next token: what a user waits for before anything appears (TTFT).

    Parameters
    ----------
    model : PreTrainedModel
    input_ids : torch.Tensor
        Shape (batch, context).

    Returns
    -------
    tuple
        The state for :func:`next_token`, and the chosen tokens, shape (batch, 1), on the model's device.
    """
    return _chosen(model, prefill(model, *input_ids.shape, input_ids=input_ids))


def next_token(model: PreTrainedModel, state: PhaseState, tokens: torch.Tensor) -> Run:
    """Decode one step from ``tokens`` and choose the next: what each further token costs (TPOT)."""
    return _chosen(model, decode_step(model, state, input_ids=tokens))


def _chosen(model: PreTrainedModel, state: PhaseState) -> Run:
    with torch.inference_mode():
        return state, state.logits[:, -1].argmax(dim=-1, keepdim=True).to(model.device)


def decode_room(config: PreTrainedConfig, context: int, steps: int) -> tuple[int, int]:
    """Return how many tokens to prefill so that ``steps`` decode steps have positions, and how many steps fit.

    Raises
    ------
    ProfilerError
        If the model has too few positions to decode at all.
    """
    limit = context_limit(config)
    if limit is None or context + steps <= limit:
        return context, steps
    if limit <= DECODE_WARM_UP + 1:
        raise ProfilerError(f"the model has {limit} positions, too few to time decoding; use a model with more")
    held = max(1, limit - steps)
    return held, limit - held


def check_point(model: PreTrainedModel, batch: int, context: int) -> None:
    """Refuse a batch x context that cannot run, before memory runs out: Linux ends a process that takes too much.

    The need is a lower bound: the cache, as predicted on the meta device, and the widest activations of one layer.

    Raises
    ------
    DoesNotFitError
        If that is more than is available.
    ProfilerError
        If the batch or context is not positive, the context is past the model's limit, or the model is on meta.
    """
    check_batch(batch)
    check_context(model.config, context)
    device = model.device
    if device.type == "meta":
        raise ProfilerError(f"{type(model).__name__} is on the meta device and has no weights to run; load its weights")
    on_one_device = len(set(getattr(model, "hf_device_map", {}).values())) <= 1
    if device.type not in ("cpu", "cuda") or not on_one_device:
        return  # torch's own out-of-memory error is all there is
    text = model.config.get_text_config(decoder=True)
    hidden = int(getattr(text, "hidden_size", 0))
    width = hidden + 2 * int(getattr(text, "intermediate_size", None) or 4 * hidden)
    tokens = batch * context
    need = tokens * width * model.dtype.itemsize
    available = memory_available_bytes(device)
    largest_cache = 2 * tokens * hidden * int(getattr(text, "num_hidden_layers", 0)) * model.dtype.itemsize
    if (
        generates(model) and need + largest_cache > available / 2
    ):  # else it fits whatever the layers keep, and the prediction is not needed
        with contextlib.suppress(NotApplicableError):  # a cache that cannot be predicted counts as nothing
            need += predictor_of(model)(batch, context).bytes
    if need > available:
        raise DoesNotFitError(
            f"batch {batch} x context {context} needs at least {need / 1e9:.1f} GB beside the weights and {device} has "
            f"{available / 1e9:.1f} GB; give a smaller --batch or --context"
        )


@contextlib.contextmanager
def out_of_memory_as_error(batch: int, context: int, device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory errors inside this block into :class:`profilers.base.DoesNotFitError`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_OUT_OF_MEMORY not in str(error):
            raise
        raise DoesNotFitError(
            f"batch {batch} x context {context} ran out of memory on {device}; give a smaller --batch or --context"
        ) from error
