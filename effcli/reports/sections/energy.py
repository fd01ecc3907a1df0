"""Energy of decoding, or why there is no figure."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Facts, Report, Section, unique


def _with_unit(value: float | None, unit: str) -> str:
    return fmt.MISSING if value is None else f"{fmt.significant(value)} {unit}"


def section(result: Report, report: Report) -> Section:
    """Build the section."""
    pairs = [("energy a token", _with_unit(result.get("joules_per_token"), "J"))]
    measured = (
        ("average power", result.get("average_power_watts"), _with_unit(result.get("average_power_watts"), "W")),
        ("power limit", result.get("power_limit_watts"), _with_unit(result.get("power_limit_watts"), "W")),
        ("SM clock", result.get("sm_clock_hertz"), fmt.hertz(result.get("sm_clock_hertz"))),
        ("memory clock", result.get("memory_clock_hertz"), fmt.hertz(result.get("memory_clock_hertz"))),
        ("temperature", result.get("temperature_celsius"), _with_unit(result.get("temperature_celsius"), "°C")),
        ("decoding at batch", result.get("batch"), fmt.integer(result.get("batch"))),
        ("decoding at context", result.get("context"), fmt.integer(result.get("context"))),
        ("method", result.get("method"), printable(result.get("method"))),
        ("tokens", result.get("tokens"), fmt.integer(result.get("tokens"))),
        ("measured for", result.get("seconds"), fmt.seconds(result.get("seconds"))),
    )
    pairs += [(name, text) for name, value, text in measured if value is not None]
    throttling = result.get("throttle_reasons")
    if throttling is not None:
        pairs.append(("throttled by", printable(", ".join(throttling)) or "nothing"))
    reason = result.get("reason")
    notes = unique([f"Not measured: {printable(reason)}" if reason else None])
    return Section("energy", "Energy", (), (Facts("", tuple(pairs), notes),))
