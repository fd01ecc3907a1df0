"""Arithmetic intensity and roofline of a model, prefill and decode apart, traced from its real forward.

Counting rules: ``docs/profilers/intensity.md``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from profilers.base import ProfileContext, Profiler, ProfilerError, Progress, SilentProgress
from profilers.meta import meta_model
from profilers.op_trace import Cost, OpGroup, OpTracer, Trace
from profilers.peaks import Peaks, Seen
from profilers.phases import (
    check_batch,
    check_context,
    context_limit,
    decode_history,
    decode_step,
    prefill,
    token_ids,
)
from profilers.timing import check_point, out_of_memory_as_error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from profilers.timing import PhaseTimings

PHASES = ("prefill", "decode")
DEFAULT_CONTEXT = 512
DEFAULT_CONTEXT_CONFIG_ONLY = 2048

# Bound by overhead when the roofline explains less than this share of the measured time.
OVERHEAD_BELOW = 0.25

# Passes whose op times are compared call by call, the (lower) median being kept: one pass of a busy machine is shaky.
PREFILL_PASSES = 2  # at the first point, 1 at the others
DECODE_STEPS = 5


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


def count(
    model: PreTrainedModel | PreTrainedConfig,
    phase: str,
    batch: int,
    context: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Trace:
    """Count one phase of a live model, or of a config on the meta device.

    Parameters
    ----------
    model : PreTrainedModel or PreTrainedConfig
    phase : str
        ``"prefill"``, or ``"decode"``: one more token of each sequence after ``context`` tokens.
    batch, context : int
        Sequences, and tokens in each.
    dtype : torch.dtype
        Of the parameters, when ``model`` is a config.
    seed : int
        Of the random token ids (they choose the routed experts).

    Returns
    -------
    Trace
        FLOPs and bytes in total, by module and by op.

    Raises
    ------
    DoesNotFitError
        If the device has not enough memory.
    ProfilerError
        For an unknown phase, a batch below 1, or a context that the model has no positions for.
    """
    if phase not in PHASES:
        raise ProfilerError(f"no phase named '{phase}'; known: {', '.join(PHASES)}")
    live: PreTrainedModel = model if isinstance(model, torch.nn.Module) else meta_model(model, dtype)
    _check(live, batch, context)
    return _trace_phases(live, batch, context, {phase: 1}, seed=seed)[phase][0]


def measure_intensity(
    model: PreTrainedModel,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (DEFAULT_CONTEXT,),
    *,
    peaks: Peaks | None = None,
    timings: PhaseTimings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> IntensityResult:
    """Count both phases at every batch x context, and set them against the roofline and the clock.

    Parameters
    ----------
    model : PreTrainedModel
        On a device: each op is timed too. On meta: only counted.
    batches, contexts : sequence of int
        Sequences, and tokens in each.
    peaks : Peaks or None
        The device's measured ceilings; without them there are no attainable times and no bound.
    timings : PhaseTimings or None
        Where the time of a whole phase comes from; without it there is no MFU and no MBU.
    seed : int
        Of the random token ids.
    progress : Progress or None

    Raises
    ------
    DoesNotFitError
        If the device has not enough memory.
    ProfilerError
        For a batch below 1, or a context that the model has no positions for.
    """
    traced = _trace_all(model, batches, contexts, timings, seed, progress or SilentProgress())
    if peaks is not None:
        peaks = peaks.raised(_name(model.dtype), _seen(traced))
    return _result(model, traced, peaks)


def run(context: ProfileContext) -> IntensityResult:
    """Profile every batch x context asked for.

    Raises
    ------
    DoesNotFitError
        If the device has not enough memory.
    ProfilerError
        For a batch below 1, or a context that the model has no positions for.
    """
    contexts = context.request.contexts
    if contexts is None:
        default = DEFAULT_CONTEXT_CONFIG_ONLY if context.config_only else DEFAULT_CONTEXT
        contexts = (min(default, context_limit(context.config) or default),)
    timings = None if context.config_only else context.timings
    traced = _trace_all(
        context.model, context.request.batches, contexts, timings, context.request.seed, context.progress
    )
    if context.peaks is not None:
        context.peaks = context.peaks.raised(_name(context.dtype), _seen(traced))
    return _result(context.model, traced, context.peaks)


@dataclass(frozen=True)
class _Traced:
    """One phase at one batch and context, counted, and timed if there was a clock."""

    phase: str
    batch: int
    context: int
    traces: tuple[Trace, ...]
    op_seconds: dict[OpGroup, float]
    seconds: float | None


def _trace_all(
    model: PreTrainedModel,
    batches: Sequence[int],
    contexts: Sequence[int],
    timings: PhaseTimings | None,
    seed: int,
    progress: Progress,
) -> list[_Traced]:
    """Trace both phases at every batch x context, and time them whole with ``timings``."""
    sizes = [(batch, context) for batch in batches for context in contexts]
    for batch, context in sizes:
        _check(model, batch, context)
    on_meta = model.device.type == "meta"
    traced: list[_Traced] = []
    with progress.task("Counting operations", total=len(sizes)) as task:
        for batch, context in sizes:
            timing = None if timings is None or on_meta else timings.measure(batch, context)
            passes = {"prefill": 1 if traced else PREFILL_PASSES, "decode": DECODE_STEPS}
            done = _trace_phases(model, batch, context, {p: 1 for p in PHASES} if on_meta else passes, seed=seed)
            for phase, traces in done.items():
                seconds = None if timing is None else getattr(timing, phase).p50
                traced.append(_Traced(phase, batch, context, tuple(traces), _typical_seconds(traces), seconds))
            task.advance()
    return traced


def _seen(traced: Iterable[_Traced]) -> list[Seen]:
    """List what ran and how fast: each whole phase, and each kind of op in it."""
    seen: list[Seen] = []
    for item in traced:
        if item.seconds is not None:
            seen.append(
                Seen(f"{item.phase} as a whole", item.traces[0].total.flops, item.traces[0].total.bytes, item.seconds)
            )
        for group, seconds in item.op_seconds.items():
            if seconds > 0:
                calls = item.traces[0].ops[group].calls
                seen.append(Seen(f"'{group.name}'", group.flops, group.bytes, seconds / calls))
    return seen


def _result(model: PreTrainedModel, traced: Sequence[_Traced], peaks: Peaks | None) -> IntensityResult:
    roofline = _Roofline(peaks, model.dtype)
    on_meta = model.device.type == "meta"
    reason = "the model has no weights" if on_meta else "no timings were asked for"
    return IntensityResult(
        dtype=roofline.dtype,
        peak_flops_per_second=roofline.flops,
        peak_bytes_per_second=roofline.bytes,
        ridge_flops_per_byte=_ratio(roofline.flops, roofline.bytes),
        experts=_experts_rule(on_meta) if any(item.traces[0].experts for item in traced) else None,
        points=tuple(_point(model, item, roofline, reason) for item in traced),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Roofline:
    """The two ceilings for one dtype, and what they allow."""

    def __init__(self, peaks: Peaks | None, dtype: torch.dtype) -> None:
        self.dtype = _name(dtype)
        self._peaks = peaks
        self.flops = None if peaks is None else peaks.flops_per_second.get(self.dtype)
        self.bytes = None if peaks is None else peaks.memory_bytes_per_second

    def terms(self, flops: int, moved: int) -> tuple[float, float] | None:
        """Seconds that computing and moving take at the ceilings; what fits a cache moves at that cache's bandwidth."""
        if self.flops is None or not self.bandwidth(moved):
            return None
        return flops / self.flops, moved / self.bandwidth(moved)

    def bandwidth(self, moved: int) -> float:
        """Return the bandwidth ceiling, in bytes/s, for this many bytes; 0 without measured peaks."""
        return 0.0 if self._peaks is None else self._peaks.bandwidth(moved)


