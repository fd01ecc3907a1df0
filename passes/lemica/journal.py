"""What a build of an error graph has measured so far, on disk, so that a killed one goes on.

::

    journal.jsonl   {"recording": …, "reuse": "last"}                     what the measurements depend on
                    {"check": {"noise": 0.0, "as_recorded": false}}       how well replays work
                    {"edge": [0, 2], "samples": [0, 1], "errors": [0.1, 0.2]}
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """How well replays give the recorded result back.

    Attributes
    ----------
    noise : float
        Largest error of a replay that reuses nothing of another step.
    as_recorded : bool
        Whether replays must have the batch of the recording: one edge at a time.
    """

    noise: float
    as_recorded: bool


class Journal:
    """What is measured so far, one JSON object a line; a line that a kill cut short is dropped.

    Parameters
    ----------
    path : Path
    header : mapping
        What the measurements depend on; a journal with another header is begun anew.

    Attributes
    ----------
    check : Check or None
    errors : dict
        By edge, then sample.
    path, header
        As given.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header = dict(header)
        self.check: Check | None = None
        self.errors: dict[tuple[int, int], dict[int, float]] = {}
        lines = list(_whole_lines(path))
        if not lines or lines[0] != dict(header):
            lines = [dict(header)]
        for line in lines[1:]:
            if "check" in line:
                self.check = Check(**line["check"])
            else:
                start, end = line["edge"]
                self.errors.setdefault((start, end), {}).update(zip(line["samples"], line["errors"], strict=True))
        draft = path.with_name(path.name + ".part")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(draft, path)

    def add_check(self, check: Check) -> None:
        """Write down how well replays work."""
        self.check = check
        self._append([{"check": asdict(check)}])

    def add(self, end: int, rows: Sequence[tuple[int, int]], errors: Sequence[float]) -> None:
        """Write down what a batch has measured: of each row (i, sample), the error of edge (i, ``end``)."""
        for (start, sample), error in zip(rows, errors, strict=True):
            self.errors.setdefault((start, end), {})[sample] = error
        starts = dict.fromkeys(start for start, _ in rows)
        lines = []
        for start in starts:
            taken = [sample for other, sample in rows if other == start]
            lines.append(
                {"edge": [start, end], "samples": taken, "errors": [self.errors[start, end][item] for item in taken]}
            )
        self._append(lines)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal up to the first that is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError), path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
