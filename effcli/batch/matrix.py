"""Turn a jobs file into jobs: the matrix without what is excluded, then the jobs that stand by themselves.

::

    models × (profiles, recipes, exports) × devices ── exclude ──┐
                                                  jobs: [...] ───┴──> names, needs, order ──> tuple of Job
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from effcli import built_source
from effcli.batch.entries import ExcludeEntry, JobEntry, LimitsEntry
from effcli.batch.jobs_file import JobsFile, existing_file, unique
from effcli.batch.model import Job, Kind, Limits
from effcli.errors import did_you_mean

DEFAULT_LAYOUT = "{model}.{part}"
_KINDS: dict[str, Kind] = {"profile": "profile", "recipe": "optimize", "export": "export"}
"""What is done with an entry of each kind, in the order of a model's jobs."""
_GOOD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_BAD_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
_TAKEN = ("summary.jsonl", "summary.csv", "index.html", "batch.json")
_LONGEST_NAME = 150
_MOST_LISTED = 12


@dataclass(frozen=True)
class _Cell:
    """One job before it has settings: what it is made of, and where it stands in the file."""

    model: str
    section: str
    part: str
    device: str
    way: tuple[Any, ...]
    name: str = ""
    entry: JobEntry | None = None


def jobs(file: JobsFile) -> tuple[Job, ...]:
    """Return every job of the file; one that another needs comes before it, otherwise the file's order holds.

    Raises
    ------
    BadInputError
        For a name that is not known or not unique, a rule that excludes nothing, a matrix that is empty, or jobs that
        need each other in a circle.
    """
    product = [*_product(file)]
    kept, excluded = _excluded(file, product)
    cells = [replace(cell, name=_name(file, cell)) for cell in (*kept, *_explicit(file))]
    if not cells and not file.search:
        raise file.error(("matrix",), _why_empty(file), at_key=True)
    _check_unique(file, cells)
    _check_twins(file, cells)
    _check_searches(file, cells)
    gone = {_name(file, cell): rule for cell, rule in excluded}
    by_name = {cell.name: cell for cell in cells}
    return _ordered(file, cells, [_job(file, cell, by_name, gone) for cell in cells])


def search_job(file: JobsFile, name: str) -> Job:
    """Return the job that a search starts from: its model, device and limits, without passes.

    Raises
    ------
    BadInputError
        If its model is the output of a job that the file does not have.
    """
    spec, way = file.search[name], ("search", name)
    model = file.models[spec.model]
    if model.output_of is not None:
        file.check_name(model.output_of, [job.name for job in jobs(file)], "job", ("models", spec.model, "output_of"))
    return _bare_job(file, _Cell(spec.model, "recipe", name, spec.device, way, name=name))


def _product(file: JobsFile) -> Iterator[_Cell]:
    matrix = file.matrix
    sections = _sections(file)
    chosen = {"profile": matrix.profiles, "recipe": matrix.recipes, "export": matrix.exports}
    for number, name in enumerate(matrix.models or ()):
        file.check_name(name, file.models, "model", ("matrix", "models", number))
    for section, known in sections.items():
        for number, name in enumerate(chosen[section] or ()):
            file.check_name(name, known, section, ("matrix", f"{section}s", number))
    for key in ("models", "profiles", "recipes", "exports", "devices"):
        _check_once(file, getattr(matrix, key) or (), ("matrix", key))
    for model in file.models if matrix.models is None else matrix.models:
        for section, known in sections.items():
            names = chosen[section]
            for part in known if names is None else names:
                for device in matrix.devices:
                    yield _Cell(model, section, part, device, ("matrix",))


def _sections(file: JobsFile) -> dict[str, tuple[str, ...]]:
    """Return the names of what can be done with a model, by what a job calls it."""
    return {"profile": tuple(file.profiles), "recipe": tuple(file.recipes), "export": tuple(file.exports)}


def _check_once(file: JobsFile, names: Sequence[str], way: tuple[Any, ...]) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise file.error((*way, number), f"'{name}' stands in '{'.'.join(way)}' twice; leave one out")


