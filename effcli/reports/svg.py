"""Inline SVG for the HTML report: elements, scales and ticks. Colours come from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass
class Svg:
    """A drawing of ``width`` × ``height`` user units with an accessible title and description."""

    name: str
    title: str
    description: str
    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def add(
        self, tag: str, kind: str, tip: str | None = None, text: str | None = None, **attributes: float | str
    ) -> None:
        """Add an element of class ``kind``; ``tip`` shows on hover, underscores in attribute names become hyphens."""
        written = "".join(
            f" {key.rstrip('_').replace('_', '-')}={quoteattr(value if isinstance(value, str) else _number(value))}"
            for key, value in attributes.items()
        )
        inner = (f"<title>{escape(tip)}</title>" if tip else "") + (escape(text) if text else "")
        self.parts.append(f"<{tag} class={quoteattr(kind)}{written}>{inner}</{tag}>")

    def line(self, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
        """Add a straight line."""
        self.add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)

    def text(self, kind: str, x: float, y: float, text: str, anchor: str = "start", **attributes: float | str) -> None:
        """Add text."""
        self.add("text", kind, None, text, x=x, y=y, text_anchor=anchor, **attributes)

    def polyline(self, kind: str, points: Sequence[tuple[float, float]], tip: str | None = None) -> None:
        """Add a line through points."""
        self.add("polyline", kind, tip, points=" ".join(f"{_number(x)},{_number(y)}" for x, y in points))

    def render(self) -> str:
        """Return the SVG element."""
        label = f"{self.name}-title {self.name}-desc"
        return (
            f'<svg class="chart" id={quoteattr(self.name)} role="img" aria-labelledby={quoteattr(label)} '
            f'viewBox="0 0 {_number(self.width)} {_number(self.height)}" xmlns="http://www.w3.org/2000/svg">'
            f"<title id={quoteattr(self.name + '-title')}>{escape(self.title)}</title>"
            f"<desc id={quoteattr(self.name + '-desc')}>{escape(self.description)}</desc>{''.join(self.parts)}</svg>"
        )


@dataclass(frozen=True)
class LogScale:
    """Maps ``low`` … ``high`` (positive) to ``start`` … ``end`` by logarithm."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of ``value``, inside the range."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 8) -> list[float]:
        """Return powers of ten (every second, third … where there are many)."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / most))
        return [10.0**exponent for exponent in range(first, last + 1, step)]

    def minor_ticks(self) -> list[float]:
        """Return 2 … 9 times the powers of ten inside the range."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = [factor * 10.0**exponent for exponent in range(first, last) for factor in range(2, 10)]
        return [value for value in every if self.low <= value <= self.high]


def decade_below(value: float) -> float:
    """Return the largest power of ten not above ``value``."""
    return float(10.0 ** math.floor(math.log10(value) + 1e-9))


def decade_above(value: float) -> float:
    """Return the smallest power of ten not below ``value``."""
    return float(10.0 ** math.ceil(math.log10(value) - 1e-9))


def linear_ticks(high: float, most: int = 5) -> list[float]:
    """Return 0 and round steps (1, 2 or 5 times a power of ten) up to ``high``."""
    rough = high / most
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * base for factor in (1, 2, 5, 10) if factor * base >= rough * (1 - 1e-9))
    return [step * count for count in range(int(high / step + 1e-9) + 1)]


@dataclass
class Labels:
    """Places labels beside marks so that none covers another; one that finds no room is left out (its tip remains)."""

    left: float
    right: float
    top: float
    bottom: float
    character: float = 6.3
    line: float = 13.0
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def occupy(self, x: float, y: float, radius: float) -> None:
        """Keep the place of a mark free."""
        self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def place(self, x: float, y: float, text: str, gap: float = 10.0) -> tuple[float, float, str] | None:
        """Return x, y and anchor for a label of the mark at (x, y), or None."""
        for distance in (gap, 2 * gap, 3.2 * gap):
            for dx, dy, anchor in (
                (distance, 4, "start"),
                (-distance, 4, "end"),
                (0, -distance, "middle"),
                (0, distance + 8, "middle"),
                (distance, distance + 4, "start"),
                (-distance, -distance, "end"),
                (distance, -distance, "start"),
                (-distance, distance + 4, "end"),
            ):
                if self.fits(x + dx, y + dy, text, anchor):
                    return x + dx, y + dy, anchor
        return None

    def fits(self, x: float, y: float, text: str, anchor: str) -> bool:
        """Take the place of a label at (x, y) if it is inside the plot and free."""
        width = len(text) * self.character
        start = {"start": x, "end": x - width, "middle": x - width / 2}[anchor]
        box = (start, y - self.line + 3, start + width, y + 3)
        inside = box[0] >= self.left and box[2] <= self.right and box[1] >= self.top and box[3] <= self.bottom
        if not inside or any(_overlap(box, other) for other in self.taken):
            return False
        self.taken.append(box)
        return True


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