def _check(model: PreTrainedModel, batch: int, context: int) -> None:
    if model.device.type != "meta":
        check_point(model, batch, context)
        return
    check_context(model.config, context)
    check_batch(batch)


def _trace_phases(
    model: PreTrainedModel, batch: int, context: int, passes: dict[str, int], *, seed: int
) -> dict[str, list[Trace]]:
    """Trace each phase as often as ``passes`` says, timing the ops unless the model is on meta."""
    with out_of_memory_as_error(batch, context, model.device):
        return _run_phases(model, batch, context, passes, seed=seed)


def _run_phases(
    model: PreTrainedModel, batch: int, context: int, passes: dict[str, int], *, seed: int
) -> dict[str, list[Trace]]:
    traces: dict[str, list[Trace]] = {phase: [] for phase in passes}
    state = None
    history = decode_history(model.config, context)
    ids = token_ids(model, batch, context, seed)
    for _ in range(passes.get("prefill", 0)):
        state = None  # frees the last pass's cache
        with OpTracer(model, timed=True) as tracer:
            state = prefill(model, batch, context, input_ids=ids)
        traces["prefill"].append(tracer.result())
    if "decode" in passes:
        if state is None or history != context:
            state = prefill(model, batch, history, input_ids=ids[:, :history])
        ids = token_ids(model, batch, 1, seed)
        limit = context_limit(model.config)
        for _ in range(passes["decode"] if limit is None else max(1, min(passes["decode"], limit - history))):
            with OpTracer(model, cache=state.cache, timed=True) as tracer:
                state = decode_step(model, state, input_ids=ids)
            traces["decode"].append(tracer.result())
    return traces


