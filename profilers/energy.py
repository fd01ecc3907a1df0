"""Energy a token, power, clocks and throttling, read through NVML; None with the reason where there is none.

::

    energy counter ──┐                                    ┌── energy counter
                     ▼                                    ▼
    prefill ─────────[ decode step · decode step · … ]────  more such stretches until 2 s are timed
                        ▲     ▲     ▲     ▲     ▲
                        power, clocks, temperature, throttle reasons, sampled by a thread

See ``docs/profilers/energy.md``.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from profilers.base import ProfileContext, Profiler
from profilers.device import synchronize
from profilers.phases import context_limit, generates, token_ids
from profilers.timing import check_point, decode_room, first_token, next_token, out_of_memory_as_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_CONTEXT = 512
DECODE_SECONDS = 2.0
"""Decoding is metered for at least this long: NVML's counter moves in steps of tens of milliseconds."""
STRETCH_STEPS = 256
"""Decode steps between prefills; the cache grows by as many tokens."""
WARM_UP_STEPS = 8
SAMPLE_SECONDS = 0.05
THROTTLE_REASONS = {
    # bits of nvmlDeviceGetCurrentClocksThrottleReasons (nvml.h); idle clocks (bit 0) are no throttling
    0x002: "applications clocks setting",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake slowdown",
    0x100: "display clock setting",
    0x200: "board limit",
    0x400: "reliability",
}


@dataclass(frozen=True)
class EnergyResult:
    """Energy of decoding at the first batch and context asked for. ``reason`` says why a figure is None.

    Attributes
    ----------
    joules_per_token : float or None
        Of the whole GPU, idle power included: energy / ``tokens``.
    average_power_watts : float or None
        Energy / ``seconds``.
    power_limit_watts : float or None
        Enforced by the driver.
    sm_clock_hertz, memory_clock_hertz, temperature_celsius : float or None
        Mean of samples taken while decoding.
    throttle_reasons : tuple of str or None
        All that were seen while decoding; empty if none was.
    tokens : int or None
        Decode steps x batch.
    seconds : float or None
        Metered.
    reason : str or None
    batch, context : int or None
        What was decoded.
    method : str or None
        ``"energy counter"``, or ``"sampled power"`` on GPUs without one.
    """

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
    batch: int | None = None
    context: int | None = None
    method: str | None = None


def not_measured(reason: str) -> EnergyResult:
    """Return a result in which nothing was measured."""
    return EnergyResult(None, None, None, None, None, None, None, None, None, reason)


def measure_energy(
    model: PreTrainedModel, batch: int = 1, context: int = DEFAULT_CONTEXT, *, seed: int = 0
) -> EnergyResult:
    """Measure the energy of decoding on an NVIDIA GPU.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, on its device.
    batch, context : int
        Sequences, and tokens in the cache when decoding starts; the cache grows by at most ``STRETCH_STEPS``.
    seed : int
        Of the random token ids.

    Returns
    -------
    EnergyResult
        All None with the reason on a CPU or without NVML.

    Raises
    ------
    DoesNotFitError
        If the device has not enough memory.
    ProfilerError
        If the batch or context is not positive or past the model's limit.
    """
    device = model.device
    if device.type != "cuda":
        return not_measured(f"the model is on {device.type}; NVML reads the energy of NVIDIA GPUs only")
    if not generates(model):
        return not_measured("the model does not generate, and energy is that of decoding")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return not_measured("the model is spread over several devices; their energy is not added up")
    import pynvml

    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return _with_nvml(pynvml, uuid, lambda meter: _decode(model, batch, context, seed, meter), batch, context)


