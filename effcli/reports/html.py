"""The report as one HTML file that opens offline: no request, no script, charts drawn in place."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from effcli.formatting import printable
from effcli.reports import charts
from effcli.reports.blocks import Chart, Code, Facts, HeatMap, Link, Picture, Report, Table, tone
from effcli.reports.documents import document
from effcli.reports.documents.base import Document

if TYPE_CHECKING:
    from jinja2 import Template

BOUNDS = ("memory", "compute", "overhead")
SHEET_PIXELS = 800  # for all columns of pictures together
_HERE = files("effcli.reports")
CELL_PIXELS = (88, 208)  # least and most for one picture


def to_html(report: Report) -> str:
    """Return the whole page."""
    from markupsafe import Markup

    shown = document(report)
    first, *others = (sentence.replace(" %", "\u00a0%") for sentence in shown.verdict)
    page: str = _template().render(
        style=Markup(_HERE.joinpath("page.css").read_text(encoding="utf-8")),  # noqa: S704 (our own file)
        command=shown.command,
        name=shown.name,
        subtitle=shown.subtitle,
        first=first,
        others=others,
        tiles=[(tile.label, tile.figure, tile.basis) for tile in shown.tiles],
        sections=[section for section in shown.sections if section.name not in shown.setup],
        setup=[section for section in shown.sections if section.name in shown.setup],
        drawn=_drawn(shown),
        captions={name: figure.caption for name, figure in shown.figures.items()},
        missing={name: figure.missing for name, figure in shown.figures.items() if figure.missing},
        bounds=BOUNDS,
        created=printable(report.get("created") or ""),
        raw=Markup(embedded_json(report)),  # noqa: S704 (escaped by embedded_json)
    )
    return page


@functools.cache
def _template() -> Template:
    """Return the page's template; compiling it takes longer than filling it in, and a batch fills in hundreds."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["facts"] = lambda block: isinstance(block, Facts)
    environment.tests["heat_map"] = lambda block: isinstance(block, HeatMap)
    environment.tests["code"] = lambda block: isinstance(block, Code)
    environment.tests["link"] = lambda cell: isinstance(cell, Link)
    environment.tests["picture"] = lambda block: isinstance(block, Picture)
    environment.filters["shown_pixels"] = shown_pixels
    environment.filters["tone"] = tone
    return environment.from_string(_HERE.joinpath("page.html.jinja").read_text(encoding="utf-8"))


def shown_pixels(picture: Picture) -> tuple[int, int]:
    """Return the width and height in CSS pixels that each cell is shown at: small pictures are enlarged.

    The wider side gets what the page's width leaves to each column, within ``CELL_PIXELS``.
    """
    low, high = CELL_PIXELS
    width, height = picture.cell_pixels
    longest = min(high, max(low, SHEET_PIXELS // len(picture.columns)))
    return max(1, round(longest * width / max(width, height))), max(1, round(longest * height / max(width, height)))


def embedded_json(report: Report) -> str:
    """Return the report as JSON that can stand inside a script element: no ``<`` can end it or open a comment."""
    text = json.dumps(report, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _drawn(shown: Document) -> dict[Any, Any]:
    """Return the SVG of each chart by name, and of each heat map by its title."""
    from markupsafe import Markup

    drawings: dict[Any, str | None] = {}
    number = 0
    for section in shown.sections:
        for block in section.blocks:
            if isinstance(block, Chart) and block.name in shown.figures:
                drawings[block.name] = shown.figures[block.name].draw()
            elif isinstance(block, HeatMap):
                drawings[block.title] = charts.heat_map(block, number)
                number += 1
    return {name: Markup(svg) for name, svg in drawings.items() if svg is not None}  # noqa: S704 (escaped by Svg)
