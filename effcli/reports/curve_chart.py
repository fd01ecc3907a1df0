"""Curves over tokens that a pass recorded: of training and healing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, Table, columns, items
from effcli.reports.changes import mapping, number
from effcli.reports.charts import LEFT, RIGHT, WIDTH
from effcli.reports.sections.generic import named
from effcli.reports.svg import Svg, linear_ticks

MOST_ROWS = 12
"""Of a curve's table; the chart has every point."""
STYLES = ("curve first", "curve second", "curve third", "curve fourth")


@dataclass(frozen=True)
class Curves:
    """Lines that share both axes.

    Attributes
    ----------
    title, unit : str
        The unit is that of the values.
    series : tuple of (str, tuple of (float, float))
        Names, and pairs of tokens and value.
    """

    title: str
    unit: str
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]


def curves(record: Report) -> list[Curves]:
    """Return the curves in a pass's record; what cannot be drawn is left out."""
    found = []
    for entry in items(mapping(record.get("details")), "curves"):
        series = []
        for line in items(mapping(entry), "series"):
            points = tuple(
                (x, y)
                for point in items(mapping(line), "points")
                if isinstance(point, list | tuple) and len(point) == 2
                if (x := number(point[0])) is not None and x >= 0 and (y := number(point[1])) is not None and y >= 0
            )
            if len(points) > 1:
                series.append((named(mapping(line).get("name")), points))
        if series:
            found.append(
                Curves(named(mapping(entry).get("title")), printable(mapping(entry).get("unit") or ""), tuple(series))
            )
    return found


def chart(found: Curves, name: str) -> str | None:
    """Draw curves from zero upwards, so that what is left can be seen."""
    most = max(x for _, points in found.series for x, _ in points)
    highest = max(y for _, points in found.series for _, y in points)
    if not most or not highest:
        return None
    top, floor, right = 34.0, 264.0, WIDTH - RIGHT
    across, up = (right - LEFT) / most, (floor - top) / highest
    drawing = Svg(
        name,
        found.title,
        "; ".join(
            f"{line}: {fmt.significant(points[0][1])} to {fmt.significant(points[-1][1])}"
            for line, points in found.series
        ),
        WIDTH,
        floor + 44,
    )
    for tick in linear_ticks(highest):
        y = floor - tick * up
        drawing.line("grid", LEFT, y, right, y)
        drawing.text("tick", LEFT - 8, y + 4, fmt.short(tick), "end")
    for tick in linear_ticks(most):
        drawing.text("tick", LEFT + tick * across, floor + 16, fmt.large(tick, "").strip(), "middle")
    drawing.text("axis", (LEFT + right) / 2, floor + 36, "tokens", "middle")
    drawing.text("axis", 0, 0, found.unit, "middle", transform=f"translate(16 {(top + floor) / 2:.0f}) rotate(-90)")
    x = LEFT
    for style, (line, points) in zip(_styles(found.series), found.series, strict=True):
        placed = [(LEFT + tokens * across, floor - value * up) for tokens, value in points]
        drawing.polyline(style, placed, line)
        drawing.line(style, x, 16, x + 22, 16)
        drawing.text("label", x + 28, 20, line)
        x += 48 + 7 * len(line)
    return drawing.render()


def table(found: Curves) -> Table:
    """Return the points of curves as rows, at most ``MOST_ROWS``, the first and the last included."""
    places = sorted({x for _, points in found.series for x, _ in points})
    steps = min(MOST_ROWS, len(places))
    chosen = sorted({places[round(index * (len(places) - 1) / max(1, steps - 1))] for index in range(steps)})
    lines = [dict(points) for _, points in found.series]
    rows = tuple(
        (fmt.integer(int(x)), *(fmt.significant(line[x]) if x in line else "–" for line in lines)) for x in chosen
    )
    return Table(found.title, columns("tokens", *(f"{line}, {found.unit}" for line, _ in found.series)), rows)


def _styles(series: Sequence[object]) -> list[str]:
    return [STYLES[index % len(STYLES)] for index in range(len(series))]
