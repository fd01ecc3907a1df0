"""``effcli verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.options import QuietOption


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What 'effcli optimize' or 'effcli export' wrote, as it is now.")
    ],
    signature: Annotated[
        str | None,
        typer.Option("--signature", metavar="SHA256", help="What the maker published; its first 12 digits are enough."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Check that a checkpoint is what its report says: hashes, audit, and that the report is of these weights."""
    from effcli.verifying import verify

    found = verify(folder, expected=signature)
    if quiet:
        return
    for line in found.checks:
        typer.echo(f"holds  {line}")
    for line in found.notes:
        typer.echo(f"note   {line}")
    typer.echo(f"signature {found.signature}")
