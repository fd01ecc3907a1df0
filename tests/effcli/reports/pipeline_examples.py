"""Reports of diffusion pipelines to render, built from the dataclasses and models that runs return."""

from __future__ import annotations

import base64
import functools
import math
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from effcli.reports.model import PIPELINE_OPTIMIZE_SCHEMA, PIPELINE_PROFILE_SCHEMA
from effcli.reports.optimize_model import GateResult, StageTime
from effcli.reports.pipeline_model import (
    ComparisonRow,
    Component,
    Likeness,
    PipelineInfo,
    PipelineOptimizeReport,
    PipelineProfileReport,
    ScheduleResult,
    Sheet,
    Spread,
)
from passes.base import PassRecord
from passes.lemica.schedule import Calibration, ErrorGraph, LemicaFile, Schedule
from profilers.denoising import CallCost, ComponentTime, DenoisingResult

from . import optimize_samples, samples

STEPS, MAX_GAP, SAMPLES = 50, 8, 8
NO_LPIPS = "AlexNet's weights are not in torch's hub folder, and they are not downloaded unasked"
WAN = (*range(9), 10, 13, 18, 25, 32, 39, 46, 49)
PATHS = {
    25: (*range(13), 14, 16, 18, 21, 24, 29, 35, 40, 44, 47, 48, 49),
    17: WAN,
    10: (0, 1, 3, 7, 14, 21, 28, 35, 42, 49),
}
NAMES = {25: "slow", 17: "medium", 10: "fast"}
PSNR = {  # by method: at 25, 17 and 10 full steps
    "fitted": (39.84, 34.11, 27.02),
    "linear": (39.61, 33.58, 25.71),
    "lemica": (37.93, 32.05, 25.12),
    "uniform": (31.2, 27.44, 22.9),
    "greedy": (35.72, 29.93, 23.37),
    "shortest-sum": (37.4, 31.31, 23.68),
    "first-block-cache": (36.15, 30.2, None),
    "mag-cache": (36.9, 31.02, 24.06),
}
NOT_RUN = "no threshold gives as few as 10 full steps; the least is 13.4"


