"""Find instruments by name through the ``effcli.profilers`` entry point group.

Listing names imports nothing; an instrument's module is imported when it is first asked for.
"""

from __future__ import annotations

import difflib
import functools
from importlib.metadata import EntryPoint, entry_points

from profilers.base import Profiler, ProfilerError

GROUP = "effcli.profilers"


@functools.cache
def _entry_points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        known = found.get(entry.name)
        if known is not None and known.value != entry.value:
            raise ProfilerError(
                f"two installed packages provide a profiler named '{entry.name}' ({known.value} and {entry.value}); "
                "uninstall one of them"
            )
        found[entry.name] = entry
    return found


def names() -> tuple[str, ...]:
    """Return the names of all installed instruments, sorted, without importing any."""
    return tuple(sorted(_entry_points()))


def load(name: str) -> Profiler:
    """Import the instrument called ``name``.

    Raises
    ------
    ProfilerError
        If there is no such instrument, or what the entry point names is not a :class:`profilers.base.Profiler`.
    """
    entry = _entry_points().get(name)
    if entry is None:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names()) or 'none installed'}"
        raise ProfilerError(f"no profiler named '{name}'; {hint}")
    profiler = entry.load()
    if not isinstance(profiler, Profiler) or profiler.name != name:
        raise ProfilerError(f"entry point '{entry.value}' does not hold a Profiler named '{name}'")
    return profiler


def in_order(selected: tuple[str, ...]) -> tuple[Profiler, ...]:
    """Load the selected instruments, those that others read first, otherwise in the order given.

    Raises
    ------
    ProfilerError
        For an unknown name, or instruments that require each other.
    """
    chosen = {name: load(name) for name in selected}
    ordered: list[Profiler] = []
    state: dict[str, str] = {}

    def visit(profiler: Profiler) -> None:
        if state.get(profiler.name) == "done":
            return
        if state.get(profiler.name) == "open":
            raise ProfilerError(f"profilers require each other in a circle through '{profiler.name}'")
        state[profiler.name] = "open"
        for needed in profiler.requires:
            if needed in chosen:
                visit(chosen[needed])
        state[profiler.name] = "done"
        ordered.append(profiler)

    for profiler in chosen.values():
        visit(profiler)
    return tuple(ordered)