def _excluded(file: JobsFile, product: Sequence[_Cell]) -> tuple[list[_Cell], list[tuple[_Cell, int]]]:
    """Return what is kept, and what is excluded with the number of the first rule that does."""
    known = {"model": tuple(file.models), **_sections(file)}
    hits = [0] * len(file.exclude)
    for number, rule in enumerate(file.exclude):
        for key in rule.model_fields_set - {"device"}:
            for position, name in enumerate(getattr(rule, key)):
                file.check_name(name, known[key], key, ("exclude", number, key, position))
        hits[number] = sum(_fits(rule, cell) for cell in product)
        if not hits[number]:
            raise file.error(("exclude", number), f"{_as_text(rule)} excludes nothing: {_why_nothing(rule)}")
    by_rule = [(cell, [number for number, rule in enumerate(file.exclude) if _fits(rule, cell)]) for cell in product]
    kept = [cell for cell, rules in by_rule if not rules]
    if product and not kept:
        lines = ", ".join(
            f"line {file.line(('exclude', number))} takes {hits[number]}" for number in range(len(file.exclude))
        )
        raise file.error(
            ("exclude",),
            f"the matrix is empty: it makes {len(product)} jobs and exclude takes all of them ({lines}); remove a "
            "rule, or write matrix: {models: []} for no matrix",
            at_key=True,
        )
    return kept, [(cell, rules[0]) for cell, rules in by_rule if rules]


def _fits(rule: ExcludeEntry, cell: _Cell) -> bool:
    parts = {"model": cell.model, cell.section: cell.part, "device": cell.device}
    return all(parts.get(key) in getattr(rule, key) for key in rule.model_fields_set)


def _as_text(rule: ExcludeEntry) -> str:
    given = rule.model_dump(exclude_unset=True)
    return "{" + ", ".join(f"{key}: {' or '.join(value)}" for key, value in given.items()) + "}"


def _why_nothing(rule: ExcludeEntry) -> str:
    parts = [key for key in _KINDS if key in rule.model_fields_set]
    if len(parts) > 1:
        return f"no job has a {' and a '.join(parts)} at once; write a rule for each"
    return "no job of the matrix fits all of it; correct it, or remove it"


def _why_empty(file: JobsFile) -> str:
    if not (file.profiles or file.recipes or file.exports):
        return "nothing is to be done: there are no profiles, recipes, exports or search; add e.g. profiles: {all: {}}"
    empty = [key for key in ("models", "devices") if getattr(file.matrix, key) == ()]
    what = f"'matrix.{empty[0]}' is an empty list" if empty else "no profile, recipe or export is left in it"
    return (
        f"the matrix is empty: {what}, and there are no jobs and no search beside it; name some, or leave the key out"
    )


def _explicit(file: JobsFile) -> Iterator[_Cell]:
    known = _sections(file)
    for number, entry in enumerate(file.jobs):
        way = ("jobs", number)
        file.check_name(entry.model, file.models, "model", (*way, "model"))
        section = next(key for key in _KINDS if getattr(entry, key) is not None)
        part = getattr(entry, section)
        file.check_name(part, known[section], section, (*way, section))
        yield _Cell(entry.model, section, part, entry.device or "auto", way, entry=entry)


