"""``effcli models``."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    fetch: Annotated[str | None, typer.Option("--fetch", help="Download this model into the cache now.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """List the built-in models: name, size, licence, cached or not."""
    from effcli import builtin_models

    if fetch is not None:
        from effcli.cli.progress import progress_bars

        with progress_bars(quiet=quiet) as progress:
            folder = builtin_models.fetch(fetch, progress)
        if not quiet and isinstance(builtin_models.CATALOGUE[fetch], builtin_models.ShippedModel):
            typer.echo(f"{fetch} is shipped with effcli: nothing to fetch", err=True)
        typer.echo(str(folder))
        return
    rows = [
        {
            "name": name,
            "title": model.title,
            "parameters": model.parameters,
            "download_bytes": model.download_bytes,
            "licence": model.licence,
            "origin": model.origin,
            "cached": builtin_models.cached(name),
            "shipped": isinstance(model, builtin_models.ShippedModel),
        }
        for name, model in builtin_models.CATALOGUE.items()
    ]
    if as_json:
        import json

        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "parameters", "download", "licence", "cached", "origin"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        size = "none" if row["shipped"] else f"{int(str(row['download_bytes'])) / 1e6:.0f} MB"
        cached = "shipped" if row["shipped"] else "yes" if row["cached"] else "no"
        table.add_row(str(row["name"]), f"{row['parameters']:,}", size, str(row["licence"]), cached, str(row["origin"]))
    Console().print(table)
