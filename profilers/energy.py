"""Energy a token, power, clocks and throttling, read through NVML; None with the reason where there is none."""

from __future__ import annotations

from dataclasses import dataclass

from profilers.base import ProfileContext, Profiler


@dataclass(frozen=True)
class EnergyResult:
    """Energy of decoding at the first batch and context asked for. ``reason`` says why a figure is None."""

    joules_per_token: float | None
    average_power_watts: float | None
    power_limit_watts: float | None
    sm_clock_hertz: float | None
    memory_clock_hertz: float | None
    temperature_celsius: float | None
    throttle_reasons: tuple[str, ...] | None
    tokens: int | None
    seconds: float | None
    reason: str | None


def run(context: ProfileContext) -> EnergyResult:
    """Measure the energy of decoding."""
    raise NotImplementedError


PROFILER = Profiler(
    name="energy",
    title="Energy",
    run=run,
    result_type=EnergyResult,
)