def _with_nvml(nvml: Any, uuid: str, work: Callable[[EnergyMeter], int], batch: int, context: int) -> EnergyResult:
    """Run ``work``, which meters stretches and returns its tokens, on the GPU that NVML knows by ``uuid``."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return not_measured(f"NVML: {error}")
    try:
        try:
            # By UUID, because CUDA_VISIBLE_DEVICES renumbers CUDA's devices and not NVML's.
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            return not_measured(f"NVML has no device {uuid}: {error}")
        meter = EnergyMeter(nvml, handle)
        tokens = work(meter)
        return meter.result(tokens, batch, context)
    finally:
        nvml.nvmlShutdown()


def _decode(model: PreTrainedModel, batch: int, context: int, seed: int, meter: EnergyMeter) -> int:
    """Decode in metered stretches until ``DECODE_SECONDS`` are metered; return the tokens decoded in them."""
    check_point(model, batch, context)
    held, steps = decode_room(model.config, context, STRETCH_STEPS + WARM_UP_STEPS)
    ids = token_ids(model, batch, held, seed)
    tokens = 0
    with out_of_memory_as_error(batch, context, model.device):
        while meter.seconds < DECODE_SECONDS:
            run = first_token(model, ids)
            warm_up = min(WARM_UP_STEPS, steps - 1)
            for _ in range(warm_up):
                run = next_token(model, *run)
            synchronize(model.device)
            with meter:
                for _ in range(steps - warm_up):
                    run = next_token(model, *run)
                synchronize(model.device)
            tokens += batch * (steps - warm_up)
            del run
    return tokens


@dataclass
class _Samples:
    power_watts: list[float] = field(default_factory=list)
    sm_hertz: list[float] = field(default_factory=list)
    memory_hertz: list[float] = field(default_factory=list)
    celsius: list[float] = field(default_factory=list)
    throttle_bits: list[int] = field(default_factory=list)


class EnergyMeter:
    """Adds up the energy of the ``with`` blocks it guards; the caller synchronizes the GPU at both ends.

    Parameters
    ----------
    nvml : module
        ``pynvml``.
    handle : object
        NVML's device handle.
    clock : callable
        Returns seconds.
    interval : float
        Seconds between samples.
    """

    def __init__(
        self,
        nvml: Any,
        handle: Any,
        *,
        clock: Callable[[], float] = time.perf_counter,
        interval: float = SAMPLE_SECONDS,
    ) -> None:
        self.seconds = 0.0
        self._nvml = nvml
        self._handle = handle
        self._clock = clock
        self._interval = interval
        self._counted_joules = 0.0
        self._samples = _Samples()
        self._missing: dict[str, str] = {}  # figure -> NVML's words
        self._failure: Exception | None = None
        self._thread = threading.Thread()
        self._stop = threading.Event()
        self._start_seconds = 0.0
        self._start_joules: float | None = None

    def __enter__(self) -> EnergyMeter:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)
        self._thread.start()
        self._start_joules = self._counter()
        self._start_seconds = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += self._clock() - self._start_seconds
        end = self._counter()
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        if self._start_joules is not None and end is not None:
            self._counted_joules += end - self._start_joules

    def result(self, tokens: int, batch: int, context: int) -> EnergyResult:
        """Return the figures of everything metered so far, in which this many tokens were decoded."""
        nvml, samples = self._nvml, self._samples
        limit = self._read("power limit", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3)
        joules: float | None
        if "energy counter" not in self._missing:
            method, joules = "energy counter", self._counted_joules
        else:
            method, power = "sampled power", _mean(samples.power_watts)
            joules = None if power is None else power * self.seconds
        if joules is not None:  # power was sampled in place of the counter, or not needed
            self._missing.pop("energy counter", None)
            self._missing.pop("power", None)
        bits = 0
        for sample in samples.throttle_bits:
            bits |= sample
        names = tuple(name for bit, name in THROTTLE_REASONS.items() if bits & bit)
        return EnergyResult(
            joules_per_token=None if joules is None else joules / tokens,
            average_power_watts=None if joules is None else joules / self.seconds,
            power_limit_watts=limit,
            sm_clock_hertz=_mean(samples.sm_hertz),
            memory_clock_hertz=_mean(samples.memory_hertz),
            temperature_celsius=_mean(samples.celsius),
            throttle_reasons=names if samples.throttle_bits else None,
            tokens=tokens,
            seconds=self.seconds,
            reason="; ".join(f"{figure}: {why}" for figure, why in self._missing.items()) or None,
            batch=batch,
            context=context,
            method=None if joules is None else method,
        )

    def _counter(self) -> float | None:
        return self._read("energy counter", lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3)

    def _read(self, figure: str, query: Callable[[], float]) -> float | None:
        """Return the figure, or None after noting why this GPU does not tell; it is not asked again."""
        if figure in self._missing:
            return None
        try:
            return query()
        except self._nvml.NVMLError as error:
            self._missing[figure] = str(error)
            return None

    def _sample_until_stopped(self) -> None:
        try:
            self._sample()
            while not self._stop.wait(self._interval):
                self._sample()
        except Exception as error:  # noqa: BLE001 - raised again where the block ends
            self._failure = error

    def _sample(self) -> None:
        nvml, handle, samples = self._nvml, self._handle, self._samples
        for figure, values, query in (
            ("power", samples.power_watts, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
            ("SM clock", samples.sm_hertz, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6),
            (
                "memory clock",
                samples.memory_hertz,
                lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6,
            ),
            (
                "temperature",
                samples.celsius,
                lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            ),
        ):
            value = self._read(figure, query)
            if value is not None:
                values.append(value)
        bits = self._read("throttle reasons", lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        if bits is not None:
            samples.throttle_bits.append(int(bits))


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def run(context: ProfileContext) -> EnergyResult:
    """Measure the energy of decoding at the first batch and context asked for."""
    default = min(DEFAULT_CONTEXT, context_limit(context.config) or DEFAULT_CONTEXT)
    length = context.request.contexts[0] if context.request.contexts else default
    with context.progress.task("energy", 1) as task:
        result = measure_energy(context.model, context.request.batches[0], length, seed=context.request.seed)
        task.advance()
    return result


PROFILER = Profiler(
    name="energy",
    title="Energy",
    run=run,
    result_type=EnergyResult,
)
