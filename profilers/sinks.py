"""Attention sinks of every head, without ever forming the T x T attention matrix."""

from __future__ import annotations

from dataclasses import dataclass

from profilers.base import ProfileContext, Profiler


@dataclass(frozen=True)
class SinkPosition:
    """One key position: attention it receives, averaged over heads and sequences."""

    position: int  # 1-based, as in the paper: 1 is the first token
    mean_alpha: float
    sink_rate: float  # share of heads with alpha > epsilon, averaged over sequences


@dataclass(frozen=True)
class SinkPoint:
    """Sinks at one context length, with or without a BOS token.

    ``alpha`` is ``alpha_1`` by layer and head, averaged over sequences; a layer without softmax attention is None.
    ``sink_rate`` is thresholded for each sequence, then averaged, at the first epsilon.
    """

    context: int
    bos: bool
    sequences: int
    sink_rate: float | None
    sink_rate_by_epsilon: dict[str, float]
    alpha: tuple[tuple[float, ...] | None, ...]
    positions: tuple[SinkPosition, ...]
    positions_reason: str | None
    value_norm_ratio: tuple[float | None, ...]  # by layer: norm of the first token's value / median norm
    uniform_alpha: float  # H_T / T: what uniform causal attention would give


@dataclass(frozen=True)
class MassiveActivation:
    """A hidden-state entry with |a| > 100 and |a| > 1000 x the median."""

    layer: int
    position: int  # 1-based
    token: str
    dimension: int
    value: float
    ratio_to_median: float
    bos: bool


@dataclass(frozen=True)
class PerturbationSpread:
    """How far the representation moves when one token is changed.

    ``relative_change[layer][position]`` is |h' - h| / |h|, averaged over sequences.
    """

    bos: bool
    context: int
    changed_position: int  # 1-based
    sequences: int
    relative_change: tuple[tuple[float, ...], ...]
    mean_by_layer: tuple[float, ...]  # over the positions at and after the changed one


@dataclass(frozen=True)
class SinksResult:
    """Sink rates and what goes with them."""

    epsilon: float
    epsilons: tuple[float, ...]
    sequences: int
    text: str  # what the sequences were taken from
    points: tuple[SinkPoint, ...]
    bos_reason: str | None  # why there is no point with (or without) BOS, if so
    not_applicable: dict[str, str]  # layer index -> reason
    massive_activations: tuple[MassiveActivation, ...]
    massive_activation_count: int
    perturbation: tuple[PerturbationSpread, ...]


def run(context: ProfileContext) -> SinksResult:
    """Profile the sinks of a live model."""
    raise NotImplementedError


PROFILER = Profiler(
    name="sinks",
    title="Attention sinks",
    run=run,
    result_type=SinksResult,
    paper="Gu et al. 2025, When Attention Sink Emerges in Language Models",
)
