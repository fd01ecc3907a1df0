"""A process that runs jobs of a batch, one after another: imports are paid once, a model stays for the next job.

::

    engine ── {"job": …, "output", "log", "attempt"} a line ──> standard input
           <── {"event": "started" │ "progress" │ "finished", …} a line ── standard output, a copy kept at the start
    NAME.log <── whatever the job's process prints, C libraries included

It ends with its standard input: an engine that is gone, however it went, leaves no worker behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from effcli.batch.memory import MemoryWatch, gpu_memory_bytes
from effcli.batch.model import Job, Outcome
from effcli.batch.running import ModelCache, run_job
from effcli.batch.storage import log_file
from effcli.errors import EXIT_BAD_INPUT, EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EffcliError, explain
from effcli.reports.model import plain

if TYPE_CHECKING:
    from profilers.base import Task

_PRELOADED = (
    "effcli.api",
    "effcli.loading",
    "effcli.reports.render",
    "effcli.reports.verdict",
    "effcli.staging",
    "effcli.worker",
    "profilers.kv_cache",
    "profilers.latency",
    "profilers.phases",
    "profilers.timing",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)


class _Channel:
    """Lines of JSON to the engine, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, event: str, **content: Any) -> None:
        """Write one message."""
        with self._lock:
            self._stream.write(json.dumps({"event": event, "time": time.time(), **content}) + "\n")
            self._stream.flush()


@dataclass
class _Line:
    """One open progress line."""

    description: str
    total: float | None
    steps: float = 0.0

    def advance(self, steps: float = 1.0) -> None:
        self.steps += steps

    def describe(self, text: str) -> None:
        self.description = text


@dataclass
class Stages:
    """Progress that remembers where a job is; something else looks at it now and then."""

    _open: list[_Line] = field(default_factory=list)
    _share: float | None = None

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Open a line."""
        line = _Line(description, total)
        self._open.append(line)
        try:
            yield line
        finally:
            self._open.remove(line)

    def now(self) -> tuple[str | None, float | None]:
        """Return the innermost line's text, and the share of the whole that is done; that never falls."""
        lines = tuple(self._open)
        share: float | None = None
        for line in reversed(lines):
            if line.total:
                share = min(1.0, (line.steps + (share or 0.0)) / line.total)
        if share is not None:
            self._share = max(share, self._share or 0.0)
        return (lines[-1].description if lines else None), self._share


class _Worker:
    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._models = ModelCache()
        self._stages: Stages | None = None
        self._memory = MemoryWatch(self._tell)

    def run(self, jobs: queue.SimpleQueue[str]) -> None:
        """Run what comes, for ever: the thread that reads standard input ends this process."""
        with self._memory:
            while True:
                request = json.loads(jobs.get())
                self._channel.send("started")
                outcome = self._do(request)
                self._channel.send("finished", outcome=plain(outcome), model_loads=self._models.loads)

    def _do(self, request: dict[str, Any]) -> Outcome:
        job, log, outcome = Job.from_mapping(request["job"]), request["log"], None
        self._stages = Stages()
        try:
            with log_file(log) as file, _printed_to(file):
                started = datetime.now(UTC).isoformat(timespec="seconds")
                sys.stderr.write(f"--- {job.name}, attempt {request['attempt']}, {started}, process {os.getpid()}\n")
                sys.stderr.write(request["note"])
                outcome = run_job(
                    job, request["output"], self._stages, self._models, request["attempt"], memory=self._memory
                )
                if outcome.status == "passed":
                    sys.stderr.write(f"passed after {outcome.seconds:.1f} s: {outcome.message}\n")
        except (OSError, EffcliError) as error:
            return _without_log(outcome, log, error)
        finally:
            self._stages = None
        return outcome

    def _tell(self) -> None:
        """Say how far the job is; called twice a second."""
        stages = self._stages
        if stages is None:
            return
        stage, done = stages.now()
        self._channel.send(
            "progress", stage=stage, done=done, memory=self._memory.held_bytes(), gpu_memory=gpu_memory_bytes()
        )


def _without_log(outcome: Outcome | None, log: str, error: OSError | EffcliError) -> Outcome:
    """Return how a job ended whose log cannot be written: as it did, or not begun."""
    why = f"the log '{log}' cannot be written: {error}"
    if outcome is not None:
        return replace(outcome, message=f"{outcome.message} ({why})")
    code = explain(error)[1]
    return Outcome("failed", f"{why}; choose another --output", EXIT_BAD_INPUT if code == EXIT_BUG else code)


@contextlib.contextmanager
def _printed_to(file: str) -> Iterator[None]:
    """Send what this process and its children print to a file, below Python: file descriptors 1 and 2."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    earlier = os.dup(1), os.dup(2)
    try:
        _flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        yield
    finally:
        _flush()
        for number, kept in enumerate(earlier, start=1):
            os.dup2(kept, number)
            os.close(kept)
        os.close(descriptor)


def _flush() -> None:
    """Write out what Python and the C library hold back of standard output and error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


def _read(requests: int, jobs: queue.SimpleQueue[str]) -> None:
    """Take in jobs; when the engine is gone, end this process and all that it started."""
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            jobs.put(line)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(EXIT_INTERRUPTED)


def main() -> int:
    """Import what jobs need, then run those that come."""
    import gc

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine stops this process
    # Copies that what a job starts does not inherit: it neither takes a job nor keeps the engine waiting.
    requests, channel = os.dup(0), _Channel(os.dup(1))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, jobs), daemon=True).start()
    for module in _PRELOADED:
        importlib.import_module(module)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    gc.collect()
    gc.freeze()  # what imports leave is there for good; looking through it would take a tenth of a second a job
    _Worker(channel).run(jobs)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
