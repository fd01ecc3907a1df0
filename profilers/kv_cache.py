"""KV-cache footprint: predicted on the meta device, measured on the real one, and what fits."""

from __future__ import annotations

from dataclasses import dataclass

from profilers.base import ProfileContext, Profiler


@dataclass(frozen=True)
class KVLayer:
    """What one layer keeps between tokens, for one sequence."""

    index: int
    kind: str  # "full" | "sliding" | "latent" | "linear" | "hybrid..." | "cross" | "none"
    cache_class: str
    bytes_per_token: float  # slope once every window is full
    fixed_bytes: int
    window: int | None


@dataclass(frozen=True)
class KVPoint:
    """Cache of ``batch`` sequences of ``context`` tokens."""

    batch: int
    context: int
    predicted_bytes: int
    measured_bytes: int | None
    measured_reason: str | None
    difference_bytes: int | None
    allocator_bytes: int | None
    allocator_reason: str | None


@dataclass(frozen=True)
class KVResult:
    """bytes(context) = fixed_bytes + bytes_per_token x context, a sequence, once every sliding window is full.

    ``bytes_per_token_growing`` is the slope before any window is full. ``max_context`` and ``max_batch`` are keyed
    by bits per cached value ("16", "8", "4"; payload only, scales not counted).
    """

    dtype: str
    attention: str  # "MHA" | "GQA" | "MQA" | "MLA" | "none" | "mixed"
    bytes_per_token: float
    fixed_bytes: int
    bytes_per_token_growing: float
    latent_bytes_per_token: float | None
    latent_reason: str | None
    cross_attention_bytes_per_token: float | None
    layers: tuple[KVLayer, ...]
    points: tuple[KVPoint, ...]
    weight_bytes: int
    memory_bytes: int | None  # device memory that weights and cache have to share
    memory_reason: str | None
    model_context_limit: int | None
    max_context: dict[str, int | None]  # batch 1; by memory alone
    max_batch: dict[str, dict[str, int | None]]  # bits -> context -> batch
    crossover_context: int | None  # context at which one sequence's cache is as large as the weights


def run(context: ProfileContext) -> KVResult:
    """Profile the cache of a live model or, with ``config_only``, of its config."""
    raise NotImplementedError


PROFILER = Profiler(
    name="kv",
    title="KV cache",
    run=run,
    result_type=KVResult,
    needs_weights=False,
)
