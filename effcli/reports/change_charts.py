"""The charts of what changed: bars before and after, both on one roofline, and each layer's bits and error.

Each function returns None where there are no figures; the page then says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, items, main_point, profile, ratio, where
from effcli.reports.changes import Change, mapping, number
from effcli.reports.charts import HEAT_LEVELS, LEFT, RIGHT, WIDTH, grid_lines, roofs
from effcli.reports.sections.change import figure, words
from effcli.reports.sections.generic import named
from effcli.reports.svg import Labels, LogScale, Svg, decade_above, decade_below

BAR_LEFT, BAR_RIGHT = 150.0, 250.0
CHARACTER = 7.3  # width of a character of a label, at most on average
BAR = 16.0
MOST_KINDS = 24
MOST_COLUMNS = 200
_LAYER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Bars:
    """Bars of one figure: each has a name, a value and a class; each group has a scale of its own."""

    label: str
    unit: str
    bars: tuple[tuple[str, float | None, str], ...]
    remark: str = ""


def change_bars(found: Sequence[Change], predicted: dict[str, float], before: str, after: str) -> str | None:
    """Draw two bars for each of size, time per token, time to first token and peak memory.

    Parameters
    ----------
    found : sequence of Change
    predicted : dict
        What a plan said, by metric: a mark on the second bar's scale.
    before, after : str
        What the bars are called.
    """
    wanted = ("stored_bytes", "weight_bytes", "tpot_seconds", "ttft_seconds", "peak_memory_bytes", "joules_per_token")
    groups = []
    for change in found:
        if change.metric not in wanted or not isinstance(change.before, (int, float)):
            continue
        if not isinstance(change.after, (int, float)):
            continue
        remark = words(change).partition(" (")[0]
        groups.append(
            Bars(
                change.label,
                change.unit,
                (
                    (before, change.before, "attainable"),
                    (after, change.after, "measured"),
                    ("predicted", predicted.get(change.metric), "predicted"),
                ),
                remark,
            )
        )
    return grouped_bars("changes", "Before and after", groups, [(before, "attainable"), (after, "measured")])


def grouped_bars(
    name: str, title: str, groups: Sequence[Bars], key: Sequence[tuple[str, str]], *, named: bool = False
) -> str | None:
    """Draw horizontal bars in groups; a bar of class ``predicted`` is a mark; ``named`` writes each bar's name."""
    groups = [group for group in groups if any(value for _, value, _ in group.bars)]
    if not groups:
        return None
    head = 34.0
    heights = [
        BAR * sum(kind != "predicted" for _, value, kind in group.bars if value is not None) + 26 for group in groups
    ]
    drawing = Svg(
        name,
        title,
        "; ".join(
            f"{group.label}: "
            + ", ".join(f"{bar} {figure(value, group.unit)}" for bar, value, _ in group.bars if value is not None)
            for group in groups
        ),
        WIDTH,
        head + sum(heights),
    )
    marked = any(kind == "predicted" and value for group in groups for _, value, kind in group.bars)
    x = BAR_LEFT
    for text, kind in [*key, *([("predicted", "predicted")] if marked else [])]:
        if kind == "predicted":
            drawing.line("threshold", x + 6, 8, x + 6, 22)
        else:
            drawing.add("rect", f"bar {kind}", x=x, y=9, width=12, height=12, rx=2)
        drawing.text("label", x + 18, 19, printable(text))
        x += 40 + 7 * len(printable(text))
    y = head
    for group, height in zip(groups, heights, strict=True):
        _group(drawing, group, y, named)
        y += height
    return drawing.render()


