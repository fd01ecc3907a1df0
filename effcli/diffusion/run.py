"""``effcli optimize`` on a diffusion pipeline: calibrate, write, read back, compare with all steps, publish or refuse.

::

    check ──> pass-1 ──────────────> after ───────────────────────────> gates ──> out/ ──rename──> the target
              calibration, files     loads only the staged folder;
                                     held-out samples, with and without

Stages end in the staging folder of :mod:`effcli.staging`; calibration also resumes inside itself, segment by segment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from effcli import gating, provenance, signature, staging
from effcli.diffusion import writing
from effcli.diffusion.job import PipelineJob, prepare
from effcli.diffusion.verifying import verify
from effcli.disk import free_bytes
from effcli.dry_run import SPARE_BYTES, DryRun
from effcli.errors import GateFailedError, InterruptedRunError, NoRoomError
from effcli.formatting import data_size
from effcli.preflight import Options, installed_versions
from effcli.quiet import quiet_diffusers
from effcli.recipes import Recipe
from effcli.reports.model import plain
from effcli.reports.optimize_model import GateResult, StageTime
from effcli.reports.pipeline_model import (
    PIPELINE_OPTIMIZE_SCHEMA,
    ComparisonRow,
    PipelineOptimizeReport,
    ScheduleResult,
    Sheet,
)
from effcli.stage_times import Times
from passes.base import ActsOnPipelines, PassRecord, PipelineContext
from passes.lemica import schedule as schedules_file
from profilers.base import SilentProgress

if TYPE_CHECKING:
    from effcli.diffusion.opening import OpenedPipeline
    from effcli.staging import Staging
    from passes.base import Spread
    from profilers.base import Progress

MakeSpread = Callable[[Path, str], "AbstractContextManager[Spread | None]"]
"""Of the staging folder and a device's type."""
REPORT, PAGE = "report.json", "report.html"
_AFTER = "after"


def optimize_pipeline(
    model: str,
    recipe: Recipe,
    output: Path,
    options: Options,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
    spread: MakeSpread | None = None,
) -> PipelineOptimizeReport | DryRun:
    """Make a pipeline skip steps, and publish it with its report; see :func:`effcli.pipeline.optimize`.

    ``spread`` makes the workers that parts of a pass may run in.
    """
    shown, times = progress or SilentProgress(), Times()
    with times.stage("check", own=True):
        job = prepare(model, recipe, Path(output), options, shown)
    if dry_run:
        return _dry_run(job)
    staged_work = staging.open_staging(job.target, job.fingerprint(), resume=options.resume, force=options.force)
    with quiet_diffusers(shown), staged_work as staged:
        try:
            with nullcontext() if spread is None else spread(staged.folder, job.opened.device.type) as made:
                return _run(job, staged, times, shown, on_warning, made)
        except KeyboardInterrupt:
            if staged.is_empty():
                raise InterruptedRunError("interrupted before anything was finished; nothing was written") from None
            raise InterruptedRunError(
                f"interrupted; what was finished is kept in '{staged.folder}': run again with --resume to go on, or "
                "with --force to start again"
            ) from None


def _dry_run(job: PipelineJob) -> DryRun:
    """Say what a run would do and take.

    Raises
    ------
    NoRoomError
    """
    parameters = job.item.parameters
    copied = sum((job.folder / name).stat().st_size for name in job.files) if parameters.weights == "copy" else 0
    needed, free = copied + SPARE_BYTES, free_bytes(job.target.parent)
    if needed > free:
        raise NoRoomError(
            f"'{job.target}' needs about {data_size(needed)} of disk while it is made and {data_size(free)} are free; "
            "free some, or choose another --output"
        )
    notes = (
        f"pass 1: {job.recipe.passes[0].label}, {parameters.samples} calibration samples of {parameters.steps} steps",
        "states of one run are kept on the disk while the errors are measured; their size is not known in advance",
    )
    return DryRun(job.spec, job.target, staging.folder_for(job.target), (), job.recipe.gates, needed, free, notes, True)


def _run(
    job: PipelineJob,
    staged: Staging,
    times: Times,
    progress: Progress,
    on_warning: Callable[[str], None] | None,
    spread: Spread | None,
) -> PipelineOptimizeReport:
    last = f"pass-{len(job.chain)}"
    with progress.task(f"optimize {job.spec}", total=len(job.chain) + 2) as overall:
        records: list[PassRecord] = []
        for number in range(1, len(job.chain) + 1):
            apply = partial(_pass, job, staged, number, tuple(records), times, progress, spread)
            records.append(provenance.record_from(dict(_stage(staged, times, f"pass-{number}", apply)["record"])))
            overall.advance()
        after = _stage(staged, times, _AFTER, lambda _: verify(job, staged.path(last), times, progress))
        overall.advance()
        report = _report(job, staged.path(last), tuple(records), after, times)
        for line in report.warnings if on_warning is not None else ():
            assert on_warning is not None
            on_warning(line)
        failed = [gate for gate in report.gates if not gate.passed]
        if failed:
            _refuse(job, staged, report, failed)
        _publish(job, staged, last, report)
        overall.advance()
    return report


