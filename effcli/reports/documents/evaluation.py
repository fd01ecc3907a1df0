"""The document of ``effcli eval``."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, Section, items, texts
from effcli.reports.changes import interval, mapping, number
from effcli.reports.documents.base import Document, Tile
from effcli.reports.documents.profile import subtitle
from effcli.reports.sections import quality, setup, written
from effcli.reports.sections.change import change_span, signed_percent, span


def document(report: Report) -> Document:
    """Build the document."""
    found = report.get("quality")
    notes = texts(report, "notes")
    sections = [quality.section(found, report.get("quality_reason"))]
    against = mapping(report.get("against"))
    if against:
        made = setup.model({"model": against})
        sections.append(Section("against", "The reference", (), made.blocks))
    if items(report, "kernels"):
        sections.append(Section("kernels", "Kernels that ran", (), (written.kernel_table(report),)))
    sections += [setup.model(report), setup.environment(report)]
    if notes:
        sections.append(Section("notes", "Notes", notes, ()))
    return Document(
        command="effcli eval",
        heading="Quality of",
        name=printable(mapping(report.get("model")).get("source") or "a model"),
        subtitle=subtitle(report),
        verdict=_verdict(found),
        tiles=_tiles(mapping(found)),
        sections=tuple(sections),
        setup=("against", "model", "environment", "notes"),
    )


def _verdict(found: object) -> tuple[str, ...]:
    data = mapping(found)
    perplexity = mapping(data.get("perplexity"))
    before, after = number(perplexity.get("before")), number(perplexity.get("after"))
    if after is None:
        return ("Quality was not measured.",)
    limits = interval(perplexity.get("interval"))
    sentences = [
        f"Perplexity {fmt.significant(after, 4)}"
        + (f" (95 % interval {span(limits)})" if limits is not None else "")
        + "."
    ]
    if before:
        ratio = number(perplexity.get("ratio")) or after / before
        ratios = interval(perplexity.get("ratio_interval"))
        said = f"The reference has {fmt.significant(before, 4)}: a change of {signed_percent(ratio - 1)}"
        said += f" (95 % interval {change_span(ratios)})" if ratios is not None else ""
        if ratios is not None and ratios[0] <= 1 <= ratios[1]:
            said += ", no loss outside noise"
        sentences.append(f"{said}.")
    kl, agreement = number(mapping(data.get("kl")).get("mean")), number(data.get("top1_agreement"))
    if kl is not None:
        p99 = number(mapping(data.get("kl")).get("p99"))
        tail = f", p99 {fmt.significant(p99)}" if p99 is not None else ""
        sentences.append(f"KL divergence from the reference: {fmt.significant(kl)} nats a token{tail}.")
    if agreement is not None:
        sentences.append(f"Same top token as the reference at {fmt.percent(agreement)} of positions.")
    return (*sentences, quality.conditions(data))


def _tiles(data: Report) -> tuple[Tile, ...]:
    perplexity, kl = mapping(data.get("perplexity")), mapping(data.get("kl"))
    tiles = []
    for label, value, basis in (
        ("Perplexity", fmt.significant(number(perplexity.get("after")), 4), span(interval(perplexity.get("interval")))),
        ("KL, mean", fmt.significant(number(kl.get("mean"))), span(interval(kl.get("interval")))),
        (
            "Same top token",
            fmt.percent(number(data.get("top1_agreement"))),
            span(interval(data.get("top1_interval")), "fraction"),
        ),
    ):
        if value != fmt.MISSING:
            tiles.append(Tile(label, value, f"95 % interval {basis}" if basis != fmt.MISSING else "no interval"))
    return tuple(tiles)
