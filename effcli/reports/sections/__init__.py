"""From a saved report to the sections that every rendering shows, one module for each built-in instrument."""

from __future__ import annotations

from collections.abc import Callable

from effcli.formatting import printable
from effcli.reports.blocks import Column, Report, Section, Table, profile
from effcli.reports.sections import energy, generic, intensity, kv, latency, outliers, redundancy, setup, sinks

BUILDERS: dict[str, Callable[[Report, Report], Section]] = {
    "intensity": intensity.section,
    "latency": latency.section,
    "kv": kv.section,
    "sinks": sinks.section,
    "energy": energy.section,
    "outliers": outliers.section,
    "redundancy": redundancy.section,
}


def sections(report: Report) -> tuple[Section, ...]:
    """Return the sections of a saved report in reading order; instruments that we do not know come last."""
    found = [setup.model(report), setup.environment(report)]
    for name, build in BUILDERS.items():
        result = profile(report, name)
        if result is not None:
            found.append(build(result, report))
    for name, result in (report.get("profiles") or {}).items():
        if name not in BUILDERS or not isinstance(result, dict):
            found.append(generic.section(name, result))
    skipped = report.get("skipped") or {}
    if skipped:
        rows = tuple((printable(name), printable(reason)) for name, reason in skipped.items())
        table = Table("", (Column("profiler", numeric=False), Column("why", numeric=False)), rows)
        found.append(Section("skipped", "Not measured", (), (table,)))
    return tuple(found)
