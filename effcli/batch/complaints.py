"""What pydantic found wrong with a file, as one line that names the place, the value and the remedy."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from effcli.batch.yaml_places import Document, Place
from effcli.errors import BadInputError, did_you_mean

_WANTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_MOST_SHOWN = 60
_MAY_FOLLOW = ("missing", "too_short")
_CONTINUES = ("is ", "has ", "needs ", "says ")

Way = tuple[int | str, ...]


def first_error(document: Document, model: type[BaseModel], error: ValidationError, way: Way = ()) -> BadInputError:
    """Return the error about what stands first in the file.

    Parameters
    ----------
    document : Document
    model : type
        What was validated.
    error : ValidationError
    way : tuple
        To the validated data.
    """
    found = [*_flat(error, ())]
    # What a list or mapping lacks may only follow from a mistake inside it.
    item = min(found, key=lambda item: (item["type"] in _MAY_FOLLOW, *_order(document, (*way, *item["loc"]))))
    loc = item["loc"]
    whole = (*way, *loc)
    name = ".".join(str(part) for part in document.nearest(whole))
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, loc[:-1])
        return document.error(
            whole,
            f"'{_dotted(whole)}' is an unknown key{did_you_mean(str(loc[-1]), known)}; known: {', '.join(known)}",
            at_key=True,
        )
    if item["type"] == "missing":
        owner = f"'{name}'" if name else "the file"
        return document.error(whole, f"{owner} has no '{loc[-1]}'; add it", at_key=True)
    problem = _problem(item)
    colon = "" if problem.startswith(_CONTINUES) else ":"
    return document.error(whole, f"'{name}'{colon} {problem}" if name else f"the file {problem}")


def _flat(error: ValidationError, way: Way) -> list[ErrorDetails]:
    """Return all errors; one that a validator of ours met inside counts, not the text that pydantic makes of it."""
    found: list[ErrorDetails] = []
    for item in error.errors():
        inner = item.get("ctx", {}).get("error")
        loc = (*way, *item["loc"])
        found += _flat(inner, loc) if isinstance(inner, ValidationError) else [{**item, "loc": loc}]
    return found


def _order(document: Document, way: Way) -> tuple[int, int]:
    found = document.nearest(way)
    place = document.keys.get(found) or document.values.get(found) or Place(0, 0)
    return place.line, place.column


def _problem(item: Mapping[str, Any]) -> str:
    value, kind, given = item["input"], item["type"], shown(item["input"])
    if kind in ("value_error", "assertion_error"):
        return str(item["msg"]).removeprefix("Value error, ")
    wanted = _WANTED.get(kind)
    if wanted is not None:
        return f"is {given}, not {wanted}{_remedy(value, wanted)}"
    if kind == "literal_error":
        options = str(item["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        near = did_you_mean(str(value), options)
        return f"is {given}, which is not known{near}; write one of: {', '.join(options)}"
    if kind in ("too_short", "string_too_short"):
        return "is empty; write one" if kind == "string_too_short" else "is empty; write at least one"
    return f"is {given}; {str(item['msg']).replace('Input should', 'it has to')}"


def _remedy(value: Any, wanted: str) -> str:
    if value is None:
        return f"; write {'{}' if wanted == 'a mapping' else 'one'}, or leave the key out"
    if wanted == "a text" and not isinstance(value, (list, dict)):
        return f'; write it in quotes: "{json.dumps(value)}"'
    if wanted == "a list" and not isinstance(value, dict):
        return f"; write [{value}]"
    return "; write {KEY: VALUE}" if wanted == "a mapping" else "; change it"


def shown(value: Any) -> str:
    """Return a value of the file as a message shows it."""
    if value is None:
        return "empty"
    if isinstance(value, str):
        return f"'{value[:_MOST_SHOWN]}'"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence):
        return "a list"
    return json.dumps(value)


def _dotted(way: Sequence[Any]) -> str:
    return ".".join(str(part) for part in way)


def _known_keys(model: type[BaseModel], way: Way) -> tuple[str, ...]:
    """Return the keys that the model at ``way`` takes."""
    kind: Any = model
    for part in way:
        kind = _model(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names = {field.alias or name: field for name, field in kind.model_fields.items()}
            if part not in names:
                return ()
            kind = names[str(part)].annotation
        elif get_origin(kind) in (dict, tuple):
            kind = get_args(kind)[1 if get_origin(kind) is dict else 0]
    kind = _model(kind)
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return ()
    return tuple(field.alias or name for name, field in kind.model_fields.items())


def _model(kind: Any) -> Any:
    """Return what is left of an annotation without ``Annotated`` and ``| None``."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        (kind, *_) = [item for item in get_args(kind) if item is not type(None)]
        return _model(kind)
    return kind
