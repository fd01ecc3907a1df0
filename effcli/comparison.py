"""Hold two saved reports against each other, and refuse what cannot be compared.

::

    profile, or optimize report (its after) ──┐
                                              ├─ same device, dtype, text, point, architecture? ──> Comparison
    profile, or optimize report (its after) ──┘            no: refused unless told otherwise
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from effcli.errors import BadInputError
from effcli.reports.changes import (
    Change,
    Side,
    changes,
    mapping,
    number,
    optimize_sides,
    paired_intervals,
    places,
    profile_side,
)
from effcli.reports.model import COMPARE_SCHEMA, OPTIMIZE_SCHEMA, PROFILE_SCHEMA, plain, read_report


@dataclass(frozen=True)
class ComparedSide:
    """Which model stood on one side, and under which conditions it was measured."""

    name: str
    path: str
    schema: str
    created: str | None
    architecture: str | None
    device: str | None
    dtype: str | None
    text: str | None


@dataclass(frozen=True)
class Mismatch:
    """A condition that is not the same on both sides."""

    what: str
    a: str
    b: str


@dataclass(frozen=True)
class ComparedPoint:
    """Changes at one batch and context."""

    batch: int
    context: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Comparison:
    """Two reports held against each other; ``before`` in a change is A, ``after`` is B.

    Attributes
    ----------
    batch, context : int or None
        The first point that both hold; None where neither was timed.
    changes : tuple of Change
    points : tuple of ComparedPoint
        Every further point that both hold, times only.
    mismatches : tuple of Mismatch
        What differs although ``anyway`` let it pass.
    notes : tuple of str
    """

    schema: str
    created: str
    a: ComparedSide
    b: ComparedSide
    batch: int | None
    context: int | None
    changes: tuple[Change, ...]
    points: tuple[ComparedPoint, ...]
    mismatches: tuple[Mismatch, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data

    def to_json(self) -> str:
        """Return the comparison as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Measured:
    """One model of a saved report, with the conditions under which it was measured."""

    side: Side
    about: ComparedSide
    report: Mapping[str, Any]


def compare(a: Path | str, b: Path | str | None = None, *, anyway: bool = False) -> Comparison:
    """Compare two saved reports.

    Parameters
    ----------
    a, b : Path or str
        Profiles or optimize reports, files or checkpoint folders. An optimize report stands for its ``after``; given
        alone, its ``before`` is held against its ``after``.
    anyway : bool
        Compare although device, dtype, text, batch and context, or architecture differ.

    Raises
    ------
    BadInputError
        If a report cannot be read or compared, or the conditions differ; the message names both values.
    """
    paired: dict[str, Any] = {}
    if b is None:
        one, other = _both_sides(a)
        paired = paired_intervals(dict(one.report))
    else:
        first, second = _load(a), _load(b)
        one, other = _known_quality(first, second), _known_quality(second, first)
        if one is not first:  # what the optimize report started from: its paired interval is the one that counts
            paired = paired_intervals(dict(second.report))
    differing, shared = mismatches(one, other), shared_places((one, other))
    if differing and not anyway:
        raise BadInputError(
            "; ".join(f"{found.what} differs: {found.a} against {found.b}" for found in differing)
            + "; add --anyway to compare all the same"
        )
    place = shared[0] if shared else None
    return Comparison(
        schema=COMPARE_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        a=one.about,
        b=other.about,
        batch=place[0] if place else None,
        context=place[1] if place else None,
        changes=changes(one.side, other.side, place, **paired),
        points=tuple(
            ComparedPoint(batch, context, _times(one.side, other.side, (batch, context)))
            for batch, context in shared[1:]
        ),
        mismatches=tuple(differing),
        notes=tuple(_notes(one, other, shared)),
    )


def _times(a: Side, b: Side, place: tuple[int, int]) -> tuple[Change, ...]:
    wanted = ("ttft_seconds", "tpot_seconds", "tokens_per_second", "peak_memory_bytes", "decode_bound")
    return tuple(found for found in changes(a, b, place) if found.metric in wanted)


def _load(path: Path | str) -> Measured:
    return of_report(path, read_report(path))[-1][0]


def _both_sides(path: Path | str) -> tuple[Measured, Measured]:
    report = read_report(path)
    if report["schema"] != OPTIMIZE_SCHEMA:
        raise BadInputError(f"'{path}' is one measurement ({report['schema']}); name a second report to compare with")
    (before, _), (after, _) = of_report(path, report)
    return before, after


