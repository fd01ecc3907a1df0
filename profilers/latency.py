"""Latency: TTFT and TPOT percentiles, throughput, peak memory."""

from __future__ import annotations

from dataclasses import dataclass

from profilers.base import ProfileContext, Profiler
from profilers.timing import Distribution


@dataclass(frozen=True)
class LatencyPoint:
    """Timing of one batch and context."""

    batch: int
    context: int
    ttft_seconds: Distribution
    tpot_seconds: Distribution
    tokens_per_second: float  # decode, all sequences of the batch together
    prefill_tokens_per_second: float
    peak_memory_bytes: int | None
    peak_memory_reason: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class LatencyResult:
    """All points, and the conditions they were measured under."""

    points: tuple[LatencyPoint, ...]
    load_seconds: float | None
    threads: int | None
    attention_implementation: str


def run(context: ProfileContext) -> LatencyResult:
    """Time every batch x context asked for."""
    raise NotImplementedError


PROFILER = Profiler(
    name="latency",
    title="Latency",
    run=run,
    result_type=LatencyResult,
)
