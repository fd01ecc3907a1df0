"""The document of ``effcli optimize``."""

from __future__ import annotations

from functools import partial

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports import change_charts, curve_chart
from effcli.reports.blocks import (
    Block,
    Chart,
    Facts,
    HeatMap,
    Report,
    Section,
    Table,
    columns,
    items,
    profile,
    texts,
    unique,
)
from effcli.reports.changes import Change, decode_point, mapping, number, optimize_changes, place_of, sink_shifts
from effcli.reports.documents.base import Document, Figure, Tile
from effcli.reports.documents.profile import subtitle
from effcli.reports.optimize_verdict import optimize_verdict
from effcli.reports.sections import change, onnx, quality, run, setup, steps, written
from effcli.reports.sections.intensity import time_table, work_table
from effcli.reports.sections.sinks import heat_maps

FIGURES_CHANGES = (
    "Each figure has its own scale. The red mark is what the plan predicted; words beside a bar say whether the change "
    "is outside noise."
)
NO_CHANGES = "No bars: the report lacks the figures of one side."
ROOFLINE = (
    "Faded marks: before. The arrow leads to after. Fewer bytes a token move decode right; more tokens a second "
    "move it up. The roof of a dtype that the kernels compute in bounds what they can reach."
)
NO_ROOFLINE = "No roofline: it needs a measured peak and timed points before and after."
LAYERS = "Colour: relative squared error, the largest of the layers in a cell. Text in a cell: bits, where they differ."
NO_CURVES = "No curve: all its values are zero."
SETUP = ("model", "environment", "warnings")
STAYED = 0.05
"""Share of heads on the other side of ε up to which the sinks stayed."""


def document(report: Report) -> Document:
    """Build the document."""
    before, after = mapping(report.get("before")), mapping(report.get("after"))
    found = optimize_changes(report)
    figures = {
        "changes": Figure(
            partial(change_charts.change_bars, found, _predicted(report), "before", "after"),
            FIGURES_CHANGES,
            NO_CHANGES,
        ),
        "roofline-pair": Figure(partial(change_charts.roofline_pair, before, after), ROOFLINE, NO_ROOFLINE),
    }
    for number_, record in enumerate(steps.passes(report)):
        draw = partial(change_charts.layer_chart, steps.layers(record), number_)
        figures[f"layers-{number_}"] = Figure(draw, LAYERS)
        for index, curves in enumerate(curve_chart.curves(record)):
            name = f"curve-{number_}-{index}"
            figures[name] = Figure(partial(curve_chart.chart, curves, name), curves.title, NO_CURVES)
    return Document(
        command="effcli optimize",
        heading="Optimized:",
        name=_name(report),
        subtitle=subtitle(before),
        verdict=optimize_verdict(report),
        tiles=_tiles(found),
        sections=_sections(report, before, after, found),
        setup=SETUP,
        figures=figures,
    )


def _name(report: Report) -> str:
    source = mapping(report.get("source")).get("spec") or mapping(mapping(report.get("before")).get("model")).get(
        "source"
    )
    return printable(source or "a model")


def _predicted(report: Report) -> dict[str, float]:
    figures = mapping(mapping(report.get("predicted")).get("figures"))
    return {key: value for key, entry in figures.items() if (value := number(entry)) is not None}


def _tiles(found: tuple[Change, ...]) -> tuple[Tile, ...]:
    tiles = []
    for key, label in (
        ("stored_bytes", "Weights"),
        ("tokens_per_second", "Decode, tokens/s"),
        ("ttft_seconds", "Time to first token"),
        ("kv_bytes_per_token", "KV cache a token"),
        ("peak_memory_bytes", "Peak memory"),
        ("perplexity", "Perplexity"),
        ("joules_per_token", "Energy a token"),
    ):
        entry = next((entry for entry in found if entry.metric == key and entry.after is not None), None)
        if entry is not None and not (key == "kv_bytes_per_token" and entry.status == "same"):
            basis = f"before {change.figure(entry.before, entry.unit)}; {change.words(entry)}"
            tiles.append(Tile(label, change.figure(entry.after, entry.unit), basis))
    return tuple(tiles)


