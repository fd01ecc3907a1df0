"""The contract between the driver, which decides what runs, and an engine, which runs it somewhere.

::

    driver ── offer(job) ──> engine ──> a worker: running.run_job(job, output, …)     the same call on every engine
       ▲                        │
       └──── events() <─────────┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from effcli.batch.model import Event, Job, JobState, Outcome


class Engine(Protocol):
    """Where jobs run. It is a context manager; leaving it ends every worker."""

    name: str
    """``local`` or ``ray``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def workers(self) -> tuple[str, ...]:
        """Return one line a worker, for reports and ``--dry-run``: device, threads, memory."""
        ...

    def cannot_run(self, job: Job) -> str | None:
        """Say why no worker can ever run the job (a GPU that is not there, more memory than there is), else None."""
        ...

    def placement(self, job: Job) -> str:
        """Say where the job would run and what is reserved for it, for ``--dry-run``: ``"cpu, 2.1 GB"``."""
        ...

    def room_for(self, job: Job) -> int:
        """Return how many jobs like this run side by side where nothing else runs."""
        ...

    def device_class(self, job: Job) -> Mapping[str, Any]:
        """Return what the device of a job is, for its fingerprint: where it ran, else where it may run.

        Returns
        -------
        mapping
            ``type`` and ``name``, or ``any_of`` a list of such, where workers differ.
        """
        ...

    def offer(self, job: Job, output: str, log: str, attempt: int) -> bool:
        """Start the job now if a worker and the memory for it are free; else return False and change nothing.

        Parameters
        ----------
        job : Job
        output : str
            The batch's output, an absolute folder or a URL; the job writes ``output/<name>``.
        log : str
            File (in a folder that exists) that takes what the job's process prints, as a path or URL.
        attempt : int
        """
        ...

    def events(self, timeout_seconds: float) -> Sequence[Event]:
        """Return what happened since the last call; wait at most this long for something to happen."""
        ...

    def release(self) -> None:
        """End the workers that have nothing to do, and give back what they hold; the next job starts new ones."""
        ...

    def stop(self, job: str) -> None:
        """Kill a running job; its staged work stays. No further event comes for it."""
        ...


class View(Protocol):
    """What shows a batch while it runs."""

    def opened(self, states: Sequence[JobState], workers: Sequence[str]) -> None:
        """Take in all jobs; ``states`` are live and change in place."""
        ...

    def added(self, state: JobState) -> None:
        """Take in a job that a search made."""
        ...

    def changed(self, state: JobState, event: Event | None) -> None:
        """Show that a job moved on."""
        ...

    def closed(self) -> None:
        """End; nothing more will come."""
        ...


class JobSource(Protocol):
    """What makes jobs while the batch runs: a search."""

    name: str

    def ask(self, running: int) -> Sequence[Job]:
        """Return jobs to run now, none where results must come first; ``running`` of its jobs are not finished."""
        ...

    def tell(self, job: Job, outcome: Outcome) -> None:
        """Take the result of one of its jobs."""
        ...

    def finished(self) -> bool:
        """Say whether no job will come any more."""
        ...
