"""Recipes: which passes to run, on what text, with which seed and gates; the same recipe gives the same checkpoint.

::

    version: 1
    seed: 0
    passes:
      - quantize: {scheme: w4a16}
    calibration: {text: my-calibration.txt}
    evaluation: {text: my-evaluation.txt, tokens: 8192}
    gates: ["ppl<=+3%", "size<=0.5x"]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator

from effcli.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    from passes.base import Pass

VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """Where calibration samples come from; how many and how long is up to each pass."""

    text: Path | None = Field(default=None, description="UTF-8 file; default: a part of the Python documentation.")

    @field_serializer("text")
    def _as_text(self, value: Path | None) -> str | None:
        return None if value is None else str(value)


class Evaluation(_Strict):
    """What quality is measured on."""

    text: Path | None = Field(
        default=None, description="UTF-8 file; default: another part of the Python documentation."
    )
    dataset: str | None = Field(default=None, description="Data set instead: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT.")
    tokens: int = Field(default=8192, ge=256, description="Tokens to evaluate at most.")
    context: int = Field(default=512, ge=32, description="Tokens of one window; windows do not overlap.")
    tasks: Path | None = Field(default=None, description="JSONL file of multiple-choice or cloze tasks.")
    first_look: int | None = Field(
        default=None, ge=64, description="Tokens to look at first: a gate that is clearly missed on them ends the run."
    )

    @field_serializer("text", "tasks")
    def _as_text(self, value: Path | None) -> str | None:
        return None if value is None else str(value)


class Step(_Strict):
    """One pass by name, and its parameters."""

    name: str
    parameters: dict[str, Any]

    @property
    def label(self) -> str:
        """As ``--pass`` takes it."""
        given = ",".join(f"{key}={_written(value)}" for key, value in self.parameters.items())
        return f"{self.name}:{given}" if given else self.name


class Recipe(_Strict):
    """A whole recipe; see the module's docstring for the file."""

    version: int = VERSION
    seed: int = 0
    passes: tuple[Step, ...]
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    gates: tuple[str, ...] = ()

    @field_validator("passes", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        """Take ``- quantize: {scheme: w4a16}`` and ``- quantize`` as well as name and parameters spelled out."""
        if not isinstance(value, (list, tuple)):
            raise ValueError("is a list, like: [{quantize: {scheme: w4a16}}]")
        if not value:
            raise ValueError("is empty; name at least one pass")
        return [_step(item) for item in value]

    def to_yaml(self) -> str:
        """Return the recipe as :func:`read` takes it."""
        data = self.model_dump(mode="json", exclude={"passes"}, exclude_none=True)
        steps = [{step.name: dict(step.parameters)} for step in self.passes]
        text: str = yaml.safe_dump(
            {"version": data.pop("version"), "seed": data.pop("seed"), "passes": steps, **data}, sort_keys=False
        )
        return text

    def chain(self) -> tuple[Pass, ...]:
        """Return the passes with their parameters validated and their order checked.

        Raises
        ------
        passes.base.PassError
            For an unknown pass or parameter, a bad value, or an order that a pass forbids.
        """
        from passes import registry

        chain = tuple(registry.load(step.name).from_mapping(step.parameters) for step in self.passes)
        registry.check_order(chain)
        return chain


def _step(item: Any) -> Any:
    if isinstance(item, (Step, str)):
        return {"name": item, "parameters": {}} if isinstance(item, str) else item
    if isinstance(item, Mapping) and set(item) == {"name", "parameters"}:
        return item
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, parameters),) = item.items()
        return {"name": name, "parameters": parameters or {}}
    raise ValueError(f"has {item!r}, which is not a pass; write e.g. quantize: {{scheme: w4a16}}")


def _written(value: Any) -> str:
    return "+".join(map(_written, value)) if isinstance(value, (list, tuple)) else str(_scalar(value))


def _scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool) or value is None else value


def parse_step(text: str) -> Step:
    """Parse ``name:key=value,key=value`` as ``--pass`` takes it; a list is written ``a+b``.

    Values are read as YAML does (``4`` a number, ``true`` a boolean); whether they suit is the pass's to say.

    Raises
    ------
    BadInputError
        If the text has not that form.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name or (colon and not rest.strip()):
        raise BadInputError(f"--pass '{text}' is not NAME or NAME:KEY=VALUE,…; write e.g. quantize:scheme=w4a16")
    parameters: dict[str, Any] = {}
    for piece in rest.split(",") if rest else ():
        key, equals, value = piece.partition("=")
        key = key.strip()
        if not equals or not key or not value.strip():
            raise BadInputError(f"--pass '{text}': '{piece.strip()}' is not KEY=VALUE; write e.g. scheme=w4a16")
        if key in parameters:
            raise BadInputError(f"--pass '{text}' gives '{key}' twice; leave one out")
        parameters[key] = _value(value.strip())
    return Step(name=name, parameters=parameters)


def _value(text: str) -> Any:
    if "+" in text.strip("+"):
        return [_value(part) for part in text.split("+")]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (str, int, float, bool)) or value is None else text


def read(path: Path) -> Recipe:
    """Read a recipe file.

    Raises
    ------
    BadInputError
        If it cannot be read, is no YAML, is from a newer version, or has an unknown key or a bad value.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"no recipe at '{path}'; see docs/recipes.md for how to write one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot read recipe '{path}': {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise BadInputError(f"recipe '{path}' is not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    return from_mapping(data, f"recipe '{path}'")


def from_mapping(data: Any, where: str = "the recipe") -> Recipe:
    """Check a recipe given as plain data.

    Raises
    ------
    BadInputError
    """
    if not isinstance(data, Mapping):
        raise BadInputError(f"{where} holds no mapping; it starts with: version: {VERSION}")
    version = data.get("version")
    if version is None:
        raise BadInputError(f"{where} has no version; add the line: version: {VERSION}")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BadInputError(f"{where} has version {version!r}; this release reads version {VERSION}")
    if version > VERSION:
        raise BadInputError(
            f"{where} has version {version}, newer than the {VERSION} that this release reads; pip install -U effcli"
        )
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise BadInputError(_explain(where, error)) from None


def from_options(steps: Sequence[str], **settings: Any) -> Recipe:
    """Return the recipe that repeated ``--pass`` options stand for.

    Raises
    ------
    BadInputError
    """
    if not steps:
        raise BadInputError("no pass given; add --pass NAME (see: effcli passes) or --recipe FILE")
    return from_mapping({"version": VERSION, "passes": [parse_step(step) for step in steps], **settings}, "--pass")


def _explain(where: str, error: ValidationError) -> str:
    errors = error.errors()  # what is missing is often what was misspelt
    first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        owners: dict[str, type[BaseModel]] = {"calibration": Calibration, "evaluation": Evaluation}
        owner = owners.get(path[0], Recipe) if len(path) > 1 else Recipe
        known = tuple(owner.model_fields)
        return (
            f"{where} has the unknown key '{'.'.join(path)}'{did_you_mean(path[-1], known)}; known: {', '.join(known)}"
        )
    return f"{where}, '{'.'.join(path)}': {first['msg'].removeprefix('Value error, ')}"
