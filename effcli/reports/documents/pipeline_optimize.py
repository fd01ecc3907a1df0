"""The document of ``effcli optimize`` on a diffusion pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports import change_charts, curve_chart, schedule_charts, schedule_map
from effcli.reports.blocks import Report, Section, texts
from effcli.reports.changes import mapping, number
from effcli.reports.documents.base import Document, Figure, Tile
from effcli.reports.documents.pipeline_profile import roofline
from effcli.reports.pipeline_reading import (
    ErrorMap,
    Result,
    error_map,
    frames,
    interval_text,
    results,
    rows,
    spread,
    steps_of,
)
from effcli.reports.pipeline_verdict import optimize_verdict
from effcli.reports.sections import (
    diffusion_calibration,
    diffusion_map,
    diffusion_pictures,
    diffusion_schedules,
    pipeline_denoising,
    pipeline_setup,
    run,
    setup,
    steps,
)

MAP = (
    "Each cell is a segment: its first step from left to right, its length from bottom to top. Paths join the segments "
    "of a schedule; those of the first are framed."
)
STRIPS = "A filled box is a step that runs the denoiser in full; the coloured rows are what was chosen."
PSNR = "Further up is nearer to the run with every step in full. Upright lines: 95 % interval of the chosen schedule."
LAYERS = "Colour: relative squared error, the largest of the layers in a cell. Text in a cell: bits, where they differ."
SETUP = ("pipeline", "stages", "recipe", "environment", "warnings")


def document(report: Report) -> Document:
    """Build the document."""
    errors = error_map(mapping(report.get("lemica")).get("graph"))
    paths = diffusion_map.paths(report, errors) if errors is not None else []
    figures = {
        "strips": Figure(
            partial(schedule_charts.strips, diffusion_map.strip_rows(report), steps_of(report) or 0), STRIPS
        ),
        "psnr": Figure(partial(schedule_charts.psnr_lines, rows(report)), PSNR),
        "denoiser-roofline": roofline(report),
    }
    if errors is not None:
        figures["error-map"] = Figure(partial(schedule_map.draw, errors, paths), MAP)
    for number_, record in enumerate(steps.passes(report)):
        draw = partial(change_charts.layer_chart, steps.layers(record), number_)
        figures[f"layers-{number_}"] = Figure(draw, LAYERS)
        for index, curves in enumerate(curve_chart.curves(record)):
            name = f"curve-{number_}-{index}"
            figures[name] = Figure(partial(curve_chart.chart, curves, name), curves.title)
    return Document(
        command="effcli optimize",
        heading="Optimized:",
        name=_name(report),
        subtitle=pipeline_setup.subtitle(report),
        verdict=optimize_verdict(report),
        tiles=_tiles(report),
        sections=_sections(report, errors, paths),
        setup=SETUP,
        figures=figures,
    )


def _name(report: Report) -> str:
    source = mapping(report.get("source")).get("spec") or mapping(report.get("pipeline")).get("source")
    return printable(source or "a pipeline")


def _sections(report: Report, errors: ErrorMap | None, paths: Sequence[schedule_map.Path]) -> tuple[Section, ...]:
    graph = mapping(report.get("lemica")).get("graph")
    why = "the report holds none" if graph is None else "the report's error graph cannot be read"
    if graph is None and mapping(report.get("lemica")):
        why = "the schedules were not calibrated"
    found = [
        diffusion_pictures.section(report),
        diffusion_schedules.section(report, errors),
        diffusion_schedules.comparison_section(report, errors),
        diffusion_map.section(errors, why, paths, rows(report)),
        diffusion_map.steps_section(report),
        diffusion_calibration.section(report, errors),
        _denoising(report),
        steps.section(report),
        _gates(report),
        _pipeline(report),
        run.stages_section(report),
        run.recipe_section(report),
        setup.environment({**report, "warnings": []}),
    ]
    warnings = texts(report, "warnings")
    if warnings:
        found.append(Section("warnings", "Warnings", warnings, ()))
    return tuple(section for section in found if section is not None)


def _denoising(report: Report) -> Section:
    made = pipeline_denoising.section(report)
    return Section(
        made.name, f"{made.title}, without reuse", (*pipeline_denoising.sentences(report), *made.lead), made.blocks
    )


def _gates(report: Report) -> Section:
    if not run.gates(report):
        return Section("gates", "Gates", ("No gate was set.",), ())
    return run.gates_section(report)


def _pipeline(report: Report) -> Section:
    made = pipeline_setup.section(report)
    table = pipeline_setup.component_table(report)
    return Section(made.name, made.title, made.lead, (run.source_facts(report), *made.blocks, table))


def _tiles(report: Report) -> tuple[Tile, ...]:
    found = results(report)
    return tuple(_result_tiles(found[0], report)) if found else ()


def _result_tiles(result: Result, report: Report) -> list[Tile]:
    data, batch = result.data, number(report.get("batch"))
    likeness = mapping(data.get("likeness"))
    tiles = []
    before, after = number(data.get("run_seconds_before")), number(data.get("run_seconds_after"))
    if before is not None and after is not None:
        each = f", {fmt.integer(batch)} at a time" if batch is not None and batch > 1 else ""
        what = "One video" if frames(report) else "One run"
        gain = diffusion_schedules.gain_text(result.gain("run"))
        basis = f"before {fmt.seconds(before)}; {gain}{each} ({result.name})"
        tiles.append(Tile(what, fmt.seconds(after), basis))
    calls, full_calls = number(data.get("calls")), number(data.get("full_calls"))
    if calls is not None and full_calls is not None:
        basis = f"of one run in full, of all; {result.of_steps} steps"
        tiles.append(Tile("Denoiser calls", f"{fmt.short(full_calls)} of {fmt.short(calls)}", basis))
    for key, label, unit in (
        ("psnr_db", "PSNR", " dB"),
        ("ssim", "SSIM", ""),
        ("lpips", "LPIPS", ""),
        ("latent_l1", "Latent L1", ""),
    ):
        value = spread(likeness.get(key))
        if value is not None:
            limits = interval_text(value)
            basis = f"95 % interval {limits}" if limits != fmt.MISSING else "of one sample"
            tiles.append(Tile(label, f"{fmt.significant(value.mean)}{unit}", basis))
    return tiles
