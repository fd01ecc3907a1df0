"""``effcli passes``."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def describe(name: str) -> dict[str, Any]:
    """Return what a pass is and takes, as plain data."""
    from passes import registry

    found = registry.load(name)
    schema = found.parameters_type.model_json_schema()
    return {
        "name": name,
        "title": found.title,
        "papers": list(found.papers),
        "changes": sorted(found.changes),
        "before": list(found.before),
        "after": list(found.after),
        "excludes": list(found.excludes),
        "extra": found.extra,
        "parameters": [
            {
                "name": key,
                "type": _type_of(value, schema),
                "default": value.get("default"),
                "description": value.get("description", ""),
            }
            for key, value in schema.get("properties", {}).items()
        ],
    }


def _type_of(value: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return a JSON Schema type in one short phrase."""
    if "$ref" in value:
        value = schema["$defs"][value["$ref"].rpartition("/")[2]]
    if "anyOf" in value:
        return " | ".join(_type_of(item, schema) for item in value["anyOf"])
    if "enum" in value:
        return " | ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    if value.get("type") == "array":
        return f"list of {_type_of(value.get('items', {}), schema)}"
    return {"null": "none"}.get(str(value.get("type")), str(value.get("type", "any")))


def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show only this pass.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the installed passes with their parameters, defaults and papers: what --pass takes."""
    from passes import registry

    rows = [describe(item) for item in ((name,) if name else registry.names())]
    if as_json:
        import json

        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for row in rows:
        console.print(Text(f"{row['name']}: {row['title']}", style="bold"))
        for paper in row["papers"]:
            console.print(Padding(Text(paper), (0, 0, 0, 2)))
        rules = [f"{rule} {', '.join(row[rule])}" for rule in ("before", "after", "excludes") if row[rule]]
        facts = [f"changes {', '.join(row['changes'])}", *rules]
        if row["extra"]:
            facts.append(f"needs pip install 'effcli[{row['extra']}]'")
        console.print(Padding(Text("; ".join(facts)), (0, 0, 0, 2)))
        table = Table(box=None, pad_edge=False)
        for heading in ("parameter", "type", "default", "what it is"):
            table.add_column(heading, overflow="fold")
        for item in row["parameters"]:
            default = "" if item["default"] is None else str(item["default"])
            table.add_row(*(Text(text) for text in (item["name"], item["type"], default, item["description"])))
        console.print(Padding(table, (0, 0, 1, 2)))
