"""``effcli profile``."""

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
    FormatOption,
    ModelArgument,
    OutputOption,
    QuietOption,
    RevisionOption,
    TrustRemoteCodeOption,
)
from effcli.cli.output import (
    checked_outputs,
    chosen_names,
    emit,
    fractions,
    positive_numbers,
    warn,
)
from effcli.cli.progress import progress_bars


def _complete_profilers(incomplete: str) -> list[str]:
    from profilers.registry import names

    head, comma, tail = incomplete.rpartition(",")
    return [head + comma + name for name in names() if name.startswith(tail)]


def command(
    model: ModelArgument,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="Run only these profilers, comma-separated: see 'effcli profilers'.",
            autocompletion=_complete_profilers,
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", "-c", help="Context lengths in tokens, comma-separated.")
    ] = None,
    batch: Annotated[str, typer.Option("--batch", "-b", help="Batch sizes, comma-separated.")] = "1",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Count from the config on the meta device; needs no weights.")
    ] = False,
    epsilon: Annotated[
        str, typer.Option("--epsilon", help="Sink threshold, or several, comma-separated; verdicts quote the first.")
    ] = "0.3",
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences the sink rate averages over.")] = 100,
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 file to measure on; default: a text every Python has.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    revision: RevisionOption = None,
    allow_pickle: AllowPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a model on this device: roofline, attention sinks, KV cache, latency, energy, outliers."""
    from profilers.registry import names

    outputs = checked_outputs(output, format_)
    chosen = chosen_names(only, names(), "--only")
    batches = positive_numbers(batch, "--batch")
    contexts = positive_numbers(context, "--context") if context is not None else None
    epsilons = fractions(epsilon, "--epsilon")
    from effcli.eval_text import read_text

    sample = read_text(text) if text is not None else None
    from effcli.api import profile

    with progress_bars(quiet=quiet) as progress:
        result = profile(
            model,
            only=chosen,
            batch=batches,
            context=contexts,
            epsilon=epsilons,
            text=sample,
            device=device,
            dtype=dtype,
            config_only=config_only,
            sequences=sequences,
            seed=seed,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            progress=progress,
            command=shlex.join(["effcli", *sys.argv[1:]]),
        )
    if not quiet:
        warn(result.warnings)
    emit(result.to_dict(), format_, outputs, quiet=quiet)
