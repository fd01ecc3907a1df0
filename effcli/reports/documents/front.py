"""The document of ``effcli compare --pareto``: any number of models side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

from effcli import formatting as fmt
from effcli import fronts
from effcli.formatting import printable
from effcli.reports.blocks import Chart, Report, Section, Table, columns, items, texts, unique
from effcli.reports.changes import Metric, mapping, number
from effcli.reports.documents.base import Document, Figure, Tile
from effcli.reports.front_chart import Mark, front_chart
from effcli.reports.sections.change import figure
from effcli.reports.sections.generic import named

LEGEND = "* nothing else is as good in this and in {} and better in one; ~ beaten only within noise."
EVERY_FIGURE = "Every other figure: -o front.csv, or -o front.json."


def document(report: Report) -> Document:
    """Build the document."""
    known = fronts.metrics_of(report)
    entries = [entry for entry in items(report, "entries") if isinstance(entry, dict)]
    found = [entry for entry in items(report, "fronts") if isinstance(entry, dict) and entry.get("target") in known]
    quality = known.get(str(report.get("quality")), next(iter(known.values())))
    quality_name = next(name for name, metric in known.items() if metric is quality)
    figures = {}
    for front in found:
        name, target = f"front-{front['target']}", known[front["target"]]
        marks = _marks(entries, front, quality_name)
        figures[name] = Figure(
            partial(front_chart, marks, target, quality, name),
            "The line joins what no other beats: none is as good in both and better in one. Hollow: beaten only within "
            "noise.",
            "No chart: fewer than two models have both figures.",
        )
    table = _table(entries, found, known, quality_name)
    sections = [Section("models", "Side by side", _lead(report), (table, *map(Chart, figures)))]
    differing = texts(report, "mismatches")
    if differing:
        table = Table("", columns("<what"), tuple((line,) for line in differing))
        sections.append(Section("mismatches", "Not the same conditions", (), (table,)))
    reasons = _reasons(entries)
    paths = Table(
        "Reports", columns("<name", "<report"), tuple((_name(e), named(e.get("path"))) for e in entries), reasons
    )
    sections.append(Section("reports", "What was compared", (), (paths,)))
    count = len(entries)
    return Document(
        command="effcli compare",
        heading="Comparison of",
        name=f"{count} {'schedules' if known is fronts.PIPELINE_METRICS else 'models'}",
        subtitle=printable(report.get("device") or ""),
        verdict=(*_verdict(entries, found, known, quality, differing), *map(_sentence, texts(report, "warnings"))),
        tiles=_tiles(entries, found, known),
        sections=tuple(sections),
        setup=("reports",),
        figures=figures,
    )


def _name(entry: Report) -> str:
    return named(entry.get("name"))


def _lead(report: Report) -> tuple[str, ...]:
    batch, context = number(report.get("batch")), number(report.get("context"))
    lines = []
    if batch is not None:
        lines.append(f"Times and memory at batch {fmt.integer(batch)}, context {fmt.integer(context)}.")
    if report.get("text"):
        lines.append(f"Quality on: {printable(report['text'])}.")
    return tuple(lines)


def _standing(entry: Report, front: Report) -> str:
    name = entry.get("name")
    return "front" if name in items(front, "members") else "near" if name in items(front, "near") else ""


def _table(entries: list[Report], found: list[Report], known: dict[str, Metric], quality: str) -> Table:
    signs = {"front": " *", "near": " ~", "": ""}
    by_target = {str(front["target"]): front for front in found}

    def cell(entry: Report, name: str) -> str:
        sign = signs[_standing(entry, by_target[name])] if name in by_target else ""
        return figure(number(mapping(entry.get("figures")).get(name)), known[name].unit) + sign

    shown = dict.fromkeys([quality, *by_target])
    rows = tuple((_name(entry), *(cell(entry, name) for name in shown)) for entry in entries)
    heads = [known[name].label for name in shown]
    return Table("", columns("<name", *heads), rows, (LEGEND.format(known[quality].label), EVERY_FIGURE))


def _marks(entries: list[Report], front: Report, quality: str) -> list[Mark]:
    marks = []
    for entry in entries:
        figures = mapping(entry.get("figures"))
        target, good = number(figures.get(str(front.get("target")))), number(figures.get(quality))
        if target is not None and good is not None:
            standing = _standing(entry, front) or ("original" if entry.get("original") else "")
            marks.append(Mark(_name(entry), target, good, standing))
    return marks


def _reasons(entries: list[Report]) -> tuple[str, ...]:
    return unique(
        f"{_name(entry)}, {metric}: {printable(reason)}"
        for entry in entries
        for metric, reason in mapping(entry.get("reasons")).items()
        if metric in ("ppl", *fronts.TARGETS, *fronts.PIPELINE_TARGETS)
    )


def _verdict(
    entries: list[Report], found: list[Report], known: dict[str, Metric], quality: Metric, differing: tuple[str, ...]
) -> tuple[str, ...]:
    sentences = []
    for front in found:
        members, near = texts(front, "members"), texts(front, "near")
        target = known[front["target"]].label
        if not members:
            sentences.append(f"No report has both {quality.label} and {target}.")
            continue
        also = f"; within noise of it: {', '.join(near)}" if near else ""
        beaten = sum(_standing(entry, front) == "" for entry in entries) - len(items(front, "left_out"))
        sentences.append(
            f"Of {quality.label} against {target}, nothing beats {', '.join(members)}{also}; {beaten} of "
            f"{len(entries)} {'is' if beaten == 1 else 'are'} beaten."
        )
    if differing:
        sentences.append("Compared although conditions differ: the figures do not say what caused a difference.")
    return tuple(sentences) or ("The report holds no front.",)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _tiles(entries: list[Report], found: list[Report], known: dict[str, Metric]) -> tuple[Tile, ...]:
    tiles = []
    for front in found:
        target = str(front["target"])
        better = known[target].better
        have: list[tuple[float, Any]] = [
            (value, entry)
            for entry in entries
            if (value := number(mapping(entry.get("figures")).get(target))) is not None
        ]
        if have:
            value, entry = (max if better == "higher" else min)(have, key=lambda pair: pair[0])
            tiles.append(Tile(f"Best {known[target].label}", figure(value, known[target].unit), _name(entry)))
    return tuple(tiles)
