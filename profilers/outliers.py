"""Outliers in weights, keys, values and hidden states, and the quantization granularity that suits them."""

from __future__ import annotations

from dataclasses import dataclass

from profilers.base import ProfileContext, Profiler


@dataclass(frozen=True)
class OutlierRow:
    """Statistics of one tensor.

    ``channel_entropy_bits_*`` is the entropy of the codes in a channel, averaged over channels, under uniform
    quantization at ``OutliersResult.bits`` with a scale for each channel or each token (MILLION, Fig. 2).
    """

    kind: str  # "weight" | "key" | "value" | "hidden"
    name: str
    layer: int | None
    max_over_median: float | None
    kurtosis: float | None
    channel_entropy_bits_per_channel_scale: float | None
    channel_entropy_bits_per_token_scale: float | None
    suits: str | None  # "per-channel" | "per-token" | "either"


@dataclass(frozen=True)
class OutliersResult:
    """All rows."""

    bits: int
    tokens: int
    text: str
    rows: tuple[OutlierRow, ...]


def run(context: ProfileContext) -> OutliersResult:
    """Profile the outliers of a live model."""
    raise NotImplementedError


PROFILER = Profiler(
    name="outliers",
    title="Outliers",
    run=run,
    result_type=OutliersResult,
    paper="MILLION (DAC 2025), Fig. 2",
)
