"""What the passes did, layer by kind, and what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports import curve_chart
from effcli.reports.blocks import Block, Chart, Column, Facts, Report, Section, Table, columns, items, texts, unique
from effcli.reports.changes import METRICS, mapping, number
from effcli.reports.sections.change import figure, signed_percent
from effcli.reports.sections.generic import named, shown_value

MISS = 0.2
MOST_SKIPPED = 24
LARGE = 1e5
LABELS = {metric.key: (metric.label, metric.unit) for metric in METRICS}


def passes(report: Report) -> list[Report]:
    """Return the records of the passes."""
    return [record for record in items(report, "passes") if isinstance(record, dict)]


def layers(record: Report) -> list[Report]:
    """Return the layers that a pass changed."""
    return [layer for layer in items(record, "layers") if isinstance(layer, dict)]


def section(report: Report) -> Section:
    """Describe each pass."""
    blocks: list[Block] = []
    lead = []
    measured = items(report, "measured")
    for number_, record in enumerate(passes(report)):
        name = named(record.get("name"))
        found = mapping(measured[number_]) if number_ < len(measured) else {}
        lead.append(f"{name}: {printable(record.get('summary') or 'the record has no summary')}.".replace("..", "."))
        if found:
            summary = printable(found.get("summary") or "no summary")
            lead.append(f"Measured of the result: {summary}.".replace("..", "."))
        blocks.append(_facts(record, name))
        blocks += _measured(found)
        if layers(record):
            blocks += [_by_kind(layers(record), name), Chart(f"layers-{number_}")]
        for index, lines in enumerate(curve_chart.curves(record)):
            blocks += [Chart(f"curve-{number_}-{index}"), curve_chart.table(lines)]
        skipped = [entry for entry in items(record, "skipped") if isinstance(entry, dict)]
        if skipped:
            blocks.append(_skipped(skipped, name))
    if not lead:
        lead = ["The report holds no pass."]
    return Section("passes", "What was done", tuple(lead), tuple(blocks))


def _facts(record: Report, name: str) -> Facts:
    seconds = number(record.get("seconds"))
    pairs = [
        *((printable(key), shown_value(value)) for key, value in mapping(record.get("parameters")).items()),
        ("seed", shown_value(record.get("seed"))),
        ("took", fmt.seconds(seconds)),
        *((f"version of {printable(key)}", shown_value(value)) for key, value in _items(record.get("versions"))),
    ]
    notes = texts(record, "notes")
    return Facts(f"Parameters of {name}", tuple(pairs), notes)


def _measured(found: Report) -> list[Table]:
    """Return the tables of what a pass measured of the result; its notes go below the last."""
    tables = [table for table in items(found, "tables") if isinstance(table, dict)]
    made = []
    for table in tables:
        heads = [mapping(column) for column in items(table, "columns")]
        units = [str(head.get("unit")) for head in heads]
        rows = tuple(
            tuple(_cell(value, unit) for value, unit in zip(row, units, strict=True))
            for row in items(table, "rows")
            if isinstance(row, list) and len(row) == len(units)
        )
        titles = tuple(
            Column(named(head.get("title")), unit != "text") for head, unit in zip(heads, units, strict=True)
        )
        notes = texts(found, "notes") if table is tables[-1] else ()
        made.append(Table(named(table.get("title")), titles, rows, notes))
    return made


def _cell(value: Any, unit: str) -> str:
    """Return a cell in its column's unit; counts as they are, large ones with a prefix."""
    known = value if isinstance(value, str) else number(value)
    if unit == "number" and isinstance(known, (int, float)):
        if abs(known) >= LARGE:
            return fmt.large(known, "").strip()
        if isinstance(known, int):
            return fmt.integer(known)
    return figure(known, unit)


def _items(value: Any) -> Sequence[tuple[str, Any]]:
    return tuple(mapping(value).items())


