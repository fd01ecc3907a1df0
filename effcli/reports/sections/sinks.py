"""Attention sinks: rates, a heat map of layers and heads, and what goes with a sink."""

from __future__ import annotations

from statistics import median

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Chart, HeatMap, Report, Section, Table, columns, items, unique

TOP_POSITIONS = 5
TOP_ACTIVATIONS = 8
SPARKS = "▁▂▃▄▅▆▇█"


def bos_label(point: Report) -> str:
    """Return ``with BOS`` or ``without BOS``."""
    return "with BOS" if point.get("bos") else "without BOS"


def sparkline(values: list[float], width: int = 16) -> str:
    """Draw values ≥ 0 as a line of block characters, at most ``width`` of them, the largest at full height."""
    if not values:
        return fmt.MISSING
    if len(values) > width:
        edges = [round(step * len(values) / width) for step in range(width + 1)]
        values = [sum(values[low:high]) / (high - low) for low, high in zip(edges, edges[1:], strict=False)]
    top = max(values) or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int(value / top * len(SPARKS)))] for value in values)


def heat_maps(result: Report) -> tuple[HeatMap, ...]:
    """Return one heat map for each point."""
    epsilon = result.get("epsilon") or 0.0
    return tuple(
        HeatMap(
            f"First-token attention α₁, {point.get('context'):,} tokens, {bos_label(point)}",
            tuple(None if row is None else tuple(row) for row in point.get("alpha") or []),
            epsilon,
        )
        for point in items(result, "points")
        if any(row for row in point.get("alpha") or [])
    )


def quoted_points(result: Report) -> tuple[Report | None, Report | None]:
    """Return the point that sentences quote (the first without BOS, else the first), and its twin with BOS."""
    points = [point for point in items(result, "points") if point.get("sink_rate") is not None]
    quoted = next((point for point in points if not point.get("bos")), next(iter(points), None))
    if quoted is None or quoted.get("bos"):
        return quoted, None
    twins = (point for point in points if point.get("bos") and point.get("context") == quoted.get("context"))
    return quoted, next(twins, None)


def section(result: Report, report: Report) -> Section:
    """Build the section."""
    lead = [
        f"A head is a sink when the first token receives more than ε = {fmt.short(result.get('epsilon'))} of its "
        f"attention (mean over queries). {fmt.integer(result.get('sequences'))} sequences from: "
        f"{printable(result.get('text'))}."
    ]
    blocks: list[Block] = [_rates(result), Chart("sinks"), *heat_maps(result)]
    if any(point.get("positions") for point in items(result, "points")):
        blocks.append(_positions(result))
    blocks.append(_massive(result))
    if items(result, "perturbation"):
        blocks.append(_perturbation(result))
    return Section("sinks", "Attention sinks", tuple(lead), tuple(blocks))


def _rates(result: Report) -> Table:
    points = items(result, "points")
    extra = [epsilon for epsilon in items(result, "epsilons") if epsilon != result.get("epsilon")]
    rows = []
    for point in points:
        heads = [alpha for row in point.get("alpha") or [] if row for alpha in row]
        norms = [norm for norm in point.get("value_norm_ratio") or [] if norm is not None]
        by_epsilon = {float(key): rate for key, rate in (point.get("sink_rate_by_epsilon") or {}).items()}
        rows.append(
            (
                fmt.integer(point.get("context")),
                fmt.yes_no(point.get("bos")),
                fmt.percent(point.get("sink_rate")),
                *(fmt.percent(by_epsilon.get(float(epsilon))) for epsilon in extra),
                fmt.significant(sum(heads) / len(heads) if heads else None),
                fmt.significant(max(heads, default=None)),
                fmt.significant(point.get("uniform_alpha")),
                fmt.significant(median(norms) if norms else None),
            )
        )
    notes: list[str | None] = [
        "Value norm: the first token's value over the median token's, median over layers; small means that attending "
        "to it adds little."
    ]
    if result.get("bos_reason"):
        notes.append(printable(result["bos_reason"]))
    by_reason: dict[str, list[str]] = {}
    for layer, reason in (result.get("not_applicable") or {}).items():
        by_reason.setdefault(printable(reason), []).append(layer)
    notes += [f"Not applicable, layer {', '.join(layers)}: {reason}" for reason, layers in by_reason.items()]
    notes += [
        f"No positions: {printable(point['positions_reason'])}" for point in points if point.get("positions_reason")
    ]
    heads_row = columns(
        "context",
        "<BOS",
        "sink rate",
        *(f"ε={fmt.short(epsilon)}" for epsilon in extra),
        "mean α₁",
        "max α₁",
        "uniform α₁",
        "value norm",
    )
    return Table("Sink rate", heads_row, tuple(rows), unique(notes))


