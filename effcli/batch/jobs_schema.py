"""The JSON Schema of a jobs file, for editors: completes keys, passes and their parameters, and marks typos.

It is made from the models that read the file and the parameters of the passes that come with effcli. What needs more
than one place of the file (names, circles, rules that exclude nothing) only ``effcli batch`` finds.
"""

from __future__ import annotations

from typing import Any

from effcli.batch.entries import VERSION, Entries
from effcli.batch.search_space import Choice, Range

TITLE = f"effcli.jobs/{VERSION}"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_OWN_PASSES = ("quantize", "kv-pq", "loop", "lemica")
_REFERENCE = {"type": "string", "pattern": r"\$\{.+\}", "description": "Given with --set NAME=VALUE."}
_CHOICES = ({"$ref": "#/$defs/Choice"}, {"$ref": "#/$defs/Range"})
_SCALARS = ("integer", "number", "boolean")


def jobs_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.jobs/1`` (draft 2020-12); needs no torch."""
    schema = Entries.model_json_schema(ref_template="#/$defs/{model}")
    definitions: dict[str, Any] = schema["$defs"]
    for kind in (Choice, Range):
        definitions[kind.__name__] = kind.model_json_schema()
    definitions["Pass"], definitions["SearchedPass"] = _passes(definitions)
    del definitions["Step"]
    _set(definitions["RecipeEntry"], "passes", _list_of("Pass"))
    _set(definitions["SearchSpec"], "passes", _list_of("SearchedPass"))
    _set(definitions["SearchSpec"], "time", {"type": ["number", "string", "null"]})
    top = _with_references(_tidy(schema))
    definitions = top.pop("$defs")
    return {
        "$schema": _DIALECT,
        "$id": f"{TITLE.replace('/', '-')}.schema.json",
        **top,
        "title": TITLE,
        "$defs": {"reference": _REFERENCE, **dict(sorted(definitions.items()))},
    }


def _set(owner: dict[str, Any], key: str, schema: dict[str, Any]) -> None:
    """Replace what a key takes, and keep what it is for."""
    owner["properties"][key] = {**schema, "description": owner["properties"][key]["description"]}


def _list_of(definition: str) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": {"$ref": f"#/$defs/{definition}"}}


def _passes(definitions: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a pass of a recipe, and one of a search, may be; add each pass's parameters to the definitions."""
    from passes import registry

    given: dict[str, Any] = {}
    searched: dict[str, Any] = {}
    for name in _OWN_PASSES:
        kind = registry.load(name)
        parameters = kind.parameters_type.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(parameters.pop("$defs", {}))
        definitions[f"{name}-parameters"] = parameters
        free = {
            key: {"anyOf": [{"$ref": f"#/$defs/{name}-parameters/properties/{key}"}, *_CHOICES]}
            for key in parameters["properties"]
        }
        definitions[f"searched-{name}-parameters"] = {**parameters, "properties": free}
        given[name], searched[name] = (
            {"anyOf": [{"$ref": f"#/$defs/{prefix}{name}-parameters"}, {"type": "null"}]}
            for prefix in ("", "searched-")
        )
    inner = _pass(searched)
    optional = {
        "type": "object",
        "properties": {"optional": inner},
        "required": ["optional"],
        "additionalProperties": False,
        "description": "A pass that a trial may leave out.",
    }
    return _pass(given), {"anyOf": [optional, inner]}


def _pass(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of ``quantize`` and ``quantize: {…}``; passes of other packages take anything."""
    named = {
        "type": "object",
        "properties": parameters,
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": {"type": ["object", "null"]},
    }
    return {"anyOf": [{"type": "string", "minLength": 1}, named]}


def _tidy(node: Any) -> Any:
    """Leave out titles that only repeat a name; keep the first paragraph of docstrings, on one line."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _tidy(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].partition("\n\n")[0].split())
    return kept


def _with_references(node: Any) -> Any:
    """Let ``${NAME}`` stand where a number or truth value is wanted; where a text is, it is one already."""
    if isinstance(node, list):
        return [_with_references(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _with_references(value) for key, value in node.items()}
    if found.get("type") in _SCALARS:
        about = {key: found.pop(key) for key in ("description", "default") if key in found}
        return {"anyOf": [found, {"$ref": "#/$defs/reference"}], **about}
    return found
