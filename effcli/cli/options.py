"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.output import Format

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
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no warnings, no verdict.")]
