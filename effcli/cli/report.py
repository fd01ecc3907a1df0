"""``effcli report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.options import FormatOption, OutputOption, QuietOption
from effcli.cli.output import checked_outputs, emit


def command(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A report saved with --format json.")],
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Render a saved report again, without the model."""
    from effcli.reports.model import read_report

    outputs = checked_outputs(output, format_)
    emit(read_report(report), format_, outputs, quiet=quiet)
