"""Arithmetic intensity: work, bytes and time by phase, by op class and by module."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import (
    Block,
    Chart,
    Report,
    Section,
    Table,
    columns,
    items,
    main_point,
    ratio,
    unique,
    where,
)

TOP_MODULES = 12
PAPER_CLAIM = "the often-quoted 2 operations a byte holds at 8-bit weights; 1 at 16-bit, 4 at 4-bit"

ROOTS = ("", "(model)")  # names of the whole model among its modules
_LAYER_INDEX = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class ModuleGroup:
    """The same module of every layer, summed, without what runs inside its children.

    ``name`` has ``*`` in place of the layer's number; ``count`` is how many modules it stands for.
    """

    name: str
    count: int
    flops: int
    bytes: int


def module_groups(modules: list[Report]) -> list[ModuleGroup]:
    """Sum repeated layers and take from each module what its children account for.

    ::

        model.layers.0.mlp (inclusive) - its gate, up and down projections = what mlp does itself
    """
    inclusive = {str(module.get("name")): module for module in modules}
    own = {name: [module.get("flops") or 0, module.get("bytes") or 0] for name, module in inclusive.items()}
    parents: set[str] = set()
    for name, module in inclusive.items():
        parent = _parent(name, inclusive)
        if parent is not None:
            parents.add(parent)
            own[parent][0] -= module.get("flops") or 0
            own[parent][1] -= module.get("bytes") or 0
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, (flops, bytes_) in own.items():
        label = "(model)" if name in ROOTS else _LAYER_INDEX.sub(".*", name)
        group = sums[f"{label} (itself)" if name in parents else label]
        group[0] += 1
        group[1] += max(0, flops)
        group[2] += max(0, bytes_)
    return [ModuleGroup(name, count, flops, bytes_) for name, (count, flops, bytes_) in sums.items() if flops or bytes_]


def _parent(name: str, known: dict[str, Report]) -> str | None:
    """Return the nearest module that contains ``name``, None for the whole model."""
    if name in ROOTS:
        return None
    while "." in name:
        name = name.rpartition(".")[0]
        if name in known:
            return name
    return next((root for root in ROOTS if root in known), None)


def section(result: Report, report: Report) -> Section:
    """Build the section."""
    points = items(result, "points")
    ridge = result.get("ridge_flops_per_byte")
    lead = []
    if ridge is not None:
        lead.append(
            f"On this device compute takes over from memory at {fmt.short(ridge)} FLOP/byte: "
            f"{fmt.flop_rate(result.get('peak_flops_per_second'))} in {result.get('dtype')} over "
            f"{fmt.bandwidth(result.get('peak_bytes_per_second'))}."
        )
    if result.get("experts"):
        lead.append(f"Routed experts: {printable(result['experts'])}.")
    blocks: list[Block] = [
        Chart("roofline"),
        work_table(points),
        *_beside(points),
        time_table(points),
        Chart("breakdown"),
    ]
    for phase in ("decode", "prefill"):
        point = main_point(points, phase)
        if point is not None:
            blocks += [_op_classes(point), _modules(point)]
    return Section("intensity", "Arithmetic intensity", tuple(lead), tuple(blocks))


def _place(point: Report) -> tuple[str, str, str]:
    return str(point.get("phase")), fmt.integer(point.get("batch")), fmt.integer(point.get("context"))


def work_table(points: list[Report], title: str = "Work and bytes moved, one forward pass") -> Table:
    """Show what each point computes and moves."""
    rows = tuple(
        (
            *_place(point),
            fmt.flops(point.get("flops")).replace("FLOP", "").strip(),
            fmt.data_size(point.get("bytes")),
            fmt.data_size(point.get("weight_bytes")),
            fmt.data_size(point.get("activation_bytes")),
            fmt.data_size(point.get("kv_bytes")),
            fmt.significant(point.get("flops_per_byte")),
        )
        for point in points
    )
    notes = [
        "Arithmetic without a FLOP formula, not counted: " + printable(", ".join(point["uncounted_ops"]))
        for point in points
        if point.get("uncounted_ops")
    ]
    said: dict[str, list[str]] = {}
    for point in points:
        for note in point.get("notes") or []:
            said.setdefault(printable(note), []).append(f"{point.get('phase')}, {where(point)}")
    notes += [f"{note[:1].upper()}{note[1:]} ({'; '.join(places)})." for note, places in said.items()]
    heads = columns("<phase", "batch", "context", "FLOP", "bytes", "weights", "activ.", "KV", "FLOP/B")
    return Table(title, heads, rows, unique(notes))


def _beside(points: list[Report]) -> list[Block]:
    """Show what the counts leave open: work that the mask makes needless, copies that the cache adds."""
    rows = tuple(
        (
            *_place(point),
            fmt.flops(point.get("flops")),
            fmt.flops(point.get("flops_needed")),
            fmt.data_size(point.get("cache_copy_bytes")),
        )
        for point in points
        if point.get("flops_needed") != point.get("flops") or point.get("cache_copy_bytes")
    )
    heads = columns("<phase", "batch", "context", "executed", "needed", "cache copies")
    notes = (
        "needed: without the query and key pairs that the attention mask hides. cache copies: history that the cache "
        "class copies when it grows, on top of the bytes above.",
    )
    return [Table("Executed against needed", heads, rows, notes)] if rows else []


def time_table(points: list[Report], title: str = "Time against the roofline") -> Table:
    """Show how far each point is from its roofline."""
    rows = tuple(
        (
            *_place(point),
            fmt.seconds(point.get("time_seconds")),
            fmt.seconds(point.get("attainable_seconds")),
            fmt.percent(ratio(point.get("attainable_seconds"), point.get("time_seconds"))),
            point.get("bound") or fmt.MISSING,
            fmt.percent(point.get("mfu")),
            fmt.percent(point.get("mbu")),
        )
        for point in points
    )
    reasons = (f"No time: {printable(point['time_reason'])}" for point in points if point.get("time_reason"))
    heads = columns("<phase", "batch", "context", "time", "roofline", "of roof", "<bound", "MFU", "MBU")
    note = "of roof: roofline time over time measured; 100 % is all that this device can do."
    return Table(title, heads, rows, unique([note, *reasons]))


def _op_classes(point: Report) -> Table:
    classes = sorted(
        items(point, "op_classes"),
        key=lambda op: (op.get("measured_seconds") or 0.0, op.get("attainable_seconds") or 0.0, op.get("bytes") or 0),
        reverse=True,
    )
    rows = tuple(
        (
            printable(op.get("name")),
            fmt.integer(op.get("calls")),
            fmt.flops(op.get("flops")).replace("FLOP", "").strip(),
            fmt.data_size(op.get("bytes")),
            fmt.seconds(op.get("measured_seconds")),
            fmt.seconds(op.get("attainable_seconds")),
            fmt.percent(op.get("attained_fraction")),
            op.get("bound") or fmt.MISSING,
        )
        for op in classes
    )
    heads = columns("<op class", "calls", "FLOP", "bytes", "measured", "roofline", "of roof", "<bound")
    measured = sum(op.get("measured_seconds") or 0.0 for op in classes)
    notes: tuple[str, ...] = ()
    if measured:
        notes = (
            f"Ops were timed one at a time, which adds to each: together {fmt.seconds(measured)}, "
            f"the phase untraced {fmt.seconds(point.get('time_seconds'))}.",
        )
    return Table(f"Where {point.get('phase')} time goes, {where(point)}", heads, rows, notes)


def _modules(point: Report) -> Table:
    by_bytes = point.get("phase") == "decode"
    whole = point.get("bytes") if by_bytes else point.get("flops")
    groups = module_groups(items(point, "modules"))
    groups.sort(key=lambda group: group.bytes if by_bytes else group.flops, reverse=True)
    rows = tuple(
        (
            printable(group.name),
            f"×{group.count}",
            fmt.flops(group.flops).replace("FLOP", "").strip(),
            fmt.data_size(group.bytes),
            fmt.significant(ratio(group.flops, group.bytes)),
            fmt.percent(ratio(group.bytes if by_bytes else group.flops, whole)),
        )
        for group in groups[:TOP_MODULES]
    )
    notes = (f"{len(groups) - TOP_MODULES} smaller groups left out.",) if len(groups) > TOP_MODULES else ()
    heads = columns("<module", "count", "FLOP", "bytes", "FLOP/B", "of bytes" if by_bytes else "of FLOP")
    return Table(f"Modules of {point.get('phase')}, {where(point)}, layers summed", heads, rows, notes)
