"""Ways to skip steps: which steps each runs in full, as strips of boxes; what that costs in PSNR, as lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effcli import formatting as fmt
from effcli.reports.charts import LEFT, RIGHT, WIDTH
from effcli.reports.pipeline_model import Spread
from effcli.reports.pipeline_reading import Row
from effcli.reports.svg import Svg, linear_ticks

NAME = 190.0
ROW = 20.0
HEAD = 26.0
PLOT = 280.0
STYLES = ("first", "second", "third", "fourth")
LEGEND_COLUMNS = 3
EMPTY_BOXES = 4.0
"""Width from which steps that reuse get a box of their own."""


def strips(rows: Sequence[Row], steps: int) -> str | None:
    """Draw a row of ``steps`` boxes for each way at each budget, filled where the step runs in full."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    shown = [row for row in rows if row.full is not None or row.full_calls is not None]
    if not any(row.full for row in shown):
        return None
    height = HEAD * len(budgets) + ROW * len(shown) + 46
    drawing = Svg(
        "strips",
        "Which steps run in full",
        f"Rows of {steps} boxes, one a step, filled where the denoiser runs in full: "
        + "; ".join(f"{row.label} at {row.budget}" for row in shown)
        + ".",
        WIDTH,
        height,
    )
    wide = (WIDTH - NAME - RIGHT) / steps
    gap = 1.5 if wide > 6 else 0.5 if wide > 2 else 0.0
    y = 0.0
    for budget in budgets:
        drawing.text("label strong", 4, y + 18, f"{budget} of {steps} steps in full")
        y += HEAD
        for row in (row for row in shown if row.budget == budget):
            drawing.text(f"tick name{' strong' if row.chosen else ''}", NAME - 10, y + 13, _cut(row.label), "end")
            if row.full is None:
                text = f"{fmt.significant(row.full_calls)} on average; not the same steps for every sample"
                drawing.text("tick", NAME, y + 13, text)
            else:
                _strip(drawing, row, y, (steps, wide, gap))
            y += ROW
    for step in range(0, steps, next(size for size in (1, 2, 5, 10, 20, 50, 100, 500, 1000) if steps / size <= 26)):
        drawing.text("tick", NAME + (step + 0.5) * wide, y + 16, str(step), "middle")
    drawing.text("axis", NAME + (WIDTH - NAME - RIGHT) / 2, y + 36, "step", "middle")
    return drawing.render()


def _strip(drawing: Svg, row: Row, y: float, geometry: tuple[int, float, float]) -> None:
    steps, wide, gap = geometry
    chosen = set(row.full or ())
    if wide < EMPTY_BOXES:
        drawing.add("rect", "box", x=NAME, y=y + 3, width=steps * wide, height=13, rx=1)
    for step in range(steps) if wide >= EMPTY_BOXES else sorted(chosen):
        kind = "box"
        if step in chosen:
            kind = "box full chosen" if row.chosen else "box full"
        tip = f"{row.label}, step {step}: {'in full' if step in chosen else 'reused'}"
        drawing.add("rect", kind, tip, x=NAME + step * wide, y=y + 3, width=max(0.5, wide - gap), height=13, rx=1)


def _cut(text: str) -> str:
    return text if len(text) <= 23 else text[:22] + "…"


@dataclass(frozen=True)
class _Point:
    """PSNR of one way at one budget."""

    calls: float
    psnr: Spread
    row: Row

    @property
    def limits(self) -> tuple[float, float]:
        low, high = self.psnr.low, self.psnr.high
        return (self.psnr.mean, self.psnr.mean) if low is None or high is None else (low, high)


@dataclass(frozen=True)
class _Axes:
    """Linear scales of full calls and decibels; ``step`` of the ticks of the second."""

    left: float
    right: float
    low: float
    high: float
    step: float
    top: float
    floor: float

    def across(self, calls: float) -> float:
        return LEFT + (calls - self.left) / (self.right - self.left) * (WIDTH - RIGHT - LEFT)

    def up(self, decibels: float) -> float:
        return self.floor - (decibels - self.low) / (self.high - self.low) * (self.floor - self.top)


