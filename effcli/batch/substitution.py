"""``${NAME}`` and ``${NAME:-default}`` in a jobs file, from what the command line gives; never from the environment.

A reference is replaced in the value that holds it, after YAML was read: it cannot change the file's structure. Until
then one character that no text uses stands for it, as often as the reference is long, so that columns stay true.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from effcli.errors import did_you_mean

_REFERENCE = re.compile(r"\$\$\{|\$\{[^}\n]*\}|\$\{")
_BODY = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FIRST, _LAST = 0xF0000, 0xFFFFD
_STAND_IN = re.compile(f"([{chr(_FIRST)}-{chr(_LAST)}])\\1*")


class PlacedError(ValueError):
    """Something in a text cannot be used.

    Attributes
    ----------
    offset : int
        Where in the file's text.
    """

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass(frozen=True)
class _Reference:
    text: str
    offset: int


class Substitution:
    """The references of one text.

    Attributes
    ----------
    text : str
        With stand-ins, of the same length.

    Raises
    ------
    PlacedError
        For a variable whose name cannot be written in a reference, or a text that uses the stand-ins' characters.
    """

    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        for name in variables:
            if not _NAME.fullmatch(name):
                raise PlacedError(f"variable '{name}' is no name of letters, digits and _; rename it")
        if found := _STAND_IN.search(text):
            raise PlacedError("has a private-use character; remove it", found.start())
        self._variables = variables
        self._used: set[str] = set()
        self._references = [_Reference(found[0], found.start()) for found in _REFERENCE.finditer(text)]
        if len(self._references) > _LAST - _FIRST:
            raise PlacedError(f"has more than {_LAST - _FIRST:,} references; split the file")
        numbers = iter(range(_FIRST, _LAST))
        self.text = _REFERENCE.sub(lambda found: chr(next(numbers)) * len(found[0]), text)

    def holds(self, value: str) -> bool:
        """Say whether a value read from ``text`` has references."""
        return _STAND_IN.search(value) is not None

    def as_written(self, value: str) -> str:
        """Return a part of ``text`` as the file has it."""
        return _STAND_IN.sub(lambda found: self._references[ord(found[1]) - _FIRST].text, value)

    def replace(self, value: str) -> str:
        """Return a value read from ``text`` with its references replaced.

        Raises
        ------
        PlacedError
            For a name that was not given and has no default, or what is no reference.
        """
        return _STAND_IN.sub(lambda found: self._value(self._references[ord(found[1]) - _FIRST]), value)

    def _value(self, reference: _Reference) -> str:
        if reference.text == "$${":
            return "${"
        body = _BODY.fullmatch(reference.text)
        if body is None:
            raise PlacedError(
                f"'{reference.text}' is not ${{NAME}} or ${{NAME:-default}}; for the characters themselves write $${{",
                reference.offset,
            )
        name, default = body.groups()
        self._used.add(name)
        value = self._variables.get(name, default)
        if value is None:
            raise PlacedError(
                f"{reference.text} has no value{did_you_mean(name, self._variables)}; give it with "
                f"--set {name}=VALUE, or write a default: ${{{name}:-VALUE}}",
                reference.offset,
            )
        return value

    def unused(self) -> tuple[str, ...]:
        """Return the variables that were given and that nothing asked for."""
        return tuple(name for name in self._variables if name not in self._used)

    def names(self) -> tuple[str, ...]:
        """Return the names that the text asked for."""
        return tuple(sorted(self._used))
