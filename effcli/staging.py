"""Staged work beside the target: finished stages survive a crash, and the target appears whole or not at all.

::

    parent/
      NAME                    the target: absent, or as it was, until the last rename
      .NAME.effcli/           staged work, on the same file system
        lock                  held while a run uses the folder
        state.json            fingerprint of the work, and every finished stage with the sha256 of its files
        before/  pass-1/  …   one folder a stage; pass-1.work/ is the pass's own, for resuming inside itself
        out/                  the checkpoint, complete; renamed to NAME
        replaced/             what NAME was, while --force swaps the two

A stage is finished when ``state.json`` names it, which is written after the stage's files are on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effcli import provenance
from effcli.checkpoint_files import CONFIG, ONNX_EXPORT, PIPELINE, sha256_of
from effcli.disk import new_file_mode
from effcli.errors import BadInputError, NoRoomError, SourceError

FORMAT = "effcli.stage/1"
_STATE = "state.json"
_LOCK = "lock"
_OUT = "out"
_REPLACED = "replaced"
_WORK_SUFFIX = ".work"
_RECORDS = (provenance.FILE, ONNX_EXPORT)
"""What a checkpoint or an export says of itself, with the sha256 of its files."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
# What safetensors says when the operating system refuses a write: its error carries the number only as text.
_NO_ROOM_TEXTS = ("os error 28", "os error 122", "StorageFull", "No space left", "Disk quota exceeded")

JOB_FILES = frozenset({"report.json", "report.html", "result.json"})
"""What the folder of a batch's job holds that made no checkpoint."""

Fingerprint = Mapping[str, Mapping[str, Any]]
"""What the work depends on, by part: ``source``, ``recipe``, ``texts``, ``options``, ``versions``."""


class UnusableWorkError(SourceError):
    """Staged work that this run cannot go on with: of another run, or damaged."""


def folder_for(target: Path) -> Path:
    """Return where the staged work for ``target`` lies."""
    return target.parent / f".{target.name}.effcli"


