"""``effcli batch --dry-run``: what would run, where, and about how long; what is kept; why. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effcli.batch import journal
from effcli.batch.engine import Engine, JobSource
from effcli.batch.faults import failure
from effcli.batch.keeping import Fingerprinting, Keeper, check_needs
from effcli.batch.locking import state_folder
from effcli.batch.model import Job
from effcli.formatting import duration


@dataclass(frozen=True)
class _Plan:
    """What would become of a job: ``kept``, ``run`` or ``cannot run``."""

    what: str
    said: str
    seconds: float | None = None
    report_sha256: str | None = None


def dry_run(
    jobs: Sequence[Job],
    output: str,
    engine: Engine,
    *,
    fingerprints: Fingerprinting,
    state: Path | None = None,
    sources: Sequence[JobSource] = (),
) -> list[str]:
    """Say what :func:`effcli.batch.driver.run` would do with the same arguments.

    Parameters
    ----------
    jobs : sequence of Job
    output : str
    engine : Engine
        Entered, where it cannot answer without.
    fingerprints : Fingerprinting
    state : Path, optional
    sources : sequence of JobSource

    Returns
    -------
    list of str
        One line a job and a search, and one for all jobs.

    Raises
    ------
    effcli.errors.BadInputError
        If the journal is damaged, or jobs need what is not there.
    """
    check_needs(jobs)
    records = journal.read(state or state_folder(output))
    keeper = Keeper(output, fingerprints, records)
    estimates = {job.name: keeper.estimate_seconds(job.name) for job in jobs}
    plans: dict[str, _Plan] = {}
    by_name = {job.name: job for job in jobs}
    for job in jobs:
        _plan(job, by_name, plans, keeper, engine, estimates)
    lines = [f"{job.name}: {plans[job.name].said}" for job in jobs]
    lines += [f"{source.name}: a search; its jobs come from its results" for source in sources]
    return [*lines, _total([plans[job.name] for job in jobs])] if jobs else lines


def _plan(
    job: Job,
    jobs: dict[str, Job],
    plans: dict[str, _Plan],
    keeper: Keeper,
    engine: Engine,
    estimates: dict[str, float | None],
) -> None:
    if job.name in plans:
        return
    plans[job.name] = _Plan("cannot run", "needs itself, through the jobs that it needs")
    for need in job.needs:
        _plan(jobs[need], jobs, plans, keeper, engine, estimates)
    plans[job.name] = _planned(job, plans, keeper, engine, estimates[job.name])


def _planned(job: Job, plans: dict[str, _Plan], keeper: Keeper, engine: Engine, estimate: float | None) -> _Plan:
    without = next((need for need in job.needs if plans[need].what == "cannot run"), None)
    if without is not None:
        return _Plan("cannot run", f"is skipped: needs '{without}', which cannot run")
    model = plans[job.model_from] if job.model_from is not None else None
    try:
        if model is not None and model.what == "run":
            why = f"its model, the output of '{job.model_from}', is made again"
        else:
            verdict = keeper.judge(job, None if model is None else model.report_sha256)
            if verdict.kept is not None:
                said = "kept" if verdict.kept.status == "passed" else f"is not run again: {verdict.kept.message}"
                what = "kept" if verdict.kept.status == "passed" else "cannot run"
                return _Plan(what, said, report_sha256=verdict.kept.report_sha256)
            why = verdict.why
        reason = engine.cannot_run(job)
        if reason is not None:
            return _Plan("cannot run", f"cannot run: {reason}")
        time = "time not known" if estimate is None else f"about {duration(estimate)}"
        return _Plan("run", f"runs ({why}); {engine.placement(job)}; {time}", estimate)
    except Exception as error:  # noqa: BLE001 - as when it runs: a model that cannot be read is its job's alone
        return _Plan("cannot run", f"cannot run: {failure(error).message}")


def _total(plans: Sequence[_Plan]) -> str:
    running = [plan for plan in plans if plan.what == "run"]
    known = [plan.seconds for plan in running if plan.seconds is not None]
    counts = {
        "kept": sum(plan.what == "kept" for plan in plans),
        "to run": len(running),
        "that cannot": sum(plan.what == "cannot run" for plan in plans),
    }
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    line = f"{len(plans)} job{'' if len(plans) == 1 else 's'}: {parts}"
    if not running:
        return line
    unknown = len(running) - len(known)
    if not known:
        return f"{line}; how long is not known"
    more = f", and {unknown} whose time is not known" if unknown else ""
    return f"{line}; about {duration(sum(known))} of work{more}"
