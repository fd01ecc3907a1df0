"""``effcli plan``."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from effcli.cli.options import (
    AllowPickleOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    ModelArgument,
    OutputOption,
    PassOption,
    ProfileOption,
    QuietOption,
    RecipeOption,
    RevisionOption,
    TrustRemoteCodeOption,
    chosen_recipe,
)
from effcli.cli.output import checked_outputs, emit, warn
from effcli.cli.progress import progress_bars


def command(
    model: ModelArgument,
    passes: PassOption = None,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    context: Annotated[int | None, typer.Option("--context", "-c", min=1, help="Tokens; default 512.")] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences.")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    allow_pickle: AllowPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Predict what each pass would buy on this device, before spending an hour on it."""
    outputs = checked_outputs(output, format_)
    chosen = chosen_recipe(passes, recipe) if passes or recipe else None
    from effcli.planning import plan
    from effcli.reports.model import read_report

    with progress_bars(quiet=quiet) as progress:
        report = plan(
            model,
            recipe=chosen,
            profile=read_report(profile) if profile else None,
            batch=batch,
            context=context,
            device=device,
            dtype=dtype,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            progress=progress,
            command=shlex.join(["effcli", *sys.argv[1:]]),
        )
    if not quiet:
        warn(report.warnings)
    emit(report.to_dict(), format_, outputs, quiet=quiet)