def psnr_lines(rows: Sequence[Row]) -> str | None:
    """Draw PSNR against full calls, a line a way; the chosen ones with 95 % intervals; None for a single budget."""
    lines: dict[str, list[_Point]] = {}
    for row in rows:
        if row.psnr is not None and row.full_calls is not None:
            lines.setdefault(row.label, []).append(_Point(row.full_calls, row.psnr, row))
    budgets = {point.row.budget for line in lines.values() for point in line}
    if len(budgets) < 2:
        return None
    axes = _axes([point for line in lines.values() for point in line], len(lines))
    told = (
        f"{label}: " + ", ".join(f"{fmt.significant(point.psnr.mean)} dB at {fmt.short(point.calls)}" for point in line)
        for label, line in lines.items()
    )
    drawing = Svg("psnr", "PSNR against full denoiser calls", "; ".join(told), WIDTH, axes.floor + 46)
    for count in range(round((axes.high - axes.low) / axes.step) + 1):
        value = axes.low + count * axes.step
        drawing.line("grid", LEFT, axes.up(value), WIDTH - RIGHT, axes.up(value))
        drawing.text("tick", LEFT - 8, axes.up(value) + 4, fmt.short(value), "end")
    for budget in sorted(budgets):
        if axes.left <= budget <= axes.right:
            drawing.text("tick", axes.across(budget), axes.floor + 16, str(budget), "middle")
    middle = (axes.top + axes.floor) / 2
    drawing.text("axis", (LEFT + WIDTH - RIGHT) / 2, axes.floor + 36, "full denoiser calls of one run, mean", "middle")
    drawing.text("axis", 0, 0, "PSNR, dB", "middle", transform=f"translate(16 {middle:.0f}) rotate(-90)")
    for index, (label, line) in enumerate(lines.items()):
        kind = STYLES[index % len(STYLES)] + (" dashed" if index >= len(STYLES) else "")
        _line(drawing, axes, kind, label, sorted(line, key=lambda point: point.calls))
        x, y = LEFT + (index % LEGEND_COLUMNS) * 226, 10 + 20 * (index // LEGEND_COLUMNS)
        drawing.line(f"curve {kind}", x, y, x + 22, y)
        drawing.add("circle", f"dot {kind}", cx=x + 11, cy=y, r=4)
        drawing.text("label", x + 30, y + 4, _cut(label))
    return drawing.render()


def _axes(points: Sequence[_Point], lines: int) -> _Axes:
    low, high = min(point.limits[0] for point in points), max(point.limits[1] for point in points)
    step = linear_ticks(max(high - low, 1.0))[1]
    calls = [point.calls for point in points]
    margin = 0.06 * (max(calls) - min(calls)) or 1.0
    top = 16 + 20.0 * -(-lines // LEGEND_COLUMNS)
    return _Axes(
        left=min(calls) - margin,
        right=max(calls) + margin,
        low=step * (low // step),
        high=step * (high // step + 1),
        step=step,
        top=top,
        floor=top + PLOT,
    )


def _line(drawing: Svg, axes: _Axes, kind: str, label: str, line: Sequence[_Point]) -> None:
    drawing.polyline(f"curve {kind}", [(axes.across(point.calls), axes.up(point.psnr.mean)) for point in line], label)
    for point in line:
        x, y = axes.across(point.calls), axes.up(point.psnr.mean)
        low, high = point.limits
        if point.row.chosen and high > low:
            drawing.line("whisker", x, axes.up(low), x, axes.up(high))
        tip = f"{label}, {fmt.short(point.calls)} full calls: {fmt.significant(point.psnr.mean)} dB"
        drawing.add("circle", f"dot {kind}", tip, cx=x, cy=y, r=5 if point.row.chosen else 4)