def _group(drawing: Svg, group: Bars, top: float, named: bool) -> None:
    known = [(name, value, kind) for name, value, kind in group.bars if value is not None]
    longest = max(value for _, value, _ in known)
    scale = (WIDTH - BAR_LEFT - BAR_RIGHT) / longest if longest else 0.0
    solid = [bar for bar in known if bar[2] != "predicted"]
    middle = top + BAR * len(solid) / 2 + 4
    drawing.text("tick name", BAR_LEFT - 10, middle, _cut(group.label, 22), "end")
    for index, (name, value, kind) in enumerate(solid):
        tip = f"{group.label}, {name}: {figure(value, group.unit)}"
        y = top + BAR * index
        drawing.add("rect", f"bar {kind}", tip, x=BAR_LEFT, y=y, width=max(1.0, value * scale), height=BAR - 3, rx=2)
        text = figure(value, group.unit)
        last = index == len(solid) - 1
        text = f"{text} · {name}" if named else f"{text} · {group.remark}" if last and group.remark else text
        strong = last and not named
        marks = [marked for _, marked, other in known if other == "predicted"] if last else []
        x = BAR_LEFT + max(value, *marks, 0.0) * scale + 8  # clear of the plan's mark
        shown = _cut(text, int((WIDTH - x) / CHARACTER))
        drawing.text("label strong" if strong else "label", x, y + 11, shown)
    for name, value, kind in known:
        if kind == "predicted":
            at = BAR_LEFT + value * scale
            y = top + BAR * (len(solid) - 1)
            tip = f"{group.label}, {name}: {figure(value, group.unit)}"
            drawing.add("line", "threshold", tip, x1=at, y1=y - 3, x2=at, y2=y + BAR)


