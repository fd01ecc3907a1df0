"""Parts of one pass, side by side in the workers of an engine: each part is a job of kind ``call``.

::

    Pass.apply ── Spread.map(function, parts) ──> one call job a part ──> result.json ──> results, in the parts' order
                                                   lost with its worker: once again

A part that was begun goes on from what it has itself put into the pass's work folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from effcli.batch.engine import Engine
from effcli.batch.model import Event, Job, Limits
from effcli.errors import EXIT_NO_ROOM
from passes.base import PassDoesNotFitError, PassError
from profilers.base import Progress, SilentProgress

RESULT = "result.json"
_PATIENCE_SECONDS = 1.0


class EngineSpread:
    """Workers that do parts of a pass (:class:`passes.base.Spread`); a context manager, leaving it ends them.

    Parameters
    ----------
    engine : Engine
        Not yet entered: its workers are started with the first part.
    workers : int
        How many parts to make.
    memory_bytes : int, optional
        What to reserve for each part; default: the engine's own estimate.
    """

    def __init__(self, engine: Engine, workers: int, memory_bytes: int | None = None) -> None:
        self._engine, self._workers, self._memory_bytes = engine, workers, memory_bytes
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._parts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def workers(self) -> int:
        """How many parts run side by side."""
        return self._workers

    def map(self, function: str, parts: Sequence[Mapping[str, Any]], progress: Progress | None = None) -> list[Any]:
        """Call a function once a part; see :meth:`passes.base.Spread.map`."""
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="effcli-")))
            self._stack.enter_context(self._engine)
        jobs = [self._job(function, part) for part in parts]
        shares = dict.fromkeys((job.name for job in jobs), 0.0)
        waiting, running = list(jobs), set[str]()
        attempts = dict.fromkeys(shares, 0)
        with (progress or SilentProgress()).task(f"{len(jobs)} parts", total=len(jobs)) as task:
            try:
                while waiting or running:
                    for job in tuple(waiting):
                        log = str(self._folder / f"{job.name}.log")
                        if not self._engine.offer(job, str(self._folder), log, attempts[job.name] + 1):
                            break
                        attempts[job.name] += 1
                        waiting.remove(job)
                        running.add(job.name)
                    for event in self._engine.events(_PATIENCE_SECONDS):
                        done = 1.0 if event.kind == "finished" else event.done or 0.0
                        if done > shares[event.job]:
                            task.advance(done - shares[event.job])
                            shares[event.job] = done
                        if event.kind in ("finished", "lost"):
                            running.discard(event.job)
                            if self._is_lost(event, attempts[event.job]):
                                waiting += [job for job in jobs if job.name == event.job]
            except BaseException:
                for name in running:
                    self._engine.stop(name)
                raise
        return [json.loads((self._folder / job.name / RESULT).read_text(encoding="utf-8")) for job in jobs]

    def _job(self, function: str, part: Mapping[str, Any]) -> Job:
        self._parts += 1
        return Job(
            name=f"part-{self._parts}",
            kind="call",
            model="",
            model_name="",
            part=function,
            settings={"function": function, "arguments": dict(part)},
            limits=Limits(memory_bytes=self._memory_bytes),
        )

    def _is_lost(self, event: Event, attempt: int) -> bool:
        """Say whether a part has to be done again.

        Raises
        ------
        PassError
            If it failed, or its worker was lost a second time.
        """
        if event.outcome is None:
            if attempt > 1:
                raise PassError(
                    f"a part of the pass was lost twice: {event.reason}; run again with --resume, or with "
                    "fewer --workers"
                )
            return True
        if event.outcome.status != "passed":
            kind = PassDoesNotFitError if event.outcome.exit_code == EXIT_NO_ROOM else PassError
            raise kind(event.outcome.message)
        return False


def local(workers: int) -> EngineSpread:
    """Return a spread over processes on this machine, each with an equal share of its cores and of its memory.

    Raises
    ------
    effcli.errors.BadInputError
        If there are more workers than cores.
    """
    import psutil

    from effcli.batch.local import LocalEngine

    return EngineSpread(LocalEngine(workers), workers, psutil.virtual_memory().available // (2 * workers))