def _typical_seconds(traces: Sequence[Trace]) -> dict[OpGroup, float]:
    """Return the time of each group of ops in the first pass, each call's being the median of it over the passes."""
    timeline = traces[0].timeline
    classes = [group.op_class for group, _ in timeline]
    alike = [trace.timeline for trace in traces if [group.op_class for group, _ in trace.timeline] == classes]
    seconds: dict[OpGroup, float] = {}
    for calls in zip(*alike, strict=True):
        group = calls[0][0]
        seconds[group] = seconds.get(group, 0.0) + statistics.median_low(elapsed for _, elapsed in calls)
    return seconds


def _point(model: PreTrainedModel, item: _Traced, roofline: _Roofline, reason: str) -> IntensityPoint:
    phase, batch, context, trace, seconds = item.phase, item.batch, item.context, item.traces[0], item.seconds
    total = trace.total
    terms = roofline.terms(total.flops, total.bytes)
    attainable = None if terms is None else max(terms)
    bound = None
    if terms is not None and attainable is not None:
        bound = "compute" if terms[0] > terms[1] else "memory"
        if seconds is not None and attainable < OVERHEAD_BELOW * seconds:
            bound = "overhead"
    return IntensityPoint(
        phase=phase,
        batch=batch,
        context=context,
        flops=total.flops,
        flops_needed=total.flops_needed,
        bytes=total.bytes,
        weight_bytes=total.weight_bytes,
        activation_bytes=total.activation_bytes,
        kv_bytes=total.kv_bytes,
        cache_copy_bytes=total.cache_copy_bytes,
        flops_per_byte=total.flops / total.bytes,
        time_seconds=seconds,
        time_reason=reason if seconds is None else None,
        attainable_seconds=attainable,
        bound=bound,
        mfu=_ratio(_ratio(total.flops, seconds), roofline.flops),
        mbu=_ratio(_ratio(total.bytes, seconds), roofline.bandwidth(total.bytes)),
        modules=tuple(_module(name, trace.kinds[name], cost) for name, cost in trace.modules.items()),
        op_classes=_ops(trace, item.op_seconds, roofline, lambda group: group.op_class),
        ops=_ops(trace, item.op_seconds, roofline, lambda group: group.name),
        uncounted_ops=trace.uncounted,
        notes=tuple(_notes(model, phase, batch, context, trace)),
    )


