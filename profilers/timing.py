"""Time prefill and decode of a live model apart: warmed up, synchronized, with percentiles and spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Distribution:
    """Percentiles of repeated timings.

    Attributes
    ----------
    p50, p90, p99, mean, minimum : float
        Seconds.
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


@dataclass(frozen=True)
class PhaseTiming:
    """Measured times of one batch and context.

    ``prefill`` is the time to process the context and produce the first token (TTFT); ``decode`` the time of one
    further token for every sequence of the batch, at that context (TPOT).
    """

    batch: int
    context: int
    prefill: Distribution
    decode: Distribution
    peak_memory_bytes: int | None
    peak_memory_reason: str | None


class PhaseTimings:
    """Times each batch x context once, on first use, and remembers it."""

    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        raise NotImplementedError

    def measure(self, batch: int, context: int) -> PhaseTiming:
        """Return the timing of this point, measuring it if this is the first time it is asked for."""
        raise NotImplementedError