def check_target(target: Path, source: Path | None, *, force: bool) -> None:
    """Refuse a target that cannot or must not be written, before anything is done.

    Parameters
    ----------
    target : Path
        Absolute.
    source : Path or None
        File or folder that the model is read from.
    force : bool
        Whether a checkpoint that is there may be replaced.

    Raises
    ------
    BadInputError
        Naming what is in the way.
    """
    real = target.resolve()
    if source is not None:
        origin = source.resolve()
        inside = origin if origin.is_dir() else origin.parent
        if real == origin or (origin.is_dir() and real.is_relative_to(inside)):
            raise BadInputError(f"output '{target}' is inside the source '{source}'; choose a folder outside it")
        if origin.is_relative_to(real):
            raise BadInputError(f"the source '{source}' is inside the output '{target}'; choose another folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise BadInputError(f"output '{target}' is not a folder; choose another name")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise BadInputError(f"output '{target}' exists; add --force to replace it, or choose another name")
        checkpoint = any((target / name).is_file() for name in (CONFIG, PIPELINE))
        if not checkpoint and not {path.name for path in target.iterdir()} <= JOB_FILES:
            raise BadInputError(
                f"output '{target}' is no checkpoint (it has no {CONFIG}), so --force does not replace it; "
                "choose another name, or remove it yourself"
            )
    existing = next(path for path in target.absolute().parents if path.exists())
    if not existing.is_dir():
        raise BadInputError(f"output '{target}' cannot be made: '{existing}' is a file; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadInputError(f"output '{target}' cannot be made: '{existing}' cannot be written; choose another place")


@contextlib.contextmanager
def room_errors(folder: Path) -> Iterator[None]:
    """Turn a disk that is full, or closed, into one line that says how to go on.

    Raises
    ------
    NoRoomError
    BadInputError
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _full(folder) from None
        if error.errno in _NOT_ALLOWED:
            raise BadInputError(
                f"cannot write '{error.filename or folder}' ({error.strerror}); choose another --output"
            ) from None
        raise
    except SafetensorError as error:
        if any(text in str(error) for text in _NO_ROOM_TEXTS):
            raise _full(folder) from None
        raise


def _full(folder: Path) -> NoRoomError:
    return NoRoomError(
        f"the disk of '{folder.parent}' is full; what was finished is kept in '{folder}': free some space and run "
        "again with --resume"
    )


class Staging:
    """The staged work of one target; use :func:`open_staging`.

    Attributes
    ----------
    folder, target : Path
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = folder_for(target)
        self._state: dict[str, Any] = {}

    @property
    def out(self) -> Path:
        """Where the checkpoint is put together before it is renamed to the target."""
        return self.folder / _OUT

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Return what a finished stage left as its result, None where it is not finished."""
        entry = self._state["stages"].get(stage)
        return None if entry is None else dict(entry["result"])

    def path(self, stage: str) -> Path:
        """Return the folder of a stage's files."""
        return self.folder / stage

    def begin(self, stage: str) -> Path:
        """Return a stage's folder, empty."""
        folder = self.path(stage)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def finish(self, stage: str, result: Mapping[str, Any]) -> None:
        """Mark a stage as finished once its files are on the disk.

        Parameters
        ----------
        stage : str
        result : mapping
            JSON-ready.
        """
        folder = self.path(stage)
        files = _files(folder)
        for path in files:
            _sync(path)
        for inner in {path.parent for path in files} | {folder}:
            _sync(inner)
        manifest = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
        self._state["stages"][stage] = {"result": dict(result), "files": manifest}
        self._write()

    def forget(self, *stages: str) -> None:
        """Take stages back, so that they run again."""
        for stage in stages:
            self._state["stages"].pop(stage, None)
        self._write()

    def publish(self, *, force: bool) -> None:
        """Put ``out`` in place of the target and remove the staged work.

        With ``force``, what is there is moved aside first and removed last: whenever this stops, both are whole
        somewhere.

        Raises
        ------
        BadInputError
            If the target came into being meanwhile.
        """
        files = _files(self.out)
        for path in files:
            path.chmod(new_file_mode())
            _sync(path)
        for inner in {path.parent for path in files} | {self.out}:
            _sync(inner)
        record = _record(self.out)
        if record is not None:
            self._state["published"] = sha256_of(record)
            self._write()
        aside = self.folder / _REPLACED
        if self.target.is_dir() and any(self.target.iterdir()):
            if not force:
                raise BadInputError(
                    f"output '{self.target}' came into being meanwhile; run again with --resume --force to replace it"
                )
            if aside.exists():  # of a run that was stopped after both renames
                shutil.rmtree(aside)
            self.target.rename(aside)
        self.out.rename(self.target)
        _sync(self.target.parent)
        self.remove()

    def remove(self) -> None:
        """Remove all staged work; without its state, what a crash leaves of it counts as nothing."""
        (self.folder / _STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_empty(self) -> bool:
        """Say whether nothing was finished or begun that is worth keeping."""
        return not self._state.get("stages") and not _begun(self.folder)

    def work(self, stage: str) -> Path:
        """Return the folder that a stage may keep unfinished work in; it outlives an interruption."""
        folder = self.folder / f"{stage}{_WORK_SUFFIX}"
        folder.mkdir(exist_ok=True)
        return folder

    def manifest(self, stage: str) -> dict[str, str]:
        """Return the sha256 of a finished stage's files, by name."""
        return dict(self._state["stages"][stage]["files"])

    def drop_work(self, stage: str) -> None:
        """Remove what a stage kept to resume inside itself."""
        shutil.rmtree(self.folder / f"{stage}{_WORK_SUFFIX}", ignore_errors=True)

    def _write(self) -> None:
        temporary = self.folder / f"{_STATE}.new"
        temporary.write_text(json.dumps(self._state, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _sync(temporary)
        temporary.replace(self.folder / _STATE)
        _sync(self.folder)

    def _start(self, fingerprint: Fingerprint) -> None:
        for item in self.folder.iterdir():
            if item.name == _LOCK:
                continue
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
        self._state = {"format": FORMAT, "fingerprint": fingerprint, "stages": {}}
        self._write()

    def _continue(self, state: dict[str, Any], fingerprint: Fingerprint) -> None:
        differences = changed(state["fingerprint"], fingerprint)
        if differences:
            raise UnusableWorkError(
                f"cannot resume the work in '{self.folder}': {differences}; run again as before to resume, or with "
                "--force to drop it and start again"
            )
        self._state = state
        stages: dict[str, Any] = state["stages"]
        for position, stage in enumerate(tuple(stages)):
            if not self.path(stage).is_dir():  # removed by hand to have it done again, with all that follows from it
                self.forget(*tuple(stages)[position:])
                return
            self._check_files(stage, stages[stage]["files"])

    def _check_files(self, stage: str, manifest: Mapping[str, str]) -> None:
        for name, expected in manifest.items():
            path = self.path(stage) / name
            if not path.is_file() or sha256_of(path) != expected:
                what = "is damaged (its sha256 is not the recorded one)" if path.is_file() else "is missing"
                raise UnusableWorkError(
                    f"staged file '{path}' {what}; remove the folder '{self.path(stage)}' and run again with --resume "
                    "to redo its stage, or with --force to start again"
                )

    def _restore_replaced(self) -> None:
        """Put back what --force had moved aside when it was stopped before the new checkpoint was in place."""
        aside = self.folder / _REPLACED
        if aside.is_dir() and not self.target.exists():
            aside.rename(self.target)


@contextlib.contextmanager
def open_staging(target: Path, fingerprint: Fingerprint, *, resume: bool, force: bool) -> Iterator[Staging]:
    """Open the staged work of ``target`` for this process alone, new or as an earlier run left it.

    Parameters
    ----------
    target : Path
        Absolute.
    fingerprint : mapping
        What the work depends on; work with another one is not resumed.
    resume : bool
        Go on with what is there; where nothing is, start.
    force : bool
        Without ``resume``: drop what is there.

    Raises
    ------
    BadInputError
        If there is unfinished work and neither is asked for, or another run uses it.
    UnusableWorkError
        If it is to be resumed and is of another fingerprint, or a staged file is damaged.
    NoRoomError
        If the disk is full, here or in the block.
    """
    from filelock import FileLock, Timeout

    staging = Staging(target)
    with room_errors(staging.folder):
        staging.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(staging.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInputError(
                f"another run is working on '{target}' (lock '{staging.folder / _LOCK}'); wait for it or choose "
                "another --output"
            ) from None
        try:
            staging._restore_replaced()
            state = _read_state(staging.folder / _STATE)
            if state is not None and not state["stages"] and not _begun(staging.folder):
                state = None
            if state is not None and not resume and not force:
                done = ", ".join(state["stages"]) or "nothing yet"
                raise BadInputError(
                    f"'{staging.folder}' holds unfinished work for '{target}' (finished: {done}); add --resume to go "
                    "on with it, or --force to drop it and start again"
                )
            if state is not None and resume:
                staging._continue(state, fingerprint)
            else:
                staging._start(fingerprint)
            try:
                yield staging
            finally:
                if staging.is_empty():
                    staging.remove()
        finally:
            lock.release()


def published_earlier(target: Path) -> bool:
    """Say whether an earlier run renamed its checkpoint into place and was stopped before it could clean up."""
    state = _read_state(folder_for(target) / _STATE)
    expected = None if state is None else state.get("published")
    record = _record(target)
    return expected is not None and record is not None and sha256_of(record) == expected


def drop_published(target: Path) -> None:
    """Remove what a run left beside a target that it published, when it was stopped before it had cleaned up.

    Work that another run holds, or that has more to publish, stays.
    """
    from filelock import FileLock, Timeout

    folder = folder_for(target)
    if not folder.is_dir():
        return
    with contextlib.suppress(Timeout), FileLock(folder / _LOCK, timeout=0):
        state = _read_state(folder / _STATE)
        if state is None or published_earlier(target) or not (state["stages"] or _begun(folder)):
            shutil.rmtree(folder, ignore_errors=True)


def _record(folder: Path) -> Path | None:
    """Return the file that says what a folder is, None where there is none."""
    return next((path for name in _RECORDS if (path := folder / name).is_file()), None)


def _begun(folder: Path) -> bool:
    """Say whether a stage has left unfinished work of its own."""
    return any(any(work.iterdir()) for work in folder.glob(f"*{_WORK_SUFFIX}") if work.is_dir())


def _read_state(path: Path) -> dict[str, Any] | None:
    """Return the state of earlier work, None where there is none."""
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] == FORMAT and isinstance(state["stages"], dict) and isinstance(state["fingerprint"], dict):
            return dict(state)
        problem = f"has format {state['format']!r}, not {FORMAT!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read ({error})"
    raise UnusableWorkError(f"'{path}' {problem}; remove the folder '{path.parent}' to start again")


def changed(old: Fingerprint, new: Fingerprint) -> str:
    """Say in words what differs between two fingerprints; an empty string where nothing does."""
    words = {
        "source": "source file",
        "recipe": "recipe",
        "texts": "text",
        "options": "option",
        "versions": "version of",
    }
    lines = []
    for part in dict.fromkeys((*old, *new)):
        before, now = old.get(part, {}), new.get(part, {})
        for key in dict.fromkeys((*before, *now)):
            if before.get(key) != now.get(key):
                detail = "changed" if part in ("source", "texts") else f"was {before.get(key)!r}, is {now.get(key)!r}"
                lines.append(f"{words.get(part, part)} '{key}' {detail}")
    return "; ".join(lines)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source`` where the file system can, else a copy of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        shutil.copyfile(source, target)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if path.is_dir() else os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
    except PermissionError:  # Windows opens no folders
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
