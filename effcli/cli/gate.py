"""``effcli gate``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.options import QuietOption
from effcli.errors import BadInputError, GateFailedError


class GateFormat(StrEnum):
    """How the gates' results are written."""

    human = "human"
    json = "json"


def command(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A saved report, or the folder of a checkpoint.")],
    gates: Annotated[list[str], typer.Argument(metavar="RULE...", help='What must hold: "ppl<=+3%" "tpot<=0.7x".')],
    format_: Annotated[GateFormat, typer.Option("--format", help="One line a gate, or JSON.")] = GateFormat.human,
    quiet: QuietOption = False,
) -> None:
    """Hold rules against a saved report: exit code 0 if all hold, 3 if one fails."""
    from effcli.gating import check
    from effcli.reports.model import plain, read_report

    try:
        results = check(read_report(report), gates)
    except BadInputError as error:
        raise BadInputError(f"'{report}': {error}") from None
    if format_ is GateFormat.json:
        typer.echo(json.dumps(plain(results), indent=1, ensure_ascii=False))
    elif not quiet:
        for result in results:
            typer.echo(f"{'holds ' if result.passed else 'failed'}  {result.gate}: {result.explanation}")
    failed = [f"'{result.gate}'" for result in results if not result.passed]
    if failed:
        raise GateFailedError(f"{len(failed)} of {len(results)} gates failed: {', '.join(failed)}")
