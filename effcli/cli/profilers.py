"""``effcli profilers``."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the installed profilers: what --only takes."""
    from profilers import registry

    rows = []
    for name in registry.names():
        profiler = registry.load(name)
        rows.append(
            {
                "name": name,
                "title": profiler.title,
                "default": profiler.default,
                "config_only": not profiler.needs_weights,
                "source": profiler.paper,
            }
        )
    if as_json:
        import json

        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "measures", "runs", "--config-only", "source"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        runs = "by default" if row["default"] else "if named"
        config_only = "yes" if row["config_only"] else "no"
        table.add_row(str(row["name"]), str(row["title"]), runs, config_only, str(row["source"]))
    Console().print(table)
