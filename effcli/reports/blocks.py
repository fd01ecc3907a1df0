"""What a report is made of, before it is terminal text, Markdown or HTML.

::

    saved report (dict) ──> sections/*.py ──> Section(blocks) ──> terminal.py | markdown.py | html.py

Blocks hold finished text (formatted, units included), so that every rendering shows the same figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from effcli.formatting import printable

Report = dict[str, Any]
SEE_PAGE = "To see them: effcli report FILE --format html -o page.html"
"""What renderings of text say of pictures."""


@dataclass(frozen=True)
class Column:
    """Heading of a table column; numbers are flush right and never wrapped, words of prose never make a colour."""

    title: str
    numeric: bool = True
    prose: bool = False


class Link(str):
    """A table cell that leads to a file beside the report; a rendering that cannot link shows its text.

    A target comes from saved data, so it is kept to a path below the report's folder: whatever it holds, no scheme
    and no host can come of it.
    """

    target: str

    def __new__(cls, text: str, path: str) -> Link:
        """Make a link from what the cell says and a path relative to the report."""
        link = super().__new__(cls, text)
        parts = (part for part in path.split("/") if part not in ("", ".", ".."))
        link.target = "./" + quote("/".join(parts))
        return link


@dataclass(frozen=True)
class Table:
    """Rows of text under headings, with notes (reasons of missing figures, warnings) below."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Name and value pairs."""

    title: str
    pairs: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeatMap:
    """A value in 0 … 1 for each layer and head, or each pair of layers; ``None`` for a layer that has none.

    Attributes
    ----------
    title : str
    values : tuple of (tuple of float) or None
        By layer, then row.
    threshold : float or None
        The value above which a head counts as a sink.
    row : str
        What goes from top to bottom: ``head`` or ``layer``.
    value : str
        Name of the value, for the legend.
    """

    title: str
    values: tuple[tuple[float, ...] | None, ...]
    threshold: float | None
    row: str = "head"
    value: str = "α₁"


@dataclass(frozen=True)
class Chart:
    """Where a rendering that can draw puts the chart called ``name``; the others leave it out."""

    name: str


@dataclass(frozen=True)
class Code:
    """Text to copy as it is, line by line: a recipe, a command.

    Attributes
    ----------
    title : str
    language : str
        ``yaml``, ``python``, ``bash``.
    text : str
        Lines of printable characters.
    """

    title: str
    language: str
    text: str


@dataclass(frozen=True)
class Picture:
    """Pictures of one size in rows and columns, in one file; renderings of text say where to see them.

    Attributes
    ----------
    title : str
    rows, columns : tuple of str
        What each row and each column shows; at least one of each.
    cell_pixels : tuple of int
        Width and height of one picture.
    png_base64 : str
        All of them in reading order, without gaps.
    notes : tuple of str
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cell_pixels: tuple[int, int]
    png_base64: str
    notes: tuple[str, ...] = ()

    @property
    def alternative(self) -> str:
        """The words that stand for the pictures where they cannot be seen."""
        count = len(self.rows) * len(self.columns)
        of = f"{len(self.columns)} {'picture' if len(self.columns) == 1 else 'pictures'} each"
        return f"{count} pictures in {len(self.rows)} rows, {of}: {'; '.join(self.rows)}."


Block = Table | Facts | HeatMap | Chart | Code | Picture


@dataclass(frozen=True)
class Section:
    """One part of the report. ``name`` is the profiler's name, or that of the part of the report."""

    name: str
    title: str
    lead: tuple[str, ...]
    blocks: tuple[Block, ...]


def columns(*titles: str) -> tuple[Column, ...]:
    """Return columns; a title that starts with ``<`` is text, flush left."""
    return tuple(Column(title.removeprefix("<"), numeric=not title.startswith("<")) for title in titles)


BAD = ("slower", "worse than", "larger than before", "missed", "failed")
GOOD = ("smaller", "better", "passed", "held")
FASTER = " as fast"


def tone(cell: str) -> str:
    """Return ``bad`` or ``good`` for a cell that says so in words, for colour beside the words; else nothing."""
    if cell.startswith(BAD):
        return "bad"
    return "good" if cell.startswith(GOOD) or FASTER in cell else ""


def unique(notes: Iterable[str | None]) -> tuple[str, ...]:
    """Return the notes that say something, each once, in order."""
    return tuple(dict.fromkeys(note for note in notes if note))


def items(section: Any, key: str) -> list[Any]:
    """Return the list at ``key``, empty where the report has none."""
    found = section.get(key) if isinstance(section, dict) else None
    return found if isinstance(found, list) else []


def texts(section: Any, key: str) -> tuple[str, ...]:
    """Return the notes or warnings at ``key``, each once, on one line."""
    return unique(printable(entry) for entry in items(section, key) if entry is not None)


def profile(report: Report, name: str) -> Report | None:
    """Return what the profiler called ``name`` found, or None if it did not run."""
    found = (report.get("profiles") or {}).get(name)
    return found if isinstance(found, dict) else None


def main_point(points: Sequence[Report], phase: str | None = None) -> Report | None:
    """Return the point that sentences quote: the first of its phase that was timed, else the first."""
    of_phase = [point for point in points if phase is None or point.get("phase") == phase]
    timed = [point for point in of_phase if point.get("time_seconds") is not None]
    return next(iter(timed or of_phase), None)


def where(point: Report) -> str:
    """Return ``batch 1, context 512``."""
    return f"batch {point.get('batch')}, context {point.get('context'):,}"


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return part / whole, or None where that is not known."""
    return None if part is None or not whole else part / whole
