"""``effcli eval``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from effcli.cli.optimize import Kernels
from effcli.cli.options import (
    AllowPickleOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    ModelArgument,
    OutputOption,
    QuietOption,
    RevisionOption,
    TrustRemoteCodeOption,
)
from effcli.cli.output import checked_outputs, emit, warn
from effcli.cli.progress import progress_bars
from profilers.tasks import SAMPLES


def command(
    model: ModelArgument,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="ORIGINAL", help="Compare with this model: divergence and agreement."),
    ] = None,
    eval_text: Annotated[
        Path | None, typer.Option("--eval-text", help="UTF-8 file; default: a part of the Python documentation.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME[:CONFIG[:SPLIT]]", help="Data set of the hub, or a folder.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Tokens to evaluate at most.")] = 8192,
    context: Annotated[
        int, typer.Option("--context", "-c", min=32, help="Tokens of a window; windows do not overlap.")
    ] = 512,
    tasks: Annotated[
        Path | None, typer.Option("--tasks", metavar="FILE", help="JSONL file of multiple-choice or cloze tasks.")
    ] = None,
    task_samples: Annotated[int, typer.Option("--task-samples", min=1, help="Samples of a task at most.")] = SAMPLES,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-evaluation-harness, comma-separated."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    kernels: Annotated[
        Kernels, typer.Option("--kernels", help="For quantized weights: the fastest kernels here, or plain.")
    ] = Kernels.auto,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    allow_pickle: AllowPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a model's quality, by itself or against the original: perplexity, divergence, agreement, tasks."""
    outputs = checked_outputs(output, format_)
    from effcli.evaluation import evaluate
    from effcli.recipes import Evaluation

    with progress_bars(quiet=quiet) as progress:
        result = evaluate(
            model,
            against=against,
            evaluation=Evaluation(text=eval_text, dataset=dataset, tokens=tokens, context=context, tasks=tasks),
            task_samples=task_samples,
            lm_eval=tuple(name.strip() for name in lm_eval.split(",") if name.strip()) if lm_eval else (),
            seed=seed,
            device=device,
            dtype=dtype,
            kernels=kernels.value,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            progress=progress,
            command=shlex.join(["effcli", *sys.argv[1:]]),
        )
    if not quiet:
        warn(result.warnings)
    emit(result.to_dict(), format_, outputs, quiet=quiet)
