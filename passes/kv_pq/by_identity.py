"""Keep what was made of an object for as long as the object lives."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

_Made = TypeVar("_Made")
_Of = TypeVar("_Of")


def by_identity(make: Callable[[_Of], _Made]) -> Callable[[_Of], _Made]:
    """Return ``make`` with its results kept by the identity of its argument.

    For objects that hold tensors, which do not compare to one truth value and so cannot be keys of a mapping.
    """
    kept: dict[int, _Made] = {}

    @functools.wraps(make)
    def wrapped(of: _Of) -> _Made:
        made = kept.get(id(of))
        if made is None:
            made = kept[id(of)] = make(of)
            weakref.finalize(of, kept.pop, id(of), None)
        return made

    return wrapped