def _by_kind(found: list[Report], name: str) -> Table:
    kinds: dict[str, list[Report]] = {}
    for layer in found:
        kinds.setdefault(named(layer.get("kind")), []).append(layer)
    rows = []
    for kind, members in kinds.items():
        errors = [(error, layer) for layer in members if (error := number(layer.get("error"))) is not None]
        worst = max(errors, key=lambda pair: pair[0], default=None)
        rows.append(
            (
                kind,
                fmt.integer(len(members)),
                _range([number(layer.get("bits")) for layer in members]),
                _range([number(layer.get("group_size")) for layer in members]),
                fmt.significant(median(error for error, _ in errors)) if errors else fmt.MISSING,
                fmt.significant(worst[0]) if worst else fmt.MISSING,
                named(worst[1].get("name")) if worst else fmt.MISSING,
            )
        )
    heads = columns("<kind", "layers", "bits", "group", "error", "worst", "<worst layer")
    notes = (
        "error: relative squared error of the layer's output on calibration text (of its weights where that is not "
        "known), median over layers.",
    )
    return Table(f"Layers changed by {name}", heads, tuple(rows), notes)


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return fmt.MISSING
    low, high = min(known), max(known)
    return fmt.short(low) if low == high else f"{fmt.short(low)}–{fmt.short(high)}"


def _skipped(found: list[Report], name: str) -> Table:
    by_reason: dict[str, list[str]] = {}
    for entry in found:
        by_reason.setdefault(printable(entry.get("reason") or "no reason given"), []).append(named(entry.get("name")))
    rows = tuple(
        (
            fmt.integer(len(names)),
            ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else ""),
            reason,
        )
        for reason, names in list(by_reason.items())[:MOST_SKIPPED]
    )
    notes = (f"{len(by_reason) - MOST_SKIPPED} more reasons in the JSON.",) if len(by_reason) > MOST_SKIPPED else ()
    return Table(f"Left as they were by {name}", columns("layers", "<which", "<why"), rows, notes)


def predicted_section(report: Report) -> Section:
    """Hold what the plan said against what came out."""
    title = "Predicted beside measured"
    predicted = report.get("predicted")
    if not isinstance(predicted, dict):
        why = printable(report.get("predicted_reason") or "the report does not say why")
        return Section("predicted", title, (f"Not predicted: {why}.".replace("..", "."),), ())
    rows, explanations = [], []
    for metric in items(predicted, "metrics"):
        if not isinstance(metric, dict):
            continue
        label, unit = LABELS.get(str(metric.get("metric")), (named(metric.get("metric")), "number"))
        error = number(metric.get("relative_error"))
        missed = error is not None and abs(error) > MISS
        rows.append(
            (
                label,
                *(figure(number(metric.get(key)), unit) for key in ("before", "predicted", "measured")),
                signed_percent(error),
                fmt.MISSING if error is None else ("missed" if missed else "held"),
            )
        )
        if metric.get("explanation"):
            explanations.append(f"{label}: {metric['explanation']}")
        elif missed:
            explanations.append(f"{label}: missed by more than {fmt.percent(MISS)}; why is not known")
    said, took = number(predicted.get("pass_seconds")), number(predicted.get("measured_pass_seconds"))
    error_of_time = _error(said, took)
    rows.append(("time of the passes", fmt.MISSING, fmt.seconds(said), fmt.seconds(took), *error_of_time))
    if error_of_time[1] == "missed":
        explanations.append(f"time of the passes: missed by more than {fmt.percent(MISS)}; why is not known")
    heads = columns("<figure", "before", "predicted", "measured", "error", "<plan")
    notes = unique(printable(note) for note in (*explanations, *texts(predicted, "notes")))
    lead = (f"A prediction that is off by more than {fmt.percent(MISS)} is a miss and is explained below the table.",)
    return Section("predicted", title, lead, (Table("", heads, tuple(rows), notes),))


def _error(predicted: float | None, measured: float | None) -> tuple[str, str]:
    if predicted is None or not measured:
        return fmt.MISSING, fmt.MISSING
    error = predicted / measured - 1
    return signed_percent(error), "missed" if abs(error) > MISS else "held"