def _module(name: str, kind: str, cost: Cost) -> ModuleIntensity:
    return ModuleIntensity(
        name=name,
        kind=kind,
        flops=cost.flops,
        bytes=cost.bytes,
        flops_per_byte=_ratio(cost.flops, cost.bytes),
        weight_bytes=cost.weight_bytes,
        activation_bytes=cost.activation_bytes,
        kv_bytes=cost.kv_bytes,
    )


def _ops(
    trace: Trace, seconds: dict[OpGroup, float], roofline: _Roofline, key: Callable[[OpGroup], str]
) -> tuple[OpIntensity, ...]:
    """Sum the groups of calls that share ``key``, the most expensive first."""
    merged: dict[str, list[tuple[OpGroup, Cost]]] = {}
    for group, cost in trace.ops.items():
        merged.setdefault(key(group), []).append((group, cost))
    rows = [_op(name, groups, seconds, roofline) for name, groups in merged.items()]
    return tuple(sorted(rows, key=lambda row: (row.measured_seconds or row.attainable_seconds or 0.0, row.bytes))[::-1])


def _op(
    name: str, groups: Iterable[tuple[OpGroup, Cost]], seconds: dict[OpGroup, float], roofline: _Roofline
) -> OpIntensity:
    total = Cost()
    compute = memory = attainable = 0.0
    measured: float | None = None
    known = True
    for group, cost in groups:
        total.add(cost)
        terms = roofline.terms(group.flops, group.bytes)
        if terms is None:
            known = False
        else:
            compute += cost.calls * terms[0]
            memory += cost.calls * terms[1]
            attainable += cost.calls * max(terms)
        if group in seconds:
            measured = (measured or 0.0) + seconds[group]
    return OpIntensity(
        name=name,
        calls=total.calls,
        flops=total.flops,
        bytes=total.bytes,
        flops_per_byte=_ratio(total.flops, total.bytes),
        attainable_seconds=attainable if known else None,
        measured_seconds=measured,
        flops_per_second=_ratio(total.flops, measured),
        bytes_per_second=_ratio(total.bytes, measured),
        attained_fraction=_ratio(attainable, measured) if known else None,
        bound=("compute" if compute > memory else "memory") if known else None,
    )


def _notes(model: PreTrainedModel, phase: str, batch: int, context: int, trace: Trace) -> Iterable[str]:
    yield from trace.notes
    if phase == "decode":
        size = model.dtype.itemsize
        yield (
            f"a decoder is often said to do 2 operations for each byte it reads: a multiply-add for each weight is "
            f"2 FLOPs, so that holds for one sequence at 8-bit weights (16-bit: 1, 4-bit: 4); "
            f"here {2 * batch / size:g} for the weights ({8 * size}-bit, batch {batch})"
        )
        history = decode_history(model.config, context)
        if history != context:
            yield f"counted after {history} tokens: the model has no position for one more after {context}"
    if model.config.is_encoder_decoder:
        yield f"encoder-decoder: {context} tokens in the encoder and as many in the decoder"
    if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()) and model.device.type != "cpu":
        yield "weights that are moved to the device for each use count as activations"
    if trace.recurrent:
        yield "recurrent layers update their state with elementwise ops, which count 0 FLOPs"
    if trace.experts:
        used = sum(number for _, number in trace.experts) / len(trace.experts)
        yield f"experts whose weights are read: {used:.4g} of {trace.experts[0][0]} on average over the layers"


def _experts_rule(on_meta: bool) -> str:
    if on_meta:
        return (
            "FLOPs of the tokens routed; weights of the distinct experts expected when each of n tokens chooses k of E "
            "uniformly, E (1 - (1 - k/E)^n)"
        )
    return "FLOPs of the tokens routed; weights of the experts that random tokens really used"


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


PROFILER = Profiler(
    name="intensity",
    title="Arithmetic intensity and roofline",
    run=run,
    result_type=IntensityResult,
    needs_weights=False,
    requires=("latency",),
    paper="Williams, Waterman, Patterson 2009 (roofline)",
)
