"""Which pipeline was measured, and with what it was called."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Facts, Report, Section, Table, columns, items, texts
from effcli.reports.changes import mapping, number
from effcli.reports.pipeline_reading import MODES, mode_of
from effcli.reports.sections.generic import named, shown_value
from effcli.reports.sections.setup import SHOWN_DIGITS


def components(report: Report) -> list[Report]:
    """Return the models of the pipeline."""
    return [entry for entry in items(mapping(report.get("pipeline")), "components") if isinstance(entry, dict)]


def subtitle(report: Report) -> str:
    """Return what the pipeline is and where it ran."""
    info, environment = mapping(report.get("pipeline")), mapping(report.get("environment"))
    denoiser = next((entry for entry in components(report) if entry.get("name") == info.get("denoiser")), {})
    parameters = number(denoiser.get("parameters"))
    steps = number(report.get("steps"))
    parts = [
        info.get("architecture"),
        f"denoiser of {fmt.parameters(parameters)} parameters" if parameters is not None else None,
        info.get("scheduler"),
        f"{fmt.integer(steps)} steps" if steps is not None else None,
        info.get("dtype"),
        environment.get("device_name"),
    ]
    return " · ".join(printable(part) for part in parts if part)


def section(report: Report) -> Section:
    """Describe the pipeline."""
    info = mapping(report.get("pipeline"))
    digest = info.get("fingerprint")
    blocks = number(info.get("blocks"))
    mode = mode_of(report)
    stack = f" of {fmt.integer(blocks)} blocks" if blocks is not None and mode == "residual" else ""
    pairs = [
        ("source", f"{named(info.get('source'))} ({named(info.get('kind'))})" if info.get("source") else ""),
        ("pipeline", printable(info.get("architecture") or "")),
        ("denoiser", printable(info.get("denoiser_architecture") or info.get("denoiser") or "")),
        ("what is reused", f"{MODES[mode]}{stack}" if info.get("mode") else ""),
        ("scheduler", printable(info.get("scheduler") or "")),
        ("dtype", printable(info.get("dtype") or "")),
        ("revision", printable(info.get("revision") or "")),
        ("fingerprint", f"sha256 {printable(digest)[:SHOWN_DIGITS]}…" if digest else ""),
        ("steps", shown_value(report.get("steps"))),
        ("samples in a batch", shown_value(report.get("batch"))),
        *((printable(key), shown_value(value)) for key, value in mapping(report.get("arguments")).items()),
    ]
    facts = Facts("", tuple((name, value) for name, value in pairs if value), texts(info, "notes"))
    return Section("pipeline", "The pipeline", (), (facts,))


def component_table(report: Report) -> Table:
    """Show the models of the pipeline, the largest first."""
    found = sorted(components(report), key=lambda entry: -(number(entry.get("parameters")) or 0))
    denoiser = mapping(report.get("pipeline")).get("denoiser")
    rows = tuple(
        (
            named(entry.get("name")) + (" (denoiser)" if entry.get("name") == denoiser else ""),
            named(entry.get("architecture")),
            fmt.parameters(number(entry.get("parameters"))),
            fmt.data_size(number(entry.get("weight_bytes"))),
        )
        for entry in found
    )
    return Table("Its models", columns("<component", "<class", "parameters", "weights"), rows)
