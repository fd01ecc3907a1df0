"""The report as Markdown (GitHub tables), for issues, pull requests and model cards."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import SEE_PAGE, Block, Chart, Code, Facts, HeatMap, Link, Picture, Report, Section, Table
from effcli.reports.documents import document
from effcli.reports.shades import SHADES, downsample, shade

_MARKUP = re.compile(r"([\\`*\[\]|])")
MOST_LAYERS, MOST_HEADS = 64, 32


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, in a table cell too."""
    return _MARKUP.sub(r"\\\1", html.escape(printable(text), quote=False))


def to_markdown(report: Report) -> str:
    """Return the whole report as Markdown."""
    shown = document(report)
    lines = [f"# {shown.heading} {escape(shown.name)}", "", *verdict_lines(shown.verdict)]
    for section in shown.sections:
        lines += section_lines(section)
    return "\n".join(lines).rstrip() + "\n"


def verdict_lines(sentences: tuple[str, ...]) -> list[str]:
    """Return the first sentence in bold and the others as a list."""
    first, *others = sentences
    return [f"**{escape(first)}**", "", *(f"- {escape(sentence)}" for sentence in others), ""]


def section_lines(section: Section) -> list[str]:
    """Return one section."""
    lines = [f"## {escape(section.title)}", ""]
    for sentence in section.lead:
        lines += [escape(sentence), ""]
    for block in section.blocks:
        lines += _block(block)
    return lines


def fenced(text: str, language: str = "") -> list[str]:
    """Return text as a code block that nothing in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.splitlines(), fence, ""]


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Chart):
        return
    if block.title:
        yield f"### {escape(block.title)}"
        yield ""
    if isinstance(block, HeatMap):
        yield from _heat_map(block)
    elif isinstance(block, Code):
        yield from fenced(block.text, block.language)
    elif isinstance(block, Picture):
        yield escape(f"{block.alternative} {SEE_PAGE}")
        yield ""
        yield from _notes(block.notes)
    elif isinstance(block, Facts):
        for name, value in block.pairs:
            yield f"- {escape(name)}: {escape(value)}"
        yield ""
        yield from _notes(block.notes)
    else:
        yield from _table(block)
        yield from _notes(block.notes)


def _notes(notes: tuple[str, ...]) -> Iterator[str]:
    for note in notes:
        yield f"_{escape(note)}_"
        yield ""


def _table(table: Table) -> Iterator[str]:
    if not table.rows:
        return
    yield "| " + " | ".join(escape(column.title) for column in table.columns) + " |"
    yield "|" + "|".join("---:" if column.numeric else ":---" for column in table.columns) + "|"
    for row in table.rows:
        yield "| " + " | ".join(_cell(cell) for cell in row) + " |"
    yield ""


def _cell(cell: str) -> str:
    return f"[{escape(cell)}]({cell.target})" if isinstance(cell, Link) else escape(cell)


def _heat_map(heat_map: HeatMap) -> Iterator[str]:
    grid, note = downsample(heat_map.values, MOST_LAYERS, MOST_HEADS, heat_map.row)
    yield "```text"
    for head in range(len(grid[0]) if grid else 0):
        yield "".join(shade(layer[head]) for layer in grid)
    yield "```"
    yield ""
    legend = f"Layers left to right, {heat_map.row}s top to bottom; shades {' '.join(SHADES[1:])} from 0 to 1, "
    legend += "· not applicable. "
    threshold = "" if heat_map.threshold is None else f"Threshold {fmt.short(heat_map.threshold)}. "
    yield f"_{legend}{threshold}{note}_".replace(" _", "_")
    yield ""
