"""The state of a batch as a text file that Prometheus' node exporter collects, for batches that run for days."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from effcli.batch.model import Event, JobState, Stage

SECONDS_BETWEEN = 5.0
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Sample = tuple[Mapping[str, str], float | None]


def exposition(states: Sequence[JobState], now: float) -> str:
    """Return the state of every job in Prometheus' text format; what is not known has no sample.

    Written by hand: the format is three kinds of lines, and its library is no dependency of a local batch.
    """
    stages = Counter(state.stage for state in states)
    by_job = [({"job": state.job.name}, state) for state in states]
    return "".join(
        (
            _gauge(
                "effcli_batch_jobs",
                "Jobs at this stage.",
                [({"stage": stage}, stages[stage]) for stage in get_args(Stage)],
            ),
            _gauge(
                "effcli_batch_job_info",
                "What a job is, where it runs, and its stage; the value is always 1.",
                [
                    (
                        label
                        | {"kind": state.job.kind, "model": state.job.model_name, "part": state.job.part}
                        | {"device": state.job.device, "stage": state.stage, "worker": state.worker or ""},
                        1,
                    )
                    for label, state in by_job
                ],
            ),
            _gauge(
                "effcli_batch_job_attempts", "Attempts at a job.", [(label, state.attempt) for label, state in by_job]
            ),
            _gauge(
                "effcli_batch_job_seconds",
                "Time of a job's attempt, so far while it runs.",
                [(label, _seconds(state, now)) for label, state in by_job],
            ),
            _gauge(
                "effcli_batch_job_progress_ratio",
                "Share of a running job that is done.",
                [(label, state.done if state.stage == "running" else None) for label, state in by_job],
            ),
            _gauge(
                "effcli_batch_job_memory_bytes",
                "Memory of a job's process: now while it runs, its peak afterwards.",
                [(label, _memory(state)) for label, state in by_job],
            ),
            _gauge(
                "effcli_batch_job_gpu_memory_bytes",
                "GPU memory that a running job holds.",
                [(label, state.gpu_memory_bytes if state.stage == "running" else None) for label, state in by_job],
            ),
            _gauge("effcli_batch_updated_timestamp_seconds", "When this was written.", [({}, now)]),
        )
    )


def _seconds(state: JobState, now: float) -> float | None:
    if state.stage == "running":
        return None if state.started is None else now - state.started
    return None if state.outcome is None else state.outcome.seconds


def _memory(state: JobState) -> float | None:
    if state.stage == "running":
        return state.memory_bytes
    return None if state.outcome is None else state.outcome.peak_memory_bytes


def _gauge(name: str, meaning: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
    for labels, value in samples:
        if value is not None:
            inside = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels.items())
            lines.append(f"{name}{{{inside}}} {value!r}" if inside else f"{name} {value!r}")
    return "\n".join(lines) + "\n"


class PrometheusView:
    """Write the file every few seconds while the batch runs, and once more when it ends.

    Parameters
    ----------
    path : Path
        Replaced whole by a rename, as the collector asks for.
    warn : callable
        Takes one line where the file cannot be written any more; the batch goes on without it.
    """

    def __init__(self, path: Path, warn: Callable[[str], None], now: Callable[[], float] = time.time) -> None:
        self._path, self._warn, self._now = path, warn, now
        self._states: list[JobState] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False

    def opened(self, states: Sequence[JobState], workers: Sequence[str]) -> None:
        """Write the first time, and start the clock."""
        self._states = list(states)
        self._write()
        self._thread = threading.Thread(target=self._run, name="effcli-prometheus", daemon=True)
        self._thread.start()

    def added(self, state: JobState) -> None:
        """Take in a job that a search made."""
        self._states.append(state)

    def changed(self, state: JobState, event: Event | None) -> None:
        """Do nothing: the next write reads the states."""

    def closed(self) -> None:
        """Stop, and write how it ended."""
        if self._thread is not None:
            self._closed.set()
            self._thread.join()
            self._thread = None
            self._write()

    def _run(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN):
            self._write()

    def _write(self) -> None:
        new = self._path.with_name(f".{self._path.name}.new")
        try:
            new.write_text(exposition(list(self._states), self._now()), encoding="utf-8")
            os.replace(new, self._path)
        except OSError as error:
            if not self._warned:
                self._warn(f"cannot write '{self._path}': {error.strerror}; the batch goes on without it")
            self._warned = True
