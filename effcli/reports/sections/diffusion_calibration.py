"""What the schedules were calibrated on, and what the calibration cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Facts, Report, Section, items
from effcli.reports.changes import mapping
from effcli.reports.pipeline_reading import ErrorMap, mode_of, reuse_text, short_label
from effcli.reports.sections.generic import named, shown_value

MOST_INPUTS = 8


def section(report: Report, errors: ErrorMap | None) -> Section:
    """Describe the calibration; ``errors`` is the map that it made."""
    found = mapping(mapping(report.get("lemica")).get("calibration"))
    if not found:
        return Section("calibration", "Calibration", ("The report holds no calibration.",), ())
    inputs, seeds = items(found, "inputs"), items(found, "seeds")
    pairs = [
        ("samples", fmt.integer(len(inputs) or None)),
        ("prompts or classes", _some([f"“{short_label(entry)}”" for entry in inputs if entry is not None])),
        ("seeds", _some([shown_value(seed) for seed in seeds if seed is not None])),
        ("scheduler", named(found.get("scheduler"))),
        ("steps", shown_value(report.get("steps"))),
        *((printable(key), shown_value(value)) for key, value in mapping(found.get("arguments")).items()),
        *(_of_map(errors, mode_of(report)) if errors is not None else []),
        ("versions", _pairs(found.get("versions"))),
    ]
    shown = tuple((name, value) for name, value in pairs if value not in (fmt.MISSING, ""))
    lead = (cost(errors),) if errors is not None else ("Nothing was calibrated: there is no error map.",)
    return Section("calibration", "Calibration", lead, (Facts("", shown, _notes(errors)),))


def cost(errors: ErrorMap) -> str:
    """Say what the map cost, against the plain way of making it."""
    edges = len(errors.weights)
    if not errors.forwards:
        return f"The error map has {edges:,} segments; what it cost is not recorded."
    runs = errors.forwards / errors.steps
    return (
        f"The error map took as many denoiser calls as {fmt.short(runs)} full runs a sample, "
        f"{fmt.percent(runs / edges)} of the {edges:,} that replaying each segment from the first step would take."
    )


def _of_map(errors: ErrorMap, mode: str) -> list[tuple[str, str]]:
    return [
        ("largest gap", f"{errors.max_gap} steps"),
        ("distance", f"{errors.unit} of the final result"),
        ("reuse while calibrating", reuse_text(errors.reuse, mode)),
        (
            "denoiser calls",
            f"{fmt.integer(errors.forwards)} in full, for one sample" if errors.forwards else fmt.MISSING,
        ),
        ("noise", fmt.significant(errors.noise)),
    ]


def _notes(errors: ErrorMap | None) -> tuple[str, ...]:
    if errors is None or errors.noise is None:
        return ()
    share = errors.noise / errors.positive[0]
    beside = f", {fmt.percent(share)} of the least error of a segment" if errors.noise else ""
    return (f"noise: the largest error of a replay that reuses nothing{beside}.",)


def _some(found: Sequence[str]) -> str:
    more = f" and {len(found) - MOST_INPUTS:,} more" if len(found) > MOST_INPUTS else ""
    return ", ".join(found[:MOST_INPUTS]) + more


def _pairs(value: Any) -> str:
    return ", ".join(f"{printable(name)} {shown_value(entry)}" for name, entry in mapping(value).items())
