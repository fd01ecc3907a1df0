"""``effcli push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.options import QuietOption
from effcli.cli.progress import progress_bars


def command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What 'effcli optimize' or 'effcli export' wrote, as it is now.")
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub.")],
    upload: Annotated[bool, typer.Option("--upload", help="Send it; without this, only show what would go.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")] = False,
    revision: Annotated[str, typer.Option("--revision", metavar="BRANCH", help="Branch to commit to.")] = "main",
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    quiet: QuietOption = False,
) -> None:
    """Verify a checkpoint and upload it to the Hugging Face hub; a dry run unless --upload is given."""
    from effcli.formatting import data_size
    from effcli.pushing import push

    with progress_bars(quiet=quiet) as progress:
        done = push(
            folder,
            repository,
            upload=upload,
            private=not public,
            revision=revision,
            message=message,
            progress=progress,
        )
    if quiet:
        return
    for name, size in done.files:
        typer.echo(f"{data_size(size):>10}  {name}")
    total = f"{len(done.files)} files, {data_size(done.bytes)}"
    typer.echo(f"signature {done.signature}")
    if done.url is None:
        kind = "private" if done.private else "public"
        typer.echo(
            f"dry run: {total} would go to {repository}, branch {revision} (made {kind} if it is not there); "
            "add --upload to send them"
        )
    else:
        typer.echo(f"uploaded {total}: {done.url}")