def _cut(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def roofline_pair(before: Report, after: Report, names: tuple[str, str] = ("before", "after")) -> str | None:
    """Draw prefill and decode of two profiles on one roofline, joined by an arrow from the first to the second."""
    sides = [mapping(profile(report, "intensity")) for report in (before, after)]
    peaks = mapping(mapping(after.get("environment")).get("peaks")) or mapping(
        mapping(before.get("environment")).get("peaks")
    )
    bandwidth = number(sides[1].get("peak_bytes_per_second")) or number(sides[0].get("peak_bytes_per_second"))
    bandwidth = bandwidth or number(peaks.get("memory_bytes_per_second"))
    rates = {str(name): rate for name, rate in mapping(peaks.get("flops_per_second")).items() if number(rate)}
    marks = [_marks(side) for side in sides]
    both = [*marks[0].values(), *marks[1].values()]
    if not bandwidth or not rates or not marks[0] or not marks[1]:
        return None
    main = str(sides[0].get("dtype"))
    ridge = [rate / bandwidth for rate in rates.values()]
    xs, ys = [mark[0] for mark in both] + ridge, [mark[1] for mark in both] + list(rates.values())
    height, top, bottom = 430.0, 20.0, 54.0
    x = LogScale(decade_below(min(xs) / 1.5), decade_above(max(xs) * 1.5), LEFT, WIDTH - RIGHT)
    y = LogScale(decade_below(min(ys) / 1.5), decade_above(max(ys) * 1.2), height - bottom, top)
    drawing = Svg(
        "roofline-pair",
        f"Roofline of this device, {names[0]} and {names[1]}",
        "; ".join(
            f"{name}, {phase}: {fmt.flop_rate(rate)} at {fmt.short(intensity)} FLOP/byte"
            for name, found in zip(names, marks, strict=True)
            for phase, (intensity, rate, _) in found.items()
        ),
        WIDTH,
        height,
    )
    grid_lines(drawing, x, y, fmt.short, lambda rate: fmt.large(rate, ""))
    drawing.text("axis", (LEFT + WIDTH - RIGHT) / 2, height - 12, "arithmetic intensity, FLOP/byte", "middle")
    drawing.text(
        "axis", 0, 0, "FLOP/s", "middle", transform=f"translate(16 {(top + height - bottom) / 2:.0f}) rotate(-90)"
    )
    labels = Labels(LEFT + 4, WIDTH - RIGHT - 2, top, height - bottom)
    for mark in both:
        labels.occupy(x(mark[0]), y(mark[1]), 8)
    roofs(drawing, x, y, bandwidth, rates, main, labels)
    for phase in marks[0].keys() & marks[1].keys():
        one, other = marks[0][phase], marks[1][phase]
        _arrow(drawing, (x(one[0]), y(one[1])), (x(other[0]), y(other[1])))
    for name, found, faded in zip(names, marks, (True, False), strict=True):
        for phase, (intensity, rate, point) in found.items():
            tip = f"{name}, {phase}, {where(point)}: {fmt.flop_rate(rate)}, {fmt.short(intensity)} FLOP/byte"
            tip += f", {printable(point['bound'])}-bound" if point.get("bound") else ""
            kind = f"mark {phase}{' faded' if faded else ''}"
            at = (x(intensity), y(rate))
            if phase == "prefill":
                drawing.add("rect", kind, tip, x=at[0] - 5, y=at[1] - 5, width=10, height=10)
            else:
                drawing.add("circle", kind, tip, cx=at[0], cy=at[1], r=5.5)
            text = f"{phase} {name}"
            spot = labels.place(*at, text)
            if spot is not None:
                drawing.text("label", spot[0], spot[1], text, spot[2])
    return drawing.render()


def _marks(intensity: Report) -> dict[str, tuple[float, float, Report]]:
    """Return FLOP/byte, FLOP/s and the point of each phase that was timed."""
    points = [point for point in items(intensity, "points") if isinstance(point, dict)]
    found = {}
    for phase in ("decode", "prefill"):
        point = main_point(points, phase)
        rate = ratio(number(point.get("flops")), number(point.get("time_seconds"))) if point else None
        if point is not None and rate and number(point.get("flops_per_byte")):
            found[phase] = (float(point["flops_per_byte"]), rate, point)
    return found


def _arrow(drawing: Svg, start: tuple[float, float], end: tuple[float, float]) -> None:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    if length < 22:
        return
    ux, uy = dx / length, dy / length
    tip = (end[0] - 8 * ux, end[1] - 8 * uy)
    drawing.line("arrow", start[0] + 8 * ux, start[1] + 8 * uy, tip[0] - 5 * ux, tip[1] - 5 * uy)
    drawing.add(
        "polygon",
        "arrowhead",
        points=" ".join(
            f"{px:.1f},{py:.1f}"
            for px, py in (
                tip,
                (tip[0] - 8 * ux - 4 * uy, tip[1] - 8 * uy + 4 * ux),
                (tip[0] - 8 * ux + 4 * uy, tip[1] - 8 * uy - 4 * ux),
            )
        ),
    )


@dataclass(frozen=True)
class Cell:
    """The layers of one kind at one depth: their bits, and the largest error among them."""

    bits: float
    error: float | None
    count: int


def layer_cells(layers: Sequence[Report]) -> tuple[list[str], list[int | None], dict[tuple[str, int | None], Cell]]:
    """Sort a pass's layers into kinds and depths.

    Returns
    -------
    tuple
        Kinds in order of appearance, depths in order (None: outside the numbered layers), and the cells.
    """
    groups: dict[tuple[str, int | None], list[Report]] = {}
    for layer in layers:
        if number(layer.get("bits")) is None:
            continue
        found = _LAYER.search(str(layer.get("name")))
        key = (named(layer.get("kind")), int(found.group(1)[:9]) if found else None)
        groups.setdefault(key, []).append(layer)
    cells = {}
    for key, members in groups.items():
        errors = [error for layer in members if (error := number(layer.get("error"))) is not None]
        bits = sum(float(layer["bits"]) for layer in members) / len(members)
        cells[key] = Cell(bits, max(errors, default=None), len(members))
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    depths: list[int | None] = [*sorted({depth for _, depth in cells if depth is not None})]
    if any(depth is None for _, depth in cells):
        depths.append(None)
    return kinds, depths, cells


def layer_chart(layers: Sequence[Report], number_: int = 0) -> str | None:
    """Draw kinds of layers × depth: the colour is the error, the text in a cell its bits where they differ."""
    kinds, depths, cells = layer_cells(layers)
    if not cells or len(kinds) > MOST_KINDS or len(depths) > MOST_COLUMNS:
        return None
    errors = [cell.error for cell in cells.values() if cell.error]
    mixed = len({cell.bits for cell in cells.values()}) > 1
    if not errors and not mixed:
        return None
    low, high = (min(errors), max(errors)) if errors else (1.0, 1.0)
    left, top, tall = 124.0, 16.0, 22.0
    wide = min(30.0, (WIDTH - left - RIGHT) / len(depths))
    floor = top + tall * len(kinds)
    drawing = Svg(
        f"layers-{number_}",
        "Bits and error of each layer",
        f"{len(kinds)} kinds of layers by {len(depths)} depths"
        + (
            f"; relative squared error {fmt.significant(low)} to {fmt.significant(high)}, median "
            f"{fmt.significant(median(errors))}"
            if errors
            else ""
        ),
        WIDTH,
        floor + 84,
    )
    for row, kind in enumerate(kinds):
        y = top + row * tall
        drawing.text("tick name", left - 8, y + tall / 2 + 4, _cut(kind, 15), "end")
        for column, depth in enumerate(depths):
            cell = cells.get((kind, depth))
            if cell is not None:
                _cell(drawing, cell, kind, depth, (left + column * wide, y, wide, tall), (low, high), mixed)
    step = max(1, round(len(depths) / 15))
    for column in range(0, len(depths), step):
        if depths[column] is not None:
            drawing.text("tick", left + (column + 0.5) * wide, floor + 15, str(depths[column]), "middle")
    drawing.text("axis", left + len(depths) * wide / 2, floor + 33, "layer", "middle")
    if errors:
        _scale(drawing, left, floor + 46, low, high)
    return drawing.render()


def error_level(error: float, low: float, high: float) -> int:
    """Return the step of an error on the logarithmic colour scale from ``low`` to ``high``."""
    if error <= low or high <= low:
        return 0
    share = math.log(error / low) / math.log(high / low)
    return min(HEAT_LEVELS - 1, int(share * HEAT_LEVELS))


def _cell(
    drawing: Svg,
    cell: Cell,
    kind: str,
    depth: int | None,
    box: tuple[float, float, float, float],
    limits: tuple[float, float],
    mixed: bool,
) -> None:
    x, y, wide, tall = box
    level = error_level(cell.error, *limits) if cell.error else 0
    place = "outside the layers" if depth is None else f"layer {depth}"
    tip = f"{kind}, {place}: {fmt.short(cell.bits)} bits, "
    tip += f"error {fmt.significant(cell.error)}" if cell.error is not None else "error not known"
    tip += f" (the largest of {cell.count})" if cell.count > 1 and cell.error is not None else ""
    shade = f"h{level}" if cell.error is not None else "none"
    drawing.add("rect", f"cell {shade}", tip, x=x, y=y, width=max(0.5, wide - 1), height=tall - 1)
    if mixed and wide >= 14:
        kind_of_text = "bits light" if level >= HEAT_LEVELS // 2 else "bits"
        drawing.text(kind_of_text, x + (wide - 1) / 2, y + tall / 2 + 4, fmt.short(cell.bits, 2), "middle")


def _scale(drawing: Svg, left: float, y: float, low: float, high: float) -> None:
    size = 22.0
    levels = HEAT_LEVELS if high > low else 1
    for level in range(levels):
        drawing.add("rect", f"cell h{level}", x=left + level * size, y=y, width=size, height=10)
    marks = [(low, 0.0)] if levels == 1 else [(low, 0.0), (math.sqrt(low * high), 0.5), (high, 1.0)]
    for value, share in marks:
        drawing.text("tick", left + share * levels * size, y + 25, fmt.short(value, 2), "middle")
    drawing.text("label", left + levels * size + 14, y + 9, "relative squared error, logarithmic")
