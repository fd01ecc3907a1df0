"""Outliers: which tensors are hard to quantize, and by which granularity."""

from __future__ import annotations

from collections import Counter
from statistics import median

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, Section, Table, columns, items

WORST_ROWS = 10


def section(result: Report, report: Report) -> Section:
    """Build the section."""
    lead = (
        f"Uniform quantization to {fmt.integer(result.get('bits'))} bits over {fmt.integer(result.get('tokens'))} tokens "
        f"of: {printable(result.get('text'))}. More entropy in a channel's codes: the scheme wastes fewer of them.",
    )
    rows = items(result, "rows")
    return Section("outliers", "Outliers", lead, (_kinds(rows), _worst(rows)))


def _median(rows: list[Report], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return median(values) if values else None


def _kinds(rows: list[Report]) -> Table:
    table = []
    for kind in dict.fromkeys(row.get("kind") for row in rows):
        of_kind = [row for row in rows if row.get("kind") == kind]
        suits = Counter(row["suits"] for row in of_kind if row.get("suits"))
        table.append(
            (
                printable(kind),
                fmt.integer(len(of_kind)),
                fmt.significant(_median(of_kind, "max_over_median")),
                fmt.significant(_median(of_kind, "kurtosis")),
                fmt.significant(_median(of_kind, "channel_entropy_bits_per_channel_scale")),
                fmt.significant(_median(of_kind, "channel_entropy_bits_per_token_scale")),
                ", ".join(f"{printable(name)} {count}" for name, count in suits.most_common()) or fmt.MISSING,
            )
        )
    heads = columns("<kind", "tensors", "max/median", "kurtosis", "bits/chan.", "bits/token", "<suits")
    notes = (
        "Medians over the tensors of a kind. bits/chan., bits/token: code entropy with a scale a channel or a token.",
    )
    return Table("By kind of tensor", heads, tuple(table), notes)


def _worst(rows: list[Report]) -> Table:
    ranked = sorted(
        (row for row in rows if row.get("max_over_median") is not None),
        key=lambda row: row["max_over_median"],
        reverse=True,
    )
    table = tuple(
        (
            printable(row.get("name")),
            printable(row.get("kind")),
            fmt.significant(row.get("max_over_median")),
            fmt.significant(row.get("kurtosis")),
            printable(row.get("suits") or fmt.MISSING),
        )
        for row in ranked[:WORST_ROWS]
    )
    notes = (f"The {len(table)} largest of {len(rows)} tensors.",) if len(rows) > len(table) else ()
    return Table("Worst tensors", columns("<tensor", "<kind", "max/median", "kurtosis", "<suits"), table, notes)
