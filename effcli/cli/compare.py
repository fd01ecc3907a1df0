"""``effcli compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.options import FormatOption, OutputOption, QuietOption
from effcli.cli.output import checked_outputs, emit


def command(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A saved profile or optimize report, or the folder of a checkpoint.")
    ],
    b: Annotated[
        Path | None,
        typer.Argument(metavar="[B]", help="Another; without it, the before and after of an optimize report."),
    ] = None,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway", help="Compare although device, dtype, text, batch and context or architecture differ."
        ),
    ] = False,
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Hold two saved reports against each other, noise told apart from change."""
    from effcli.comparison import compare

    outputs = checked_outputs(output, format_)
    emit(compare(a, b, anyway=anyway).to_dict(), format_, outputs, quiet=quiet)
