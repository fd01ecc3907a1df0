"""One driver an output: a second one is refused at once, and told who holds it.

The lock is the operating system's own and goes with the process, also after ``kill -9``; ``lock.json`` beside it only
says who has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from effcli.batch.model import STATE_FOLDER
from effcli.batch.storage import is_url
from effcli.errors import BadInputError

FILE = "lock"
_HOLDER = "lock.json"


def state_folder(output: str) -> Path:
    """Return where the journal and the lock of an output lie: in it, or for a URL in the user's state folder.

    A URL has no lock that every machine sees: drivers of one URL have to run on one machine, as one user.
    """
    if not is_url(output):
        return Path(output) / STATE_FOLDER
    import platformdirs

    name = hashlib.sha256(output.encode()).hexdigest()[:16]
    return Path(platformdirs.user_state_dir("effcli")) / "batches" / name


@contextlib.contextmanager
def hold(folder: Path, output: str) -> Iterator[None]:
    """Keep other drivers off an output for the length of the block.

    Parameters
    ----------
    folder : Path
        The batch's state folder; it exists.
    output : str
        As messages name it.

    Raises
    ------
    BadInputError
        If another driver holds it, naming its process, host and start.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInputError(
            f"'{output}' is in use by another batch{_holder(folder)}; wait for it to end, or choose another --output"
        ) from None
    try:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        temporary = folder / f"{_HOLDER}.new"
        temporary.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}))
        temporary.replace(folder / _HOLDER)
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    """Return who holds the lock, an empty string where that is not known (it took it this moment)."""
    try:
        data = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f" (process {data['pid']} on {data['host']}, since {data['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
