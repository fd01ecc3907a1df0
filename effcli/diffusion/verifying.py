"""Hold a written pipeline against the one without reuse: time, likeness on held-out samples, other ways to skip."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.diffusion import comparing
from effcli.diffusion.comparing import Bench, Comparison, Outcome
from effcli.diffusion.job import PipelineJob
from effcli.diffusion.timing import TimedRun, timed_run
from effcli.reports.model import plain
from effcli.reports.pipeline_model import Likeness, ScheduleResult
from effcli.stage_times import Times
from passes.lemica.following import chosen, follower
from passes.lemica.schedule import LemicaFile, Schedule

if TYPE_CHECKING:
    from passes.lemica.hook import Follower
    from profilers.base import Progress

REPEATS = 3
"""Timed runs of each schedule, in turn with runs of all steps."""


def verify(job: PipelineJob, made: Path, times: Times, progress: Progress) -> dict[str, Any]:
    """Load what was written into ``made`` and nothing else, and hold it against the pipeline without reuse.

    Returns
    -------
    dict
        JSON-ready: ``schedules``, ``comparison``, ``sheets``, ``denoising`` of
        :class:`effcli.reports.pipeline_model.PipelineOptimizeReport`.
    """
    from effcli.diffusion.loading import open_followed
    from passes.lemica import schedule as files

    content = files.read(made)
    given = job.item.parameters
    with times.stage("after: all steps", own=False):
        original = _original(job, content, progress) if job.changes_weights else None
    with times.stage("loading the result", own=True):
        loaded = open_followed(made, device=str(job.opened.device), dtype=job.options.dtype)
        loaded.attached.remove()
    bench = _bench(job, loaded.pipeline, content)
    with times.stage("after: timing", own=False):
        timed = {
            schedule.name: _time(job, bench, partial(chosen, content, made, schedule.name), original, progress)
            for schedule in content.schedules
        }
        denoising = _denoising(job, _timed_bench(job, bench), progress)
    with (
        times.stage("after: likeness", own=False),
        progress.task("held-out samples", total=1 + len(content.schedules)) as task,
    ):
        reference = bench.run() if original is None else original.outcome
        task.advance()
        outcomes: list[tuple[Schedule, Outcome]] = []
        for schedule in content.schedules:
            outcomes.append((schedule, bench.run(chosen(content, made, schedule.name))))
            task.advance()
    results = tuple(
        _schedule_result(schedule, outcome, comparing.likeness(reference, outcome), timed[schedule.name])
        for schedule, outcome in outcomes
    )
    comparison = Comparison((), {})
    if given.compare:
        with times.stage("after: comparison", own=False):
            calibration, fitting = (
                replace(bench, samples=job.item.calibration_samples(bench.pipeline, job.recipe.seed, count))
                for count in (given.samples, given.fit_samples)
            )
            drive = partial(_fitted_driver, fitting)
            comparison = comparing.compare(
                bench, calibration, reference, content, {item.name: made for item, made in outcomes}, drive, progress
            )
    with times.stage("after: pictures", own=True):
        shown = _shown(outcomes, comparison)
        pictures = comparing.sheets(bench.samples, reference, shown, bench.steps)
    return {
        "schedules": plain(results),
        "comparison": plain(comparison.rows),
        "sheets": plain(pictures),
        "denoising": plain(denoising),
        "warnings": list(denoising.warnings),
    }


def _bench(job: PipelineJob, pipeline: Any, content: LemicaFile) -> Bench:
    from passes.lemica import inputs, targets

    given = job.item.parameters
    most = max(given.samples, given.fit_samples)
    used = () if given.published else job.item.calibration_samples(pipeline, job.recipe.seed, most)
    samples = inputs.held_out_samples(pipeline, used, given.eval_samples, seed=job.recipe.seed)
    return Bench(
        pipeline,
        targets.find(pipeline, content.calibration.mode),
        samples,
        content.calibration.inference_steps,
        content.calibration.arguments,
    )


def _fitted_driver(calibration: Bench, schedule: Schedule) -> Follower:
    """Return the driver of a schedule that is not in the checkpoint; fits it first where its reuse is fitted."""
    from passes.lemica.trying import tried_on

    if schedule.reuse != "fitted":
        return follower(schedule, None)
    trial = tried_on(
        calibration.pipeline,
        calibration.samples,
        schedule,
        steps=calibration.steps,
        arguments=dict(calibration.arguments),
    )
    return follower(schedule, trial.coefficients)


def _timed_bench(job: PipelineJob, bench: Bench) -> Bench:
    """Return what is timed: as many of the samples as one run is to make."""
    count = job.item.parameters.time_batch
    return replace(bench, samples=tuple(bench.samples[number % len(bench.samples)] for number in range(count)))


@dataclass(frozen=True)
class _Original:
    """What the source does in all steps, where a pass changes its weights."""

    outcome: Outcome
    runs: tuple[TimedRun, ...]


def _original(job: PipelineJob, content: LemicaFile, progress: Progress) -> _Original:
    from effcli.diffusion.opening import open_pipeline

    opened = open_pipeline(job.folder, device=str(job.opened.device), dtype=job.options.dtype, progress=progress)
    bench = _bench(job, opened.pipeline, content)
    single = _timed_bench(job, bench)
    runs = tuple(timed_run(single, None, job.opened.device) for _ in range(REPEATS + 1))
    return _Original(bench.run(), runs)


@dataclass(frozen=True)
class _Timed:
    """Runs of one sample in all steps and with a schedule, the first of each for warming up; the schedule's calls."""

    before: tuple[TimedRun, ...]
    after: tuple[TimedRun, ...]
    full_calls: int
    calls: int


