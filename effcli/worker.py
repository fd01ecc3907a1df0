"""Run a measurement in a fresh process, so that nothing an earlier step left in memory takes part in it.

::

    parent: Worker() ──> python -m effcli.worker        (fresh interpreter, same sys.path; imports, then waits)
            run      ── path of job.json ──> its standard input ──fork──> a process for this job alone
            Progress <── standard output: one JSON object a line ── Progress
            result   <── result.json, renamed into place ── the job's function
            the same error <── {"event": "error", class, message} ── an error that the user can act on
            <── {"event": "done", exit status} ── the worker, when the job's process has ended

The worker itself only imports; it never loads a model, so each job starts from the same state. Both stop when their
standard input closes, so they do not outlive a parent that was killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from effcli.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, EffcliError, NoRoomError
from passes.base import PassError
from profilers.base import ProfilerError, SilentProgress

if TYPE_CHECKING:
    from profilers.base import Progress, Task

JOBS = {
    "before": "effcli.measuring:before",
    "first-look": "effcli.measuring:first_look",
    "after": "effcli.measuring:after",
    "after-onnx": "effcli.measuring:after_onnx",
}
# Imported while the worker waits; transformers' submodules are slow and come in at first use otherwise.
_PRELOADED = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.utils",
    "effcli.api",
    "effcli.checkpoint",
    "effcli.measuring",
    "profilers.phases",
    "profilers.quality",
    "profilers.sinks",
    "profilers.timing",
)
_ERRORS = (EffcliError, PassError, ProfilerError)
_ADVANCE_SECONDS = 0.1
"""Steps of a progress line are sent at most this often."""
_STOP_SECONDS = 5.0
_LOOK_SECONDS = 0.5
_LOG_LINES = 3


class WorkerError(Exception):
    """A worker stopped in a way that the user cannot act on: a bug."""


class Worker:
    """A process that has imported what measuring needs, and forks one for each job.

    Starting it early hides the seconds that the imports take. It is a context manager; leaving it ends the process.
    """

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - see stop
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "effcli.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": import_path()},
            process_group=0,  # ended as a whole
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process if it still runs."""
        _stop(self._process)
        self._log.close()

    def run(
        self, job: str, arguments: Mapping[str, Any], folder: Path, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Do a job in a process of its own and return its result.

        Parameters
        ----------
        job : str
            Key of ``JOBS``.
        arguments : mapping
            JSON-ready keyword arguments of the job's function.
        folder : Path
            An existing folder for the job's file, its result and, if it fails, what it wrote to stderr.
        progress : Progress, optional
            Shows what the worker reports.

        Raises
        ------
        effcli.errors.EffcliError, passes.base.PassError, profilers.base.ProfilerError
            The error that the job raised, with its class and message.
        NoRoomError
            If the system killed the worker.
        WorkerError
            If the worker failed otherwise.
        """
        request, result = (folder / f"{job}.{suffix}" for suffix in ("job.json", "result.json"))
        result.unlink(missing_ok=True)
        request.write_text(
            json.dumps({"job": job, "arguments": dict(arguments), "result": str(result)}), encoding="utf-8"
        )
        assert self._process.stdin is not None
        log_start = os.fstat(self._log.fileno()).st_size
        try:
            with contextlib.suppress(BrokenPipeError):  # it died while it started; why is in its log
                self._process.stdin.write(f"{request}\n")
                self._process.stdin.flush()
            code, failure = _relay(self._process, progress or SilentProgress())
            if code is None:
                code = self._process.wait()
        except BaseException:
            _stop(self._process)
            raise
        if failure is not None:
            raise failure
        if code == 0 and result.is_file():
            answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return answer
        if code == -signal.SIGKILL:
            raise NoRoomError(
                f"the process that measures ('{job}') was killed, as systems do when memory runs out; free some "
                "memory, or use a smaller --dtype, --context or --batch"
            )
        size = os.fstat(self._log.fileno()).st_size - log_start
        text = os.pread(self._log.fileno(), size, log_start).decode("utf-8", errors="replace")
        log = folder / f"{job}.log"
        log.write_text(text, encoding="utf-8")
        tail = " | ".join(text.strip().splitlines()[-_LOG_LINES:]) or "no message"
        raise WorkerError(f"the worker of '{job}' stopped with code {code}: {tail} (see {log})")


def import_path() -> str:
    """Return the ``PYTHONPATH`` with which another process imports what this one does, wherever it runs."""
    return os.pathsep.join(item or os.getcwd() for item in sys.path)


def _relay(process: subprocess.Popen[str], progress: Progress) -> tuple[int | None, Exception | None]:
    """Move progress lines as the job says; return its exit status, None if the worker died, and its error."""
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
            elif event == "done":
                return message["code"], failure
    return None, failure


def _error_from(message: Mapping[str, str]) -> Exception:
    found = getattr(importlib.import_module(message["module"]), message["name"], None)
    if isinstance(found, type) and issubclass(found, _ERRORS):
        return found(message["message"])
    return WorkerError(f"{message['name']}: {message['message']}")


def _stop(process: subprocess.Popen[str]) -> None:
    """End the worker and its job if they still run, and close its pipes."""
    with contextlib.suppress(ProcessLookupError):  # the group is gone
        os.killpg(process.pid, signal.SIGKILL)
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


def main() -> int:
    """Import what measuring needs, then do each job whose file a line of standard input names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops this process
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with messages
    with _ending_with_parent():
        for module in _PRELOADED:
            importlib.import_module(module)
    sender = _Sender(messages)
    # Imports start no computing threads of torch, so a fork is safe; a job's process never comes back here.
    while line := sys.stdin.readline().strip():
        job = os.fork()
        if job == 0:
            code = EXIT_BUG
            try:
                code = _do(Path(line), sender)
            except BaseException:  # noqa: BLE001 - this process ends here, its traceback is in the log
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)  # taking the interpreter apart takes torch a second, and the result is written
        _, status = os.waitpid(job, 0)
        sender.send("done", code=os.waitstatus_to_exitcode(status))
    return EXIT_OK


def _do(request_file: Path, sender: _Sender) -> int:
    """Do one job in this process and return its exit code."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    request = json.loads(request_file.read_text(encoding="utf-8"))
    module, _, name = JOBS[request["job"]].partition(":")
    try:
        function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), name)
        result = function(**request["arguments"], progress=sender)
        target = Path(request["result"])
        temporary = target.with_suffix(".new")
        temporary.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
        temporary.replace(target)
    except Exception as error:
        reported = _reported(error)
        if reported is None:
            raise
        sender.send("error", module=type(reported).__module__, name=type(reported).__qualname__, message=str(reported))
        return EXIT_BUG
    return EXIT_OK


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


@contextlib.contextmanager
def _ending_with_parent() -> Iterator[None]:
    """End this process during the block, which may take long on a busy machine, if standard input closes.

    A timer looks, and no thread: this process forks later.
    """
    standard_input = select.poll()
    standard_input.register(sys.stdin, select.POLLHUP)

    def look(*_: object) -> None:
        if any(event & select.POLLHUP for _, event in standard_input.poll(0)):
            os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _exit_with_parent() -> None:
    """End this process when the parent's end of standard input closes."""
    sys.stdin.read()
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    exit_code = main()
    os._exit(exit_code)
