"""Find instruments by name through the ``effcli.profilers`` entry point group.

Listing names imports nothing; an instrument's module is imported when it is first asked for.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint

from profilers.base import Profiler, ProfilerError
from profilers.plugins import discover, named

GROUP = "effcli.profilers"


@functools.cache
def _entry_points() -> dict[str, EntryPoint]:
    return discover(GROUP, "profiler", ProfilerError)


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
    entry = named(_entry_points(), name, "profiler", ProfilerError)
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