def _name(file: JobsFile, cell: _Cell) -> str:
    """Return the job's name as given, or as the layout makes it from what a folder's name can hold."""
    if cell.entry is not None and cell.entry.name is not None:
        name, way = cell.entry.name, (*cell.way, "name")
        if not _GOOD_NAME.fullmatch(name):
            good = _clean(name)
            hint = f", e.g. {good}" if _GOOD_NAME.fullmatch(good) else ""
            raise file.error(way, f"'{name}' is no name; use letters, digits, '.', '_' and '-'{hint}")
    else:
        several = len(file.matrix.devices) > 1 if cell.entry is None else cell.entry.device is not None
        layout = file.layout or (DEFAULT_LAYOUT + ".{device}" if several else DEFAULT_LAYOUT)
        way = ("layout",) if file.layout else cell.way
        name = layout.format(model=cell.model, part=cell.part, kind=_KINDS[cell.section], device=cell.device)
        name = _clean(name)
        if not _GOOD_NAME.fullmatch(name):
            raise file.error(way, f"a job would be called '{name}'; use a layout that begins with a letter or digit")
    if name in _TAKEN or name.endswith(".failed.json"):
        raise file.error(
            way, f"a job is called '{name}', as a file of the batch's own is; choose another layout or name"
        )
    if len(name) > _LONGEST_NAME:
        raise file.error(way, f"a job's name has {len(name)} characters ({name[:40]}…); at most {_LONGEST_NAME}")
    return name


def _clean(text: str) -> str:
    return _BAD_CHARACTERS.sub("-", text).lstrip(".-")


def _check_unique(file: JobsFile, cells: Sequence[_Cell]) -> None:
    seen: dict[str, _Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.name.casefold(), cell)  # there are file systems that do not tell a from A
        if other is cell:
            continue
        way = cell.way if cell.entry is not None else ("layout",) if file.layout else ("matrix",)
        remedy = "give it a name of its own: name: …" if cell.entry is not None else _layout_remedy(other, cell)
        raise file.error(way, f"two jobs are called '{cell.name}' ({_described(other)}, {_described(cell)}); {remedy}")


def _check_twins(file: JobsFile, cells: Sequence[_Cell]) -> None:
    """Refuse a job that is called as the source that a pass of another makes beside its output."""
    names = {cell.name.casefold() for cell in cells}
    for cell in cells:
        twin = cell.name + built_source.SUFFIX
        if cell.section == "recipe" and twin.casefold() in names and built_source.maker(file.recipe[cell.part].chain()):
            raise file.error(cell.way, f"job '{cell.name}' also makes '{twin}', which is a job's name; rename one")


def _described(cell: _Cell) -> str:
    return f"{cell.section} {cell.part} of {cell.model} on {cell.device}"


def _layout_remedy(first: _Cell, second: _Cell) -> str:
    differs = {
        "kind": first.section != second.section,
        "device": first.device != second.device,
        "part": first.part != second.part,
        "model": first.model != second.model,
    }
    field = next(name for name, yes in differs.items() if yes)
    if field in ("kind", "device"):
        return f"put {{{field}}} into the layout, e.g. layout: '{{model}}.{{part}}.{{{field}}}'"
    return (
        f"put {{{field}}} into the layout, or rename the {field}: names differ by more than case and special characters"
    )


def _check_searches(file: JobsFile, cells: Sequence[_Cell]) -> None:
    """Refuse a search whose trials, NAME.001 and so on, could not be told from a job."""
    for search in file.search:
        way = ("search", search)
        if not _GOOD_NAME.fullmatch(search):
            raise file.error(way, f"'{search}' is no name; use letters, digits, '.', '_' and '-'", at_key=True)
        taken = next((cell for cell in cells if re.fullmatch(rf"{re.escape(search)}(\.\d+)?", cell.name, re.I)), None)
        if taken is not None:
            raise file.error(
                way, f"job '{taken.name}' is called as a trial of search '{search}' is; rename one", at_key=True
            )


def _job(file: JobsFile, cell: _Cell, cells: Mapping[str, _Cell], gone: Mapping[str, int]) -> Job:
    model = file.models[cell.model]
    needs: list[str] = []
    if model.output_of is not None:
        way = ("models", cell.model, "output_of")
        made_by = _needed(file, model.output_of, cells, gone, way)
        if made_by.section == "profile":
            raise file.error(way, f"job '{model.output_of}' is a profile and makes no model; name a recipe or export")
        needs.append(model.output_of)
    entry = cell.entry
    for number, name in enumerate(entry.after if entry else ()):
        _needed(file, name, cells, gone, (*cell.way, "after", number))
        needs.append(name)
    return replace(_bare_job(file, cell), settings=_settings(file, cell), needs=unique(needs))


