"""The error map: what each segment of reuse does to the result, with the schedules' paths drawn over it.

::

    gap 4 │ ▒ ▒ ░ ░ ░ ░ ▒ █      a cell (i, gap): the denoiser runs in full at i and at i + gap,
        3 │ ▒ ░ ░   ░ ░ ░ ▒      every step between reuses what i left
        2 │ ░ ░         ░ ░
        1 └────────────────      gap 1: nothing is reused, no error
            0 1 2 3 4 5 6 7      step i
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from effcli import formatting as fmt
from effcli.reports.charts import HEAT_LEVELS, LEFT, RIGHT, TITLED_CELLS, WIDTH
from effcli.reports.pipeline_reading import ErrorMap
from effcli.reports.svg import LogScale, Svg

PATHS = ("path main", "path", "path second", "path third", "path dashed", "path second dashed", "path third dashed")
HEIGHT, TALLEST, SHORTEST = 200.0, 26.0, 7.0
LEAST_RATIO = 1e-4
"""Of the smallest colour to the largest error: smaller errors share the lightest colour."""
LEGEND = 26.0

Path = tuple[str, tuple[int, ...]]


def draw(errors: ErrorMap, paths: Sequence[Path]) -> str:
    """Draw the map; of ``paths`` (name, full steps), those on the map's own steps, the first the strongest."""
    wide = (WIDTH - LEFT - RIGHT) / (errors.steps - 1)
    tall = min(TALLEST, max(SHORTEST, HEIGHT / errors.max_gap))
    heads, top = _heads([name for name, _ in paths])
    floor = top + errors.max_gap * tall
    low, high = errors.positive[0], errors.positive[-1]
    scale = LogScale(max(low, high * LEAST_RATIO) * (1 if low < high else 0.5), high, 0, HEAT_LEVELS)
    drawing = Svg("error-map", f"Error of each segment of reuse, {errors.unit}", _words(errors), WIDTH, floor + 96)
    each = len(errors.weights) <= TITLED_CELLS
    for (start, end), error in sorted(errors.weights.items()):
        tip = f"full at {start} and {end}, reuse between: {fmt.significant(error)}" if each else None
        drawing.add(
            "rect",
            f"cell h{_level(scale, error)}",
            tip,
            x=LEFT + start * wide,
            y=floor - (end - start) * tall,
            width=_gap(wide),
            height=_gap(tall),
        )
    drawing.line("frame", LEFT, floor, LEFT + (errors.steps - 1) * wide, floor)
    for gap in _shown(1, errors.max_gap, 10):
        drawing.text("tick", LEFT - 8, floor - (gap - 0.5) * tall + 4, str(gap), "end")
    for step in _shown(0, errors.steps - 2, 14):
        drawing.text("tick", LEFT + (step + 0.5) * wide, floor + 15, str(step), "middle")
    drawing.text("axis", LEFT + (WIDTH - LEFT - RIGHT) / 2, floor + 33, "full step i that is reused from", "middle")
    label = "steps to the next full step"
    drawing.text("axis", 0, 0, label, "middle", transform=f"translate(16 {max(92, (top + floor) / 2):.0f}) rotate(-90)")
    for kind, (name, full) in reversed(list(zip(_kinds(len(paths)), paths, strict=True))):
        _path(drawing, kind, name, full, (wide, tall, floor))
    for (x, y), kind, (name, _) in zip(heads, _kinds(len(paths)), paths, strict=True):
        drawing.line(kind, x, y, x + 22, y)
        drawing.text("label", x + 28, y + 4, name)
    _legend(drawing, floor + 50, scale, errors)
    return drawing.render()


def _heads(names: Sequence[str]) -> tuple[list[tuple[float, float]], float]:
    """Return where the legend of each path starts, line by line, and where the map starts below them."""
    spots: list[tuple[float, float]] = []
    x, y = LEFT, 12.0
    for name in names:
        wide = 46 + 7 * len(name)
        if spots and x + wide > WIDTH - RIGHT:
            x, y = LEFT, y + 20
        spots.append((x, y))
        x += wide
    return spots, y + 14 if spots else 8.0


def _kinds(count: int) -> list[str]:
    return [PATHS[min(index, len(PATHS) - 1)] for index in range(count)]


def _path(drawing: Svg, kind: str, name: str, full: Sequence[int], geometry: tuple[float, float, float]) -> None:
    wide, tall, floor = geometry
    segments = list(pairwise(full))
    spots = [(LEFT + (i + 0.5) * wide, floor - (j - i - 0.5) * tall) for i, j in segments]
    drawing.polyline("path halo", spots)
    drawing.polyline(kind, spots, f"{name}: {len(full)} full steps")
    if kind != PATHS[0]:
        return
    for (i, j), (x, y) in zip(segments, spots, strict=True):
        if j - i > 1:
            tip = f"{name}: full at {i} and {j}"
            drawing.add("rect", "stop", tip, x=x - wide / 2, y=y - tall / 2, width=_gap(wide), height=_gap(tall), rx=2)
        else:
            drawing.add("circle", "stop", f"{name}: full at {i} and {j}", cx=x, cy=y, r=min(2.0, wide / 4))


def _gap(size: float) -> float:
    return size - 1 if size >= 6 else size


def _level(scale: LogScale, error: float) -> int:
    return 0 if error <= 0 else min(HEAT_LEVELS - 1, int(scale(error)))


def _shown(first: int, last: int, most: int) -> range:
    rough = (last - first + 1) / most
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if size >= rough)
    return range(first, last + 1, step) if step < 2 or first == 0 else range(step, last + 1, step)


def _words(errors: ErrorMap) -> str:
    low, high = (pick(errors.weights, key=errors.weights.__getitem__) for pick in (min, max))
    return (
        f"Heat map of {len(errors.weights)} segments by first step and length, logarithmic colours. Least error "
        f"{fmt.significant(errors.weights[low])} from step {low[0]} to {low[1]}, largest "
        f"{fmt.significant(errors.weights[high])} from step {high[0]} to {high[1]}."
    )


def _legend(drawing: Svg, y: float, scale: LogScale, errors: ErrorMap) -> None:
    for level in range(HEAT_LEVELS):
        drawing.add("rect", f"cell h{level}", x=LEFT + level * LEGEND, y=y, width=LEGEND, height=12)
    below = "≤ " if errors.positive[0] < scale.low or 0 in errors.weights.values() else ""
    for share, before in ((0.0, below), (0.5, ""), (1.0, "")):
        value = scale.low * (scale.high / scale.low) ** share
        drawing.text("tick", LEFT + share * HEAT_LEVELS * LEGEND, y + 28, before + fmt.short(value, 2), "middle")
    drawing.text("label", LEFT + HEAT_LEVELS * LEGEND + 30, y + 10, f"error of the segment by itself, {errors.unit}")
