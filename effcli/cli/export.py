"""``effcli export``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.options import (
    AllowPickleOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    QuietOption,
    RevisionOption,
    TrustRemoteCodeOption,
)
from effcli.cli.output import warn
from effcli.cli.progress import progress_bars


def command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write the export to.")],
    format_: Annotated[str, typer.Option("--format", "-f", help="What to write: onnx.")] = "onnx",
    task: Annotated[
        str, typer.Option("--task", help="What the model is for; default: from its architecture.")
    ] = "auto",
    opset: Annotated[
        int | None, typer.Option("--opset", help="ONNX opset; default: the highest that the exporter writes.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Largest difference from torch that is let pass; default 0.001 in float32."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything that can be checked without loading weights, and stop.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    allow_pickle: AllowPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a model as ONNX graphs over one file of weights, checked against torch on real text."""
    from effcli.export.exporting import export
    from effcli.export.job import DryRun

    with progress_bars(quiet=quiet) as progress:
        result = export(
            model,
            output,
            format=format_,
            device=device,
            dtype=dtype,
            task=task,
            opset=opset,
            tolerance=tolerance,
            force=force,
            dry_run=dry_run,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            progress=progress,
            command=shlex.join(["effcli", *sys.argv[1:]]),
        )
    if quiet:
        return
    if isinstance(result, DryRun):
        lines = result.lines()
    else:
        from effcli.reports.verdict import verdict

        warn(result.warnings)
        lines = [*verdict(result.to_dict()), f"wrote {output}", f"report: {output / 'report.html'}"]
    for line in lines:
        typer.echo(line)
