"""``effcli optimize``."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from effcli.cli.options import (
    AddressOption,
    AllowPickleOption,
    DeviceOption,
    DtypeOption,
    EngineName,
    EngineOption,
    FormatOption,
    ModelArgument,
    PassOption,
    ProfileOption,
    QuietOption,
    RecipeOption,
    RevisionOption,
    TrustRemoteCodeOption,
    chosen_recipe,
)
from effcli.cli.output import Format, emit, warn
from effcli.cli.progress import progress_bars


class Kernels(StrEnum):
    """Which kernels the result is measured with."""

    auto = "auto"
    plain = "plain"


def command(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write the optimized checkpoint to.")
    ],
    passes: PassOption = None,
    recipe: RecipeOption = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="RULE", help='Publish only if this holds, e.g. "ppl<=+3%"; repeatable.'),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything that can be checked without loading weights, and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an earlier run has staged.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder, and drop staged work.")] = False,
    profile: ProfileOption = None,
    calibration_text: Annotated[
        Path | None, typer.Option("--calibration-text", help="UTF-8 file; default: part of the Python documentation.")
    ] = None,
    eval_text: Annotated[
        Path | None, typer.Option("--eval-text", help="UTF-8 file; default: another part of the same.")
    ] = None,
    eval_dataset: Annotated[
        str | None, typer.Option("--eval-dataset", metavar="NAME[:CONFIG[:SPLIT]]", help="Data set to evaluate on.")
    ] = None,
    eval_tokens: Annotated[int | None, typer.Option("--eval-tokens", min=256, help="Default 8192.")] = None,
    tasks: Annotated[Path | None, typer.Option("--tasks", help="JSONL file of multiple-choice or cloze tasks.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random; default 0.")] = None,
    context: Annotated[int | None, typer.Option("--context", "-c", min=1, help="Tokens; default 512.")] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences.")] = 1,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Processes that do parts of a pass side by side, where it has any; default: 1; with ray, what fits.",
        ),
    ] = None,
    engine: EngineOption = EngineName.local,
    address: AddressOption = None,
    export: Annotated[
        str | None,
        typer.Option("--export", metavar="FORMAT", help="Write and measure the result in this format too: onnx."),
    ] = None,
    kernels: Annotated[
        Kernels, typer.Option("--kernels", help="Kernels the result is measured with: the fastest here, or plain.")
    ] = Kernels.auto,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Measure decode with torch.compile too (takes about a minute).")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    allow_pickle: AllowPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    format_: FormatOption = None,
    quiet: QuietOption = False,
) -> None:
    """Apply passes, verify what was written, and publish a checkpoint with its before/after report."""
    evaluation = {"text": eval_text, "dataset": eval_dataset, "tokens": eval_tokens, "tasks": tasks}
    settings: dict[str, Any] = {
        "evaluation": {key: value for key, value in evaluation.items() if value is not None},
        "calibration": {"text": calibration_text} if calibration_text else {},
        "seed": seed,
        "gates": gate,
    }
    chosen = chosen_recipe(passes, recipe, **{key: value for key, value in settings.items() if value not in (None, {})})
    from effcli.pipeline import DryRun, optimize
    from effcli.reports.model import read_report

    with progress_bars(quiet=quiet) as progress:
        result = optimize(
            model,
            chosen,
            output,
            device=device,
            dtype=dtype,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            before=read_report(profile) if profile else None,
            resume=resume,
            force=force,
            dry_run=dry_run,
            kernels=kernels.value,
            compile=compile_,
            context=context,
            batch=batch,
            workers=workers,
            engine=engine.value,
            address=address,
            export=export,
            progress=progress,
            on_warning=None if quiet else lambda line: warn((line,)),
            command=shlex.join(["effcli", *sys.argv[1:]]),
        )
    if isinstance(result, DryRun):
        if not quiet:
            for line in result.lines():
                typer.echo(line)
        return
    if format_ not in (None, Format.human):
        emit(result.to_dict(), format_, [], quiet=quiet)
    elif not quiet:
        from effcli.reports.verdict import verdict

        for line in [*verdict(result.to_dict()), f"wrote {output}", f"report: {output / 'report.html'}"]:
            typer.echo(line)