def png(width: int, height: int, grey: Sequence[int]) -> str:
    """Return 8-bit grey values in reading order as a PNG in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + bytes(grey[row * width : (row + 1) * width]) for row in range(height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    ).decode()


@functools.cache
def sheet(columns: int = 8, cell: int = 32) -> Sheet:
    """Rings, a wider one in each column; the rows below the first are noisier and noisier."""
    rows = ("all 50 steps", "slow (25)", "medium (17)", "fast (10)", "uniform (17)")
    draw = random.Random(3)
    grey = []
    for y in range(cell * len(rows)):
        for x in range(cell * columns):
            across, down = x % cell - cell / 2 + 0.5, y % cell - cell / 2 + 0.5
            ring = math.exp(-((math.hypot(across, down) - 3 - x // cell) ** 2) / 4)
            grey.append(min(255, max(0, round(255 * ring + draw.gauss(0, 12 * (y // cell))))))
    return Sheet(
        title="Held-out samples",
        rows=rows,
        columns=tuple(f"class {column}, seed {100 + column}" for column in range(columns)),
        cell_pixels=(cell, cell),
        png_base64=png(cell * columns, cell * len(rows), grey),
    )


def graph(steps: int = STEPS, max_gap: int = MAX_GAP) -> ErrorGraph:
    """Errors that are large in the first steps, grow again at the end, and more than double with the gap."""
    draw = random.Random(7)
    edges = [(i, j) for i in range(steps) for j in range(i + 2, min(steps, i + max_gap + 1))]
    errors = []
    for i, j in edges:
        place = 0.12 * math.exp(-i / (0.12 * steps)) + 0.004 + 0.02 * math.exp(-(steps - 1 - j) / (0.05 * steps))
        mean = place * (j - i - 1) ** 1.3 * draw.lognormvariate(0, 0.08)
        errors.append(tuple(mean * draw.lognormvariate(0, 0.2) for _ in range(SAMPLES)))
    return ErrorGraph(
        steps=steps, max_gap=max_gap, edges=tuple(edges), errors=tuple(errors), forwards=7259, noise=2.1e-7
    )


def likeness(psnr: float, *, half: float = 1.1, samples_: int = 16) -> Likeness:
    latent = 10 ** (-psnr / 20) * 2
    return Likeness(
        samples=samples_,
        psnr_db=Spread(psnr, psnr - half, psnr + half),
        ssim=Spread(1 - latent / 2, 1 - latent / 1.7, 1 - latent / 2.4),
        lpips=None,
        lpips_reason=NO_LPIPS,
        latent_l1=Spread(latent, latent * 0.9, latent * 1.1),
    )


def schedule_result(budget: int, *, reached: float = 0.96) -> ScheduleResult:
    index = list(PATHS).index(budget)
    denoiser = 2.9 * budget / STEPS / reached
    return ScheduleResult(
        name=NAMES[budget],
        steps=STEPS,
        full=PATHS[budget],
        reuse="fitted",
        mode="residual",
        origin="calibrated",
        full_calls=float(budget),
        calls=float(STEPS),
        run_seconds_before=3.12,
        run_seconds_after=0.22 + denoiser,
        denoiser_seconds_before=2.9,
        denoiser_seconds_after=denoiser,
        likeness=likeness(PSNR["fitted"][index]),
    )


def comparison(budgets: Sequence[int] = tuple(PATHS)) -> tuple[ComparisonRow, ...]:
    rows = []
    for budget in budgets:
        for method, found in PSNR.items():
            psnr = found[list(PATHS).index(budget)]
            own = method in ("first-block-cache", "mag-cache")
            full: tuple[int, ...] | None = None if own else PATHS[budget]
            if method == "uniform":
                full = tuple(round(step * (STEPS - 1) / (budget - 1)) for step in range(budget))
            rows.append(
                ComparisonRow(
                    method=method,
                    budget=budget,
                    full_calls=None if psnr is None else budget - 0.25 * own,
                    full=None if psnr is None else full,
                    run_seconds=None if psnr is None else 0.22 + 2.9 * budget / STEPS / 0.96 + 0.02 * own,
                    likeness=None if psnr is None else likeness(psnr),
                    chosen=method == "fitted",
                    reason=NOT_RUN if psnr is None else None,
                )
            )
    return tuple(rows)


def lemica() -> dict[str, Any]:
    errors = graph()
    weights = errors.weights()
    found = LemicaFile(
        schedules=tuple(
            Schedule(
                name=NAMES[budget],
                steps=STEPS,
                full=full,
                reuse="fitted",
                errors=tuple(weights[edge] for edge in zip(full, full[1:], strict=False)),
                origin="calibrated",
            )
            for budget, full in PATHS.items()
        ),
        default="medium",
        calibration=Calibration(
            inference_steps=50,
            pipeline="DiTPipeline",
            denoiser="DiTTransformer2DModel",
            scheduler="DDIMScheduler",
            scheduler_config={"num_train_timesteps": 1000},
            inputs=tuple(str(index) for index in range(SAMPLES)),
            seeds=tuple(range(SAMPLES)),
            arguments={"guidance_scale": 1.5},
            versions={"diffusers": "0.42.1", "torch": "2.13.0"},
        ),
        graph=errors,
    )
    data: dict[str, Any] = found.model_dump(mode="json")
    return data


def pipeline_info() -> PipelineInfo:
    return PipelineInfo(
        source="dit-tiny",
        kind="builtin",
        architecture="DiTPipeline",
        denoiser="transformer",
        denoiser_architecture="DiTTransformer2DModel",
        mode="residual",
        blocks=8,
        scheduler="DDIMScheduler",
        components=(
            Component("vae", "AutoencoderKL", 312_004, 1_248_016),
            Component("transformer", "DiTTransformer2DModel", 1_924_112, 7_696_448),
        ),
        dtype="float32",
        revision=None,
        fingerprint="8f" * 32,
        notes=("weights made by effcli, MIT licence",),
    )


def denoising() -> DenoisingResult:
    flops, moved, seconds = 14_600_000_000, 61_000_000, 0.058
    cost = CallCost(
        dtype="float32",
        flops=flops,
        bytes=moved,
        weight_bytes=7_696_448,
        activation_bytes=moved - 7_696_448,
        flops_per_byte=flops / moved,
        ridge_flops_per_byte=0.31e12 / samples.MEMORY_PEAK,
        peak_flops_per_second=0.31e12,
        peak_bytes_per_second=samples.MEMORY_PEAK,
        attainable_seconds=flops / 0.31e12,
        bound="compute",
        seconds=seconds,
        flops_per_second=flops / seconds,
        bytes_per_second=moved / seconds,
        attained_fraction=flops / 0.31e12 / seconds,
        uncounted_ops=("aten.sin",),
        notes=("weights are read once a call",),
    )
    return DenoisingResult(
        steps=STEPS,
        run_seconds=optimize_samples.spread(3.12, count=3),
        step_seconds=seconds,
        call_seconds=optimize_samples.spread(seconds, count=150),
        denoiser_calls=STEPS,
        denoiser_seconds=2.9,
        denoiser_share=2.9 / 3.12,
        blocks_seconds=2.75,
        blocks_share=2.75 / 2.9,
        components=(ComponentTime("vae", "decode", 1, 0.12),),
        other_seconds=0.1,
        cost=cost,
        peak_memory_bytes=310_000_000,
        peak_memory_reason=None,
        warnings=("3 runs are few: their spread is not known well",),
    )


def profiled() -> PipelineProfileReport:
    return PipelineProfileReport(
        schema=PIPELINE_PROFILE_SCHEMA,
        created="2026-01-02T03:04:05Z",
        command="effcli profile dit-tiny --steps 50",
        seconds_spent=64.0,
        pipeline=pipeline_info(),
        environment=samples.environment(),
        steps=STEPS,
        batch=1,
        arguments={"guidance_scale": 1.5},
        denoising=denoising(),
        error_map=graph().model_dump(mode="json"),
        error_map_reason=None,
        warnings=(),
    )


def profiled_without_map() -> PipelineProfileReport:
    """Without an error map, ceilings and a block stack."""
    found = denoising()
    bare = ("ridge_flops_per_byte", "peak_flops_per_second", "peak_bytes_per_second", "attainable_seconds")
    cost = replace(found.cost, bound=None, attained_fraction=None, **dict.fromkeys(bare))
    return replace(
        profiled(),
        denoising=replace(
            found,
            cost=cost,
            blocks_seconds=None,
            blocks_share=None,
            peak_memory_bytes=None,
            peak_memory_reason="the system does not say",
        ),
        error_map=None,
        error_map_reason="left out: --no-error-map",
    )


def optimized() -> PipelineOptimizeReport:
    """Three schedules of one calibration, and everything else that skips steps beside them."""
    return PipelineOptimizeReport(
        schema=PIPELINE_OPTIMIZE_SCHEMA,
        created="2026-01-02T03:04:05Z",
        command="effcli optimize dit-tiny --pass lemica:budgets=25+17+10 -o out",
        seconds_spent=118.0,
        status="passed",
        source={"spec": "dit-tiny", "kind": "builtin", "licence": "mit", "files": {"transformer": "8f" * 32}},
        recipe={"version": 1, "passes": [{"name": "lemica", "parameters": {"budgets": [25, 17, 10], "steps": 50}}]},
        seed=0,
        pipeline=pipeline_info(),
        environment=samples.environment(),
        steps=STEPS,
        batch=1,
        arguments={"guidance_scale": 1.5},
        denoising=denoising(),
        passes=(
            PassRecord(
                name="lemica",
                parameters={"budgets": [25, 17, 10], "steps": 50, "max_gap": 8, "reuse": "fitted"},
                summary="25, 17 and 10 of 50 steps in full (minimax over 322 measured segments)",
                seconds=71.0,
                versions={"diffusers": "0.42.1"},
            ),
        ),
        lemica=lemica(),
        schedules=tuple(schedule_result(budget) for budget in PATHS),
        comparison=comparison(),
        sheets=(sheet(),),
        gates=(GateResult("psnr>=30", "psnr", 34.11, 30.0, True, "PSNR is 34.1 dB, at least 30 dB asked for"),),
        stages=(StageTime("before", 9.0, False), StageTime("pass: lemica", 71.0, False), StageTime("save", 0.4, True)),
        warnings=(),
        output="out",
    )


def slow() -> PipelineOptimizeReport:
    """One schedule, slower than it allows, with a baseline that does better; the gate failed."""
    rows = tuple(
        replace(row, likeness=likeness(36.5)) if row.method == "shortest-sum" else row for row in comparison((17,))
    )
    return replace(
        optimized(),
        status="gate failed",
        lemica={**lemica(), "default": "medium"},
        schedules=(schedule_result(17, reached=0.6),),
        comparison=rows,
        gates=(GateResult("psnr>=40", "psnr", 34.11, 40.0, False, "PSNR is 34.1 dB, at least 40 dB asked for"),),
        warnings=("timings spread over 14 %",),
    )


def published() -> PipelineOptimizeReport:
    """A published schedule of a video pipeline: no calibration, no map, no comparison, the same to the bit."""
    data = lemica()
    same = Likeness(1, None, Spread(1.0, None, None), None, NO_LPIPS, Spread(0.0, None, None))
    result = replace(schedule_result(17), name="wan2.1-1.3b-17", origin="published", reuse="last", likeness=same)
    schedule = {**data["schedules"][1], "name": result.name, "errors": None, "reuse": "last"}
    return replace(
        optimized(),
        lemica={**data, "schedules": [schedule], "default": result.name, "graph": None},
        arguments={"num_frames": 17, "height": 128, "width": 128},
        schedules=(result,),
        comparison=(),
        sheets=(),
        gates=(),
        recipe={},
    )


def wide() -> PipelineOptimizeReport:
    """250 steps, gaps up to 16."""
    full = (*range(0, 20), *range(20, 240, 8), 249)
    result = replace(schedule_result(17), steps=250, full=full, full_calls=float(len(full)), calls=250.0, name="long")
    return replace(
        optimized(),
        steps=250,
        lemica={**lemica(), "graph": graph(250, 16).model_dump(mode="json"), "default": "long"},
        schedules=(result,),
        comparison=(ComparisonRow("fitted", len(full), float(len(full)), full, 1.0, likeness(31.0), True),),
    )


def hostile() -> PipelineOptimizeReport:
    """Every text tries to leave its place."""
    text = samples.HOSTILE
    report = optimized()
    info = replace(
        report.pipeline,
        source=text,
        kind=text,
        architecture=text,
        denoiser=text,
        denoiser_architecture=text,
        mode=text,
        scheduler=text,
        components=(Component(text, text, 1, 4),),
        dtype=text,
        notes=(text,),
    )
    data = lemica()
    calibration = {**data["calibration"], "inputs": [text], "scheduler": text, "versions": {text: text}}
    return replace(
        report,
        command=text,
        source={"spec": text, "kind": text, "licence": text, "files": {text: text}},
        recipe={"version": 1, "passes": [{"name": text, "parameters": {text: text}}], text: text},
        pipeline=info,
        environment=replace(report.environment, device_name=text, versions={text: text}),
        arguments={text: text},
        passes=(PassRecord(text, {text: text}, text, notes=(text,), versions={text: text}),),
        lemica={**data, "calibration": calibration, "default": text, "graph": {**data["graph"], "distance": "decoded"}},
        schedules=(replace(schedule_result(17), name=text, reuse=text, origin=text),),
        comparison=tuple(replace(row, method=text, reason=text) for row in comparison((17,))),
        sheets=(
            replace(sheet(), title=text, rows=(text,) * 5, columns=(text,) * 8),
            replace(sheet(), png_base64='"><script>alert(1)</script>'),
        ),
        gates=(GateResult(text, text, 1.0, 2.0, True, text),),
        stages=(StageTime(text, 1.0, True),),
        warnings=(text,),
        output=text,
    )


def hostile_profile() -> PipelineProfileReport:
    info = hostile().pipeline
    return replace(profiled(), pipeline=info, error_map=None, error_map_reason=samples.HOSTILE, command=samples.HOSTILE)


OPTIMIZED = {
    "pipeline": optimized,
    "pipeline_slow": slow,
    "pipeline_published": published,
    "pipeline_wide": wide,
    "pipeline_hostile": hostile,
}
PROFILED = {
    "pipeline_profile": profiled,
    "pipeline_profile_bare": profiled_without_map,
    "pipeline_profile_hostile": hostile_profile,
}
