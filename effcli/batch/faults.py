"""What goes wrong, as outcomes, exit codes and lines: a model that cannot be read, a need, a disk that is full."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Container, Iterable, Iterator

from effcli.batch.model import JobState, Outcome
from effcli.errors import EXIT_BUG, EXIT_GATE_FAILED, EXIT_OK, BadInputError, NoRoomError, explain

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def failure(error: Exception) -> Outcome:
    """Return the outcome of a job that failed before it could be offered."""
    line, code = explain(error)
    return Outcome("failed", " ".join(line.split()).removeprefix("error: "), code)


def skipped(need: JobState) -> Outcome:
    """Return the outcome of a job that needs one that did not pass; its exit code is that one's."""
    code = EXIT_BUG
    if need.stage in ("gate-failed", "skipped") and need.outcome is not None:
        code = need.outcome.exit_code
    how = {"gate-failed": "which failed its gates", "skipped": "which was skipped"}.get(need.stage, "which failed")
    return Outcome("skipped", f"needs '{need.job.name}', {how}", code)


def exit_code(states: Iterable[JobState], trials: Container[str]) -> int:
    """Return a batch's exit code: 0 all passed, 1 a job failed or was skipped because one did, 3 only gates failed.

    A trial of a search that misses a gate, or that the search gave up, is an answer and no failure.
    """
    codes = {EXIT_OK}
    for state in states:
        if state.stage == "failed":
            codes.add(EXIT_BUG)
        elif state.stage in ("gate-failed", "skipped") and state.job.name not in trials:
            assert state.outcome is not None
            codes.add(state.outcome.exit_code)
    return max(codes) if codes <= {EXIT_OK, EXIT_GATE_FAILED} else EXIT_BUG


@contextlib.contextmanager
def room(output: str) -> Iterator[None]:
    """Turn a full disk into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise NoRoomError(
                f"the disk of '{output}' is full; every finished job is kept: free some space and run the same "
                "command again to go on"
            ) from None
        raise


@contextlib.contextmanager
def writable(output: str) -> Iterator[None]:
    """Turn a folder that cannot be made or written into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _NOT_ALLOWED:
            raise BadInputError(
                f"cannot write '{error.filename or output}' ({error.strerror}); choose another --output"
            ) from None
        raise
