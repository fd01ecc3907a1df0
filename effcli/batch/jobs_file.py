"""Read a jobs file: which models, what to do with them, on which devices; see ``docs/batch.md``.

::

    text ──substitution──> yaml_places.Document ──entries (pydantic)──> JobsFile ──matrix.jobs──> Job …
                                   └── line and column of every error ──┘

Everything that is wrong without looking at a model is found here, before anything runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import PrivateAttr, TypeAdapter, ValidationError

from effcli import recipes
from effcli.batch.complaints import first_error
from effcli.batch.entries import VERSION, Entries, RecipeEntry
from effcli.batch.search_space import SearchSpec
from effcli.batch.yaml_places import Document
from effcli.batch.yaml_places import read as read_yaml
from effcli.errors import BadInputError, EffcliError, did_you_mean
from effcli.recipes import Recipe, Step
from passes.base import Pass, PassError

_START = "version: 1, then output: runs and models: {NAME: SOURCE}"


class JobsFile(Entries):
    """A jobs file that was read and is right in itself.

    Attributes
    ----------
    path : Path
    recipe : mapping of str to Recipe
        Whole recipes by name, gates of the recipe included, texts absolute.
    variables : mapping of str to str
        Of the environment, by the names that the file asks for.
    """

    _document: Document = PrivateAttr()
    _recipes: dict[str, Recipe] = PrivateAttr(default_factory=dict)
    _variables: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where it was read from."""
        return self._document.path

    @property
    def recipe(self) -> Mapping[str, Recipe]:
        """Whole recipes by name."""
        return self._recipes

    @property
    def variables(self) -> Mapping[str, str]:
        """Environment variables that jobs get."""
        return self._variables

    def error(self, way: Sequence[Any], message: str, *, at_key: bool = False) -> BadInputError:
        """Return the error to raise about what stands at ``way``: ``("matrix", "models", 0)``."""
        return self._document.error(way, message, at_key=at_key)

    def line(self, way: Sequence[Any]) -> int:
        """Return the line that something stands on."""
        return self._document.values[self._document.nearest(way)].line

    def check_name(self, name: str, known: Iterable[str], what: str, way: Sequence[Any]) -> None:
        """Refuse a name that is not known.

        Raises
        ------
        BadInputError
        """
        names = tuple(known)
        if name not in names:
            listed = f"known: {', '.join(names)}" if names else f"the file has no {what}s"
            raise self.error(way, f"no {what} is called '{name}'{did_you_mean(name, names)}; {listed}")


def read(path: Path, variables: Mapping[str, str]) -> JobsFile:
    """Read a jobs file and check all that can be checked without its models.

    Parameters
    ----------
    path : Path
    variables : mapping of str to str
        What ``${NAME}`` stands for; the environment is not looked at.

    Raises
    ------
    BadInputError
        Naming line and column, the value and the remedy.
    """
    document = read_yaml(Path(path), variables)
    _check_version(document)
    try:
        file = JobsFile.model_validate(document.data)
    except ValidationError as error:
        raise first_error(document, JobsFile, error) from None
    file._document = document
    _check_profiles(file)
    for name, entry in file.recipes.items():
        file._recipes[name] = _recipe(file, name, entry)
    for number, name in enumerate(file.environment):
        if name not in os.environ:
            near = did_you_mean(name, os.environ)
            raise file.error(
                ("environment", number), f"environment variable '{name}' is not set{near}; set it, or leave it out"
            )
        file._variables[name] = os.environ[name]
    return file.model_copy(update={"search": {name: _checked_search(file, name) for name in file.search}})


def _check_version(document: Document) -> None:
    data = document.data
    if not isinstance(data, Mapping):
        what = "is empty" if data is None else "holds no mapping"
        raise document.error((), f"the file {what}; it starts with: {_START}")
    version = data.get("version")
    if version is None:
        raise document.error((), f"the file has no version; add the line: version: {VERSION}")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise document.error(("version",), f"version is {version!r}; this release reads version {VERSION}")
    if version > VERSION:
        raise document.error(
            ("version",),
            f"version {version} is newer than the {VERSION} that this release reads; pip install -U effcli",
        )


def _check_profiles(file: JobsFile) -> None:
    from effcli.diffusion.profile import PARTS
    from profilers.registry import names

    for name, entry in file.profiles.items():
        for number, profiler in enumerate(entry.only or ()):
            file.check_name(profiler, (*names(), *PARTS), "profiler", ("profiles", name, "only", number))
        if entry.text is not None:
            existing_file(file, entry.text, ("profiles", name, "text"))


