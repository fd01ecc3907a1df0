"""The document of ``effcli profile``."""

from __future__ import annotations

from functools import partial

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports import charts
from effcli.reports.blocks import Report, items, main_point, profile, where
from effcli.reports.documents.base import Document, Figure, Tile
from effcli.reports.sections import sections
from effcli.reports.sections.sinks import quoted_points
from effcli.reports.verdict import profile_verdict

ROOFLINE_CAPTION = (
    "Filled marks were measured; hollow ones are the least time that the peaks allow. The slanted line is "
    "main memory: work that fits a cache can lie above it."
)
NO_ROOFLINE = "No roofline plot: it needs a measured peak and a point."


def document(report: Report) -> Document:
    """Build the document."""
    model = report.get("model") or {}
    return Document(
        command="effcli profile",
        heading="Profile of",
        name=printable(model.get("source") or "a model"),
        subtitle=subtitle(report),
        verdict=tuple(profile_verdict(report)),
        tiles=_tiles(report),
        sections=sections(report),
        figures={
            "roofline": Figure(partial(charts.roofline, report), ROOFLINE_CAPTION, NO_ROOFLINE),
            "breakdown": Figure(
                partial(charts.breakdown, report),
                "Time of each class of op: as measured, and as the roofline allows.",
                "No breakdown: the report holds no time by class of op.",
            ),
            "kv": Figure(
                partial(charts.kv_curve, report),
                "Cache of one sequence. Dots are predictions held against the real cache (hollow: predicted only).",
                "No curve: the cache of this model has no size that depends on context, or the report holds none.",
            ),
        },
    )


def subtitle(report: Report) -> str:
    """Return what the model is and where it ran, for any report with ``model`` and ``environment``."""
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


def _tiles(report: Report) -> tuple[Tile, ...]:
    """Return the figures that people ask for first."""
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
    return tuple(Tile(label, printable(figure), printable(basis)) for label, figure, basis in found)