def _about(side: Side, path: Path | str, report: Mapping[str, Any], which: str | None = None) -> ComparedSide:
    model, environment = mapping(side.profile.get("model")), mapping(side.profile.get("environment"))
    optimized = report.get("schema") == OPTIMIZE_SCHEMA
    which = which or ("after" if optimized else None)
    spec = mapping(report.get("source")).get("spec") if optimized else model.get("source")
    device = environment.get("device_name") or environment.get("device")
    if device is not None and environment.get("threads") is not None:
        device = f"{device}, {environment['threads']} threads"
    return ComparedSide(
        name=f"{spec or model.get('source') or 'a model'}{f', {which}' if which else ''}",
        path=str(path),
        schema=str(report["schema"]),
        created=_text(report.get("created")),
        architecture=_text(model.get("architecture")),
        device=_text(device),
        dtype=_text(model.get("dtype")),
        text=side.text,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _known_quality(side: Measured, other: Measured) -> Measured:
    """Take the quality of a profiled model from an optimize report that started from the same weights."""
    if side.report["schema"] != PROFILE_SCHEMA or other.report["schema"] != OPTIMIZE_SCHEMA:
        return side
    before, _ = optimize_sides(dict(other.report))
    ours = mapping(side.side.profile.get("model")).get("fingerprint")
    if not ours or ours != mapping(before.profile.get("model")).get("fingerprint"):
        return side
    joined = Side(
        side.side.profile,
        stored_bytes=before.stored_bytes,
        bits_per_parameter=before.bits_per_parameter,
        figures={},
        perplexity=before.perplexity,
        tasks=before.tasks,
        text=before.text,
    )
    return Measured(joined, side.about, side.report)


def mismatches(a: Measured, b: Measured) -> list[Mismatch]:
    """Return the conditions that are known on both sides and are not the same."""
    pairs = [
        ("device", a.about.device, b.about.device),
        ("dtype", a.about.dtype, b.about.dtype),
        ("model architecture", _architecture(a), _architecture(b)),
        ("evaluation text", a.side.text, b.side.text),
        ("text of the sinks", _sink_text(a), _sink_text(b)),
    ]
    found = [Mismatch(what, one, other) for what, one, other in pairs if one and other and one != other]
    own, theirs = places(a.side.profile), places(b.side.profile)
    if own and theirs and not shared_places((a, b)):
        found.append(Mismatch("batch and context", _places(own), _places(theirs)))
    return found


def shared_places(sides: Sequence[Measured]) -> list[tuple[int, int]]:
    """Return the batch and context of every point that all sides hold."""
    held = [places(side.side.profile) for side in sides]
    return [place for place in held[0] if all(place in others for others in held[1:])]


def of_report(path: Path | str, report: Mapping[str, Any]) -> list[tuple[Measured, bool]]:
    """Return the models of a saved report, and whether each is the original that the other was made from.

    Raises
    ------
    BadInputError
        If the report is of no model.
    """
    if report["schema"] == OPTIMIZE_SCHEMA:
        before, after = optimize_sides(dict(report))
        return [
            (Measured(before, _about(before, path, report, "before"), report), True),
            (Measured(after, _about(after, path, report), report), False),
        ]
    if report["schema"] != PROFILE_SCHEMA:
        raise BadInputError(
            f"'{path}' has schema {report['schema']!r}; compare takes {PROFILE_SCHEMA!r} and {OPTIMIZE_SCHEMA!r}"
        )
    side = profile_side(dict(report))
    return [(Measured(side, _about(side, path, report), report), False)]


def _architecture(loaded: Measured) -> str | None:
    model = mapping(loaded.side.profile.get("model"))
    hidden = number(model.get("hidden_size"))
    name = model.get("architecture")
    return f"{name} with hidden size {hidden}" if name and hidden is not None else _text(name)


def _sink_text(loaded: Measured) -> str | None:
    return _text(mapping(mapping(loaded.side.profile.get("profiles")).get("sinks")).get("text"))


def _places(found: list[tuple[int, int]]) -> str:
    return ", ".join(f"{batch} × {context}" for batch, context in found)


def _notes(a: Measured, b: Measured, shared: list[tuple[int, int]]) -> list[str]:
    notes = []
    versions = [mapping(mapping(loaded.side.profile.get("environment")).get("versions")) for loaded in (a, b)]
    for name in versions[0].keys() & versions[1].keys():
        if versions[0][name] != versions[1][name]:
            notes.append(f"{name} {versions[0][name]} on one side, {versions[1][name]} on the other")
    if not shared:
        notes.append("neither figure of time stands at a batch and context that both reports hold")
    return sorted(notes)
