"""What runs on a node of a Ray cluster: an actor around one local worker, so that a job runs as it does locally.

::

    driver ── run(job) ──> Slot, a Ray actor: places, reserves, relays
           <── events, ≤ 4 a second, as Ray's streaming results ── │
                                      LocalEngine(workers=1) ──> its own process, which does the job

The job's process ends with the actor's, and the actor's with its node's: what Ray has declared dead writes no more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.batch.machine import local_device
from effcli.batch.model import Event, Job, Outcome
from effcli.batch.storage import is_url, log_file
from effcli.errors import EXIT_BAD_INPUT, EXIT_NO_ROOM, EffcliError
from effcli.reports.model import plain
from effcli.staging import folder_for

if TYPE_CHECKING:
    from effcli.batch.local import LocalEngine

COMPARED_PACKAGES = ("effcli", "torch", "transformers")
"""What must be the same on every node, or results of one batch would not be comparable."""
EVENT_SECONDS = 0.25
LOCK_SECONDS = 60.0
"""How long a retry waits for the lost attempt's lock; a shared file system may take a while to see a machine gone."""


class Slot:
    """One place for a job on a node.

    Parameters
    ----------
    threads : int
        Of the job's process.
    gpus : float
        GPUs that Ray has given it; with none, the process sees none.
    """

    def __init__(self, threads: int, gpus: float) -> None:
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._threads = threads
        self._engine: LocalEngine | None = None

    def ready(self) -> int:
        """Return the process's id, which shows that it lives."""
        return os.getpid()

    def run(
        self, job: Mapping[str, Any], output: str, log: str, attempt: int, versions: Mapping[str, str | None]
    ) -> Iterator[dict[str, Any]]:
        """Run a job; yield the node and its device, then events as plain data, four a second at most, to its end."""
        import ray

        given = Job.from_mapping(job)
        yield {"node": ray.get_runtime_context().get_node_id(), "device": local_device(given.device)}
        refused = different_versions(versions, package_versions()) or _not_shared(output, log) or _locked(given, output)
        if refused is not None:
            yield _finished(given, refused)
            return
        try:
            with log_file(log) as printed:  # here, so that the log of a process that crashes is kept
                for event in self._events(given, output, printed, attempt):
                    if event.kind in ("finished", "lost"):
                        last = plain(event)
                    else:
                        yield plain(event)
        except EffcliError as error:
            last = _finished(given, Outcome("failed", str(error), error.exit_code, retry=True))
        yield last

    def _events(self, job: Job, output: str, log: str, attempt: int) -> Iterator[Event]:
        engine = self._local()
        if (reason := engine.cannot_run(job)) is not None:
            yield Event(job.name, "finished", "", time.time(), outcome=Outcome("failed", reason, EXIT_NO_ROOM))
            return
        while not engine.offer(job, output, log, attempt):  # something else on the node takes the memory
            time.sleep(EVENT_SECONDS)
        latest, sent = None, 0.0
        while True:
            for event in engine.events(EVENT_SECONDS):
                if event.kind == "progress":
                    latest = event
                    continue
                yield event
                if event.kind in ("finished", "lost"):
                    return
            if latest is not None and time.monotonic() - sent >= EVENT_SECONDS:
                yield latest
                latest, sent = None, time.monotonic()

    def _local(self) -> LocalEngine:
        if self._engine is None:
            from effcli.batch.local import LocalEngine

            self._engine = LocalEngine(workers=1, threads=self._threads).__enter__()
        return self._engine


def package_versions() -> dict[str, str | None]:
    """Return the versions here of what must be the same everywhere."""
    found: dict[str, str | None] = {}
    for name in COMPARED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def different_versions(driver: Mapping[str, str | None], here: Mapping[str, str | None]) -> Outcome | None:
    """Return how a job ends that came from a machine with other versions, None where they are the same."""
    different = [
        f"{name} {here.get(name) or 'missing'} (driver: {found or 'missing'})"
        for name, found in driver.items()
        if here.get(name) != found
    ]
    if not different:
        return None
    return Outcome(
        "failed",
        f"node {_host()} has other versions: {', '.join(different)}; install the same ones on every node",
        EXIT_BAD_INPUT,
    )


def _not_shared(output: str, log: str) -> Outcome | None:
    if is_url(output) or is_url(log) or Path(log).parent.is_dir():
        return None
    return Outcome(
        "failed",
        f"node {_host()} does not see the folder '{output}'; on a cluster an output has to be in a folder that all "
        "nodes share under the same path, or of a batch a URL such as s3://bucket/runs",
        EXIT_BAD_INPUT,
    )


def _locked(job: Job, output: str) -> Outcome | None:
    """Wait until a lost attempt's process has let go of the staged work; say so if it never does."""
    from filelock import FileLock, Timeout

    folder = folder_for(Path(output) / job.name)
    if is_url(output) or not folder.is_dir():
        return None
    try:
        with FileLock(folder / "lock", timeout=LOCK_SECONDS):
            return None
    except FileNotFoundError:  # the other one ended, and its folder with it
        return None
    except Timeout:
        return Outcome(
            "failed",
            f"the staged work in '{folder}' is still held by an earlier attempt's process after {LOCK_SECONDS:.0f} s; "
            "end that process, or wait until the file server has let go of a dead machine's lock, and run again",
            EXIT_BAD_INPUT,
            retry=True,
        )


def _finished(job: Job, outcome: Outcome) -> dict[str, Any]:
    data: dict[str, Any] = plain(Event(job.name, "finished", "", time.time(), outcome=outcome))
    return data


def _host() -> str:
    import socket

    return socket.gethostname()


def event_from(data: Mapping[str, Any], worker: str) -> Event:
    """Return the event that this data was made from, as of that worker."""
    outcome = data["outcome"]
    event = Event(**{**data, "outcome": None if outcome is None else Outcome(**outcome)})
    return replace(event, worker=worker)
