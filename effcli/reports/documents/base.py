"""What every rendering is made from: the verdict, the figures people ask for first, sections and charts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from effcli.reports.blocks import Section


@dataclass(frozen=True)
class Figure:
    """A chart: how to draw it, what stands below it, and what stands in its place where it cannot be drawn.

    Attributes
    ----------
    draw : callable
        Returns an SVG element, or None where the report lacks the figures.
    caption, missing : str
    """

    draw: Callable[[], str | None]
    caption: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Tile:
    """A figure, what it is, and what it stands on."""

    label: str
    figure: str
    basis: str


@dataclass(frozen=True)
class Document:
    """One report, ready to be rendered; every text in it is finished and on one line.

    Attributes
    ----------
    command : str
        What made it: ``effcli profile``.
    heading : str
        What stands before the name in Markdown's title: ``Profile of``.
    name, subtitle : str
        Of the model.
    verdict : tuple of str
        At least one sentence, the most important first.
    tiles : tuple of Tile
    sections : tuple of Section
        In reading order.
    setup : tuple of str
        Names of the sections that HTML shows last, under "How this was measured".
    figures : dict of str to Figure
        By the name of the :class:`effcli.reports.blocks.Chart` that they stand for.
    """

    command: str
    heading: str
    name: str
    subtitle: str
    verdict: tuple[str, ...]
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    setup: tuple[str, ...] = ("environment",)
    figures: dict[str, Figure] = field(default_factory=dict)
