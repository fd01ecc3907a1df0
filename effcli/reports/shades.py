"""A heat map in characters: shading that reads without colour, shrunk to what fits."""

from __future__ import annotations

from collections.abc import Sequence

SHADES = " ░▒▓█"
NOT_APPLICABLE = "·"

Grid = list[list[float | None]]


def shade(value: float | None) -> str:
    """Return the shading character of a value in 0 … 1."""
    if value is None:
        return NOT_APPLICABLE
    return SHADES[min(len(SHADES) - 1, max(0, int(value * len(SHADES))))]


def _edges(length: int, most: int) -> list[int]:
    cells = min(length, most)
    return [round(cell * length / cells) for cell in range(cells + 1)] if cells else [0]


def downsample(
    values: Sequence[Sequence[float] | None], most_layers: int, most_heads: int, row: str = "head"
) -> tuple[Grid, str]:
    """Return ``values`` by layer and head as a rectangle of at most this size, and a note on what was averaged.

    A cell is the mean of the layers and heads it stands for; None where none of them has a value.
    """
    heads = max((len(row) for row in values if row is not None), default=0)
    layer_edges, head_edges = _edges(len(values), most_layers), _edges(heads, most_heads)
    grid: Grid = []
    for first, last in zip(layer_edges, layer_edges[1:], strict=False):
        cells: list[float | None] = []
        for low, high in zip(head_edges, head_edges[1:], strict=False):
            found = [value for row in values[first:last] if row is not None for value in row[low:high]]
            cells.append(sum(found) / len(found) if found else None)
        grid.append(cells)
    note = ""
    if len(values) > most_layers or heads > most_heads:
        shown = f"{len(grid)} × {len(head_edges) - 1}"
        note = f"Shrunk to fit: {len(values)} layers × {heads} {row}s shown as {shown}, averaged."
    return grid, note
