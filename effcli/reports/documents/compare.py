"""The document of ``effcli compare``."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports import change_charts
from effcli.reports.blocks import Block, Chart, Report, Section, Table, columns, items, texts
from effcli.reports.changes import Change, interval, mapping, number
from effcli.reports.documents.base import Document, Figure, Tile
from effcli.reports.sections import change
from effcli.reports.sections.generic import named

HEADLINE = ("tpot_seconds", "ttft_seconds", "stored_bytes", "weight_bytes", "peak_memory_bytes", "perplexity")


def read_change(data: Report) -> Change:
    """Return a change from saved data; what is missing or of another type becomes None."""

    def value(key: str) -> Any:
        found = data.get(key)
        return printable(found) if isinstance(found, str) else number(found)

    status = data.get("status")
    known = ("better", "worse", "noise", "same", "changed", "unknown")
    better = data.get("better")
    return Change(
        metric=named(data.get("metric")),
        label=named(data.get("label") or data.get("metric")),
        unit=named(data.get("unit")),
        better=better if better in ("lower", "higher") else None,
        before=value("before"),
        after=value("after"),
        ratio=number(data.get("ratio")),
        noise=number(data.get("noise")),
        status=cast(Any, status if status in known else "unknown"),
        reason=printable(data["reason"]) if data.get("reason") else None,
        before_interval=interval(data.get("before_interval")),
        after_interval=interval(data.get("after_interval")),
        ratio_interval=interval(data.get("ratio_interval")),
    )


def _changes(data: Report) -> tuple[Change, ...]:
    return tuple(read_change(entry) for entry in items(data, "changes") if isinstance(entry, dict))


def document(report: Report) -> Document:
    """Build the document."""
    found = _changes(report)
    sides = [mapping(report.get(side)) for side in ("a", "b")]
    names = [printable(side.get("name") or letter) for side, letter in zip(sides, "AB", strict=True)]
    batch, context = number(report.get("batch")), number(report.get("context"))
    at = f" at batch {fmt.integer(batch)}, context {fmt.integer(context)}" if batch is not None else ""
    blocks: list[Block] = [Chart("changes"), change.table(found, f"A against B{at}", "A", "B")]
    sections = [Section("changes", "A and B", (f"A: {names[0]}.", f"B: {names[1]}."), tuple(blocks))]
    sections += [
        Section("point", _place(point), (), (change.table(_changes(point), "", "A", "B"),))
        for point in items(report, "points")
        if isinstance(point, dict)
    ]
    mismatches = [entry for entry in items(report, "mismatches") if isinstance(entry, dict)]
    if mismatches:
        rows = tuple(tuple(named(entry.get(key)) for key in ("what", "a", "b")) for entry in mismatches)
        table = Table("", columns("<what", "<A", "<B"), rows)
        sections.append(Section("mismatches", "Not the same conditions", (), (table,)))
    sections.append(_sides(report, sides))
    return Document(
        command="effcli compare",
        heading="Comparison:",
        name=f"{names[0]} → {names[1]}",
        subtitle=" · ".join(dict.fromkeys(printable(side["device"]) for side in sides if side.get("device"))),
        verdict=_verdict(found, mismatches, at),
        tiles=_tiles(found),
        sections=tuple(sections),
        setup=("sides",),
        figures={
            "changes": Figure(
                partial(change_charts.change_bars, found, {}, "A", "B"),
                "Each figure has its own scale; words beside a bar say whether the change is outside noise.",
                "No bars: one side lacks the figures.",
            )
        },
    )


def _place(point: Report) -> str:
    return f"Batch {fmt.integer(number(point.get('batch')))}, context {fmt.integer(number(point.get('context')))}"


def _verdict(found: tuple[Change, ...], mismatches: list[Report], at: str) -> tuple[str, ...]:
    groups: dict[str, list[str]] = {"better": [], "worse": [], "noise": []}
    for entry in found:
        if entry.metric in HEADLINE and entry.status in groups:
            pair = f"{change.figure(entry.before, entry.unit)} → {change.figure(entry.after, entry.unit)}"
            extra = "" if entry.status == "noise" else f", {change.difference(entry)}"
            groups[entry.status].append(f"{entry.label} ({pair}{extra})")
    sentences = []
    if groups["better"]:
        sentences.append(f"B is better in {', '.join(groups['better'])}{at}.")
    else:
        sentences.append(f"B shows no gain outside noise{at}.")
    if groups["worse"]:
        sentences.append(f"B is worse than A in {', '.join(groups['worse'])}.")
    if groups["noise"]:
        sentences.append(f"Within noise, so no change is claimed: {', '.join(groups['noise'])}.")
    if mismatches:
        kinds = ", ".join(named(entry.get("what")) for entry in mismatches)
        sentences.append(f"Compared although these differ: {kinds}. The figures do not say what caused a change.")
    return tuple(sentences)


def _tiles(found: tuple[Change, ...]) -> tuple[Tile, ...]:
    return tuple(
        Tile(
            entry.label.capitalize() if entry.label.islower() else entry.label[:1].upper() + entry.label[1:],
            f"{change.figure(entry.before, entry.unit)} → {change.figure(entry.after, entry.unit)}",
            change.words(entry),
        )
        for entry in found
        if entry.metric in HEADLINE and entry.before is not None and entry.after is not None
    )


def _sides(report: Report, sides: list[Report]) -> Section:
    keys = ("name", "path", "schema", "created", "architecture", "device", "dtype", "text")
    rows = tuple((key, *(named(side.get(key)) for side in sides)) for key in keys)
    notes = texts(report, "notes")
    table = Table("What was compared", columns("<", "<A", "<B"), rows, notes)
    return Section("sides", "The two reports", (), (table,))