def _positions(result: Report) -> Table:
    rows = []
    for point in items(result, "points"):
        strongest = sorted(point.get("positions") or [], key=lambda found: found["mean_alpha"], reverse=True)
        rows += [
            (
                fmt.integer(point.get("context")),
                fmt.yes_no(point.get("bos")),
                fmt.integer(found["position"]),
                fmt.significant(found["mean_alpha"]),
                fmt.percent(found["sink_rate"]),
            )
            for found in strongest[:TOP_POSITIONS]
        ]
    heads = columns("context", "<BOS", "position", "mean α", "sink rate")
    return Table("Strongest positions (1 is the first token)", heads, tuple(rows))


def _massive(result: Report) -> Table:
    groups: dict[tuple[object, ...], list[Report]] = {}
    found = sorted(items(result, "massive_activations"), key=lambda entry: abs(entry["value"]), reverse=True)
    for entry in found:
        key = (entry["position"], entry["token"], entry["dimension"], entry.get("bos"))
        groups.setdefault(key, []).append(entry)
    rows = tuple(
        (
            _ranges([entry["layer"] for entry in entries]),
            fmt.integer(entries[0]["position"]),
            printable(repr(entries[0]["token"])),
            fmt.integer(entries[0]["dimension"]),
            fmt.significant(entries[0]["value"]),
            fmt.significant(max(entry["ratio_to_median"] for entry in entries)),
            fmt.yes_no(entries[0].get("bos")),
        )
        for entries in list(groups.values())[:TOP_ACTIVATIONS]
    )
    count = result.get("massive_activation_count")
    notes = (
        [f"{fmt.integer(count)} in all, counted in each layer; a row shows its largest value and ratio."]
        if rows
        else []
    )
    if count and count > len(found):
        notes.append(f"The report lists the {len(found)} largest.")
    if not rows:
        notes.append("None found." if count == 0 else "The report lists none.")
    heads = columns("<layers", "position", "<token", "dimension", "value", "× median", "<BOS")
    return Table("Massive activations (|a| > 100 and > 1,000 × median)", heads, rows, tuple(notes))


def _ranges(numbers: list[int]) -> str:
    """Return ``3, 5–8`` for 3, 5, 6, 7, 8."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _perturbation(result: Report) -> Table:
    rows = []
    for spread in items(result, "perturbation"):
        by_layer = [float(value) for value in spread.get("mean_by_layer") or []]
        rows.append(
            (
                fmt.integer(spread.get("context")),
                fmt.yes_no(spread.get("bos")),
                fmt.integer(spread.get("changed_position")),
                fmt.percent(by_layer[0] if by_layer else None),
                fmt.percent(max(by_layer, default=None)),
                fmt.percent(by_layer[-1] if by_layer else None),
                sparkline(by_layer),
            )
        )
    heads = columns("context", "<BOS", "changed", "first layer", "peak", "last layer", "<by layer")
    notes = ("Relative change |h' − h| / |h| of the hidden state, mean over positions at and after the changed token.",)
    return Table("Perturbation spread: one token changed", heads, tuple(rows), notes)
