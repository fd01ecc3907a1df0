"""How much disk is left and taken, and one-line errors for a disk that is full or closed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from effcli.errors import NoRoomError, SourceError
from effcli.formatting import data_size

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def nearest_existing(folder: Path) -> Path:
    """Return ``folder`` or the closest of its parents that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that ``folder`` is or will be on."""
    return shutil.disk_usage(nearest_existing(folder)).free


def used_bytes(folder: Path) -> int:
    """Return the bytes that the files in ``folder`` take, 0 where there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def new_file_mode() -> int:
    """Return the permissions that a file made here by other programs gets; temporary files and safetensors get 0600."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


@contextlib.contextmanager
def disk_errors(folder: Path, needed: int) -> Iterator[None]:
    """Turn a disk that is full, or a folder that cannot be written, into one line; the block removes what it wrote.

    Parameters
    ----------
    folder : Path
        Where the block writes.
    needed : int
        Bytes that it writes in all.

    Raises
    ------
    NoRoomError
    SourceError
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise NoRoomError(
                f"the disk of '{folder}' is full, {data_size(needed)} are needed; nothing was kept: free some space, "
                "or set EFFCLI_CACHE to a folder on another disk"
            ) from None
        if error.errno in _NOT_ALLOWED:
            raise SourceError(
                f"cannot write to '{folder}' ({error.strerror}); set EFFCLI_CACHE to a folder that can be written"
            ) from None
        raise
