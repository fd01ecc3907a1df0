"""Latency: TTFT and TPOT percentiles, throughput, peak memory. See ``docs/profilers/latency.md``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from profilers.base import ProfileContext, Profiler, Progress, SilentProgress
from profilers.phases import context_limit
from profilers.timing import Distribution, PhaseTimings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_CONTEXT = 512
NO_DECODE = "the model does not generate: TTFT is the time of one forward pass"
UNSTABLE_SPREAD = 0.25
"""(p90 - p10) / p50 above which a number carries a warning."""


@dataclass(frozen=True)
class LatencyPoint:
    """Timing of one batch and context.

    Attributes
    ----------
    ttft_seconds : Distribution
        Prefill of the context and choice of the first token.
        Of a model that does not generate: one forward pass.
    tpot_seconds : Distribution or None
        One decode step: one further token for every sequence.
    tokens_per_second : float or None
        Decode, all sequences of the batch together: batch / median TPOT.
    prefill_tokens_per_second : float
        batch x context / median TTFT.
    peak_memory_bytes : int or None
        CUDA: live tensors with the weights. CPU: resident size of the process.
    warnings : tuple of str
        About figures of this point that are not to be trusted.
    decode_context : tuple of int or None
        Tokens in the cache before the first and the last timed decode step.
    tpot_reason : str or None
        Why there is no TPOT.
    """

    batch: int
    context: int
    ttft_seconds: Distribution
    tpot_seconds: Distribution | None
    tokens_per_second: float | None
    prefill_tokens_per_second: float
    peak_memory_bytes: int | None
    peak_memory_reason: str | None
    warnings: tuple[str, ...]
    decode_context: tuple[int, int] | None = None
    tpot_reason: str | None = None


@dataclass(frozen=True)
class LatencyResult:
    """All points, and the conditions they were measured under.

    Attributes
    ----------
    load_seconds : float or None
        Time it took to load the weights; None if the model was handed over loaded.
    threads : int or None
        CPU threads of one op; None on other devices.
    attention_implementation : str
        ``sdpa``, ``eager``, …
    """

    points: tuple[LatencyPoint, ...]
    load_seconds: float | None
    threads: int | None
    attention_implementation: str


def measure_latency(
    model: PreTrainedModel,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (DEFAULT_CONTEXT,),
    *,
    timings: PhaseTimings | None = None,
    load_seconds: float | None = None,
    progress: Progress | None = None,
) -> LatencyResult:
    """Time every batch x context.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, on its device.
    batches, contexts : sequence of int
        Sequences, and tokens in each.
    timings : PhaseTimings, optional
        Points timed before are taken from here.
    load_seconds : float, optional
        Copied to the result.
    progress : Progress, optional

    Raises
    ------
    DoesNotFitError
        If the device has not enough memory for a point.
    ProfilerError
        If a batch or context is not positive or past the model's limit.
    """
    timings = timings or PhaseTimings(model)
    points = []
    with (progress or SilentProgress()).task("latency", len(batches) * len(contexts)) as task:
        for batch in batches:
            for context in contexts:
                points.append(_point(timings, batch, context))
                task.advance()
    return LatencyResult(
        points=tuple(points),
        load_seconds=load_seconds,
        threads=torch.get_num_threads() if model.device.type == "cpu" else None,
        attention_implementation=str(model.config.get_text_config(decoder=True)._attn_implementation),
    )


def _point(timings: PhaseTimings, batch: int, context: int) -> LatencyPoint:
    timing = timings.measure(batch, context)
    decode = timing.decode
    return LatencyPoint(
        batch=batch,
        context=context,
        ttft_seconds=timing.prefill,
        tpot_seconds=decode,
        tokens_per_second=None if decode is None else batch / decode.p50,
        prefill_tokens_per_second=batch * context / timing.prefill.p50,
        peak_memory_bytes=timing.peak_memory_bytes,
        peak_memory_reason=timing.peak_memory_reason,
        warnings=(
            *spread_warnings("TTFT", timing.prefill),
            *(() if decode is None else spread_warnings("TPOT", decode)),
        ),
        decode_context=timing.decode_context,
        tpot_reason=None if decode is not None else NO_DECODE,
    )


def spread_warnings(name: str, timing: Distribution) -> tuple[str, ...]:
    """Say what makes this number shaky: samples far apart, or a single one."""
    if timing.samples == 1:
        return (f"{name} is one sample: it takes too long to repeat",)
    if timing.relative_spread <= UNSTABLE_SPREAD:
        return ()
    return (
        f"{name} is unstable: p10 to p90 span {timing.relative_spread:.0%} of the median over {timing.samples} "
        "samples; close other programs and measure again",
    )


def run(context: ProfileContext) -> LatencyResult:
    """Time every batch x context asked for; by default a context of 512 tokens, or the model's limit if smaller."""
    default = min(DEFAULT_CONTEXT, context_limit(context.config) or DEFAULT_CONTEXT)
    return measure_latency(
        context.model,
        context.request.batches,
        context.request.contexts or (default,),
        timings=context.timings,
        load_seconds=context.load_seconds,
        progress=context.progress,
    )


PROFILER = Profiler(
    name="latency",
    title="Latency",
    run=run,
    result_type=LatencyResult,
)
