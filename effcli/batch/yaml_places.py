"""Read YAML as plain data that remembers the line and column of every key and value.

Only what a configuration needs is read, as YAML 1.2 reads it: ``on``, ``no`` and ``12:30`` are text, ``1e-4`` is a
number, and keys are always text. A key that stands twice, a tag, and a second document are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from effcli.batch.substitution import PlacedError, Substitution
from effcli.errors import BadInputError, did_you_mean

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_STRING = "tag:yaml.org,2002:str"
_MERGE = "<<"
_MOST_VALUES = 100_000

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where something stands, counted from 1."""

    line: int
    column: int


@dataclass
class Document:
    """A file's data, and where it stands.

    Attributes
    ----------
    path : Path
        As errors name it.
    data : object
        Dictionaries with text as keys, lists, and scalars.
    keys, values : dict
        Place of the key, and of the value, by the way to it: ``("models", "tiny", "dtype")``.
    """

    path: Path
    data: Any = None
    keys: dict[Keys, Place] = field(default_factory=dict)
    values: dict[Keys, Place] = field(default_factory=dict)

    def error(self, way: Sequence[Any], message: str, *, at_key: bool = False) -> BadInputError:
        """Return the error to raise about what stands at ``way``, or, where nothing does, about what holds it."""
        found = self.nearest(way)
        places = self.keys if at_key and found in self.keys else self.values
        return _error(self.path, places.get(found, Place(1, 1)), message)

    def nearest(self, way: Sequence[Any]) -> Keys:
        """Return the way to what is named, left out what the file does not spell.

        ``parameters`` also finds the one value of ``quantize: {…}``, the short form of a pass.
        """
        found: Keys = ()
        for part in way:
            if (*found, part) in self.values:
                found = (*found, part)
            elif part == "parameters":
                while isinstance(here := self.at(found), Mapping) and len(here) == 1:
                    found = (*found, next(iter(here)))
                    if found[-1] != "optional":
                        break
        return found

    def at(self, way: Keys) -> Any:
        """Return the data at a way that is there."""
        data = self.data
        for part in way:
            data = data[part]
        return data


