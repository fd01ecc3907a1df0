"""Arithmetic intensity and roofline of a model, prefill and decode apart, traced from its real forward.

Counting rules: ``docs/profilers/intensity.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from profilers.base import ProfileContext, Profiler

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class ModuleIntensity:
    """Cost of one module and everything inside it (inclusive, like ``FlopCounterMode``)."""

    name: str
    kind: str  # class name
    flops: int
    bytes: int
    flops_per_byte: float | None
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class OpIntensity:
    """Cost of all calls of one op (or, in ``op_classes``, of one class of ops).

    ``attained_fraction`` is attainable / measured time: 1 means that the op runs at the roofline.
    """

    name: str
    calls: int
    flops: int
    bytes: int
    flops_per_byte: float | None
    attainable_seconds: float | None
    measured_seconds: float | None
    flops_per_second: float | None
    bytes_per_second: float | None
    attained_fraction: float | None
    bound: str | None  # "compute" | "memory"


@dataclass(frozen=True)
class IntensityPoint:
    """One phase at one batch and context. ``bytes`` = weight + activation + kv bytes.

    ``flops`` counts attention as a dense query x key rectangle (as ``FlopCounterMode`` does); ``flops_needed`` counts
    only the pairs the mask lets through. ``cache_copy_bytes`` is traffic that the cache class adds by copying its
    history when it grows; it is not in ``bytes``.
    """

    phase: str  # "prefill" | "decode"
    batch: int
    context: int
    flops: int
    flops_needed: int
    bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    cache_copy_bytes: int
    flops_per_byte: float
    time_seconds: float | None
    time_reason: str | None
    attainable_seconds: float | None
    bound: str | None  # "compute" | "memory" | "overhead"
    mfu: float | None
    mbu: float | None
    modules: tuple[ModuleIntensity, ...]
    op_classes: tuple[OpIntensity, ...]
    ops: tuple[OpIntensity, ...]
    uncounted_ops: tuple[str, ...]  # ops that did arithmetic for which there is no FLOP formula
    notes: tuple[str, ...]


@dataclass(frozen=True)
class IntensityResult:
    """All points, and the roofline they are drawn on."""

    dtype: str
    peak_flops_per_second: float | None
    peak_bytes_per_second: float | None
    ridge_flops_per_byte: float | None  # intensity at which compute takes over from memory
    experts: str | None  # how routed experts were counted; None without experts
    points: tuple[IntensityPoint, ...]


def run(context: ProfileContext) -> IntensityResult:
    """Profile every batch x context asked for."""
    raise NotImplementedError


PROFILER = Profiler(
    name="intensity",
    title="Arithmetic intensity and roofline",
    run=run,
    result_type=IntensityResult,
    needs_weights=False,
    requires=("latency",),
    paper="Williams, Waterman, Patterson 2009 (roofline)",
)
