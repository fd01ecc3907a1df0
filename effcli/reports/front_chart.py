"""Quality against a target, one mark an entry, and the front that no other beats."""

from __future__ import annotations

from dataclasses import dataclass

from effcli import formatting as fmt
from effcli.reports.changes import Metric
from effcli.reports.charts import LEFT, RIGHT, WIDTH
from effcli.reports.sections.change import figure
from effcli.reports.svg import Labels, Svg, linear_ticks

TOP, FLOOR = 20.0, 320.0


@dataclass(frozen=True)
class Mark:
    """One entry: its name, where it lies, and how it stands to the front."""

    name: str
    target: float
    quality: float
    standing: str  # "front", "near", "original" or ""


@dataclass(frozen=True)
class _Axis:
    """A linear scale over the values, with a margin."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def over(values: list[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        floor = max(0.0, low - margin) if low >= 0 else low - margin
        return _Axis(floor, high + margin, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        steps = linear_ticks(self.high - self.low)
        step = steps[1] - steps[0]
        first = -(-self.low // step)
        return [tick for count in range(len(steps) + 1) if (tick := (first + count) * step) <= self.high]


def front_chart(marks: list[Mark], target: Metric, quality: Metric, name: str) -> str | None:
    """Draw the marks and the front as a staircase; None where there are fewer than two marks."""
    if len(marks) < 2:
        return None
    x = _Axis.over([mark.target for mark in marks], LEFT, WIDTH - RIGHT)
    y = _Axis.over([mark.quality for mark in marks], FLOOR, TOP)
    drawing = Svg(
        name,
        f"{quality.label} against {target.label}",
        "; ".join(
            f"{mark.name}: {figure(mark.quality, quality.unit)} at {figure(mark.target, target.unit)}"
            f"{', on the front' if mark.standing == 'front' else ''}"
            for mark in marks
        ),
        WIDTH,
        FLOOR + 56,
    )
    for tick in y.ticks():
        drawing.line("grid", LEFT, y(tick), WIDTH - RIGHT, y(tick))
        drawing.text("tick", LEFT - 8, y(tick) + 4, fmt.short(tick), "end")
    for tick in x.ticks():
        drawing.line("grid", x(tick), TOP, x(tick), FLOOR)
        drawing.text("tick", x(tick), FLOOR + 16, figure(tick, target.unit), "middle")
    better = {"lower": "lower is better", "higher": "higher is better"}
    drawing.text(
        "axis", (LEFT + WIDTH - RIGHT) / 2, FLOOR + 40, f"{target.label}, {better[target.better or 'lower']}", "middle"
    )
    words = f"{quality.label}, {better[quality.better or 'lower']}"
    drawing.text("axis", 0, 0, words, "middle", transform=f"translate(16 {(TOP + FLOOR) / 2:.0f}) rotate(-90)")
    on_front = sorted((mark for mark in marks if mark.standing == "front"), key=lambda mark: mark.target)
    corners = [(x(mark.target), y(mark.quality)) for mark in on_front]
    stairs = [point for here, after in zip(corners, corners[1:], strict=False) for point in (here, (after[0], here[1]))]
    line = [*stairs, *corners[-1:]]
    drawing.polyline("curve", line, "the front: no other is as good in both and better in one")
    labels = Labels(LEFT + 4, WIDTH - RIGHT - 2, TOP, FLOOR)
    for (x1, y1), (x2, y2) in zip(line, line[1:], strict=False):
        labels.taken.append((min(x1, x2), min(y1, y2) - 1, max(x1, x2), max(y1, y2) + 1))
    for mark in marks:
        labels.occupy(x(mark.target), y(mark.quality), 7)
    styles = {"front": "mark decode", "near": "mark decode hollow", "original": "mark other"}
    for mark in marks:
        at = x(mark.target), y(mark.quality)
        tip = f"{mark.name}: {figure(mark.quality, quality.unit)} at {figure(mark.target, target.unit)}"
        drawing.add("circle", styles.get(mark.standing, "mark other faded"), tip, cx=at[0], cy=at[1], r=6)
        if (place := labels.place(*at, mark.name)) is not None:
            drawing.text("label", place[0], place[1], mark.name, place[2])
    return drawing.render()
