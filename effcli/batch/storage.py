"""A batch's output as a folder or any fsspec URL; a job whose output is a URL works in a folder of its own machine.

::

    URL/ NAME/                what a job wrote: its files first, report.json last, so that a report means a whole job
         .NAME.effcli/        staged work of an optimize job: a stage's files first, state.json last
         .effcli-batch/files/NAME.json     sha256 of every file of NAME, checked when another job reads it

    here: run_on_url ── staged work down ──> run(local folder) ── each finished stage up, result up ──> staged work gone
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from effcli.batch.model import STATE_FOLDER
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError, EffcliError, NoRoomError, did_you_mean
from effcli.staging import folder_for

PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Between the tries of one operation, so that a short loss of the network costs nothing but time."""
WATCH_SECONDS = 0.5
"""How often staged work is looked at for a newly finished stage."""
LAST = ("result.json", "report.json")
"""Files of a job's folder that stand for all others."""
_STATE = "state.json"
_BLOCK_BYTES = 2**20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}

Answer = TypeVar("Answer")


class StorageError(EffcliError):
    """An output cannot be reached."""


def is_url(output: str) -> bool:
    """Say whether an output is a URL, not a path."""
    return "://" in output


class Storage:
    """A folder, or what lies under a URL. Paths are relative to it, with ``/``.

    Attributes
    ----------
    root : str

    Raises
    ------
    BadInputError
        If nothing can open the URL's protocol.
    """

    def __init__(self, root: str) -> None:
        import fsspec

        self.root = root.rstrip("/")
        protocol = root.partition("://")[0]
        try:
            self._fs, self._base = fsspec.core.url_to_fs(self.root if is_url(root) else str(Path(root).absolute()))
        except ImportError as error:
            raise BadInputError(
                f"output '{root}' needs a package that is not installed ({_line(error)}); install it on this machine "
                "and on every node"
            ) from None
        except ValueError as error:
            hint = did_you_mean(protocol, fsspec.available_protocols())
            raise BadInputError(
                f"output '{root}': no package opens '{protocol}://'{hint} ({_line(error)}); install the package that "
                "brings it to fsspec on this machine and on every node, or use a shared folder"
            ) from None
        except Exception as error:  # noqa: BLE001 - each file system has errors of its own
            raise StorageError(f"output '{root}' cannot be opened: {_line(error)}") from None

    def exists(self, path: str) -> bool:
        """Say whether there is a file or folder."""
        return bool(self._tried("look for", path, lambda: self._fs.exists(self._at(path))))

    def read(self, path: str) -> bytes:
        """Return a file's content."""
        content: bytes = self._tried("read", path, lambda: self._fs.cat_file(self._at(path)))
        return content

    def write(self, path: str, content: bytes) -> None:
        """Write a small file; it is there whole or not at all."""
        temporary = f"{self._at(path)}.part"

        def put() -> None:
            self._make_parent(path)
            self._fs.pipe_file(temporary, content)
            self._fs.mv(temporary, self._at(path))

        self._tried("write", path, put)

    def sha256(self, path: str) -> str:
        """Return the sha256 of a file as it lies there."""

        def digest() -> str:
            found = hashlib.sha256()
            with self._fs.open(self._at(path), "rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    found.update(block)
            return found.hexdigest()

        return self._tried("read", path, digest)

    def files(self, path: str) -> list[str]:
        """Return the files under a folder, relative to it; none where there is no folder."""
        start = self._at(path)

        def find() -> list[str]:
            self._fs.invalidate_cache()
            return list(self._fs.find(start)) if self._fs.exists(start) else []

        return sorted(name.removeprefix(start).lstrip("/") for name in self._tried("list", path, find))

    def upload(self, source: Path, path: str) -> str:
        """Copy a file there, read it back, and return its sha256.

        Raises
        ------
        StorageError
            If it cannot be written, or what is read back is not what was written.
        """
        expected = sha256_of(source)

        def put() -> None:
            self._make_parent(path)
            self._fs.put_file(str(source), self._at(path))

        self._tried("write", path, put)
        if self.sha256(path) != expected:
            raise StorageError(
                f"'{self._shown(path)}' was written and reads back differently (sha256); run the batch again"
            )
        return expected

    def download(self, path: str, target: Path, expected: str | None = None) -> None:
        """Copy a file here and check its sha256 where that is known."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._tried("read", path, lambda: self._fs.get_file(self._at(path), str(target)))
        if expected is not None and sha256_of(target) != expected:
            raise StorageError(f"'{self._shown(path)}' is damaged: its sha256 is not the recorded one; remove it")

    def remove(self, path: str) -> None:
        """Remove a file or folder; fine if it is not there."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._at(path), recursive=True)

        self._tried("remove", path, remove)

    def _at(self, path: str) -> str:
        return f"{self._base.rstrip('/')}/{path}"

    def _shown(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _make_parent(self, path: str) -> None:
        self._fs.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)

    def _tried(self, what: str, path: str, action: Callable[[], Answer]) -> Answer:
        """Do it, again after a pause where it fails for a reason that may pass, and fail in words."""
        started = time.monotonic()
        for pause in (*PAUSES_SECONDS, None):
            try:
                return action()
            except Exception as error:  # noqa: BLE001 - each file system has errors of its own
                shown, said = self._shown(path), _line(error)
                if isinstance(error, FileNotFoundError):
                    raise StorageError(f"cannot {what} '{shown}': it is not there") from None
                if isinstance(error, PermissionError):
                    raise StorageError(f"cannot {what} '{shown}': {said}; check the rights on it") from None
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    raise NoRoomError(f"cannot {what} '{shown}': {said}; free some room and run again") from None
                if pause is None:
                    raise StorageError(
                        f"cannot {what} '{shown}', tried {len(PAUSES_SECONDS) + 1} times in "
                        f"{time.monotonic() - started:.0f} s: {said}; check that the place can be reached and run the "
                        "batch again: what is finished is kept"
                    ) from None
                time.sleep(pause)
        raise AssertionError  # the last try returns or raises


def publish(folder: Path, storage: Storage, name: str) -> None:
    """Copy a finished job's folder there, in place of what an earlier run left.

    The old report goes first and the new one comes last: whenever this stops, a report that is there belongs to files
    that are all there.

    Raises
    ------
    StorageError
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for path in LAST:
        storage.remove(f"{name}/{path}")
    for stale in set(storage.files(name)) - set(files):
        storage.remove(f"{name}/{stale}")
    last = [path for path in LAST if path in files]
    hashes = {path: storage.upload(folder / path, f"{name}/{path}") for path in files if path not in last}
    hashes |= {path: sha256_of(folder / path) for path in last}
    storage.write(_manifest(name), json.dumps(hashes, indent=1).encode())
    for path in last:
        storage.write(f"{name}/{path}", (folder / path).read_bytes())


def fetch(storage: Storage, name: str, folder: Path) -> Path:
    """Copy a finished job's folder here and return where it lies; every file is checked.

    Raises
    ------
    StorageError
    """
    for path, expected in json.loads(storage.read(_manifest(name))).items():
        storage.download(f"{name}/{path}", folder / name / path, expected)
    return folder / name


class StagedWork:
    """The staged work of one target, kept beside it on the URL too, stage by stage.

    Parameters
    ----------
    storage : Storage
    target : Path
        The job's folder here; its staged work lies beside it.
    """

    def __init__(self, storage: Storage, target: Path) -> None:
        self._storage, self._folder = storage, folder_for(target)
        self._there: dict[str, str] = {}
        self._state = b""

    def fetch(self) -> None:
        """Bring what an earlier attempt finished; nothing where there is none."""
        name = self._folder.name
        if not self._storage.exists(f"{name}/{_STATE}"):
            return
        self._state = self._storage.read(f"{name}/{_STATE}")
        for path, expected in _staged_files(self._state).items():
            self._storage.download(f"{name}/{path}", self._folder / path, expected)
            self._there[path] = expected
        (self._folder / _STATE).write_bytes(self._state)

    def push(self) -> None:
        """Copy the stages that were finished since the last call, then the state that names them."""
        try:
            state = (self._folder / _STATE).read_bytes()
            if state == self._state:
                return
            for path, expected in _staged_files(state).items():
                if self._there.get(path) != expected:
                    self._there[path] = self._storage.upload(self._folder / path, f"{self._folder.name}/{path}")
        except FileNotFoundError:  # published, or dropped, meanwhile
            return
        self._storage.write(f"{self._folder.name}/{_STATE}", state)
        self._state = state

    def remove(self) -> None:
        """Remove what lies on the URL; without its state, what a stop leaves of it counts as nothing."""
        self._storage.remove(f"{self._folder.name}/{_STATE}")
        self._storage.remove(self._folder.name)


@contextlib.contextmanager
def pushing(staged: StagedWork) -> Iterator[None]:
    """Copy each stage to the URL as soon as it is finished, while the block works; raise what kept it from that.

    Raises
    ------
    StorageError
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            with contextlib.suppress(EffcliError):  # tried again next time, and a last time after the block
                staged.push()

    thread = threading.Thread(target=watch, name="staged work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    staged.push()


def run_on_url(output: str, name: str, model_from: str | None, run: Callable[[str], Answer]) -> Answer:
    """Run a job whose output is a URL in a folder of this machine, and put what it wrote on the URL.

    Parameters
    ----------
    output : str
        URL of the batch.
    name : str
        The job's.
    model_from : str or None
        Job whose output it reads; fetched first.
    run : callable
        Does the job in the output folder that it is given.

    Raises
    ------
    StorageError
        If the URL cannot be reached; what was staged before is still there.
    """
    storage = Storage(output)
    with tempfile.TemporaryDirectory(prefix="effcli-batch-") as folder:
        here = Path(folder)
        if model_from is not None:
            fetch(storage, model_from, here)
        staged = StagedWork(storage, here / name)
        staged.fetch()
        with pushing(staged):
            answer = run(folder)
        if (here / name).is_dir():
            publish(here / name, storage, name)
        for path in sorted(here.glob(f"{name}.*")):  # the report of a gate that failed
            if path.is_file():
                storage.upload(path, path.name)
        if not folder_for(here / name).exists():
            staged.remove()
        return answer


@contextlib.contextmanager
def log_file(log: str) -> Iterator[str]:
    """Yield a file of this machine for a log; one that belongs on a URL is put there after the block.

    Raises
    ------
    StorageError
    """
    if not is_url(log):
        yield log
        return
    with tempfile.TemporaryDirectory(prefix="effcli-batch-") as folder:
        printed = Path(folder) / "log"
        try:
            yield str(printed)
        finally:
            if printed.exists():
                place, _, name = log.rpartition("/")
                Storage(place).write(name, printed.read_bytes())


def _manifest(name: str) -> str:
    return f"{STATE_FOLDER}/files/{name}.json"


def _staged_files(state: bytes) -> dict[str, str]:
    """Return the sha256 of the files of every finished stage, by path in the staging folder."""
    stages: dict[str, Any] = json.loads(state)["stages"]
    return {f"{stage}/{path}": digest for stage, entry in stages.items() for path, digest in entry["files"].items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
