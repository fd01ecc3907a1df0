"""Any instrument that effcli does not know: its scalars as key and value, its lists of records as tables."""

from __future__ import annotations

import json
from typing import Any

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Column, Facts, Section, Table

MOST_ROWS = 40
MOST_CHARACTERS = 60


def section(name: str, result: Any) -> Section:
    """Build a section from plain data of any shape."""
    pairs: list[tuple[str, str]] = []
    tables: list[Block] = []
    if isinstance(result, dict):
        _walk("", result, pairs, tables)
    else:
        pairs.append(("value", shown_value(result)))
    facts: list[Block] = [Facts("", tuple(pairs))] if pairs else []
    return Section(printable(name), printable(name).replace("_", " ").capitalize(), (), tuple(facts + tables))


def _walk(prefix: str, value: dict[str, Any], pairs: list[tuple[str, str]], tables: list[Block]) -> None:
    for key, item in value.items():
        path = f"{prefix}{printable(key)}"
        if isinstance(item, dict) and item:
            _walk(f"{path}.", item, pairs, tables)
        elif isinstance(item, list) and item and all(isinstance(entry, dict) for entry in item):
            tables.append(_records(path, item))
        else:
            pairs.append((path, shown_value(item)))


def _records(title: str, records: list[dict[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = tuple(tuple(shown_value(record.get(key)) for key in keys) for record in records[:MOST_ROWS])
    numeric = [all(isinstance(record.get(key), (int, float)) for record in records) for key in keys]
    notes = (f"{len(records) - MOST_ROWS} more rows in the JSON.",) if len(records) > MOST_ROWS else ()
    heads = tuple(Column(printable(key), flush_right) for key, flush_right in zip(keys, numeric, strict=True))
    return Table(title, heads, rows, notes)


def named(value: Any) -> str:
    """Return a name on one line, a dash where the report has none."""
    return fmt.MISSING if value is None else printable(value)


def shown_value(value: Any) -> str:
    """Return any plain value as one short line of text."""
    if value is None:
        return fmt.MISSING
    if isinstance(value, bool):
        return fmt.yes_no(value)
    if isinstance(value, int):
        return fmt.integer(value)
    if isinstance(value, float):
        return fmt.significant(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = printable(text)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
