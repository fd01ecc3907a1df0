"""Run a measurement in a fresh process, so that nothing an earlier step left in memory takes part in it.

::

    parent: run_job ── job.json ──> python -m effcli.worker job.json          (fresh interpreter, same sys.path)
            Progress <── stdout: one JSON object a line ── Progress
            result   <── result.json, renamed into place ── the job's function
            the same error <── {"event": "error", class, message} ── an error that the user can act on

The worker stops when its standard input closes, so it does not outlive a parent that was killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from effcli.errors import EXIT_INTERRUPTED, EffcliError, NoRoomError
from passes.base import PassError
from profilers.base import ProfilerError, SilentProgress

if TYPE_CHECKING:
    from profilers.base import Progress, Task

JOBS = {
    "before": "effcli.measuring:before",
    "after": "effcli.measuring:after",
}
_ERRORS = (EffcliError, PassError, ProfilerError)
_ADVANCE_SECONDS = 0.1
"""Steps of a progress line are sent at most this often."""
_STOP_SECONDS = 5.0
_LOG_LINES = 3


class WorkerError(Exception):
    """A worker stopped in a way that the user cannot act on: a bug."""


def run_job(job: str, arguments: Mapping[str, Any], folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run a job in a fresh process and return its result.

    Parameters
    ----------
    job : str
        Key of ``JOBS``.
    arguments : mapping
        JSON-ready keyword arguments of the job's function.
    folder : Path
        An existing folder for the job's file, its result and what it writes to stderr.
    progress : Progress, optional
        Shows what the worker reports.

    Returns
    -------
    dict
        What the function returned, and ``start_seconds``: the time from starting the process to starting the work.

    Raises
    ------
    effcli.errors.EffcliError, passes.base.PassError, profilers.base.ProfilerError
        The error that the job raised, with its class and message.
    NoRoomError
        If the system killed the worker.
    WorkerError
        If the worker failed otherwise.
    """
    request, result, log = (folder / f"{job}.{suffix}" for suffix in ("job.json", "result.json", "log"))
    result.unlink(missing_ok=True)
    request.write_text(json.dumps({"job": job, "arguments": dict(arguments), "result": str(result)}), encoding="utf-8")
    # The worker imports what this process imports, wherever it runs.
    path = os.pathsep.join(item or os.getcwd() for item in sys.path)
    started = time.time()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "effcli.worker", str(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            failure = _relay(process, progress or SilentProgress())
            code = process.wait()
        finally:
            _stop(process)
    if failure is not None:
        raise failure
    if code == 0 and result.is_file():
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        answer["start_seconds"] = max(0.0, answer.pop("started") - started)
        return answer
    if code == -signal.SIGKILL:
        raise NoRoomError(
            f"the process that measures ('{job}') was killed, as systems do when memory runs out; free some memory, or "
            "use a smaller --dtype, --context or --batch"
        )
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LOG_LINES:]
    raise WorkerError(f"the worker of '{job}' stopped with code {code}: {' | '.join(tail) or 'no message'} (see {log})")


def _relay(process: subprocess.Popen[str], progress: Progress) -> Exception | None:
    """Move progress lines as the worker says until it closes its output; return the error that it reported."""
    failure: Exception | None = None
    with contextlib.ExitStack() as stack:
        lines: dict[int, tuple[contextlib.ExitStack, Task]] = {}
        assert process.stdout is not None
        for text in process.stdout:
            message = json.loads(text)
            event, number = message["event"], message.get("task", 0)
            if event == "task":
                line = stack.enter_context(contextlib.ExitStack())
                lines[number] = line, line.enter_context(progress.task(message["description"], message["total"]))
            elif event == "advance":
                lines[number][1].advance(message["steps"])
            elif event == "describe":
                lines[number][1].describe(message["text"])
            elif event == "end":
                lines.pop(number)[0].close()
            elif event == "error":
                failure = _error_from(message)
    return failure


def _error_from(message: Mapping[str, str]) -> Exception:
    found = getattr(importlib.import_module(message["module"]), message["name"], None)
    if isinstance(found, type) and issubclass(found, _ERRORS):
        return found(message["message"])
    return WorkerError(f"{message['name']}: {message['message']}")


def _stop(process: subprocess.Popen[str]) -> None:
    """End the worker if it still runs, and close its pipes."""
    if process.poll() is None:
        process.kill()
        process.wait(timeout=_STOP_SECONDS)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


class _Sender:
    """Progress that goes to the parent as lines of JSON."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._count = 0

    def send(self, event: str, **content: Any) -> None:
        """Write one message."""
        self._stream.write(json.dumps({"event": event, **content}) + "\n")
        self._stream.flush()

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Open a progress line in the parent."""
        self._count += 1
        number = self._count
        self.send("task", task=number, description=description, total=total)
        line = _SentTask(self, number)
        try:
            yield line
        finally:
            line.flush()
            self.send("end", task=number)


class _SentTask:
    def __init__(self, sender: _Sender, number: int) -> None:
        self._sender, self._number = sender, number
        self._steps, self._sent = 0.0, 0.0

    def advance(self, steps: float = 1.0) -> None:
        self._steps += steps
        if time.monotonic() - self._sent >= _ADVANCE_SECONDS:
            self.flush()

    def describe(self, text: str) -> None:
        self._sender.send("describe", task=self._number, text=text)

    def flush(self) -> None:
        if self._steps:
            self._sender.send("advance", task=self._number, steps=self._steps)
            self._steps, self._sent = 0.0, time.monotonic()


def main(arguments: list[str]) -> int:
    """Do the job that a file describes; the file's path is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops this process
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with messages
    sender = _Sender(messages)
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    module, _, name = JOBS[request["job"]].partition(":")
    try:
        function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), name)
        import torch  # noqa: F401 - part of starting, not of measuring
        import transformers  # noqa: F401

        started = time.time()
        result = function(**request["arguments"], progress=sender)
        target = Path(request["result"])
        temporary = target.with_suffix(".new")
        temporary.write_text(json.dumps({**result, "started": started}, allow_nan=False), encoding="utf-8")
        temporary.replace(target)
    except Exception as error:
        reported = _reported(error)
        if reported is None:
            raise
        sender.send("error", module=type(reported).__module__, name=type(reported).__qualname__, message=str(reported))
        return 1
    return 0


def _reported(error: Exception) -> Exception | None:
    """Return the error to raise in the parent, None for a bug, whose traceback goes to the log."""
    import errno

    if isinstance(error, _ERRORS):
        return error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return NoRoomError(f"out of memory while measuring: {error}; use a smaller --dtype, --context or --batch")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoomError(f"no space left on the disk of '{error.filename}'; free some and run again with --resume")
    return None


def _exit_with_parent() -> None:
    """End this process when the parent's end of standard input closes."""
    sys.stdin.read()
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
