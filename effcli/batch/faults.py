"""What goes wrong outside the jobs, as text: a model that cannot be read, a disk that is full or closed."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from effcli.batch.model import Outcome
from effcli.errors import BadInputError, NoRoomError, explain

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def failure(error: Exception) -> Outcome:
    """Return the outcome of a job that failed before it could be offered."""
    line, code = explain(error)
    return Outcome("failed", " ".join(line.split()).removeprefix("error: "), code)


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
