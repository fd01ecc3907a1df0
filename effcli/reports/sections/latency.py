"""Latency: time to the first token and time for each further one."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, Section, Table, columns, items, unique, where


def section(result: Report, report: Report) -> Section:
    """Build the section."""
    points = items(result, "points")
    conditions = []
    if result.get("attention_implementation"):
        conditions.append(f"attention: {printable(result['attention_implementation'])}")
    if result.get("threads") is not None:
        conditions.append(f"threads: {result['threads']}")
    if result.get("load_seconds") is not None:
        conditions.append(f"weights loaded in {fmt.seconds(result['load_seconds'])}")
    lead = ["TTFT: the whole context to the first token. TPOT: one further token for every sequence of the batch."]
    if conditions:
        lead.append("; ".join(conditions).capitalize() + ".")
    return Section("latency", "Latency", tuple(lead), (_percentiles(points), _rates(points)))


def _place(point: Report) -> tuple[str, str]:
    return fmt.integer(point.get("batch")), fmt.integer(point.get("context"))


def _percentiles(points: list[Report]) -> Table:
    rows = tuple(
        _place(point)
        + tuple(
            fmt.seconds((point.get(timing) or {}).get(percentile))
            for timing in ("ttft_seconds", "tpot_seconds")
            for percentile in ("p50", "p90", "p99")
        )
        for point in points
    )
    notes = (f"{where(point)}: {printable(warning)}" for point in points for warning in point.get("warnings") or [])
    heads = columns("batch", "context", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99")
    return Table("Percentiles", heads, rows, unique(notes))


def _rates(points: list[Report]) -> Table:
    rows = tuple(
        (
            *_place(point),
            fmt.significant(point.get("tokens_per_second")),
            fmt.significant(point.get("prefill_tokens_per_second")),
            fmt.percent((point.get("tpot_seconds") or {}).get("relative_spread")),
            fmt.integer((point.get("tpot_seconds") or {}).get("samples")),
            fmt.data_size(point.get("peak_memory_bytes")),
        )
        for point in points
    )
    reasons = (
        f"No peak memory: {printable(point['peak_memory_reason'])}"
        for point in points
        if point.get("peak_memory_bytes") is None and point.get("peak_memory_reason")
    )
    no_tpot = (f"No TPOT: {printable(point['tpot_reason'])}." for point in points if point.get("tpot_reason"))
    heads = columns("batch", "context", "decode tok/s", "prefill tok/s", "spread", "samples", "peak memory")
    spread = "Spread: (p90 − p10) / p50 of TPOT."
    ranges = (
        f"TPOT of {where(point)}: timed with {' to '.join(map(fmt.integer, point['decode_context']))} tokens cached."
        for point in points
        if point.get("decode_context")
    )
    return Table("Throughput", heads, rows, unique([spread, *ranges, *no_tpot, *reasons]))
