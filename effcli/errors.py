"""One error root. Each error knows its exit code; one place (:func:`explain`) turns errors into text.

Exit codes: 0 fine, 1 a bug (or a job of a batch failed), 2 bad input, 3 a gate failed, 4 not enough memory or disk,
130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

EXIT_OK = 0
EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_GATE_FAILED = 3
EXIT_NO_ROOM = 4
EXIT_INTERRUPTED = 130


class EffcliError(Exception):
    """Something the user can act on. The message is one line: the value, what is wrong, the remedy."""

    exit_code = EXIT_BAD_INPUT


class BadInputError(EffcliError):
    """A value the user gave cannot be used."""


class SourceError(BadInputError):
    """A model source cannot be found, read or trusted."""


class NoRoomError(EffcliError):
    """Not enough memory or disk."""

    exit_code = EXIT_NO_ROOM


class InterruptedRunError(EffcliError):
    """Ctrl-C stopped a run whose finished stages are kept."""

    exit_code = EXIT_INTERRUPTED


class GateFailedError(EffcliError):
    """The result was measured and a gate that was asked for does not hold; nothing was published.

    Attributes
    ----------
    gates : str
        What does not hold, without what to do about it.
    """

    exit_code = EXIT_GATE_FAILED

    def __init__(self, message: str, gates: str | None = None) -> None:
        super().__init__(message)
        self.gates = gates or message


class GivenUpError(GateFailedError):
    """A first look at little text showed that a gate on quality will not hold.

    Attributes
    ----------
    figures : dict
        What was measured of quality, by metric of :data:`effcli.gates.METRICS`.
    """

    def __init__(self, message: str, gates: str | None = None, figures: dict[str, float | None] | None = None) -> None:
        super().__init__(message, gates)
        self.figures = figures or {}


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(value, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def explain(error: Exception) -> tuple[str, int]:
    """Return the one line that says what went wrong, and the exit code, for any error."""
    from passes.base import PassDoesNotFitError, PassError
    from profilers.base import DoesNotFitError, ProfilerError

    if isinstance(error, EffcliError):
        return f"error: {error}", error.exit_code
    if isinstance(error, (DoesNotFitError, PassDoesNotFitError)):
        return f"error: {error}", EXIT_NO_ROOM
    if isinstance(error, (ProfilerError, PassError)):
        return f"error: {error}", EXIT_BAD_INPUT
    if hasattr(error, "format_message"):  # typer's usage errors, whichever click they are built on
        return f"error: {error.format_message()}", EXIT_BAD_INPUT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"error: out of memory: {error}; try a smaller --batch or --context", EXIT_NO_ROOM
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"error: no space left on the disk of '{error.filename}'; free some or choose another place",
            EXIT_NO_ROOM,
        )
    name = type(error).__name__
    return f"bug: {name}: {error} (run again with EFFCLI_DEBUG=1 for the traceback and report it)", EXIT_BUG
