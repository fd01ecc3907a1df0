"""What ``search:`` in a jobs file says: which parameters may vary, what is wanted, and what must hold.

::

    model: smol
    passes:
      - quantize: {scheme: {choose: [w4a16, w8a16]}, group_size: 64}      a value, or what it may be
      - optional: {kv-pq: {bits: {from: 2, to: 4}}}                       a pass that a trial may leave out
    minimize: tpot
    subject_to: ["ppl<=+2%"]

A mapping with ``choose``, or with ``from`` and ``to``, is a choice; whatever else stands there is the value itself.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from effcli import gates
from effcli.errors import BadInputError, did_you_mean
from effcli.recipes import Calibration, Evaluation

QUALITY = ("ppl", "kl", "kl_p99", "top1", "accuracy")
"""Metrics of :data:`effcli.gates.METRICS` that say what is left of the model; the others say what it costs."""
HIGHER_IS_BETTER = frozenset({"top1", "accuracy", "tokens_per_second"})

TRIALS = 20

_DURATION = re.compile(r"(\d+(?:\.\d*)?)\s*(s|m|min|h|d)")
_UNIT_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _number(value: Any) -> Any:
    """Read ``1e-5``, which YAML takes for text, as the number that it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"is no number: {value!r}") from None
    if isinstance(value, bool):
        raise ValueError(f"is no number: {value!r}")
    return value


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = _DURATION.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"is no time: {value!r}; write e.g. 90s, 30m or 2h")
    return float(found[1]) * _UNIT_SECONDS[found[2]]


Number = Annotated[int | float, BeforeValidator(_number)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]


class Choice(_Strict):
    """One of several values."""

    choose: tuple[Any, ...] = Field(min_length=1, description="The values.")

    def values(self) -> tuple[Any, ...]:
        """Return them."""
        return self.choose


class Range(_Strict):
    """A number between two others, both included; whole numbers where all that is given is whole."""

    low: Number = Field(alias="from", description="Smallest value.")
    high: Number = Field(alias="to", description="Largest value.")
    step: Number | None = Field(default=None, description="Only every so many; of whole numbers, 1.")
    log: bool = Field(default=False, description="Evenly spread over orders of magnitude.")

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low >= self.high:
            raise ValueError(f"from {self.low} to {self.high} is no range; 'from' is less than 'to'")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step {self.step} leaves one value of the range; it is above 0 and at most to - from")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a range above 0, and it begins at {self.low}")
        if self.log and self.step is not None:
            raise ValueError("has step and log; leave one out")
        return self

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return all(isinstance(item, int) for item in (self.low, self.high, self.step or 1))

    def values(self) -> tuple[int | float, ...] | None:
        """Return all of them, None where they cannot be counted."""
        step = self.step or (1 if self.whole else None)
        if step is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return tuple(self.low + step * number for number in range(count))