def _time(
    job: PipelineJob, bench: Bench, drive: Callable[[], Follower], original: _Original | None, progress: Progress
) -> _Timed:
    """Time runs with and without a schedule in turn, so that both see the same machine."""
    single = _timed_bench(job, bench)
    before, after = [], []
    with progress.task("timing", total=REPEATS + 1) as task:
        for _ in range(REPEATS + 1):
            if original is None:
                before.append(timed_run(single, None, job.opened.device))
            driver = drive()
            after.append(timed_run(single, driver, job.opened.device))
            task.advance()
    return _Timed(tuple(before) if original is None else original.runs, tuple(after), driver.full_calls, driver.calls)


def _denoising(job: PipelineJob, bench: Bench, progress: Progress) -> Any:
    from effcli.diffusion.profile import measure_denoising

    return measure_denoising(job.opened, bench, progress)


def _schedule_result(schedule: Schedule, outcome: Outcome, like: Likeness, timed: _Timed) -> ScheduleResult:
    def middle(runs: Sequence[TimedRun], figure: str) -> float:
        return float(statistics.median(getattr(run, figure) for run in runs[1:]))

    return ScheduleResult(
        name=schedule.name,
        steps=schedule.steps,
        full=schedule.full,
        reuse=schedule.reuse,
        mode=schedule.mode,
        origin=schedule.origin,
        full_calls=float(timed.full_calls),
        calls=float(timed.calls),
        run_seconds_before=middle(timed.before, "seconds"),
        run_seconds_after=middle(timed.after, "seconds"),
        denoiser_seconds_before=middle(timed.before, "denoiser_seconds"),
        denoiser_seconds_after=middle(timed.after, "denoiser_seconds"),
        likeness=like,
    )


def _shown(outcomes: Sequence[tuple[Schedule, Outcome]], comparison: Comparison) -> list[tuple[str, Outcome]]:
    """Return what the page shows below the pictures of all steps: each schedule, and the baselines at the fewest."""
    rows = [(f"{schedule.name}: {schedule.budget} full steps", outcome) for schedule, outcome in outcomes]
    least = min(schedule.budget for schedule, _ in outcomes)
    names = {"lemica": "LeMiCa", "uniform": "uniform", "mag-cache": "MagCache"}
    for method, title in names.items():
        found = comparison.outcomes.get((method, least))
        if found is not None:
            rows.append((f"{title}: {least} full steps", found))
    return rows
