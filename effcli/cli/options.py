"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effcli.cli.output import Format
from effcli.errors import BadInputError

if TYPE_CHECKING:
    from effcli.recipes import Recipe


def _complete_model(incomplete: str) -> list[str]:
    from effcli.builtin_models import CATALOGUE

    return [name for name in CATALOGUE if name.startswith(incomplete)]


def _complete_pass(incomplete: str) -> list[str]:
    from passes.registry import names

    return [name for name in names() if name.startswith(incomplete)]


class EngineName(StrEnum):
    """Where jobs, or parts of a pass, run."""

    local = "local"
    ray = "ray"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Built-in name (see 'effcli models'), transformers folder, .gguf file, config.json, or hub id.",
        autocompletion=_complete_model,
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, float16, bfloat16.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
AllowPickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Load pickled weights (.bin, .pt): they can run code.")
]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the model.")
]
PassOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        "-p",
        metavar="NAME:KEY=VALUE,…",
        help="A pass and its parameters, see 'effcli passes'; may be given more than once, in order.",
        autocompletion=_complete_pass,
    ),
]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="YAML recipe instead of --pass.")]
ProfileOption = Annotated[
    Path | None,
    typer.Option("--profile", help="A profile of this model on this device, saved as JSON, instead of measuring now."),
]

FormatOption = Annotated[
    Format | None,
    typer.Option("--format", "-f", help="How to write the report; default: human, or what the file's suffix says."),
]
OutputOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--output", "-o", help="Write the report to this file (.json, .md, .html, .txt); may be given more than once."
    ),
]
EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="Processes of this machine, or a Ray cluster (effcli[ray]).")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Of the Ray cluster: auto, HOST:PORT; default: one started here.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no warnings, no verdict.")]


def chosen_recipe(passes: list[str] | None, recipe: Path | None, **settings: Any) -> Recipe:
    """Return the recipe that ``--recipe`` or ``--pass`` stand for; ``settings`` (seed, gates, …) come on top.

    Raises
    ------
    BadInputError
        If both or neither are given, or either is wrong.
    """
    from effcli import recipes

    if recipe is not None and passes:
        raise BadInputError("--pass and --recipe are both given; write the passes into the recipe")
    if recipe is None:
        return recipes.from_options(passes or (), **settings)
    read = recipes.read(recipe)
    return recipes.from_mapping(_over(read.model_dump(), settings), f"recipe '{recipe}'")


def _over(recipe: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with settings from the command line: single values replace its own, gates add to them."""
    merged = dict(recipe)
    for key, value in settings.items():
        own = merged[key]
        if isinstance(own, dict):
            merged[key] = own | value
        elif isinstance(own, tuple):
            merged[key] = (*own, *value)
        else:
            merged[key] = value
    return merged