class Step(_Strict):
    """One pass, with parameters that are values, :class:`Choice` or :class:`Range`."""

    name: str
    parameters: dict[str, Any]
    optional: bool = False

    @field_validator("parameters")
    @classmethod
    def _choices(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {key: _choice(key, item) for key, item in value.items()}


class SearchSpec(_Strict):
    """One search; see the module's docstring for how it is written."""

    model: str = Field(description="Name of a model of this file.")
    passes: tuple[Step, ...] = Field(description="Passes in order, as in a recipe; values may be choices.")
    minimize: str | None = Field(default=None, description="Metric to make small, as gates name it: tpot.")
    maximize: str | None = Field(default=None, description="Metric to make large, instead.")
    subject_to: tuple[str, ...] = Field(default=(), description="Gates that a result has to keep: ppl<=+2%.")
    trials: int | None = Field(default=None, ge=1, description="Recipes to try at most; default 20, of a grid all.")
    time: Seconds | None = Field(default=None, description="Start no further trial after this time: 2h.")
    seed: int = Field(default=0, ge=0, description="Of the sampler, and of the recipes.")
    sampler: Literal["tpe", "random", "grid"] = Field(default="tpe", description="How the next trial is chosen.")
    storage: str | None = Field(default=None, description="Optuna storage URL; default: SQLite in the output folder.")
    prune: bool = Field(default=True, description="Give a trial up after a look at little text, where that is clear.")
    prune_tokens: int = Field(default=1024, ge=64, description="Tokens of that look.")
    evaluation: Evaluation = Evaluation()
    calibration: Calibration = Calibration()
    context: int | None = Field(default=None, ge=1, description="Tokens of the point that is measured; default 512.")
    batch: int = Field(default=1, ge=1, description="Sequences of the point that is measured.")
    device: str = Field(default="auto", description="auto or a torch name.")
    keep: Literal["front", "best", "all"] = Field(
        default="front", description="Whose weights stay: the Pareto front's, the best trial's, or all."
    )

    @field_validator("passes", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError("is a list of passes, like: [{quantize: {scheme: {choose: [w4a16, w8a16]}}}]")
        return [_step(item) for item in value]

    @field_validator("minimize", "maximize")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in gates.METRICS:
            near = did_you_mean(value, gates.METRICS)
            raise ValueError(f"is the unknown metric '{value}'{near}; known: {', '.join(gates.METRICS)}")
        return value

    @field_validator("subject_to")
    @classmethod
    def _gates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                gates.parse(text)
            except BadInputError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _one_target(self) -> SearchSpec:
        if (self.minimize is None) == (self.maximize is None):
            raise ValueError("needs one of minimize and maximize, like: minimize: tpot")
        if all(step.optional for step in self.passes):
            raise ValueError("has only optional passes; make one of them certain, or a trial may have none")
        if self.sampler == "grid":
            for name, space in self.spaces().items():
                if space.values() is None:
                    raise ValueError(f"sampler grid cannot count the values of '{name}'; give it a step")
        return self

    @property
    def limit(self) -> int | None:
        """How many recipes to try at most, None for all."""
        return TRIALS if self.trials is None and self.sampler != "grid" else self.trials

    @property
    def metric(self) -> str:
        """The metric that is wanted small or large."""
        found = self.minimize or self.maximize
        assert found is not None
        return found

    def spaces(self) -> dict[str, Choice | Range]:
        """Return what may vary, by the name that a trial has it under: ``quantize.scheme``, ``use kv-pq``."""
        found: dict[str, Choice | Range] = {}
        for label, step in self._labelled():
            if step.optional:
                found[f"use {label}"] = Choice(choose=(True, False))
            found |= {
                f"{label}.{key}": value for key, value in step.parameters.items() if isinstance(value, (Choice, Range))
            }
        return found

    def needed(self, values: Mapping[str, Any]) -> str | None:
        """Return the next thing to decide after these values, None where all is; an absent pass has no parameters."""
        for label, step in self._labelled():
            if step.optional and f"use {label}" not in values:
                return f"use {label}"
            if step.optional and not values[f"use {label}"]:
                continue
            for key, value in step.parameters.items():
                if isinstance(value, (Choice, Range)) and f"{label}.{key}" not in values:
                    return f"{label}.{key}"
        return None

    def chosen(self, values: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
        """Return the passes of a recipe with these values."""
        return [
            {step.name: {key: values.get(f"{label}.{key}", value) for key, value in step.parameters.items()}}
            for label, step in self._labelled()
            if values.get(f"use {label}", True)
        ]

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yield every set of values once, where they can be counted."""
        spaces = self.spaces()
        waiting: list[dict[str, Any]] = [{}]
        while waiting:
            values = waiting.pop()
            name = self.needed(values)
            if name is None:
                yield values
                continue
            waiting.extend({**values, name: value} for value in reversed(spaces[name].values() or ()))

    def _labelled(self) -> Iterator[tuple[str, Step]]:
        """Yield each step with a name of its own: the pass's, and for the second of one pass ``quantize#2``."""
        seen: dict[str, itertools.count[int]] = {}
        for step in self.passes:
            number = next(seen.setdefault(step.name, itertools.count(1)))
            yield (step.name if number == 1 else f"{step.name}#{number}"), step


def _step(item: Any) -> Any:
    if isinstance(item, Step):
        return item
    optional = isinstance(item, Mapping) and set(item) == {"optional"}
    inner = item["optional"] if optional else item
    if isinstance(inner, str):
        inner = {inner: {}}
    if isinstance(inner, Mapping) and {"name", "parameters"} <= set(inner):
        return inner
    if not isinstance(inner, Mapping) or len(inner) != 1:
        raise ValueError(f"has {item!r}, which is not a pass; write e.g. quantize: {{scheme: w4a16}}")
    ((name, parameters),) = inner.items()
    return {"name": name, "parameters": parameters or {}, "optional": optional}


def _choice(key: str, value: Any) -> Any:
    kinds: dict[str, type[Choice | Range]] = {"choose": Choice, "from": Range, "to": Range}
    kind = next((kinds[word] for word in kinds if isinstance(value, Mapping) and word in value), None)
    if kind is None:
        return value
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (key, *first["loc"]))
        raise ValueError(f"'{where}': {first['msg'].removeprefix('Value error, ')}") from None
