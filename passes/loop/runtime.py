"""What a looped result does when it runs, as the report says it: stored less, and moved less or not.

:mod:`passes.loop.reuse` measures; this module puts it into words and tables, beside what the two profiles counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from passes.base import MeasureContext, Measured, MeasuredColumn, MeasuredTable, PassError
from passes.loop import reuse, serving
from passes.loop.layout import LoopPlan
from passes.loop.reuse import Group, Reuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HOW = (
    "one set: the layers of a block run with one copy of its weights; own sets: each layer with a copy of its own, of "
    "equal values; medians over rounds in which both ran, the ratio with its 95 % interval over the rounds",
    "from memory, at most: the time of one set multiplied by the measured memory bandwidth, what memory can deliver in "
    "that time; the rest came from a cache",
    "bytes a step touches: counted op by op in both profiles, a block's weights once for each loop, wherever they came "
    "from",
)


def measure(model: PreTrainedModel, context: MeasureContext, *, depth_batched: bool = False) -> Measured:
    """Measure whether blocks stay in a cache, and set FLOPs beside bytes stored and bytes touched.

    Parameters
    ----------
    model : PreTrainedModel
    context : MeasureContext
    depth_batched : bool
        Measure what batching over depth gains, too (:mod:`passes.loop.serving`).
    """
    found = _moved(model, context)
    return _with_serving(found, model, context) if depth_batched else found


def _moved(model: PreTrainedModel, context: MeasureContext) -> Measured:
    plan = LoopPlan.from_json(model.config.loop)
    counted = _counted(context)
    reason = reuse.why_not(model, plan)
    if reason is not None:
        return Measured(
            summary=f"stored less; whether less is moved is not known: {reason}", tables=(counted,), notes=_HOW[-1:]
        )
    with context.progress.task("timing blocks with one set of weights and with own sets"):
        found = reuse.measure(
            model, plan, batch=context.batch, context=context.context,
            bandwidth_bytes_per_second=context.peaks.memory_bytes_per_second, seed=context.seed,
        )  # fmt: skip
    verdict, why = found.verdict
    return Measured(
        summary=_summary(found),
        tables=(counted, _timed(found)),
        notes=(*_HOW, *_cache_notes(found, context)),
        details={"reuse": {**asdict(found), "verdict": verdict, "reason": why or None}},
    )


def _summary(found: Reuse) -> str:
    verdict, why = found.verdict
    step = f"a decode step {_ratio(found.step)}"
    if verdict == "less":
        size = "" if found.cache_bytes is None else f" (the last-level one has {_megabytes(found.cache_bytes)})"
        return (
            f"stored less and moved less: a block stays in a cache{size} between its loops; its linears take "
            f"{_ratio(found.looped)} x the time of the same layers with own weights, {step} x"
        )
    if verdict == "same":
        return (
            "stored less; moved the same as far as can be measured: the linears of the blocks take "
            f"{_ratio(found.looped)} x the time of the same layers with own weights, {step} x"
        )
    if found.looped.interval is None:
        return f"stored less; whether less is moved is not known: {why}"
    return f"stored less; whether less is moved is not known: {why}; {step} x that with own weights"


def _with_serving(found: Measured, model: PreTrainedModel, context: MeasureContext) -> Measured:
    try:
        with context.progress.task("serving prompts one by one, in batches, and batched over depth"):
            served = serving.measure(model, seed=context.seed)
    except PassError as error:  # a later pass may have made it so, a KV cache of its own
        return replace(found, summary=f"{found.summary}; batching over depth was not measured: {error}")
    columns = (
        MeasuredColumn("served", "text"),
        MeasuredColumn("until all are answered", "seconds"),
        MeasuredColumn("gain", "text"),
        MeasuredColumn("mean latency", "seconds"),
        MeasuredColumn("gain of latency", "text"),
        MeasuredColumn("tokens", "text"),
    )
    rows = tuple(
        (
            gain.way,
            gain.total_seconds,
            None if gain.total_interval is None else _shown(gain.total_gain, gain.total_interval),
            gain.latency_seconds,
            None if gain.latency_interval is None else _shown(gain.latency_gain, gain.latency_interval),
            "the same" if gain.same_tokens else "others",
        )
        for gain in served.gains
    )
    said = "until all prompts are answered: " + "; ".join(
        f"{_shown(gain.total_gain, gain.total_interval)} x as fast as {gain.way}" for gain in served.gains[:-1]
    )
    if any(gain.total_interval is None for gain in served.gains):
        said = f"what is gained is not known, rounds: {served.rounds}, too few for an interval"
    note = (
        f"{served.sequences} prompts of {served.prompt_tokens} tokens, {served.new_tokens} new tokens each, one every "
        f"{served.arrivals_seconds[1]:.3g} s, {served.rounds} rounds; gain: time of that way / time of "
        "depth-batched, median, 95 % interval, above 1 where depth-wise batching is faster. Sequences in lockstep read "
        "a block as often in an ordinary batch, so beside token by token only the wait to join can be gained"
    )
    return replace(
        found,
        summary=f"{found.summary}; batched over depth, {said}",
        tables=(*found.tables, MeasuredTable("Prompts that arrive one after another", columns, rows)),
        notes=(*found.notes, note),
        details={**found.details, "serving": asdict(served)},
    )


def _ratio(group: Group) -> str:
    return _shown(group.ratio, group.interval)


def _shown(ratio: float, interval: tuple[float, float] | None) -> str:
    return f"{ratio:.3f}" if interval is None else f"{ratio:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.2g} MB"


def _cache_notes(found: Reuse, context: MeasureContext) -> tuple[str, ...]:
    first, last = found.context
    notes = [
        f"batch {found.batch}, {first} to {last} tokens in the cache, rounds: {found.rounds}; the largest block's "
        f"weights take {_megabytes(found.largest_block_bytes)}"
    ]
    if found.cache_bytes is None:
        notes.append("the system does not say how large the device's caches are")
    else:
        notes.append(f"the last-level cache has {_megabytes(found.cache_bytes)}, as the system states it")
        if found.step.read_bytes < found.cache_bytes:
            notes.append(
                f"the linears' weights with own sets ({_megabytes(found.step.read_bytes)}) would fit that cache too, "
                "if nothing else used it"
            )
    notes += context.peaks.notes  # how busy the device was
    if context.after["environment"]["device"].startswith("cuda"):
        notes.append("times of linears on a GPU hold what launching them takes, where the host is slower than the GPU")
    return tuple(notes)


def _timed(found: Reuse) -> MeasuredTable:
    columns = (
        MeasuredColumn("time of", "text"),
        MeasuredColumn("layers", "number"),
        MeasuredColumn("weights read", "bytes"),
        MeasuredColumn("one set", "seconds"),
        MeasuredColumn("own sets", "seconds"),
        MeasuredColumn("one / own", "text"),
        MeasuredColumn("from memory, at most", "bytes"),
    )
    groups = [found.first, found.later, found.looped, *([found.alone] if found.alone is not None else []), found.step]
    rows = tuple(
        (
            group.name,
            group.layers,
            group.read_bytes,
            group.one_seconds,
            group.own_seconds,
            None if group.interval is None else _ratio(group),
            None if group is found.step else found.from_memory_bytes(group),
        )
        for group in groups
    )
    return MeasuredTable("A decode step with one set of weights a block, and with own sets", columns, rows)


def _counted(context: MeasureContext) -> MeasuredTable:
    """Return FLOPs beside bytes stored and bytes touched, before and after, from the two profiles."""
    sides = [_side(report, context.batch, context.context) for report in (context.before, context.after)]
    names = (
        ("FLOP a token", "flops"),
        ("bytes stored, as held in memory", "stored"),
        ("FLOP a token / byte stored", "flops_per_stored"),
        ("bytes a decode step touches", "touched"),
        ("FLOP / byte touched", "flops_per_touched"),
    )
    columns = (
        MeasuredColumn(f"decode, batch {context.batch}, context {context.context}", "text"),
        MeasuredColumn("before", "number"),
        MeasuredColumn("after", "number"),
    )
    rows = tuple((name, *(side[key] for side in sides)) for name, key in names)
    return MeasuredTable("FLOP beside bytes", columns, rows)


def _side(report: Mapping[str, Any], batch: int, context: int) -> dict[str, float | None]:
    stored = report["model"]["weight_bytes"]
    point = decode_point(report, batch, context)
    if point is None:
        return {"flops": None, "stored": stored, "flops_per_stored": None, "touched": None, "flops_per_touched": None}
    flops = point["flops"] / batch
    return {
        "flops": flops,
        "stored": stored,
        "flops_per_stored": flops / stored,
        "touched": point["bytes"],
        "flops_per_touched": point["flops_per_byte"],
    }


def decode_point(report: Mapping[str, Any], batch: int, context: int) -> Mapping[str, Any] | None:
    """Return a profile's decode step at this batch and context, None where it has none."""
    for point in (report["profiles"].get("intensity") or {}).get("points") or ():
        if (point["phase"], point["batch"], point["context"]) == ("decode", batch, context):
            found: Mapping[str, Any] = point
            return found
    return None