def read(path: Path, variables: Mapping[str, str]) -> Document:
    """Read a YAML file and replace its references to variables.

    Raises
    ------
    BadInputError
        If it cannot be read, is no YAML of this kind, or the references and the variables do not go together.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, _siblings(path))
        raise BadInputError(f"no jobs file at '{path}'{near}; see docs/batch.md for how to write one") from None
    except UnicodeDecodeError as error:
        raise BadInputError(f"'{path}' is not UTF-8 (byte {error.start:,}); save it as UTF-8") from None
    except OSError as error:
        raise BadInputError(f"cannot read '{path}' ({error.strerror}); check the path and who may read it") from None
    return parse(text, variables, path)


def parse(text: str, variables: Mapping[str, str], path: Path) -> Document:
    """Read YAML from text; ``path`` is what errors call it. Raises as :func:`read` does."""
    substitution = None
    try:
        substitution = Substitution(text, variables)
        root = yaml.compose(substitution.text, Loader=yaml.SafeLoader)
        document = Document(path)
        if root is not None:
            _Builder(document, substitution).build(root)
    except PlacedError as error:
        raise _error(path, _place_of(text, error.offset), str(error)) from None
    except yaml.reader.ReaderError as error:
        raise _error(
            path, _place_of(text, error.position), f"has the control character {error.character:#x}; remove it"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise _error(
            path, place, _yaml_problem(substitution.as_written(problem) if substitution else problem)
        ) from None
    except RecursionError:
        raise _error(path, Place(1, 1), "is nested too deeply; write it flatter") from None
    for name in substitution.unused():
        asked = substitution.names()
        known = f"; it asks for: {', '.join(asked)}" if asked else "; it asks for none"
        raise BadInputError(f"'{path}' has no ${{{name}}}{did_you_mean(name, asked)}; leave out --set {name}=…{known}")
    return document


class _Builder:
    """Turns YAML's nodes into data and places."""

    def __init__(self, document: Document, substitution: Substitution) -> None:
        self._document = document
        self._substitution = substitution
        self._open: list[yaml.Node] = []

    def build(self, root: yaml.Node) -> None:
        self._document.data = self._value(root, ())

    def _value(self, node: yaml.Node, way: Keys) -> Any:
        values = self._document.values
        values[way] = _place(node)
        if len(values) > _MOST_VALUES:
            raise self._fail(node, f"has more than {_MOST_VALUES:,} values, anchors expanded; split the file")
        if any(node is other for other in self._open):
            raise self._fail(node, "an anchor that contains itself has no value; write it out")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        implied = "tag:yaml.org,2002:map" if isinstance(node, yaml.MappingNode) else "tag:yaml.org,2002:seq"
        if node.tag != implied:
            raise self._unknown_tag(node)
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, way)
            return [self._value(item, (*way, number)) for number, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, way: Keys) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._fail(key_node, "a key is text, not a list or a mapping; write NAME: VALUE")
            if key_node.value == _MERGE and key_node.style is None:
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            key = self._substitution.replace(key_node.value)
            if key in data:
                first = self._document.keys[*way, key].line
                raise self._fail(key_node, f"'{key}' stands here a second time (first on line {first}); leave one out")
            self._document.keys[*way, key] = _place(key_node)
            data[key] = self._value(value_node, (*way, key))
        for item in merged:
            if not isinstance(item, yaml.MappingNode):
                raise self._fail(item, "'<<' takes a mapping, or a list of them; give the name of an anchor: *NAME")
            if any(item is other for other in self._open):
                raise self._fail(item, "an anchor that contains itself has no value; write it out")
            self._merge(item, way, data)
        return data

    def _merge(self, node: yaml.MappingNode, way: Keys, data: dict[str, Any]) -> None:
        """Add what ``data`` does not have; where it has a key, its own value stays, with its places."""
        inner = Document(self._document.path)
        builder = _Builder(inner, self._substitution)
        builder._open = [*self._open]
        for key, value in builder._value(node, ()).items():
            if key in data:
                continue
            data[key] = value
            for source, target in ((inner.keys, self._document.keys), (inner.values, self._document.values)):
                target.update({(*way, *rest): place for rest, place in source.items() if rest[:1] == (key,)})

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        plain = node.style is None
        text = self._substitution.replace(node.value)
        if not plain and node.tag == _STRING:
            return text
        written = node.tag.rpartition(":")[2]
        if node.tag.startswith("tag:yaml.org,2002:") and written in ("str", "int", "float", "bool", "null"):
            # PyYAML resolves plain scalars as YAML 1.1 does and does not say whether a tag was written, so a plain
            # scalar is looked at again; '!!str 12' is rare, and a quoted "12" says the same.
            return _plain(text) if plain else text
        if plain and written in ("timestamp", "value", "merge"):
            return text
        raise self._unknown_tag(node)

    def _unknown_tag(self, node: yaml.Node) -> PlacedError:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        return self._fail(node, f"the tag '{tag}' is not read here; write the value without it")

    @staticmethod
    def _fail(node: yaml.Node, message: str) -> PlacedError:
        return PlacedError(message, node.start_mark.index)


def _plain(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _place(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _place_of(text: str, offset: int) -> Place:
    before = text[:offset]
    return Place(before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1)


def _error(path: Path, place: Place, message: str) -> BadInputError:
    return BadInputError(f"'{path}', line {place.line}, column {place.column}: {' '.join(message.split())}")


def _yaml_problem(problem: str) -> str:
    if "'\\t'" in problem:
        return "YAML takes no tab here; indent with spaces"
    if "single document" in problem:
        return "a second document begins; a jobs file is one, so remove the line '---'"
    if "mapping values are not allowed" in problem:
        return "a ':' stands where no key can be; indent the line as its neighbours, or put the text in quotes"
    if "undefined alias" in problem:
        return f"{problem}; write &NAME before the value that *NAME stands for"
    return f"is not valid YAML: {problem}; put text with special characters in quotes"


def _siblings(path: Path) -> list[str]:
    return [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
