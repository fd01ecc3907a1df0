"""The report as one HTML file that opens offline: no request, no script, charts drawn in place."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports import charts
from effcli.reports.blocks import Chart, Facts, HeatMap, Report, Section, Table, items, main_point, profile, where
from effcli.reports.sections import sections
from effcli.reports.sections.sinks import quoted_points
from effcli.reports.verdict import verdict

CAPTIONS = {
    "roofline": "Filled marks were measured; hollow ones are the least time that the peaks allow. The slanted line is "
    "main memory: work that fits a cache can lie above it.",
    "breakdown": "Time of each class of op: as measured, and as the roofline allows.",
    "kv": "Cache of one sequence. Dots are predictions held against the real cache (hollow: predicted only).",
}
MISSING_CHARTS = {
    "roofline": "No roofline plot: it needs a measured peak and a point.",
    "breakdown": "No breakdown: the report holds no time by class of op.",
    "kv": "No curve: the cache of this model has no size that depends on context, or the report holds none.",
}
BOUNDS = ("memory", "compute", "overhead")


def to_html(report: Report) -> str:
    """Return the whole page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = files("effcli.reports")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["facts"] = lambda block: isinstance(block, Facts)
    environment.tests["heat_map"] = lambda block: isinstance(block, HeatMap)
    template = environment.from_string(here.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    found = sections(report)
    first, *others = (sentence.replace(" %", "\u00a0%") for sentence in verdict(report))
    model = report.get("model") or {}
    page: str = template.render(
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),  # noqa: S704 (our own file)
        name=printable(model.get("source") or "a model"),
        subtitle=_subtitle(report),
        first=first,
        others=others,
        tiles=_tiles(report),
        sections=[section for section in found if section.name != "environment"],
        setup=[section for section in found if section.name == "environment"],
        drawn=_drawn(report, found),
        captions=CAPTIONS,
        missing=MISSING_CHARTS,
        bounds=BOUNDS,
        created=printable(report.get("created") or ""),
        raw=Markup(embedded_json(report)),  # noqa: S704 (escaped by embedded_json)
    )
    return page


def embedded_json(report: Report) -> str:
    """Return the report as JSON that can stand inside a script element: no ``<`` can end it or open a comment."""
    text = json.dumps(report, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _subtitle(report: Report) -> str:
    model, environment = report.get("model") or {}, report.get("environment") or {}
    parts = [
        model.get("architecture"),
        f"{fmt.parameters(model['parameters'])} parameters" if model.get("parameters") is not None else None,
        f"{fmt.data_size(model['weight_bytes'])} in {model.get('dtype')}"
        if model.get("weight_bytes") is not None
        else None,
        environment.get("device_name"),
        "counted from the config, not run" if report.get("config_only") else None,
    ]
    return " · ".join(printable(part) for part in parts if part)


def _drawn(report: Report, found: tuple[Section, ...]) -> dict[Any, Any]:
    """Return the SVG of each chart by name, and of each heat map by its block."""
    from markupsafe import Markup

    drawings: dict[Any, str | None] = {}
    number = 0
    for section in found:
        for block in section.blocks:
            if isinstance(block, Chart) and block.name in CAPTIONS:
                draw = {"roofline": charts.roofline, "breakdown": charts.breakdown, "kv": charts.kv_curve}[block.name]
                drawings[block.name] = draw(report)
            elif isinstance(block, HeatMap):
                drawings[block.title] = charts.heat_map(block, number)
                number += 1
    return {name: Markup(svg) for name, svg in drawings.items() if svg is not None}  # noqa: S704 (escaped by Svg)


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return label, figure and what it stands on, for the figures people ask for first."""
    found: list[tuple[str, str, str]] = []
    timed = next(iter(items(profile(report, "latency"), "points")), None)
    if timed is not None:
        found.append(("Decode", f"{fmt.short(timed.get('tokens_per_second'))} tok/s", where(timed)))
        ttft = (timed.get("ttft_seconds") or {}).get("p50")
        found.append(("Time to first token", fmt.seconds(ttft), f"median, {where(timed)}"))
    points = items(profile(report, "intensity"), "points")
    for phase, key, label in (("decode", "mbu", "Bandwidth used"), ("prefill", "mfu", "Compute used")):
        point = main_point(points, phase)
        if point is not None and point.get(key) is not None:
            found.append((label, fmt.percent(point[key]), f"{key.upper()} of {phase}, {where(point)}"))
        elif point is not None:
            found.append(
                (
                    f"{phase.capitalize()} intensity",
                    fmt.short(point.get("flops_per_byte")),
                    f"FLOP/byte, {where(point)}",
                )
            )
    kv = profile(report, "kv")
    if kv is not None and kv.get("bytes_per_token") is not None:
        found.append(("KV cache", fmt.data_size(kv["bytes_per_token"]), f"a token, {kv.get('dtype')}"))
    sinks = profile(report, "sinks") or {}
    rated, _ = quoted_points(sinks)
    if rated is not None:
        bos = "with" if rated.get("bos") else "without"
        epsilon = fmt.short(sinks.get("epsilon"))
        found.append(("Sink rate", fmt.percent(rated["sink_rate"]), f"ε = {epsilon}, {bos} BOS"))
    joules = (profile(report, "energy") or {}).get("joules_per_token")
    if joules is not None:
        found.append(("Energy", f"{fmt.short(joules)} J", "a decoded token"))
    return [(label, printable(figure), printable(basis)) for label, figure, basis in found]
