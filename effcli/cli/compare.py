"""``effcli compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.options import FormatOption, OutputOption, QuietOption
from effcli.cli.output import checked_outputs, emit


def command(
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT...",
            help="Saved profiles or optimize reports, or folders of checkpoints. One: before and after of an optimize "
            "report; two: held against each other; more: side by side.",
        ),
    ],
    sort: Annotated[
        str | None, typer.Option("--sort", metavar="METRIC", help="Side by side, best first: ppl, size, tpot, ….")
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto", help="Side by side, however many: quality against size, time and memory, fronts marked."
        ),
    ] = False,
    quality: Annotated[
        str | None,
        typer.Option(
            "--quality", metavar="METRIC", help="Of the fronts: ppl, kl, kl_p99, top1, accuracy; default ppl."
        ),
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
    """Hold saved reports against each other: noise told apart from change, and what no other beats."""
    outputs = checked_outputs(output, format_)
    if len(reports) > 2 or pareto or sort is not None or quality is not None:
        from effcli.fronts import front

        report = front(reports, quality=quality, sort=sort, anyway=anyway).to_dict()
    else:
        from effcli.comparison import compare

        report = compare(*reports, anyway=anyway).to_dict()
    emit(report, format_, outputs, quiet=quiet)
