"""``effcli profile``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from effcli.errors import BadInputError

if TYPE_CHECKING:
    from effcli.diffusion.profile import Sampling
    from effcli.reports.model import ProfileReport
    from effcli.reports.pipeline_model import PipelineProfileReport

_LANGUAGE_ONLY = {
    "--context": None,
    "--config-only": False,
    "--epsilon": "0.3",
    "--sequences": 100,
    "--text": None,
    "--allow-pickle": False,
}
"""Options that mean nothing for a diffusion pipeline, with their defaults."""


def _complete_profilers(incomplete: str) -> list[str]:
    from effcli.diffusion.profile import PARTS
    from profilers.registry import names

    head, comma, tail = incomplete.rpartition(",")
    return [head + comma + name for name in (*names(), *PARTS) if name.startswith(tail)]


def command(
    model: ModelArgument,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="Run only these profilers, comma-separated: see 'effcli profilers'; or denoising, error-map.",
            autocompletion=_complete_profilers,
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option("--context", "-c", help="Context lengths in tokens, comma-separated.")
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", "-b", help="Batch sizes, comma-separated; of a pipeline, one.")
    ] = "1",
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
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampling steps of a diffusion pipeline; default: 50.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What a pipeline is asked for: a prompt, or a class.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", min=0, help="Guidance scale of a pipeline; default: its own.")
    ] = None,
    height: Annotated[int | None, typer.Option("--height", min=1, help="Pixels; default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Pixels; default: the pipeline's own.")] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Of a video; default: the pipeline's own.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Samples that a pipeline's error map averages over; default: 1 to 4."),
    ] = None,
    max_gap: Annotated[
        int | None,
        typer.Option("--max-gap", min=2, help="Longest reuse in a pipeline's error map, in steps; default: 8."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    revision: RevisionOption = None,
    allow_pickle: AllowPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    format_: FormatOption = None,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a model on this device: roofline, attention sinks, KV cache, latency, energy, outliers.

    Of a diffusion pipeline: FLOP/byte and time a step, the transformer's share, and the error that reuse would cause.
    """
    from effcli.diffusion.opening import is_pipeline

    outputs = checked_outputs(output, format_)
    sampling: dict[str, Any] = {
        "steps": steps, "prompt": prompt, "guidance": guidance, "height": height, "width": width, "frames": frames,
        "samples": samples, "max_gap": max_gap,
    }  # fmt: skip
    settings: dict[str, Any] = {
        "device": device, "dtype": dtype, "seed": seed, "revision": revision, "trust_remote_code": trust_remote_code,
        "command": shlex.join(["effcli", *sys.argv[1:]]),
    }  # fmt: skip
    result: ProfileReport | PipelineProfileReport
    given: dict[str, Any]
    if is_pipeline(model):
        given = dict(zip(_LANGUAGE_ONLY, (context, config_only, epsilon, sequences, text, allow_pickle), strict=True))
        _refuse(model, given, _LANGUAGE_ONLY, "is a diffusion pipeline, and {} is for language models")
        result = _profile_pipeline(model, only, _sampling(sampling, batch), quiet=quiet, **settings)
    else:
        given = {f"--{name.replace('_', '-')}": value for name, value in sampling.items()}
        _refuse(model, given, dict.fromkeys(given), "is no diffusion pipeline in a local folder, and {} is for those")
        result = _profile_model(
            model, only, batch, context, epsilon, text, quiet=quiet, config_only=config_only, sequences=sequences,
            allow_pickle=allow_pickle, **settings,
        )  # fmt: skip
    emit(result.to_dict(), format_, outputs, quiet=quiet)


def _refuse(model: str, given: Mapping[str, Any], defaults: Mapping[str, Any], why: str) -> None:
    """Refuse the first option that was given and means nothing for this model."""
    for option, value in given.items():
        if value != defaults[option]:
            raise BadInputError(f"'{model}' {why.format(option)}; leave {option} out")


def _sampling(given: Mapping[str, Any], batch: str) -> Sampling:
    from effcli.diffusion.profile import Sampling

    batches = positive_numbers(batch, "--batch")
    if len(batches) > 1:
        raise BadInputError(f"--batch '{batch}' of a diffusion pipeline must be one number; give e.g. --batch 4")
    return Sampling(batch=batches[0], **{name: value for name, value in given.items() if value is not None})


def _profile_pipeline(
    model: str, only: str | None, sampling: Sampling, *, quiet: bool, **settings: Any
) -> PipelineProfileReport:
    from effcli.diffusion.profile import PARTS, profile_pipeline

    chosen = chosen_names(only, PARTS, "--only")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        warn((line,))

    with progress_bars(quiet=quiet) as progress:
        result = profile_pipeline(
            model, sampling, only=chosen or PARTS, progress=progress, on_warning=None if quiet else say, **settings
        )
    if not quiet:
        warn(line for line in result.warnings if line not in said)
    return result


def _profile_model(
    model: str,
    only: str | None,
    batch: str,
    context: str | None,
    epsilon: str,
    text: Path | None,
    *,
    quiet: bool,
    **settings: Any,
) -> ProfileReport:
    from effcli.eval_text import read_text
    from profilers.registry import names

    parsed: dict[str, Any] = {
        "only": chosen_names(only, names(), "--only"),
        "batch": positive_numbers(batch, "--batch"),
        "context": positive_numbers(context, "--context") if context is not None else None,
        "epsilon": fractions(epsilon, "--epsilon"),
        "text": read_text(text) if text is not None else None,
    }
    from effcli.api import profile

    with progress_bars(quiet=quiet) as progress:
        result = profile(model, **parsed, **settings, progress=progress)
    if not quiet:
        warn(result.warnings)
    return result
