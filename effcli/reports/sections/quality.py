"""Quality: perplexity, divergence from the original and agreement with it, each with its interval; tasks."""

from __future__ import annotations

from typing import Any

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Report, Section, Table, columns, items, unique
from effcli.reports.changes import interval, mapping, number
from effcli.reports.sections.change import change_span, points, signed_percent, span


def section(quality: Any, reason: str | None) -> Section:
    """Build the section; without a measurement it says why."""
    if not isinstance(quality, dict):
        why = printable(reason or "the report does not say why")
        return Section("quality", "Quality", (f"Not measured: {why}.".replace("..", "."),), ())
    blocks: list[Block] = [_measures(quality)]
    tasks = [task for task in items(quality, "tasks") if isinstance(task, dict)]
    if tasks:
        blocks.append(_tasks(tasks))
    return Section("quality", "Quality", (conditions(quality),), tuple(blocks))


def conditions(quality: Report) -> str:
    """Say what quality was measured on."""
    tokens, blocks, context = (number(quality.get(key)) for key in ("tokens", "blocks", "context"))
    parts = [
        f"{fmt.integer(tokens)} tokens" if tokens is not None else "",
        f"{fmt.integer(blocks)} blocks" if blocks is not None else "",
        f"windows of {fmt.integer(context)} tokens" if context is not None else "",
    ]
    text = printable(quality.get("text") or "a text the report does not name")
    return f"Measured on: {text} ({', '.join(part for part in parts if part) or 'how much is not recorded'})."


def _measures(quality: Report) -> Table:
    perplexity, kl = mapping(quality.get("perplexity")), mapping(quality.get("kl"))
    before, after = number(perplexity.get("before")), number(perplexity.get("after"))
    ratio = number(perplexity.get("ratio"))
    if ratio is None and before and after is not None:
        ratio = after / before
    rows = [
        (
            "perplexity, original",
            fmt.significant(before, 4),
            span(interval(perplexity.get("before_interval"))),
        ),
        ("perplexity, result", fmt.significant(after, 4), span(interval(perplexity.get("interval")))),
        (
            "perplexity, change",
            signed_percent(ratio - 1) if ratio is not None else fmt.MISSING,
            change_span(interval(perplexity.get("ratio_interval"))),
        ),
        (
            "KL to original, mean (nats a token)",
            fmt.significant(number(kl.get("mean"))),
            span(interval(kl.get("interval"))),
        ),
        (
            "KL to original, 99th percentile",
            fmt.significant(number(kl.get("p99"))),
            span(interval(kl.get("p99_interval"))),
        ),
        (
            "same top token as the original",
            fmt.percent(number(quality.get("top1_agreement"))),
            span(interval(quality.get("top1_interval")), "fraction"),
        ),
    ]
    if before is None and interval(perplexity.get("before_interval")) is None:
        rows = rows[1:2] + [row for row in rows[3:] if row[1] != fmt.MISSING]
    confidence = number(quality.get("confidence")) or 0.95
    notes = (
        f"Intervals of {fmt.percent(confidence)} from blocks of the text: they say how far another text of the same "
        "kind would move the figure. That of the change pairs the blocks, so it is narrower than the other two.",
        f"No interval: {printable(quality['interval_reason'])}" if quality.get("interval_reason") else None,
        "A missing figure was not measured." if any(row[1] == fmt.MISSING for row in rows) else None,
    )
    heads = columns("<figure", "value", f"{fmt.percent(confidence)} interval")
    return Table("", heads, tuple(rows), unique(notes))


def _tasks(tasks: list[Report]) -> Table:
    rows = []
    for task in tasks:
        limits = interval(task.get("difference_interval"))
        rows.append(
            (
                printable(task.get("name") or fmt.MISSING),
                printable(task.get("metric") or fmt.MISSING),
                fmt.integer(number(task.get("samples"))),
                fmt.percent(number(task.get("before"))),
                fmt.percent(number(task.get("after"))),
                points(number(task.get("difference"))),
                fmt.MISSING if limits is None else f"{points(limits[0])} to {points(limits[1])}",
            )
        )
    heads = columns("<task", "<metric", "samples", "before", "after", "change", "interval")
    notes = ("Interval of the change, paired by sample: one that holds 0 is no change outside noise.",)
    return Table("Tasks, scored by log-likelihood", heads, tuple(rows), notes)