def _checked_search(file: JobsFile, name: str) -> SearchSpec:
    """Refuse a model, pass or parameter that is not known; what values do together shows when they are tried.

    Files become absolute, as in a recipe.
    """
    from passes import registry

    way, search = ("search", name), file.search[name]
    file.check_name(search.model, file.models, "model", (*way, "model"))
    steps = []
    for number, step in enumerate(search.passes):
        here = (*way, "passes", number)
        try:
            known = registry.load(step.name).parameters_type.model_fields
        except PassError as error:
            raise file.error(here, str(error)) from None
        paths = {}
        for key, value in step.parameters.items():
            there = (*here, "parameters", key)
            file.check_name(key, known, f"parameter of {step.name}", there)
            kind = known[key].annotation
            if isinstance(value, Mapping) and not _takes(kind, value):
                near = did_you_mean(next(iter(value), ""), ("choose", "from"))
                raise file.error(there, f"is no choice{near}; write {{choose: [A, B]}} or {{from: A, to: B}}")
            if isinstance(value, str) and Path in (kind, *get_args(kind)):
                paths[key] = str(existing_file(file, value, there))
        steps.append(step.model_copy(update={"parameters": step.parameters | paths}))
    return search.model_copy(update={"passes": tuple(steps), **_texts(file, search, way)})


def _takes(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def existing_file(file: JobsFile, given: str | Path, way: Sequence[Any]) -> Path:
    """Return the absolute path of a file, relative to the working directory.

    Raises
    ------
    BadInputError
        If it is not there.
    """
    found = Path(given).expanduser().absolute()
    if not found.is_file():
        near = did_you_mean(found.name, (item.name for item in found.parent.iterdir())) if found.parent.is_dir() else ""
        raise file.error(way, f"no file '{given}'{near}; looked for '{found}', relative to the working directory")
    return found


def _recipe(file: JobsFile, name: str, entry: RecipeEntry) -> Recipe:
    way = ("recipes", name)
    if entry.file is not None:
        recipe = _recipe_file(file, entry.file, way)
    else:
        given = entry.model_dump(include={"passes", "seed", "calibration", "evaluation"}, exclude_none=True)
        try:
            recipe = Recipe.model_validate({"version": recipes.VERSION, **given})
        except ValidationError as error:
            raise first_error(file._document, Recipe, error, way) from None
    changes: dict[str, Any] = {"passes": _checked_passes(file, recipe, way)}
    changes |= _texts(file, recipe, way)
    return recipe.model_copy(update={**changes, "gates": unique((*recipe.gates, *entry.gates))})


def _recipe_file(file: JobsFile, given: str, way: tuple[str, ...]) -> Recipe:
    from effcli import gates
    from effcli.batch.entries import GATED

    way = (*way, "file")
    path = Path(given).expanduser()
    path = path if path.is_absolute() else file.path.absolute().parent / path
    if not path.is_file() and path.parent.is_dir():
        near = did_you_mean(path.name, {item.name for item in path.parent.iterdir()} - {file.path.name})
        raise file.error(way, f"no recipe file '{given}'{near}; looked for '{path}', beside the jobs file")
    try:
        recipe = recipes.read(path)
    except EffcliError as error:
        raise file.error(way, str(error)) from None
    for text in recipe.gates:
        try:
            gates.parse(text, GATED)
        except EffcliError as error:
            raise file.error(way, f"in '{given}': {error}") from None
    return recipe


def _checked_passes(file: JobsFile, recipe: Recipe, way: tuple[str, ...]) -> tuple[Step, ...]:
    """Find an unknown pass, a bad parameter or a wrong order now rather than in a worker; imports no torch.

    Files that parameters name become absolute, relative to the working directory.
    """
    from passes import registry

    read_from = file.recipes[way[1]].file
    inside = f"in '{read_from}': " if read_from else ""
    steps = []
    for number, step in enumerate(recipe.passes):
        here: tuple[Any, ...] = (*way, "passes", number)
        try:
            kind = registry.load(step.name)
        except PassError as error:
            raise file.error(here, f"{inside}{error}") from None
        try:
            made = kind.from_mapping(step.parameters)
            made.check_complete()
        except PassError as error:
            raise file.error(
                (*here, "parameters", *_wrong_parameter(kind, step.parameters)), f"{inside}{error}"
            ) from None
        paths = {key: existing_file(file, path, (*here, "parameters", key)) for key, path in path_parameters(made)}
        given = step.parameters | {key: str(path) for key, path in paths.items()}
        steps.append(step.model_copy(update={"parameters": given}))
    try:
        recipe.chain()
    except PassError as error:
        raise file.error((*way, "passes"), f"{inside}{error}") from None
    return tuple(steps)


def path_parameters(item: Pass) -> list[tuple[str, Path]]:
    """Return the parameters of a pass that name files."""
    return [(key, value) for key, value in item.parameters if isinstance(value, Path)]


def _wrong_parameter(kind: Any, parameters: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        kind.parameters_type.model_validate(dict(parameters))
    except ValidationError as error:
        return tuple(error.errors()[0]["loc"])
    return ()


def _texts(file: JobsFile, holder: Recipe | SearchSpec, way: tuple[str, ...]) -> dict[str, Any]:
    """Return a recipe's or search's calibration and evaluation with absolute paths."""
    found: dict[str, Any] = {}
    for part in ("calibration", "evaluation"):
        settings = getattr(holder, part)
        paths = {key: existing_file(file, path, (*way, part, key)) for key, path in settings if isinstance(path, Path)}
        found[part] = settings.model_copy(update=paths)
    return found


def unique(values: Iterable[str]) -> tuple[str, ...]:
    """Return each value once, in order."""
    return tuple(dict.fromkeys(values))
