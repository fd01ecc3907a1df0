"""The journal: what became of every job, one JSON line an event, only ever appended to while a batch runs.

::

    {"format": "effcli.journal/1"}
    {"event": "started",  "job": "smol.w4", "time": …, "attempt": 1, "fingerprint": {…}}
    {"event": "finished", "job": "smol.w4", "time": …, "attempt": 1, "fingerprint": {…}, "outcome": {…}}
    {"event": "lost",     "job": …, "reason": …}       its worker is gone
    {"event": "stopped",  "job": …, "reason": …}       Ctrl-C, or its time limit

What counts (``finished``) is on the disk before the driver goes on. A last line that was torn by a crash is cut off:
its job runs again. Lines that no longer matter go when a batch opens the journal, by writing a new file and renaming
it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from effcli.batch.model import Outcome
from effcli.errors import BadInputError
from effcli.reports.model import plain

FORMAT = "effcli.journal/1"
FILE = "journal.jsonl"
_FAMILY, _, _VERSION = FORMAT.partition("/")

Kind = Literal["started", "finished", "lost", "stopped"]
_FIRST = json.dumps({"format": FORMAT})
_KINDS = ("started", "finished", "lost", "stopped")


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes
    ----------
    event : str
        ``started``, ``finished``, ``lost`` or ``stopped``.
    job : str
    time : float
        Seconds since the epoch.
    attempt : int
    worker : str or None
    reason : str or None
        Of ``lost`` and ``stopped``.
    fingerprint : mapping or None
        Of ``started`` and ``finished``: what the job depended on when the attempt began.
    outcome : Outcome or None
        Of ``finished``.
    """

    event: Kind
    job: str
    time: float
    attempt: int
    worker: str | None = None
    reason: str | None = None
    fingerprint: Mapping[str, Any] | None = None
    outcome: Outcome | None = None

    def to_json(self) -> str:
        """Return the entry on one line."""
        data = {key: value for key, value in plain(self).items() if value is not None}
        return json.dumps(data, allow_nan=False, ensure_ascii=False)


@dataclass(frozen=True)
class Record:
    """What the journal says of one job.

    Attributes
    ----------
    last : Entry
        What was noted last.
    passed : Entry or None
        When it last passed: its output may still be there, whatever was tried and stopped since.
    """

    last: Entry
    passed: Entry | None = None

    def then(self, entry: Entry) -> Record:
        """Return the record after one more line."""
        good = entry.outcome is not None and entry.outcome.status == "passed"
        return Record(entry, entry if good else self.passed)

    def entries(self) -> tuple[Entry, ...]:
        """Return the lines that say the same in as few as possible."""
        return (self.last,) if self.passed in (None, self.last) else (self.passed, self.last)


class Journal:
    """The journal of one output, open for appending; the caller holds the lock. Use it as a context manager.

    Attributes
    ----------
    path : Path
    records : dict of str to Record
        What earlier runs left, by job. Lines that are appended do not change it, so that memory stays flat.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.records, lines, whole = _replay(self.path)
        if lines > sum(len(record.entries()) for record in self.records.values()) or not whole:
            _rewrite(self.path, self.records)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def append(self, entry: Entry) -> None:
        """Add a line; one that says ``finished`` is on the disk when this returns.

        Raises
        ------
        OSError
            If it cannot be written; the journal is then as it was before.
        """
        line = (entry.to_json() + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            while line:  # a disk that fills up takes a part of a line, and says why at the next write
                line = line[os.write(self._file, line) :]
            if entry.event == "finished":
                os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise


def read(folder: Path) -> dict[str, Record]:
    """Return what the journal in ``folder`` says of each job, without touching it.

    Raises
    ------
    BadInputError
        If it is damaged, or from a newer release.
    """
    return _replay(folder / FILE)[0]


def _replay(path: Path) -> tuple[dict[str, Record], int, bool]:
    """Return the records, how many lines they came from, and whether the file ends as it should."""
    records: dict[str, Record] = {}
    lines, whole = 0, False
    try:
        with path.open("rb") as file:
            for number, raw, last in _lines(file):
                try:
                    entry = _parse(path, raw, first=number == 1)
                except (ValueError, KeyError, TypeError):
                    if last:
                        return records, lines, False
                    remedy = "remove that line (its job may run again)" if number > 1 else f"put back {_FIRST}"
                    raise BadInputError(
                        f"line {number} of the journal '{path}' is damaged; {remedy}, or remove the file to run every "
                        "job again"
                    ) from None
                if last and not raw.endswith(b"\n"):
                    return records, lines, False
                whole = True
                if entry is not None:
                    lines += 1
                    known = records.get(entry.job)
                    records[entry.job] = Record(entry).then(entry) if known is None else known.then(entry)
    except FileNotFoundError:
        return {}, 0, False
    return records, lines, whole


def _lines(file: Any) -> Iterator[tuple[int, bytes, bool]]:
    """Yield every line with its number and whether it is the last."""
    number, line = 1, file.readline()
    while line:
        following = file.readline()
        yield number, line, not following
        number, line = number + 1, following


def _parse(path: Path, raw: bytes, *, first: bool) -> Entry | None:
    data = json.loads(raw)
    if not isinstance(data, dict):
        raise ValueError("no mapping")
    if first:
        _check_format(path, data["format"])
        return None
    if data["event"] not in _KINDS:
        raise ValueError("unknown event")
    outcome = data.pop("outcome", None)
    return Entry(**data, outcome=None if outcome is None else Outcome(**outcome))


def _check_format(path: Path, text: str) -> None:
    family, _, version = text.partition("/")
    if family == _FAMILY and version.isdecimal() and int(version) > int(_VERSION):
        raise BadInputError(
            f"the journal '{path}' has the format {text}, newer than the {FORMAT} that this release reads; "
            "pip install -U effcli, or choose another --output"
        )
    if text != FORMAT:
        raise ValueError(text)


def _rewrite(path: Path, records: Mapping[str, Record]) -> None:
    """Put a journal with only the lines that matter in place of what is there, whole or not at all."""
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(_FIRST + "\n")
            for record in records.values():
                file.writelines(entry.to_json() + "\n" for entry in record.entries())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
