"""The document of ``effcli profile`` on a diffusion pipeline."""

from __future__ import annotations

from functools import partial

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports import denoiser_roofline, schedule_map
from effcli.reports.blocks import Report, Section
from effcli.reports.changes import mapping, number
from effcli.reports.documents.base import Document, Figure, Tile
from effcli.reports.pipeline_reading import ErrorMap, error_map
from effcli.reports.pipeline_verdict import profile_verdict
from effcli.reports.sections import diffusion_calibration, diffusion_map, pipeline_denoising, pipeline_setup, setup

MAP = (
    "Each cell is a segment: its first step from left to right, its length from bottom to top. The stronger "
    "the colour, the more reuse there changes the result."
)

ROOFLINE = "A dotted line shows how far the denoiser's call is below what this device allows."
NO_ROOFLINE = "No roofline plot: it needs measured ceilings and a timed call of the denoiser."


def roofline(report: Report) -> Figure:
    """Return the figure of the denoiser's call on the roofline."""
    draw = partial(denoiser_roofline.draw, report, pipeline_denoising.denoiser_name(report))
    return Figure(draw, ROOFLINE, NO_ROOFLINE)


def document(report: Report) -> Document:
    """Build the document."""
    errors = error_map(report.get("error_map"))
    figures = {"denoiser-roofline": roofline(report)}
    if errors is not None:
        figures["error-map"] = Figure(partial(schedule_map.draw, errors, ()), MAP)
    return Document(
        command="effcli profile",
        heading="Profile of",
        name=printable(mapping(report.get("pipeline")).get("source") or "a pipeline"),
        subtitle=pipeline_setup.subtitle(report),
        verdict=profile_verdict(report, errors),
        tiles=_tiles(report),
        sections=_sections(report, errors),
        setup=("pipeline", "environment"),
        figures=figures,
    )


def _sections(report: Report, errors: ErrorMap | None) -> tuple[Section, ...]:
    mapped = diffusion_map.section(errors, printable(report.get("error_map_reason") or "the report does not say why"))
    if errors is not None:
        lead = (*mapped.lead, diffusion_calibration.cost(errors))
        mapped = Section(mapped.name, mapped.title, lead, mapped.blocks)
    denoising = pipeline_denoising.section(report)
    table = pipeline_setup.component_table(report)
    return (
        Section(denoising.name, denoising.title, denoising.lead, (*denoising.blocks, table)),
        mapped,
        pipeline_setup.section(report),
        setup.environment(report),
    )


def _tiles(report: Report) -> tuple[Tile, ...]:
    """Return the figures that people ask for first."""
    found = pipeline_denoising.denoising(report)
    cost = mapping(found.get("cost"))
    run, step = pipeline_denoising.median_run(found), number(found.get("step_seconds"))
    calls, steps = number(found.get("denoiser_calls")), number(found.get("steps"))
    made = []
    if run is not None:
        basis = f"{fmt.integer(steps)} steps, median" if steps is not None else "median"
        made.append(Tile("One run", fmt.seconds(run), basis))
    if step is not None:
        basis = f"of the denoiser; {fmt.integer(calls)} calls a run" if calls is not None else "of the denoiser"
        made.append(Tile("One step", fmt.seconds(step), basis))
    if number(found.get("denoiser_share")) is not None:
        blocks = number(found.get("blocks_share"))
        basis = f"of a run; {fmt.percent(blocks)} of that in its blocks" if blocks is not None else "of a run"
        made.append(Tile("Denoiser", fmt.percent(number(found.get("denoiser_share"))), basis))
    if number(cost.get("flops_per_byte")) is not None:
        bound = f"FLOP/byte of a call, {printable(cost['bound'])}-bound" if cost.get("bound") else "FLOP/byte of a call"
        made.append(Tile("Intensity", fmt.short(number(cost.get("flops_per_byte"))), bound))
    if number(cost.get("attained_fraction")) is not None:
        made.append(
            Tile("Of the roofline", fmt.percent(number(cost["attained_fraction"])), "of a call of the denoiser")
        )
    if number(found.get("peak_memory_bytes")) is not None:
        made.append(Tile("Peak memory", fmt.data_size(number(found["peak_memory_bytes"])), "of a run"))
    return tuple(made)
