"""The error map, the paths through it, and which steps run in full."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from effcli import formatting as fmt
from effcli.reports.blocks import Block, Chart, Report, Section, Table, columns
from effcli.reports.pipeline_reading import ErrorMap, Row, ranges, results, rows, short_label, whole
from effcli.reports.schedule_map import Path

NOTE = (
    "An edge from i to j is a segment of reuse: the denoiser runs in full at steps i and j, and every step between "
    "reuses what i left. Its error is the mean absolute difference of the final result to a run in which every step "
    "is full, with only this segment reused."
)


def paths(report: Report, errors: ErrorMap) -> list[Path]:
    """Return the schedules that the map can show, the default first."""
    return [
        (f"{short_label(result.name)} ({len(result.full)})", result.full)
        for result in results(report)
        if result.steps == errors.steps and len(result.full) > 1
        if all(j - i <= errors.max_gap for i, j in pairwise(result.full))
    ]


def section(errors: ErrorMap | None, reason: str, drawn: Sequence[Path] = (), others: Sequence[Row] = ()) -> Section:
    """Show the map.

    Parameters
    ----------
    errors : ErrorMap or None
    reason : str
        Why there is none.
    drawn : sequence of Path
        What is drawn over it.
    others : sequence of Row
        Other ways to skip steps; the first path is held against uniform spacing at its budget.
    """
    title = "The error map"
    if errors is None:
        return Section("map", title, (f"No error map: {reason.rstrip('.')}.",), ())
    low = min(errors.weights, key=errors.weights.__getitem__)
    high = max(errors.weights, key=errors.weights.__getitem__)
    lead = [
        NOTE,
        f"The cheapest segment is {low[0]} to {low[1]} ({fmt.significant(errors.weights[low])}), the dearest "
        f"{high[0]} to {high[1]} ({fmt.significant(errors.weights[high])}, {errors.unit}).",
    ]
    worst = errors.worst(drawn[0][1]) if drawn else None
    if worst is not None:
        beside = _even(errors, drawn[0][1], others)
        lead.append(f"On the path of {drawn[0][0]} no segment costs more than {fmt.significant(worst)}{beside}.")
    return Section("map", title, tuple(lead), (Chart("error-map"), _by_gap(errors)))


def _even(errors: ErrorMap, full: Sequence[int], others: Sequence[Row]) -> str:
    even = next((row.full for row in others if row.method == "uniform" and row.budget == len(full) and row.full), None)
    worst = errors.worst(even) if even else None
    return f"; uniform spacing at the same budget has one of {fmt.significant(worst)}" if worst is not None else ""


def _by_gap(errors: ErrorMap) -> Table:
    """Say the map in numbers: for each length of segment, what it costs and where."""
    made = []
    for gap in range(2, errors.max_gap + 1):
        found = {edge: error for edge, error in errors.weights.items() if edge[1] - edge[0] == gap}
        if found:
            low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            made.append(
                (
                    fmt.integer(gap - 1),
                    fmt.integer(len(found)),
                    fmt.significant(found[low]),
                    f"{low[0]}–{low[1]}",
                    fmt.significant(median(found.values())),
                    fmt.significant(found[high]),
                    f"{high[0]}–{high[1]}",
                )
            )
    heads = columns("steps reused", "segments", "least", "at", "median", "largest", "at")
    notes = (f"Error of a segment by itself, {errors.unit}, mean over {errors.samples:,} samples.",)
    return Table("What reuse costs, by length", heads, tuple(made), notes)


def strip_rows(report: Report) -> tuple[Row, ...]:
    """Return the rows of the strips: the comparison's, and schedules that it does not hold."""
    found = rows(report)
    held = {(row.budget, row.full) for row in found}
    more = tuple(
        Row(result.name, result.name, len(result.full), float(len(result.full)), result.full, None, {}, True, None)
        for result in results(report)
        if result.full and result.steps == whole(report.get("steps")) and (len(result.full), result.full) not in held
    )
    return tuple(sorted((*found, *more), key=lambda row: -row.budget))


def steps_section(report: Report) -> Section:
    """Show which steps run in full, as boxes and as text."""
    ways: dict[tuple[int, str], list[str]] = {}
    for row in strip_rows(report):
        full = ranges(row.full) if row.full is not None else _no_steps(row)
        ways.setdefault((row.budget, full), []).append(f"{row.label} (chosen)" if row.chosen else row.label)
    made = tuple((fmt.integer(budget), "; ".join(labels), full) for (budget, full), labels in ways.items())
    if not made:
        return Section("steps", "Which steps run in full", ("The report holds no full steps.",), ())
    blocks: list[Block] = [Chart("strips"), Table("", columns("budget", "<way", "<full steps"), made)]
    return Section("steps", "Which steps run in full", (), tuple(blocks))


def _no_steps(row: Row) -> str:
    if row.full_calls is None:
        return row.reason or fmt.MISSING
    return f"not the same for every sample ({fmt.short(row.full_calls)} on average)"
