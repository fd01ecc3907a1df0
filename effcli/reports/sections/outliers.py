"""Outliers: which tensors are hard to quantize, and by which granularity."""

from __future__ import annotations

from collections import Counter
from statistics import median

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, Section, Table, columns, items, unique

WORST_OF_KIND = 4


def section(result: Report, report: Report) -> Section:
    """Build the section."""
    bits, tokens = fmt.integer(result.get("bits")), fmt.integer(result.get("tokens"))
    lead = (
        f"Uniform {bits}-bit quantization over {tokens} tokens of: {printable(result.get('text'))}. A granularity "
        "suits a tensor when its error, relative to the signal, is clearly the smaller one.",
    )
    rows = items(result, "rows")
    notes = unique(
        [
            *(printable(note) for note in result.get("notes") or []),
            *(f"{printable(row.get('name'))}: {printable(row['reason'])}" for row in rows if row.get("reason")),
        ]
    )
    return Section("outliers", "Outliers", lead, (_kinds(rows), _scales(rows), _worst(rows, notes)))


def _by_kind(rows: list[Report]) -> dict[str, list[Report]]:
    kinds: dict[str, list[Report]] = {}
    for row in rows:
        kinds.setdefault(printable(row.get("kind")), []).append(row)
    return kinds


def _median(rows: list[Report], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmt.significant(median(values) if values else None)


def _kinds(rows: list[Report]) -> Table:
    table = []
    for kind, found in _by_kind(rows).items():
        suits = Counter(row["suits"] for row in found if row.get("suits"))
        table.append(
            (
                kind,
                fmt.integer(len(found)),
                _median(found, "max_over_median"),
                _median(found, "kurtosis"),
                ", ".join(f"{printable(name)} {count}" for name, count in suits.most_common()) or fmt.MISSING,
            )
        )
    heads = columns("<kind", "tensors", "max/median", "kurtosis", "<suits")
    return Table("By kind of tensor, medians", heads, tuple(table))


def _scales(rows: list[Report]) -> Table:
    keys = (
        "channel_entropy_bits_per_channel_scale",
        "channel_entropy_bits_per_token_scale",
        "noise_to_signal_per_channel_scale",
        "noise_to_signal_per_token_scale",
    )
    table = tuple((kind, *(_median(found, key) for key in keys)) for kind, found in _by_kind(rows).items())
    heads = columns("<kind", "bits, channel", "bits, token", "noise, channel", "noise, token")
    notes = (
        "bits: entropy of a channel's codes, with a scale a channel or a token. noise: squared error over a channel's "
        "variance. Medians over the tensors of a kind.",
    )
    return Table("A scale a channel against a scale a token", heads, table, notes)


def _worst(rows: list[Report], notes: tuple[str, ...]) -> Table:
    worst: list[Report] = []
    for found in _by_kind([row for row in rows if row.get("max_over_median") is not None]).values():
        worst += sorted(found, key=lambda row: row["max_over_median"], reverse=True)[:WORST_OF_KIND]
    table = tuple(
        (
            printable(row.get("name")),
            printable(row.get("kind")),
            fmt.significant(row.get("max_over_median")),
            fmt.significant(row.get("kurtosis")),
            printable(row.get("suits") or fmt.MISSING),
        )
        for row in worst
    )
    shown = (
        f"The {WORST_OF_KIND} with the largest max/median of each kind, of {len(rows)} tensors."
        if len(rows) > len(table)
        else None
    )
    heads = columns("<tensor", "<kind", "max/median", "kurtosis", "<suits")
    return Table("Worst tensors", heads, table, unique([shown, *notes]))