def _bare_job(file: JobsFile, cell: _Cell) -> Job:
    """Return a job without what it is to do."""
    model, entry = file.models[cell.model], cell.entry
    gpus = float(cell.device.startswith("cuda")) if entry is None or entry.gpus is None else entry.gpus
    return Job(
        name=cell.name,
        kind=_KINDS[cell.section],
        model="" if model.source is None else _opened(model.source),
        model_name=cell.model,
        part=cell.part,
        device=cell.device,
        dtype=model.dtype,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        allow_pickle=model.allow_pickle,
        model_from=model.output_of,
        needs=() if model.output_of is None else (model.output_of,),
        environment=dict(file.variables),
        limits=_limits(*(item.limits for item in (entry, model, file) if item is not None)),
        gpus=gpus,
        labels=dict(entry.labels) if entry else {},
    )


def _needed(
    file: JobsFile, name: str, cells: Mapping[str, _Cell], gone: Mapping[str, int], way: tuple[Any, ...]
) -> _Cell:
    """Return the job called ``name``, which another needs."""
    if name in cells:
        return cells[name]
    if name in gone:
        line = file.line(("exclude", gone[name]))
        raise file.error(way, f"job '{name}' is needed, and line {line} excludes it; remove the rule, or the need")
    listed = ", ".join([*cells][:_MOST_LISTED]) + (", …" if len(cells) > _MOST_LISTED else "")
    raise file.error(way, f"no job is called '{name}'{did_you_mean(name, cells)}; known: {listed}")


def _opened(source: str) -> str:
    """Return a source as a worker in another folder has to open it."""
    path = Path(source).expanduser()
    try:
        return str(path.absolute()) if path.exists() else source
    except OSError:
        return source  # too long for a path: no path, then


def _limits(*entries: LimitsEntry) -> Limits:
    """Return the limits, each from the first entry that gives it."""

    def first(key: str) -> Any:
        return next((value for entry in entries if (value := getattr(entry, key)) is not None), None)

    retries = first("retries")
    return Limits(first("time"), first("memory"), Limits().retries if retries is None else retries)


def _settings(file: JobsFile, cell: _Cell) -> dict[str, Any]:
    """Return the job's settings, JSON-ready, without what was not given."""
    if cell.section == "profile":
        profile = file.profiles[cell.part]
        given = profile.model_dump(mode="json", exclude_none=True)
        if profile.text is not None:
            given["text"] = str(existing_file(file, profile.text, ("profiles", cell.part, "text")))
        return given
    if cell.section == "export":
        return file.exports[cell.part].model_dump(mode="json", exclude_none=True)
    entry = file.recipes[cell.part]
    recipe = file.recipe[cell.part].model_dump(mode="json")
    recipe["gates"] = [*unique((*recipe["gates"], *file.gates, *(cell.entry.gates if cell.entry else ())))]
    options = entry.model_dump(mode="json", include={"context", "batch", "kernels", "compile"}, exclude_none=True)
    return {"recipe": recipe, **options}


def _ordered(file: JobsFile, cells: Sequence[_Cell], made: Sequence[Job]) -> tuple[Job, ...]:
    """Put each job behind those that it needs and otherwise keep the order."""
    number = {job.name: position for position, job in enumerate(made)}
    sorter = TopologicalSorter({job.name: job.needs for job in made})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        first = made[number[circle[0]]]
        way = (
            ("models", first.model_name) if first.model_from == circle[1] else (*cells[number[circle[0]]].way, "after")
        )
        raise file.error(
            way, f"jobs need each other in a circle: {' needs '.join(circle)}; take one of these needs out"
        ) from None
    ready = [number[name] for name in sorter.get_ready()]
    heapq.heapify(ready)
    ordered = []
    while ready:
        job = made[heapq.heappop(ready)]
        ordered.append(job)
        sorter.done(job.name)
        for name in sorter.get_ready():
            heapq.heappush(ready, number[name])
    return tuple(ordered)
