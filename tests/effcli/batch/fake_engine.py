"""An engine whose jobs end at once, in this process, as a test tells them to; and fingerprints to go with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from effcli.batch.model import Event, Job, JobState, Limits, Outcome
from effcli.batch.storage import Storage
from effcli.errors import BadInputError

LOST = "lost"
HANGS = "hangs"
Act = Outcome | str | Callable[[], None]


def job(name: str, *, needs: tuple[str, ...] = (), limits: Limits | None = None, **settings: Any) -> Job:
    """Return a job of a model called like it."""
    return Job(name, "call", f"/models/{name}", name, "part", settings, needs=needs, limits=limits or Limits())


def failed(message: str = "it broke; mend it", *, exit_code: int = 2, retry: bool = False) -> Outcome:
    """Return the outcome of a job that failed."""
    return Outcome("failed", message, exit_code, retry=retry)


class WordFingerprints:
    """A job depends on its settings and on what the test says its model holds."""

    def __init__(self, models: Mapping[str, str] | None = None) -> None:
        self.models = dict(models or {})
        self.asked: list[str] = []

    def of(self, job: Job) -> dict[str, Any]:
        """Return it; a model that is ``"missing"`` cannot be read."""
        self.asked.append(job.name)
        if self.models.get(job.name) == "missing":
            raise BadInputError(f"no model at '{job.model}'; check the path")
        return {"model": self.models.get(job.name, ""), "settings": json.loads(json.dumps(dict(job.settings)))}

    def difference(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        """Name what differs."""
        return ", ".join(key for key in new if old.get(key) != new[key])


@dataclass
class FakeEngine:
    """Runs a job by writing its report.

    Attributes
    ----------
    acts : dict
        By job, what becomes of each attempt: an outcome, ``LOST``, ``HANGS``, or something to call first. What is not
        told passes.
    slots : int
        How many run at once.
    """

    acts: dict[str, list[Act]] = field(default_factory=dict)
    slots: int = 2
    never: dict[str, str] = field(default_factory=dict)
    report: Callable[[Job], Any] = field(default=lambda job: {"job": job.name})
    name: str = "fake"
    ran: list[str] = field(default_factory=list)
    offered: list[str] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    entered: int = 0
    left: int = 0
    most_at_once: int = 0
    _events: list[Event] = field(default_factory=list)
    _busy: set[str] = field(default_factory=set)

    def __enter__(self) -> Self:
        self.entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left += 1

    def workers(self) -> tuple[str, ...]:
        return tuple(f"fake {number}" for number in range(self.slots))

    def cannot_run(self, job: Job) -> str | None:
        return self.never.get(job.name)

    def placement(self, job: Job) -> str:
        return "cpu, 2.1 GB"

    def room_for(self, job: Job) -> int:
        return self.slots

    def device_class(self, job: Job) -> Mapping[str, Any]:
        return {"type": "cpu", "name": "fake"}

    def offer(self, job: Job, output: str, log: str, attempt: int) -> bool:
        self.offered.append(job.name)
        if len(self._busy) >= self.slots:
            return False
        self._busy.add(job.name)
        self.most_at_once = max(self.most_at_once, len(self._busy))
        self.ran.append(job.name)
        self.attempts.append(attempt)
        self._say(job, "started")
        script = self.acts.get(job.name, [])
        act: Act = script[attempt - 1] if attempt <= len(script) else "passes"
        if callable(act):
            act()
            act = "passes"
        if act == HANGS:
            return True
        if act == LOST:
            self._say(job, "lost", reason="killed by signal 9")
            return True
        self._say(job, "progress", stage="half of it", done=0.5, memory_bytes=10**9)
        outcome = act if isinstance(act, Outcome) else publish(output, job, self.report(job))
        self._say(job, "finished", outcome=outcome)
        return True

    def events(self, timeout_seconds: float) -> Sequence[Event]:
        taken, self._events = self._events, []
        self._busy -= {event.job for event in taken if event.kind in ("finished", "lost")}
        if not taken:
            import time

            time.sleep(min(timeout_seconds, 0.01))
        return taken

    def release(self) -> None: ...

    def stop(self, job: str) -> None:
        self.stopped.append(job)
        self._busy.discard(job)
        self._events = [event for event in self._events if event.job != job]

    def _say(self, job: Job, kind: Any, **more: Any) -> None:
        self._events.append(Event(job.name, kind, "fake 0", 0.0, **more))


def publish(output: str, job: Job, report: Any) -> Outcome:
    """Write a job's output, as ``running.run_job`` does."""
    name = f"{job.name}/{'result' if job.kind == 'call' else 'report'}.json"
    content = json.dumps(report).encode()
    Storage(output).write(name, content)
    digest = hashlib.sha256(content).hexdigest()
    return Outcome("passed", "done", seconds=2.0, report=name, report_sha256=digest)


class RecordingView:
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, str]] = []
        self.names: list[str] = []
        self.closings = 0
        self.reasons: list[str | None] = []

    def opened(self, states: Sequence[JobState], workers: Sequence[str]) -> None:
        self.names = [state.job.name for state in states]

    def added(self, state: JobState) -> None:
        self.names.append(state.job.name)

    def changed(self, state: JobState, event: Event | None) -> None:
        self.stages.append((state.job.name, state.stage))
        if event is not None and event.kind == "lost":
            self.reasons.append(event.reason)

    def closed(self) -> None:
        self.closings += 1