def _sections(report: Report, before: Report, after: Report, found: tuple[Change, ...]) -> tuple[Section, ...]:
    place = place_of(report)
    at = f", batch {place[0]}, context {place[1]:,}" if place else ""
    result = Section(
        "changes", "Before and after", (), (Chart("changes"), change.table(found, f"Measured the same way twice{at}"))
    )
    sections = [
        result,
        *onnx.sections(report, found),
        quality.section(report.get("quality"), report.get("quality_reason")),
        steps.predicted_section(report),
        steps.section(report),
        written.audit_section(report),
        written.kernels_section(report),
        roofline_section(before, after, place),
        sinks_section(before, after),
        run.gates_section(report),
        run.stages_section(report),
        run.recipe_section(report),
        _model(report, before),
        _environment(report, before, after),
    ]
    warnings = texts(report, "warnings")
    if warnings:
        sections.append(Section("warnings", "Warnings", warnings, ()))
    return tuple(sections)


def roofline_section(
    before: Report, after: Report, place: tuple[int, int] | None, names: tuple[str, str] = ("before", "after")
) -> Section:
    """Show where decode and prefill stand on the roofline, before and after."""
    blocks: list[Block] = [Chart("roofline-pair")]
    for name, report in zip(names, (before, after), strict=True):
        points = [point for point in items(profile(report, "intensity"), "points") if isinstance(point, dict)]
        if points:
            blocks += [
                work_table(points, f"{name.capitalize()}: work and bytes moved"),
                time_table(points, f"{name.capitalize()}: time"),
            ]
    lead = []
    bounds = [decode_point(report, place).get("bound") for report in (before, after)]
    if all(bounds):
        one, other = (printable(bound) for bound in bounds)
        lead.append(
            f"Decode was {one}-bound and still is."
            if one == other
            else f"Decode was {one}-bound and is {other}-bound now."
        )
    if len(blocks) == 1:
        lead.append("Neither profile holds arithmetic intensity.")
    return Section("roofline", "On the roofline", tuple(lead), tuple(blocks))


def sinks_section(before: Report, after: Report, names: tuple[str, str] = ("before", "after")) -> Section:
    """Say whether the sinks moved, head by head."""
    title = "Attention sinks"
    shifts = sink_shifts(before, after)
    if not shifts:
        reasons = unique(
            printable(reason) if (reason := mapping(report.get("skipped")).get("sinks")) else None
            for report in (before, after)
        )
        why = f" ({'; '.join(reasons)})" if reasons else ""
        return Section("sinks", title, (f"Not compared: one of the profiles holds no sinks{why}.",), ())
    crossed, heads = max(((shift.crossed, shift.heads) for shift in shifts), key=lambda pair: pair[0] / pair[1])
    moved = crossed / heads > STAYED
    said = "The sinks moved" if moved else "The sinks stayed where they were"
    lead = (
        f"{said}: {crossed:,} of {heads:,} heads are on the other side of ε ({fmt.percent(STAYED)} of them would count "
        "as moved).",
    )
    rows = tuple(
        (
            fmt.integer(shift.context),
            fmt.yes_no(shift.bos),
            fmt.percent(shift.before_rate),
            fmt.percent(shift.after_rate),
            f"{shift.crossed:,} of {shift.heads:,}",
            fmt.significant(shift.mean_difference),
        )
        for shift in shifts
    )
    heads_row = columns("context", "<BOS", names[0], names[1], "heads that crossed ε", "mean |Δα₁|")
    maps: list[Block] = []
    for name, report in zip(names, (before, after), strict=True):
        for heat in heat_maps(mapping(profile(report, "sinks")))[:1]:
            maps.append(HeatMap(f"{name.capitalize()}: {heat.title}", heat.values, heat.threshold))
    return Section("sinks", title, lead, (Table("Sink rate", heads_row, rows), *maps))


def _model(report: Report, before: Report) -> Section:
    made = setup.model(before)
    return Section("model", "Model", (), (run.source_facts(report), *made.blocks))


def _environment(report: Report, before: Report, after: Report) -> Section:
    own = (
        ("command", printable(report.get("command") or fmt.MISSING)),
        ("made", printable(report.get("created") or fmt.MISSING)),
    )
    blocks: list[Block] = [Facts("This run", own)]
    told: set[tuple[str, ...]] = set()
    for name, side in (("Before", before), ("After, where it differs", after)):
        for block in setup.environment(side).blocks:
            if isinstance(block, Facts):
                pairs = tuple(pair for pair in block.pairs if pair not in told)
                told |= set(block.pairs)
                blocks.append(Facts(f"{name}: device and software", pairs, block.notes))
            elif isinstance(block, Table):
                rows = tuple(row for row in block.rows if row not in told)
                told |= set(block.rows)
                if rows:
                    blocks.append(Table(f"{name}: measured ceilings", block.columns, rows, block.notes))
    return Section("environment", "Device and software", (), tuple(blocks))
