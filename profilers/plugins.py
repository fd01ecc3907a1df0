"""Find what installed packages offer through an entry point group; nothing is imported until it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points


def discover(group: str, noun: str, error: type[Exception]) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name; two packages with one name raise ``error``."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        known = found.get(entry.name)
        if known is not None and known.value != entry.value:
            raise error(
                f"two installed packages provide a {noun} named '{entry.name}' ({known.value} and {entry.value}); "
                "uninstall one of them"
            )
        found[entry.name] = entry
    return found


def named(found: Mapping[str, EntryPoint], name: str, noun: str, error: type[Exception]) -> EntryPoint:
    """Return the entry point called ``name``; an unknown one raises ``error`` with the closest known name."""
    entry = found.get(name)
    if entry is None:
        close = difflib.get_close_matches(name, sorted(found), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(found)) or 'none installed'}"
        raise error(f"no {noun} named '{name}'; {hint}")
    return entry
