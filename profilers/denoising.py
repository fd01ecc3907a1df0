"""What a sampling step of a diffusion pipeline costs: times of its parts, and the roofline of one denoiser call.

::

    run() ─┬─ text encoders, vae.encode          components
           ├─ steps x (denoiser, once a branch)  ─┬─ embedders, output heads
           │                                      └─ blocks: what caching can skip
           ├─ vae.decode                         components
           └─ scheduler, loops                   what is left

Times come from hooks: on CUDA from events, read when a run has ended, so that nothing waits for them. FLOPs and bytes
are counted by the rules of ``docs/profilers/intensity.md``, on one call of the denoiser with its real arguments.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from profilers.base import DoesNotFitError, ProfilerError, Progress, SilentProgress
from profilers.device import synchronize, track_peak_memory
from profilers.latency import spread_warnings
from profilers.op_rules import tensors_in
from profilers.op_trace import OpTracer, Trace
from profilers.peaks import Peaks, Seen
from profilers.timing import CPU_OUT_OF_MEMORY, Distribution, Repeats

METHODS = ("decode", "encode")
"""What pipelines call on an autoencoder instead of the module itself."""
LIMIT_SECONDS = 300.0
"""Runs are not repeated beyond this time."""

Mark: TypeAlias = Any
"""A moment: a CUDA event, or seconds."""


@dataclass(frozen=True)
class ComponentTime:
    """One component's part of a run.

    Attributes
    ----------
    name : str
        As the pipeline calls it: ``vae``, ``text_encoder``.
    method : str
        ``forward``, ``decode`` or ``encode``.
    calls : int
        In one run.
    seconds : float
        In one run, all calls; median over runs.
    """

    name: str
    method: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class CallCost:
    """Cost of one call of the denoiser.

    Attributes
    ----------
    dtype : str
        Of its weights, whose ceiling counts.
    flops : int
        Attention as a dense rectangle of queries x keys.
    bytes : int
        Moved: weights and activations.
    flops_per_byte : float
    ridge_flops_per_byte : float or None
        From here on, computing takes longer than moving, on this device.
    peak_flops_per_second, peak_bytes_per_second : float or None
        Measured ceilings of this device, for this dtype and for main memory.
    attainable_seconds : float or None
        The least that the ceilings allow; None where there is no ceiling for the dtype.
    bound : str or None
        ``compute`` or ``memory``: which ceiling that is.
    seconds : float
        Median of the measured calls.
    flops_per_second, bytes_per_second : float
        Achieved.
    attained_fraction : float or None
        attainable / measured time.
    uncounted_ops : tuple of str
        Ops that may do arithmetic for which there is no formula.
    notes : tuple of str
    """

    dtype: str
    flops: int
    bytes: int
    weight_bytes: int
    activation_bytes: int
    flops_per_byte: float
    ridge_flops_per_byte: float | None
    peak_flops_per_second: float | None
    peak_bytes_per_second: float | None
    attainable_seconds: float | None
    bound: str | None
    seconds: float
    flops_per_second: float
    bytes_per_second: float
    attained_fraction: float | None
    uncounted_ops: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DenoisingResult:
    """Where the time of a sampling run goes.

    Attributes
    ----------
    steps : int
        Sampling steps that were asked for.
    run_seconds : Distribution
        Whole runs.
    step_seconds : float
        The denoiser's time in a run, divided by the steps.
    call_seconds : Distribution
        Single calls of the denoiser, of all runs.
    denoiser_calls : int
        In one run: more than the steps where guidance or the solver calls it more than once a step.
    denoiser_seconds : float
        In one run, all calls; median over runs.
    denoiser_share : float
        Of the run.
    blocks_seconds : float or None
        The block stack's part of ``denoiser_seconds``; None for a denoiser without blocks.
    blocks_share : float or None
        Of the denoiser.
    components : tuple of ComponentTime
        The others, in the order in which they first ran.
    other_seconds : float
        What is left of a run: scheduler, loops, moving data.
    cost : CallCost
    peak_memory_bytes : int or None
        CUDA: live tensors with the weights. CPU: resident size of the process.
    peak_memory_reason : str or None
        Why that is None.
    warnings : tuple of str
        About figures that are not to be trusted.
    """

    steps: int
    run_seconds: Distribution
    step_seconds: float
    call_seconds: Distribution
    denoiser_calls: int
    denoiser_seconds: float
    denoiser_share: float
    blocks_seconds: float | None
    blocks_share: float | None
    components: tuple[ComponentTime, ...]
    other_seconds: float
    cost: CallCost
    peak_memory_bytes: int | None
    peak_memory_reason: str | None
    warnings: tuple[str, ...]


def measure(
    run: Callable[[], Any],
    denoiser: torch.nn.Module | Sequence[torch.nn.Module],
    *,
    others: Mapping[str, torch.nn.Module],
    blocks: Sequence[torch.nn.Module],
    steps: int,
    peaks: Peaks | None,
    warmup: int = 1,
    repeats: int = 3,
    progress: Progress | None = None,
) -> DenoisingResult:
    """Time whole runs of a pipeline and their parts, and count one call of the denoiser.

    The models are as they were when this returns or raises.

    Parameters
    ----------
    run : callable
        Runs the pipeline once, from prompt to picture.
    denoiser : torch.nn.Module or sequence of torch.nn.Module
        What runs each step; several where they take turns, of which the first to run is counted.
    others : mapping of str to torch.nn.Module
        Further models of the pipeline, by name.
    blocks : sequence of torch.nn.Module
        The denoisers' block stacks; may be empty.
    steps : int
        That ``run`` asks for.
    peaks : Peaks or None
        The device's measured ceilings; without them there are no attainable times.
    warmup : int
        Runs before the first that is timed, at least 1: its call of the denoiser is the one that is counted.
    repeats : int
        Timed runs; fewer where they take longer than ``LIMIT_SECONDS`` together.
    progress : Progress, optional

    Raises
    ------
    DoesNotFitError
        If the device has not enough memory.
    ProfilerError
        If a run does not call the denoiser, or a number of runs is below 1.
    """
    denoisers = [denoiser] if isinstance(denoiser, torch.nn.Module) else list(denoiser)
    for name, count in (("warmup", warmup), ("repeats", repeats), ("steps", steps)):
        if count < 1:
            raise ProfilerError(f"{name}={count} is no number of runs or steps; give 1 or more")
    until = Repeats(minimum=repeats, maximum=repeats, seconds=0.0, limit_seconds=LIMIT_SECONDS)
    recorded: list[_Run] = []
    with (
        (progress or SilentProgress()).task("timing whole runs of the pipeline", warmup + repeats + 1) as task,
        _out_of_memory_as_error(),
    ):
        with _first_call(denoisers) as call:
            for _ in range(warmup):
                run()
                task.advance()
        if not call:
            raise ProfilerError("a run of the pipeline did not call its denoiser, so there is nothing to measure")
        watch = _Watch(_device_of(*call[0]))
        with watch.watching(denoisers, others, blocks), track_peak_memory(watch.device) as peak:
            while not until.enough([item.seconds for item in recorded]):
                recorded.append(watch.record(run))
                task.advance()
        trace = _count(*call[0])
        task.advance()
    return _result(recorded, trace, call[0][0], steps, bool(blocks), peaks, (peak.bytes, peak.reason))


@dataclass
class _Run:
    """Times of one run: seconds of each call, by part."""

    seconds: float
    calls: dict[tuple[str, str], list[float]]


_DENOISER = ("denoiser", "")
_BLOCKS = ("blocks", "")


@dataclass
class _Watch:
    """Marks when parts of a run begin and end."""

    device: torch.device
    _marks: list[tuple[tuple[str, str], Mark, Mark]] = field(default_factory=list)
    _open: dict[tuple[str, str], list[Mark]] = field(default_factory=dict)

    def record(self, run: Callable[[], Any]) -> _Run:
        """Run once and return its times."""
        self._marks.clear()
        self._open.clear()
        synchronize(self.device)
        start = time.perf_counter()
        run()
        synchronize(self.device)
        seconds = time.perf_counter() - start
        calls: dict[tuple[str, str], list[float]] = {}
        for part, begun, ended in self._marks:
            calls.setdefault(part, []).append(self._between(begun, ended))
        return _Run(seconds, calls)

    @contextlib.contextmanager
    def watching(
        self, denoisers: Sequence[torch.nn.Module], others: Mapping[str, torch.nn.Module], blocks: Sequence[Any]
    ) -> Iterator[None]:
        """Mark the parts inside this block; the modules are as before after it."""
        with contextlib.ExitStack() as stack:
            for module in denoisers:
                self._hook(stack, module, _DENOISER)
            for module in blocks:
                self._hook(stack, module, _BLOCKS)
            for name, module in others.items():
                self._hook(stack, module, (name, "forward"))
                for method in METHODS:
                    if callable(getattr(module, method, None)):
                        self._wrap(stack, module, method, (name, method))
            yield

    def _hook(self, stack: contextlib.ExitStack, module: torch.nn.Module, part: tuple[str, str]) -> None:
        before = module.register_forward_pre_hook(lambda *_: self._begin(part), prepend=True)
        stack.callback(before.remove)
        after = module.register_forward_hook(lambda *_: self._end(part))
        stack.callback(after.remove)

    def _wrap(self, stack: contextlib.ExitStack, module: torch.nn.Module, method: str, part: tuple[str, str]) -> None:
        original = getattr(module, method)

        @functools.wraps(original)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._begin(part)
            result = original(*args, **kwargs)
            self._end(part)
            return result

        if method in vars(module):
            stack.callback(setattr, module, method, original)
        else:
            stack.callback(delattr, module, method)
        setattr(module, method, marked)

    def _begin(self, part: tuple[str, str]) -> None:
        self._open.setdefault(part, []).append(self._now())

    def _end(self, part: tuple[str, str]) -> None:
        begun = self._open[part].pop()
        if not self._open[part]:  # of calls inside each other (a tiled decode), the outermost counts
            self._marks.append((part, begun, self._now()))

    def _now(self) -> Mark:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()

    def _between(self, begun: Mark, ended: Mark) -> float:
        return float(begun.elapsed_time(ended)) / 1e3 if self.device.type == "cuda" else float(ended - begun)


@contextlib.contextmanager
def _first_call(denoisers: Sequence[torch.nn.Module]) -> Iterator[list[tuple[torch.nn.Module, Any, Any]]]:
    """Keep module, arguments and keyword arguments of the first call of any denoiser inside this block."""
    kept: list[tuple[torch.nn.Module, Any, Any]] = []

    def keep(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not kept:
            kept.append((module, args, kwargs))

    with contextlib.ExitStack() as stack:
        for module in denoisers:
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield kept


def _device_of(module: torch.nn.Module, args: Any, kwargs: Any) -> torch.device:
    """Return where a call runs; weights that wait elsewhere (CPU offload) do not say it, but its arguments do."""
    tensors = tensors_in((*args, *kwargs.values()))
    return next((tensor.device for tensor in tensors), next(module.parameters()).device)


def _count(module: torch.nn.Module, args: Any, kwargs: Any) -> Trace:
    """Trace one call of the denoiser."""
    with torch.inference_mode(), OpTracer(module) as tracer:
        module(*args, **kwargs)
    return tracer.result()


def _result(
    runs: Sequence[_Run],
    trace: Trace,
    denoiser: torch.nn.Module,
    steps: int,
    has_blocks: bool,
    peaks: Peaks | None,
    memory: tuple[int | None, str | None],
) -> DenoisingResult:
    def total(item: _Run, part: tuple[str, str]) -> float:
        return sum(item.calls.get(part, ()))

    run_seconds = Distribution.of([item.seconds for item in runs])
    call_seconds = Distribution.of([seconds for item in runs for seconds in item.calls[_DENOISER]])
    denoiser_seconds = statistics.median(total(item, _DENOISER) for item in runs)
    parts = [part for part in runs[0].calls if part not in (_DENOISER, _BLOCKS)]
    components = tuple(
        ComponentTime(*part, len(runs[0].calls[part]), statistics.median(total(item, part) for item in runs))
        for part in parts
    )
    left = statistics.median(item.seconds - sum(total(item, part) for part in (_DENOISER, *parts)) for item in runs)
    blocks_seconds = blocks_share = None
    if has_blocks:
        blocks_seconds = statistics.median(total(item, _BLOCKS) for item in runs)
        blocks_share = statistics.median(total(item, _BLOCKS) / total(item, _DENOISER) for item in runs)
    warnings = [
        *spread_warnings("the time of a run", run_seconds),
        *spread_warnings("the time of a denoiser call", call_seconds),
    ]
    dtype = next((item.dtype for item in denoiser.parameters() if item.is_floating_point()), torch.float32)
    name = str(dtype).removeprefix("torch.")
    cost = trace.total
    if peaks is not None:
        known = peaks.notes
        peaks = peaks.raised(name, [Seen("the denoiser", cost.flops, cost.bytes, call_seconds.minimum)])
        warnings += [note for note in peaks.notes if note not in known]
    return DenoisingResult(
        steps=steps,
        run_seconds=run_seconds,
        step_seconds=denoiser_seconds / steps,
        call_seconds=call_seconds,
        denoiser_calls=len(runs[0].calls[_DENOISER]),
        denoiser_seconds=denoiser_seconds,
        denoiser_share=statistics.median(total(item, _DENOISER) / item.seconds for item in runs),
        blocks_seconds=blocks_seconds,
        blocks_share=blocks_share,
        components=components,
        other_seconds=max(0.0, left),
        cost=_cost(trace, name, call_seconds.p50, peaks),
        peak_memory_bytes=memory[0],
        peak_memory_reason=memory[1],
        warnings=tuple(warnings),
    )


def _cost(trace: Trace, dtype: str, seconds: float, peaks: Peaks | None) -> CallCost:
    """Set what was counted against the ceilings and the clock."""
    cost = trace.total
    ceiling = None if peaks is None else peaks.flops_per_second.get(dtype)
    attainable = bound = ridge = None
    if peaks is not None and ceiling is not None:
        computing, moving = cost.flops / ceiling, cost.bytes / peaks.bandwidth(cost.bytes)
        attainable, bound = max(computing, moving), "compute" if computing > moving else "memory"
        ridge = ceiling / peaks.memory_bytes_per_second
    return CallCost(
        dtype=dtype,
        flops=cost.flops,
        bytes=cost.bytes,
        weight_bytes=cost.weight_bytes,
        activation_bytes=cost.activation_bytes,
        flops_per_byte=cost.flops / cost.bytes,
        ridge_flops_per_byte=ridge,
        peak_flops_per_second=ceiling,
        peak_bytes_per_second=None if peaks is None else peaks.memory_bytes_per_second,
        attainable_seconds=attainable,
        bound=bound,
        seconds=seconds,
        flops_per_second=cost.flops / seconds,
        bytes_per_second=cost.bytes / seconds,
        attained_fraction=None if attainable is None else attainable / seconds,
        uncounted_ops=trace.uncounted,
        notes=trace.notes,
    )


@contextlib.contextmanager
def _out_of_memory_as_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_OUT_OF_MEMORY not in str(error):
            raise
        raise DoesNotFitError(
            "a run of the pipeline ran out of memory; give a smaller --height, --width or --frames, or another --dtype"
        ) from error
