"""The report in a terminal or a pipe, drawn with rich. The console decides width and colour."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from effcli import formatting as fmt
from effcli.reports.blocks import (
    SEE_PAGE,
    Block,
    Chart,
    Code,
    Column,
    Facts,
    HeatMap,
    Picture,
    Report,
    Section,
    Table,
    tone,
)
from effcli.reports.documents import document
from effcli.reports.shades import SHADES, Grid, downsample, shade

PIPE_WIDTH = 80
MOST_WIDTH = 120
MOST_HEADS = 16
INDENT = 2
WORD = 16  # text cells up to this long are never broken
# Light to strong, one for each shading character; chosen to read on dark and on light backgrounds.
HEAT_STYLES = ("", "blue", "cyan", "yellow", "bold red")
TONE_STYLES = {"good": "green", "bad": "bold red"}
BOUND_STYLES = {"memory": "yellow", "compute": "green", "overhead": "red"}


def to_terminal(report: Report, console: Console | None = None) -> str:
    """Return the report as the text that ``console`` would show (80 plain columns without one)."""
    if console is None:
        console = Console(file=io.StringIO(), width=PIPE_WIDTH, color_system=None)
    width = min(console.width, MOST_WIDTH)
    with console.capture() as capture:
        for renderable in _document(report, width):
            console.print(renderable, width=width, highlight=False, crop=False)
    # rich pads lines to the full width: nothing to see in a terminal, noise in a file.
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n") + "\n"


def _document(report: Report, width: int) -> Iterator[RenderableType]:
    shown = document(report)
    yield Rule(Text(f"{shown.command} · {shown.name}", style="bold"), characters="━", align="left")
    yield Text()
    first, *others = shown.verdict
    yield Padding(Text(first, style="bold"), (0, INDENT))
    for sentence in others:
        yield Padding(_bullet(sentence), (0, INDENT))
    for section in shown.sections:
        yield from _section(section, width)


def _bullet(sentence: str) -> RenderableType:
    grid = RichTable.grid(padding=(0, 1))
    grid.add_row(Text("•", style="dim"), Text(sentence))
    return grid


def _section(section: Section, width: int) -> Iterator[RenderableType]:
    yield Text()
    yield Rule(Text(section.title, style="bold cyan"), characters="─", align="left", style="cyan")
    for sentence in section.lead:
        yield Padding(Text(sentence), (0, INDENT))
    for block in section.blocks:
        if not isinstance(block, Chart):
            yield from _block(block, width)


def _block(block: Block, width: int) -> Iterator[RenderableType]:
    if isinstance(block, Chart):
        return
    if block.title:
        yield Text()
        yield Padding(Text(block.title, style="bold"), (0, INDENT))
    if isinstance(block, HeatMap):
        yield from _heat_map(block, width)
        return
    if isinstance(block, Code):
        yield Padding(Text(block.text, overflow="fold"), (0, INDENT))
        return
    if isinstance(block, Picture):
        yield Padding(Text(f"{block.alternative} {SEE_PAGE}"), (0, INDENT))
    elif isinstance(block, Facts):
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in block.pairs:
            grid.add_row(Text(name), Text(value))
        yield Padding(grid, (0, INDENT))
    elif block.rows:
        yield Padding(rich_table(block), (0, 0, 0, INDENT - 1))
    for note in block.notes:
        yield Padding(Text(note, style="dim"), (0, INDENT))


def rich_table(table: Table) -> RichTable:
    """Return a table as rich draws it."""
    drawn = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=True, padding=(0, 1), collapse_padding=True, header_style="dim", show_edge=False
    )
    for index, column in enumerate(table.columns):
        longest = max(len(text) for text in (column.title, *(row[index] for row in table.rows)))
        if column.numeric:
            drawn.add_column(Text(column.title), justify="right", no_wrap=True)
        elif longest <= WORD:
            drawn.add_column(Text(column.title), no_wrap=True, min_width=longest)
        else:
            drawn.add_column(Text(column.title), overflow="fold", min_width=WORD)
    for row in table.rows:
        drawn.add_row(
            *(Text(cell, style=_style(cell, column)) for cell, column in zip(row, table.columns, strict=True))
        )
    return drawn


def _style(cell: str, column: Column) -> str:
    return BOUND_STYLES.get(cell, "") or ("" if column.prose else TONE_STYLES.get(tone(cell), ""))


def _heat_map(heat_map: HeatMap, width: int) -> Iterator[RenderableType]:
    first = "head 1" if heat_map.row == "head" else f"{heat_map.row} 0"
    label = len(first) + 2
    room = max(8, width - 2 * INDENT - label)
    grid, note = downsample(heat_map.values, room, MOST_HEADS, heat_map.row)
    cell = max(1, min(2, room // max(1, len(grid))))
    yield Padding(_cells(grid, cell, label, first), (0, INDENT))
    legend = Text(" " * label)
    steps = len(SHADES)
    for step in range(1, steps):
        legend.append(SHADES[step] * 2, style=HEAT_STYLES[step])
        legend.append(f" {step / steps:.1f}–{(step + 1) / steps:.1f}  ", style="dim")
    legend.append(f"blank below {1 / steps:.1f}", style="dim")
    yield Padding(legend, (0, INDENT))
    threshold = "" if heat_map.threshold is None else f"; ε = {fmt.short(heat_map.threshold)}"
    caption = f"{len(heat_map.values)} layers left to right, {heat_map.row}s top to bottom{threshold}."
    yield Padding(Text(f"{caption} {note}".strip(), style="dim"), (0, INDENT))


def _cells(grid: Grid, cell: int, label: int, first: str) -> Text:
    drawn = Text(no_wrap=True)
    heads = len(grid[0]) if grid else 0
    for head in range(heads):
        text = first if head == 0 else ("last" if head == heads - 1 else "")
        drawn.append(f"{text:>{label - 2}} │", style="dim")
        for layer in grid:
            mark = shade(layer[head])
            style = HEAT_STYLES[SHADES.index(mark)] if mark in SHADES else "dim"
            drawn.append(mark * cell, style=style)
        drawn.append("│\n" if head < heads - 1 else "│", style="dim")
    return drawn
