"""Find passes by name through the ``effcli.passes`` entry point group, and check the order of a chain of them.

Listing names imports nothing; a pass's module is imported when it is first asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import EntryPoint

from passes.base import Pass, PassError
from profilers.plugins import discover, named

GROUP = "effcli.passes"
WEIGHTS = frozenset({"weights", "structure"})


@functools.cache
def _entry_points() -> dict[str, EntryPoint]:
    return discover(GROUP, "pass", PassError)


def names() -> tuple[str, ...]:
    """Return the names of all installed passes, sorted, without importing any."""
    return tuple(sorted(_entry_points()))


def load(name: str) -> type[Pass]:
    """Import the pass called ``name``.

    Raises
    ------
    PassError
        If there is no such pass, or what the entry point names is not a :class:`passes.base.Pass`.
    """
    entry = named(_entry_points(), name, "pass", PassError)
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, Pass)) or found.name != name:
        raise PassError(f"entry point '{entry.value}' does not hold a Pass named '{name}'")
    return found


def check_order(chain: Sequence[Pass]) -> None:
    """Refuse a chain of passes whose order or combination one of them forbids.

    Raises
    ------
    PassError
        Naming the two passes and the order that works.
    """
    for position, first in enumerate(chain):
        for second in chain[position + 1 :]:
            if second.name in first.excludes or first.name in second.excludes:
                raise PassError(
                    f"pass '{first.name}' can run only once; leave one out"
                    if first.name == second.name
                    else f"passes '{first.name}' and '{second.name}' cannot be combined; leave one out"
                )
            misplaced = second.name in first.after or first.name in second.before
            # What a pass adds beside the weights is made for them, and a pass that writes new ones leaves it behind.
            if misplaced or (second.changes & WEIGHTS and not first.changes & WEIGHTS):
                raise PassError(
                    f"pass '{first.name}' must come after '{second.name}'; "
                    f"give --pass {second.name} before --pass {first.name}"
                )
