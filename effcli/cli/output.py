"""Where results, warnings and files go: results to stdout, the rest to stderr, files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

from effcli.disk import new_file_mode
from effcli.errors import BadInputError, NoRoomError, did_you_mean

SUFFIXES = {".json": "json", ".md": "markdown", ".html": "html", ".htm": "html", ".txt": "human", ".csv": "csv"}


class Format(StrEnum):
    """How a report is written."""

    human = "human"
    json = "json"
    markdown = "markdown"
    html = "html"
    csv = "csv"


def format_of(path: Path, chosen: Format | None) -> str:
    """Return the format for ``path``: the one chosen, or the one its suffix names.

    Raises
    ------
    BadInputError
        If neither says.
    """
    if chosen is not None:
        return chosen.value
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise BadInputError(f"cannot tell the format of '{path}' from its name; add --format or one of {known}")
    return SUFFIXES[path.suffix.lower()]


def check_writable(path: Path) -> None:
    """Fail now rather than after minutes of measuring if ``path`` cannot be written.

    Raises
    ------
    BadInputError
        If its folder does not exist or cannot be written, or it is a folder.
    """
    folder = path.parent
    if path.is_dir():
        raise BadInputError(f"output '{path}' is a folder; name a file")
    if not folder.is_dir():
        raise BadInputError(f"output folder '{folder}' does not exist; make it first: mkdir -p '{folder}'")
    try:
        handle, probe = tempfile.mkstemp(dir=folder, prefix=".effcli-")
    except OSError as error:
        raise _cannot_write(path, error) from None
    os.close(handle)
    os.unlink(probe)


def checked_outputs(output: list[Path] | None, chosen: Format | None) -> list[Path]:
    """Return the files to write, after checking that each has a format and can be written.

    Raises
    ------
    BadInputError
    """
    outputs = list(output or [])
    for path in outputs:
        format_of(path, chosen)
        check_writable(path)
    return outputs


def write_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all.

    Raises
    ------
    BadInputError, NoRoomError
        If the file cannot be written; nothing is left behind.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".effcli-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, new_file_mode())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _cannot_write(path: Path, error: OSError) -> BadInputError | NoRoomError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoomError(f"no space left for '{path}'; free some or choose another place with -o")
    return BadInputError(f"cannot write '{path}': {error.strerror}; choose another place with -o")


@contextlib.contextmanager
def perhaps_unread(stream: TextIO) -> Iterator[None]:
    """Let the block write to a stream whose reader (head, less) may have left: the work goes on all the same."""
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def emit(data: dict[str, Any], chosen: Format | None, outputs: list[Path], *, quiet: bool) -> None:
    """Send a report where the user asked: to files, or to stdout.

    With files, stdout gets only the verdict and the file names; with ``quiet``, nothing.
    """
    from effcli.reports.render import render

    for path in outputs:
        write_file(path, render(data, format_of(path, chosen)))
    if outputs:
        if not quiet:
            from effcli.reports.verdict import verdict

            for line in [*verdict(data), *(f"wrote {path}" for path in outputs)]:
                sys.stdout.write(line + "\n")
        return
    name = (chosen or Format.human).value
    if name == "human":
        from rich.console import Console

        render(data, name, console=Console())
    else:
        sys.stdout.write(render(data, name))


def positive_numbers(text: str, option: str) -> tuple[int, ...]:
    """Parse ``"1,8"`` into ``(1, 8)``.

    Raises
    ------
    BadInputError
        For anything but positive whole numbers.
    """
    values = []
    for piece in text.split(","):
        if not piece.strip().isdecimal() or int(piece) < 1:
            raise BadInputError(
                f"{option} '{text}': '{piece.strip()}' is not a positive whole number; give e.g. 512,4096"
            )
        values.append(int(piece))
    return tuple(dict.fromkeys(values))


def fractions(text: str, option: str) -> tuple[float, ...]:
    """Parse ``"0.3,0.8"`` into ``(0.3, 0.8)``.

    Raises
    ------
    BadInputError
        For anything but numbers between 0 and 1.
    """
    values = []
    for piece in text.split(","):
        try:
            value = float(piece)
        except ValueError:
            value = -1.0
        if not 0.0 <= value < 1.0:
            raise BadInputError(f"{option} '{text}': '{piece.strip()}' is not a number from 0 up to 1; give e.g. 0.3")
        values.append(value)
    return tuple(dict.fromkeys(values))


def chosen_names(text: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...] | None:
    """Parse a comma-separated list of known names.

    Raises
    ------
    BadInputError
        For an unknown or an empty name.
    """
    if text is None:
        return None
    picked = tuple(dict.fromkeys(piece.strip() for piece in text.split(",")))
    for name in picked:
        if name not in known:
            raise BadInputError(f"{option} '{name}' is not known{did_you_mean(name, known)}; known: {', '.join(known)}")
    return picked


def warn(lines: Iterable[str]) -> None:
    """Write each line to stderr as a warning."""
    for line in lines:
        sys.stderr.write(f"warning: {' '.join(line.split())}\n")