def _stage(staged: Staging, times: Times, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return a stage's result: of an earlier run where it is finished, else by doing it."""
    known = staged.finished(name)
    if known is not None:
        for entry in known["times"]:
            times.add(StageTime(**entry))
        return known
    earlier = times.copy()
    result = work(staged.begin(name))
    result["times"] = times.since(earlier)
    staged.finish(name, result)
    staged.drop_work(name)
    return result


def _pass(
    job: PipelineJob,
    staged: Staging,
    number: int,
    done: tuple[PassRecord, ...],
    times: Times,
    progress: Progress,
    spread: Spread | None,
    folder: Path,
) -> dict[str, Any]:
    """Run one pass on the pipeline as the one before it left it on the disk."""
    item, name = job.chain[number - 1], f"pass-{number}"
    assert isinstance(item, ActsOnPipelines)
    previous = job.folder if number == 1 else staged.path(f"pass-{number - 1}")
    with times.stage("passes: loading", own=False):
        pipeline = job.take() if number == 1 else _open(job, previous, progress).pipeline
    with times.stage(f"pass: {item.name}", own=False):
        started = time.perf_counter()
        context = PipelineContext(
            device=job.opened.device,
            work=staged.work(name),
            seed=job.recipe.seed,
            progress=progress,
            spread=spread,
            opening={
                "function": "effcli.diffusion.opening:pipeline_of",
                "arguments": {
                    "folder": str(previous.absolute()),
                    "device": job.opened.device.type,
                    "dtype": str(job.opened.dtype).removeprefix("torch."),
                    "trust_remote_code": job.options.trust_remote_code,
                },
            },
        )
        record = item.apply_pipeline(pipeline, context)
        record = replace(record, seconds=time.perf_counter() - started)
    with times.stage("writing", own=True):
        how = job.item.parameters.weights
        # What a pass wrote lies in the staging folder, and goes with it: it cannot be referred to.
        writing.put(previous, folder, "link" if number > 1 else how)
        item.save_pipeline(pipeline, folder)
        _write_provenance(job, (*done, record), folder, {})
    return {"record": plain(record)}


def _open(job: PipelineJob, folder: Path, progress: Progress) -> OpenedPipeline:
    from effcli.diffusion.opening import open_pipeline

    return open_pipeline(folder, device=str(job.opened.device), dtype=job.options.dtype, progress=progress)


def _write_provenance(
    job: PipelineJob, records: tuple[PassRecord, ...], folder: Path, files: Mapping[str, str]
) -> None:
    from profilers.device import device_name

    made = provenance.Provenance(
        format=provenance.FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=job.provenance_source(),
        recipe=job.recipe.model_dump(mode="json"),
        passes=records,
        dtype=job.opened.info.dtype,
        device=device_name(job.opened.device),
        versions=installed_versions(),
        files=dict(files),
    )
    (folder / provenance.FILE).write_text(made.to_json(), encoding="utf-8")


def _report(
    job: PipelineJob, made: Path, records: tuple[PassRecord, ...], after: Mapping[str, Any], times: Times
) -> PipelineOptimizeReport:
    from effcli.diffusion.opening import environment_of

    content = schedules_file.read(made)
    schedules = TypeAdapter(tuple[ScheduleResult, ...]).validate_python(after["schedules"])
    default = next(item for item in schedules if item.name == content.default)
    judged = gating.values(
        {
            "schema": PIPELINE_OPTIMIZE_SCHEMA,
            "schedules": [plain(default)],
            "lemica": {"default": content.default},
        }
    ).evaluate(job.gates)
    return PipelineOptimizeReport(
        schema=PIPELINE_OPTIMIZE_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=job.command,
        seconds_spent=sum(item.seconds for item in times.stages),
        status="passed" if all(gate.passed for gate in judged) else "gate failed",
        source=job.provenance_source(),
        recipe=job.recipe.model_dump(mode="json"),
        seed=job.recipe.seed,
        pipeline=job.opened.info,
        environment=environment_of(job.opened),
        steps=default.steps,
        batch=job.item.parameters.time_batch,
        arguments=dict(content.calibration.arguments),
        denoising=after["denoising"],
        passes=records,
        lemica=content.model_dump(mode="json"),
        schedules=schedules,
        comparison=TypeAdapter(tuple[ComparisonRow, ...]).validate_python(after["comparison"]),
        sheets=TypeAdapter(tuple[Sheet, ...]).validate_python(after["sheets"]),
        gates=judged,
        stages=tuple(times.stages),
        warnings=tuple(after["warnings"]),
        output=job.output,
    )


def _refuse(job: PipelineJob, staged: Staging, report: PipelineOptimizeReport, failed: Sequence[GateResult]) -> None:
    data, page = (job.target.with_name(f"{job.target.name}.failed.{suffix}") for suffix in ("json", "html"))
    _write_reports(report, data, page)
    what = "; ".join(f"gate '{gate.gate}' failed: {gate.explanation}" for gate in failed)
    raise GateFailedError(
        f"{what}. Nothing was published; report: '{page}' and '{data}'. The work is kept in '{staged.folder}': run "
        "again with --resume and other gates to publish it",
        what,
    )


def _publish(job: PipelineJob, staged: Staging, last: str, report: PipelineOptimizeReport) -> None:
    out = staged.begin(staged.out.name)
    made, manifest = staged.path(last), staged.manifest(last)
    manifest.pop(provenance.FILE, None)
    for name in manifest:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        staging.link_or_copy(made / name, out / name)
    _write_provenance(job, report.passes, out, manifest)
    _write_reports(report, out / REPORT, out / PAGE)
    signature.write(out, manifest)
    staged.publish(force=job.options.force)


def _write_reports(report: PipelineOptimizeReport, data_path: Path, page: Path) -> None:
    from effcli.reports.render import render

    data_path.write_text(report.to_json(), encoding="utf-8")
    page.write_text(render(report.to_dict(), "html"), encoding="utf-8")
