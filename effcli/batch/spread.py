"""Parts of one pass, side by side in the workers of an engine: each part is a job of kind ``call``.

::

    Pass.apply ── Spread.map(function, parts) ──> one call job a part ──> result.json ──> results, in the parts' order
                                                   lost with its worker: once again

A part that was begun goes on from what it has itself put into the pass's work folder. Results lie beside that, in the
staging folder: every worker sees it, and what a kill leaves is removed by the next run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from effcli.batch import engines
from effcli.batch.memory import PROCESS_BYTES
from effcli.batch.model import Event, Job, Limits
from effcli.errors import EXIT_NO_ROOM, BadInputError
from passes.base import PassDoesNotFitError, PassError
from profilers.base import Progress, SilentProgress

if TYPE_CHECKING:
    from effcli.batch.engine import Engine

RESULT = "result.json"
_PREFIX = "parts-"
_PATIENCE_SECONDS = 1.0


class EngineSpread:
    """Workers that do parts of a pass (:class:`passes.base.Spread`); a context manager, leaving it ends them.

    Parameters
    ----------
    engine : Engine
        Not yet entered: its workers are started with the first part.
    folder : Path
        Where results are kept meanwhile, in a folder of their own; every worker must see it.
    device : str
        Type of the pass's device, which each worker must have: ``cpu``, ``cuda``.
    """

    def __init__(self, engine: Engine, folder: Path, device: str = "cpu") -> None:
        self._engine, self._folder, self._device = engine, folder, device
        self._stack = ExitStack()
        self._results: Path | None = None
        self._parts = 0

    def __enter__(self) -> Self:
        for stale in self._folder.glob(f"{_PREFIX}*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        with ExitStack() as stack:
            results = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=self._folder, ignore_cleanup_errors=True)
            self._results = Path(stack.enter_context(results))
            stack.enter_context(self._engine)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def room(self, memory_bytes: int) -> int:
        """Return how many parts run side by side; see :meth:`passes.base.Spread.room`.

        Raises
        ------
        PassDoesNotFitError
            If a cluster that was asked for has no room for two.
        """
        job = self._job("", {}, memory_bytes)
        found = self._engine.room_for(job)
        if found < 2 and self._engine.name != "local":
            raise PassDoesNotFitError(
                f"the {self._engine.name} cluster has room for {found} of the pass's parts at a time "
                f"({self._engine.placement(job)}) and sharing out takes 2; start more nodes, or leave --engine out"
            )
        return found

    def map(
        self,
        function: str,
        parts: Sequence[Mapping[str, Any]],
        progress: Progress | None = None,
        *,
        memory_bytes: int = 0,
    ) -> list[Any]:
        """Call a function once a part; see :meth:`passes.base.Spread.map`."""
        assert self._results is not None
        results = str(self._results)
        jobs = [self._job(function, part, memory_bytes) for part in parts]
        shares = dict.fromkeys((job.name for job in jobs), 0.0)
        waiting, running = list(jobs), set[str]()
        attempts = dict.fromkeys(shares, 0)
        with (progress or SilentProgress()).task(f"{len(jobs)} parts", total=len(jobs)) as task:
            try:
                while waiting or running:
                    for job in tuple(waiting):
                        if not self._engine.offer(job, results, f"{results}/{job.name}.log", attempts[job.name] + 1):
                            break
                        attempts[job.name] += 1
                        waiting.remove(job)
                        running.add(job.name)
                    if not running and (reason := self._engine.cannot_run(waiting[0])) is not None:
                        raise PassDoesNotFitError(f"a part of the pass cannot run: {reason}")
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
            finally:
                self._engine.release()  # the rest of the pass may take long
        return [json.loads((self._results / job.name / RESULT).read_text(encoding="utf-8")) for job in jobs]

    def _job(self, function: str, part: Mapping[str, Any], memory_bytes: int) -> Job:
        self._parts += 1
        own = 0 if self._device == "cuda" else PROCESS_BYTES  # the engine adds it to what is of the GPU's
        return Job(
            name=f"part-{self._parts}",
            kind="call",
            model="",
            model_name="",
            part=function,
            settings={"function": function, "arguments": dict(part)},
            device=self._device,
            limits=Limits(memory_bytes=memory_bytes + own),
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


def maker(
    engine: str, address: str | None, workers: int | None
) -> Callable[[Path, str], AbstractContextManager[EngineSpread | None]]:
    """Return what makes the workers for a staging folder and a device's type: None for one process.

    Parameters
    ----------
    engine, address
        As :func:`effcli.batch.engines.engine_for` takes them.
    workers : int or None
        Default: 1 on this machine, on a cluster as many as its nodes have room for.

    Raises
    ------
    BadInputError
        For options that do not go together, or more workers than this machine has cores.
    """
    engines.check(engine, address)
    if engine == "local" and workers in (None, 1):
        return lambda folder, device: nullcontext()
    if workers == 1:
        raise BadInputError(
            "one worker on a cluster is no faster than this process; give --workers 2 or more, or leave --engine out"
        )
    made = engines.engine_for(engine, address, workers, share_cpus=True)
    return lambda folder, device: EngineSpread(made, folder, device)
