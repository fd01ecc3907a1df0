"""The loop of a batch: what is still good is kept, what is ready is offered to the engine, what ends is noted.

::

    waiting ──kept?──> kept
       │  └─a need failed──> skipped
       ▼
    running ──finished──> passed, gate-failed, failed
       └─lost, out of memory──> waiting again, while retries are left

A failure is its job's alone: the others go on. The journal knows everything that has to outlive this process, so that
the same command run again goes on where this one ended, however it ended.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcli.batch import locking
from effcli.batch.engine import Engine, JobSource, View
from effcli.batch.faults import exit_code, failure, room, skipped, writable
from effcli.batch.journal import Entry, Journal, Kind
from effcli.batch.keeping import Fingerprinting, Keeper, check_needs
from effcli.batch.locking import state_folder
from effcli.batch.model import STATE_FOLDER, Event, Job, JobState, Outcome, Stage
from effcli.batch.rehearsal import dry_run as dry_run
from effcli.batch.storage import is_url
from effcli.disk import free_bytes
from effcli.errors import (
    EXIT_BUG,
    EXIT_NO_ROOM,
    BadInputError,
    EffcliError,
    InterruptedRunError,
)
from effcli.formatting import duration

LOGS = f"{STATE_FOLDER}/logs"
_PATIENCE_SECONDS = 1.0
"""How long the driver waits for an event before it offers again what an engine had no room for."""
_ROUND_SECONDS = 0.5
"""How long it looks for jobs to start (large models take long to hash) before it looks at events again."""
_FULL_BYTES = 16 * 10**6
"""With less free, a job that found no room shows that the disk is full, and not that the job is large."""
_GOOD: frozenset[Stage] = frozenset({"kept", "passed"})
_OPEN: frozenset[Stage] = frozenset({"waiting", "running"})


@dataclass(frozen=True)
class BatchRun:
    """How a batch ended.

    Attributes
    ----------
    states : tuple of JobState
        In the order of the jobs; those that searches made come last.
    workers : tuple of str
    seconds_spent : float
    exit_code : int
        0 all passed, 1 a job failed (or was skipped because one did), 3 only gates failed.
    """

    states: tuple[JobState, ...]
    workers: tuple[str, ...]
    seconds_spent: float
    exit_code: int


def run(
    jobs: Sequence[Job],
    output: str,
    engine: Engine,
    *,
    fingerprints: Fingerprinting,
    state: Path | None = None,
    view: View | None = None,
    sources: Sequence[JobSource] = (),
) -> BatchRun:
    """Run the jobs that are new, failed before or changed.

    Parameters
    ----------
    jobs : sequence of Job
    output : str
        An absolute folder or a URL.
    engine : Engine
        Not yet entered.
    fingerprints : Fingerprinting
    state : Path, optional
        Folder of the journal and the lock; default: :func:`state_folder`.
    view : View, optional
    sources : sequence of JobSource
        Searches; asked for jobs whenever there is room.

    Returns
    -------
    BatchRun

    Raises
    ------
    effcli.errors.BadInputError
        If another driver works on the output, the journal is damaged, or jobs need what is not there.
    effcli.errors.InterruptedRunError
        On Ctrl-C; what is finished is kept.
    effcli.errors.NoRoomError
        If the disk is full; what is finished is kept.
    """
    started = time.monotonic()
    check_needs(jobs)
    folder = state or state_folder(output)
    with ExitStack() as stack:
        stack.enter_context(room(output))
        with writable(output):
            folder.mkdir(parents=True, exist_ok=True)
            if not is_url(output):
                (Path(output) / LOGS).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locking.hold(folder, output))
            journal = stack.enter_context(Journal(folder))
        stack.enter_context(engine)
        workers = tuple(engine.workers())
        batch = _Batch(jobs, output, engine, Keeper(output, fingerprints, journal.records), journal, view, sources)
        journal.records.clear()
        if view is not None:
            view.opened(tuple(batch.states.values()), workers)
            stack.callback(view.closed)
        try:
            batch.run()
        except KeyboardInterrupt:
            batch.stop_all("interrupted")
            raise InterruptedRunError(
                f"interrupted; {batch.done()} of {len(batch.states)} jobs are finished and kept in '{output}': run the "
                "same command again to go on"
            ) from None
    states = tuple(batch.states.values())
    return BatchRun(states, workers, time.monotonic() - started, batch.exit_code())


class _Batch:
    """One run over the jobs."""

    def __init__(
        self,
        jobs: Sequence[Job],
        output: str,
        engine: Engine,
        keeper: Keeper,
        journal: Journal,
        view: View | None,
        sources: Sequence[JobSource],
    ) -> None:
        self.states: dict[str, JobState] = {}
        self._output, self._engine, self._keeper = output, engine, keeper
        self._journal, self._view, self._sources = journal, view, tuple(sources)
        self._waiting: dict[str, JobState] = {}
        self._running: dict[str, JobState] = {}
        self._fingerprints: dict[str, dict[str, Any]] = {}
        self._deadlines: dict[str, float] = {}
        self._source_of: dict[str, JobSource] = {}
        self._look = True
        for job in jobs:
            self._add(job)

    def run(self) -> None:
        """Go on until every job has ended."""
        while True:
            held_back = self._start_ready()
            if not held_back and self._ask_sources():
                continue
            if not self._running and not held_back:
                if self._look:
                    continue
                if self._waiting:
                    raise BadInputError(
                        f"the jobs {', '.join(self._waiting)} need each other in a circle; remove one 'after' or "
                        "'output_of'"
                    )
                return
            events = self._engine.events(self._patience_seconds())
            for event in events:
                self._take(event)
            self._stop_late()
            self._look |= not events

    def done(self) -> int:
        """Return how many jobs have a good result."""
        return sum(state.stage in _GOOD for state in self.states.values())

    def exit_code(self) -> int:
        """Return the batch's exit code."""
        return exit_code(self.states.values(), trials=self._source_of)

    def stop_all(self, reason: str) -> None:
        """Stop every running job, and note why."""
        for state in tuple(self._running.values()):
            if self._stop(state, reason):
                self._clear(state)
                state.stage = "waiting"

    def _add(self, job: Job, source: JobSource | None = None) -> None:
        if job.name in self.states:
            raise BadInputError(f"two jobs are called '{job.name}'; rename one")
        state = JobState(job, log=f"{LOGS}/{job.name}.log")
        self.states[job.name] = self._waiting[job.name] = state
        self._look = True
        if source is not None:
            self._source_of[job.name] = source
            if self._view is not None:
                self._view.added(state)

    def _ask_sources(self) -> bool:
        """Take in what the searches want to run next; say whether anything came."""
        came = False
        for source in self._sources:
            if source.finished():
                continue
            unfinished = sum(
                owner is source and self.states[name].stage in _OPEN for name, owner in self._source_of.items()
            )
            asked = source.ask(unfinished)
            if not asked and not unfinished and not source.finished():
                raise RuntimeError(f"search '{source.name}' gives no job, waits for none and is not finished")
            check_needs(asked, self.states)
            for job in asked:
                self._add(job, source)
                came = True
        return came

    def _start_ready(self) -> bool:
        """Start, keep or skip every job whose needs have ended; say whether one that is ready has to wait."""
        if not self._look:
            return any(name in self._fingerprints for name in self._waiting)
        self._look = False
        until = time.monotonic() + _ROUND_SECONDS
        refused = set()
        for state in tuple(self._waiting.values()):
            if time.monotonic() > until:
                self._look = True
                return True
            job = state.job
            needs = [self.states[name] for name in job.needs]
            bad = next((need for need in needs if need.stage not in _GOOD | _OPEN), None)
            if bad is not None:
                self._settle(state, "skipped", skipped(bad))
            elif all(need.stage in _GOOD for need in needs) and self._must_run(state):
                like = _like(job)
                if like not in refused and not self._offer(state):
                    refused.add(like)
        return bool(refused)

    def _must_run(self, state: JobState) -> bool:
        """Say whether a ready job has to run; one that is kept, or never can run, ends here."""
        job = state.job
        if job.name in self._fingerprints:
            return True
        model = self.states[job.model_from].outcome if job.model_from is not None else None
        try:
            verdict = self._keeper.judge(job, None if model is None else model.report_sha256)
            reason = self._engine.cannot_run(job) if verdict.kept is None else None
        except Exception as error:  # noqa: BLE001 - a model that cannot be read fails its job; the others go on
            self._settle(state, "failed", failure(error))
            return False
        self._fingerprints[job.name] = verdict.fingerprint
        if verdict.kept is not None:
            if verdict.unnoted:
                self._note(state, "finished", outcome=verdict.kept)
            self._settle(state, "kept" if verdict.kept.status == "passed" else verdict.kept.status, verdict.kept)
        elif reason is not None:
            self._settle(state, "failed", Outcome("failed", f"cannot run: {reason}", EXIT_NO_ROOM))
        return state.stage == "waiting"

    def _offer(self, state: JobState) -> bool:
        job = state.job
        now = self._keeper.begin(job)
        try:
            if not self._engine.offer(job, self._output, f"{self._output}/{state.log}", state.attempt + 1):
                return False
        except EffcliError as error:
            self._settle(state, "failed", failure(error))
            return True
        state.attempt += 1
        state.stage, state.started, state.ended, state.worker, state.outcome = "running", now, None, None, None
        self._running[job.name] = self._waiting.pop(job.name)
        self._note(state, "started")
        self._set_deadline(job)
        self._show(state)
        return True

    def _take(self, event: Event) -> None:
        state = self._running.get(event.job)
        if state is None:
            return
        state.worker = event.worker
        if event.kind == "progress":
            state.step, state.done = event.stage, event.done
            state.memory_bytes, state.gpu_memory_bytes = event.memory_bytes, event.gpu_memory_bytes
            self._show(state, event)
        elif event.kind == "started":
            self._set_deadline(state.job)
            self._show(state, event)
        elif event.kind == "lost":
            self._take_lost(state, event)
        elif event.outcome is not None:
            self._note(state, "finished", outcome=event.outcome)
            self._end(state, event.outcome, event)

    def _take_lost(self, state: JobState, event: Event) -> None:
        reason = event.reason or "no reason is known"
        self._note(state, "lost", reason)
        if self._was_published(state, event):
            return
        times = "" if state.attempt == 1 else f" (attempt {state.attempt})"
        message = f"lost{times}: {reason}; see '{state.log}', or raise limits.retries"
        self._end(state, Outcome("failed", message, EXIT_BUG, retry=True), event)

    def _was_published(self, state: JobState, event: Event | None = None) -> bool:
        """Take a job for finished that was killed after it had published its output."""
        assert state.started is not None
        outcome = self._keeper.published(state.job, state.started)
        if outcome is None:
            return False
        self._note(state, "finished", outcome=outcome)
        self._settle(state, outcome.status, outcome, event)
        return True

    def _end(self, state: JobState, outcome: Outcome, event: Event) -> None:
        """End an attempt: the job has ended, or is tried again."""
        no_room = outcome.exit_code == EXIT_NO_ROOM and not is_url(self._output)
        if no_room and free_bytes(Path(self._output)) < _FULL_BYTES:
            raise OSError(errno.ENOSPC, outcome.message, self._output)
        if outcome.status != "failed" or not outcome.retry or state.attempt > state.job.limits.retries:
            self._settle(state, outcome.status, outcome, event)
            return
        name = state.job.name
        self._clear(state)
        state.stage, state.outcome = "waiting", outcome
        del self._fingerprints[name]  # asked again, with whether any worker that is left can run it
        self._waiting = {name: state, **self._waiting}
        self._show(state, event)

    def _settle(self, state: JobState, stage: Stage, outcome: Outcome, event: Event | None = None) -> None:
        """Note how a job ended for good."""
        name = state.job.name
        if stage != "kept" and state.attempt:
            state.ended = time.time()
        self._clear(state)
        state.stage, state.outcome = stage, outcome
        self._waiting.pop(name, None)
        self._fingerprints.pop(name, None)
        self._show(state, event)
        source = self._source_of.get(name)
        if source is not None:
            source.tell(state.job, outcome)

    def _clear(self, state: JobState) -> None:
        """Take a job off its worker."""
        self._running.pop(state.job.name, None)
        self._deadlines.pop(state.job.name, None)
        state.step = state.done = state.memory_bytes = state.gpu_memory_bytes = None
        self._look = True

    def _set_deadline(self, job: Job) -> None:
        if job.limits.time_seconds is not None:
            self._deadlines[job.name] = time.monotonic() + job.limits.time_seconds

    def _patience_seconds(self) -> float:
        if self._look:
            return 0.0
        nearest = min(self._deadlines.values(), default=float("inf")) - time.monotonic()
        return max(0.0, min(_PATIENCE_SECONDS, nearest))

    def _stop_late(self) -> None:
        """Stop the jobs that have taken longer than they may."""
        now = time.monotonic()
        for name in [name for name, deadline in self._deadlines.items() if deadline <= now]:
            state = self._running[name]
            limit = duration(state.job.limits.time_seconds)
            reason = f"took longer than its limit of {limit}; raise limits.time, or make the job smaller"
            if self._stop(state, reason):
                outcome = Outcome("failed", reason, EXIT_BUG, seconds=state.job.limits.time_seconds or 0.0)
                self._note(state, "finished", outcome=outcome)
                self._settle(state, "failed", outcome)

    def _stop(self, state: JobState, reason: str) -> bool:
        """Stop a running job; say whether that was in time, and it has not finished after all."""
        self._engine.stop(state.job.name)
        self._note(state, "stopped", reason)
        return not self._was_published(state)

    def _note(self, state: JobState, kind: Kind, reason: str | None = None, outcome: Outcome | None = None) -> None:
        """Write a line of the journal; that an attempt started is dated before anything that it wrote."""
        at = state.started if kind == "started" and state.started is not None else time.time()
        fingerprint = self._fingerprints[state.job.name] if kind in ("started", "finished") else None
        if fingerprint is not None and outcome is not None and outcome.status == "passed":
            with contextlib.suppress(EffcliError):  # its model was removed meanwhile
                fingerprint = self._keeper.completed(state.job, fingerprint)
        self._journal.append(Entry(kind, state.job.name, at, state.attempt, state.worker, reason, fingerprint, outcome))

    def _show(self, state: JobState, event: Event | None = None) -> None:
        if self._view is not None:
            self._view.changed(state, event)


def _like(job: Job) -> tuple[object, ...]:
    """Return what an engine's answer to an offer depends on: refused one, the next of its like is not offered."""
    labels = tuple(sorted(job.labels.items()))
    return (job.kind, job.model, job.model_from, job.part, job.device, job.dtype, job.gpus, job.limits, labels)
