"""What the measuring processes of ``effcli optimize`` do: the original before, the written checkpoint after.

::

    before: load the source ── profile ── reference of its logits ── tasks          (worker 1)
    first look: quality on little text, where the recipe asks for it
    after onnx: profile and quality of its export, on ONNX Runtime
    after:  read the staged folder ── profile ── quality against the reference ── tasks ── compiled decode
            ── what each pass measures itself ── logits of the fast kernels against plain weights     (worker 2)

All run through :mod:`effcli.worker`; results are JSON-ready.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effcli.errors import SourceError
from effcli.reports.model import ProfileReport, plain
from effcli.reports.optimize_model import KernelAgreement
from profilers.base import NotApplicableError, Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from effcli.checkpoint import Loaded
    from effcli.loading import LoadedModel
    from profilers.quality import Reference

PROFILERS = ("latency", "intensity", "kv", "energy")
SINK_CONTEXT = 64
SINK_SEQUENCES = 32
"""Sinks are measured on this many sequences of 64 tokens: enough to see them move, in a few seconds."""
AGREEMENT_WINDOWS = 2
"""Windows of text on which the fast kernels are held against plain weights."""
AGREEMENT_POSITIONS = 64
"""Positions whose logits are in memory at a time."""
WINDOWS_FILE = "windows.safetensors"
REFERENCE_FOLDER = "reference"
TASK_FILE = "task.json"


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's time to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def before(
    *,
    source: Mapping[str, Any],
    kept_in: str,
    device: str,
    dtype: str,
    batch: int,
    context: int,
    seed: int,
    text_name: str,
    tasks: str | None,
    profile: bool,
    command: str,
    allow_pickle: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the original and keep what the result is compared with.

    Parameters
    ----------
    source : mapping
        Fields of :class:`effcli.sources.Source`.
    kept_in : str
        Folder that holds the windows of text, and takes the reference.
    profile : bool
        False where a saved profile is used.
    device, dtype, batch, context, seed, text_name, tasks, command, allow_pickle, trust_remote_code, progress
        As in :func:`effcli.pipeline.optimize`.

    Raises
    ------
    SourceError
        If the weights hold NaN or infinity.
    """
    from effcli import loading
    from effcli.quiet import quiet_transformers
    from effcli.sources import Source
    from profilers import tasks as scoring
    from profilers.quality import record_reference

    clock, kept = Clock(), Path(kept_in)
    with clock.stage("profile"):
        described = Source(**{**source, "path": Path(source["path"]), "notes": tuple(source["notes"])})
        loaded = loading.load(
            described, device=device, dtype=dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip
        _check_finite(loaded.model, described.spec)
        report = _profile(loaded, batch, context, seed, command, progress) if profile else None
    quality_reason, task = None, None
    with clock.stage("quality"), quiet_transformers():
        try:
            windows = _read_windows(kept)
            record_reference(loaded.model, windows, progress=progress).save(kept / REFERENCE_FOLDER)
        except NotApplicableError as error:
            quality_reason = str(error)
        if tasks is not None:
            wanted = scoring.read_task(Path(tasks), seed=seed)
            task = plain(scoring.score(loaded.model, loaded.tokenizer, wanted, progress=progress))
    return {
        "profile": None if report is None else report.to_dict(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "notes": list(loaded.notes),
        "quality_reason": quality_reason,
        "task": task,
        "seconds": clock.seconds,
    }


def after(
    *,
    checkpoint: str,
    shown_as: str,
    before_folder: str,
    before_profile: Mapping[str, Any],
    device: str,
    dtype: str,
    batch: int,
    context: int,
    seed: int,
    text_name: str,
    tasks: str | None,
    task_before: Mapping[str, Any] | None,
    quality: bool,
    kernels: Literal["auto", "plain"],
    compile: bool,
    parameters: int,
    command: str,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Read a written checkpoint back and measure it.

    Parameters
    ----------
    checkpoint : str
        The staged folder: all that is read.
    shown_as : str
        Where the checkpoint will be, for the report.
    before_folder : str
        Where :func:`before` left windows and reference.
    before_profile : mapping
        ``effcli.profile/1`` of the original.
    task_before : mapping or None
        What :func:`before` scored.
    quality : bool
        False where the original has no reference.
    parameters : int
        Of the original model.
    kernels, compile, device, dtype, batch, context, seed, text_name, tasks, command, trust_remote_code, progress
        As in :func:`effcli.pipeline.optimize`.
    """
    from effcli import checkpoint as checkpoints
    from effcli.quiet import quiet_transformers
    from profilers import tasks as scoring
    from profilers.quality import Reference, measure_quality, record_reference

    clock, kept = Clock(), Path(before_folder)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with clock.stage("profile"):
        found = checkpoints.load(checkpoint, device=device, dtype=dtype, kernels=kernels, progress=progress, **trust)
        shown = dataclasses.replace(found.source, source=dataclasses.replace(found.source.source, spec=shown_as))
        report = _profile(shown, batch, context, seed, command, progress)
        described = dataclasses.replace(report.model, parameters=parameters, dtype_reason="as before")
        report = dataclasses.replace(report, model=described)
    result: dict[str, Any] = {
        "profile": report.to_dict(),
        "kernels": plain(found.record.kernels),
        "notes": list(found.record.notes),
        "quality": None,
        "agreement": None,
        "agreement_reason": None,
        "compiled": None,
    }
    fast: Reference | None = None
    with clock.stage("quality"), quiet_transformers():
        if quality:
            windows = _read_windows(kept)
            reference = Reference.load(kept / REFERENCE_FOLDER, found.source.device, **trust)
            measured = measure_quality(found.model, windows, reference, text_name=text_name, progress=progress)
            del reference
            if tasks is not None:
                task = scoring.score(
                    found.model, found.tokenizer, scoring.read_task(Path(tasks), seed=seed), progress=progress
                )
                measured = dataclasses.replace(measured, tasks=scoring.compare(task, _task_result(task_before)))
            result["quality"] = plain(measured)
            if any(use.fallback_reason is None for use in found.record.kernels):
                fast = record_reference(found.model, windows[:AGREEMENT_WINDOWS], progress=progress)
            else:
                result["agreement_reason"] = "every layer runs on plain weights"
    if compile:
        with clock.stage("profile"):
            result["compiled"] = plain(checkpoints.measure_compiled_decode(found.model, context))
    with clock.stage("passes"), quiet_transformers():
        result["measured"] = _measured(found, before_profile, result["profile"], batch, context, seed, progress)
    if fast is not None:
        del shown, found
        gc.collect()
        with clock.stage("quality"), quiet_transformers():
            simple = checkpoints.load(checkpoint, device=device, dtype=dtype, kernels="plain", **trust)
            result["agreement"] = plain(
                logit_agreement(fast, record_reference(simple.model, fast.windows, progress=progress))
            )
    return {**result, "seconds": clock.seconds}


def after_onnx(
    *,
    export: str,
    shown_as: str,
    before_folder: str,
    quality_reason: str | None,
    device: str,
    batch: int,
    context: int,
    seed: int,
    text_name: str,
    command: str,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Open a staged export and measure it on ONNX Runtime, as :func:`after` measures the checkpoint in torch.

    Parameters
    ----------
    export : str
        The staged folder: all that is read.
    quality_reason : str or None
        Why the original has no reference.
    device : str
        As the user gave it: where ONNX Runtime has no provider for a GPU, ``auto`` is the CPU.
    shown_as, before_folder, batch, context, seed, text_name, command, trust_remote_code, progress
        As for :func:`after`.
    """
    from effcli.api import HIDDEN_IN_GRAPHS, ONNX_PROFILERS, profile
    from effcli.export import opening
    from effcli.quiet import quiet_transformers
    from effcli.sources import Source
    from profilers.quality import Reference, measure_quality

    clock, kept = Clock(), Path(before_folder)
    with clock.stage("profile"):
        loaded = opening.load(Source(shown_as, "onnx", Path(export)), device=device)
        report = profile(
            loaded, only=ONNX_PROFILERS, refuse_inapplicable=False, batch=(batch,), context=(context,), seed=seed,
            progress=progress, command=command,
        )  # fmt: skip
        hidden = {name: HIDDEN_IN_GRAPHS for name in (*PROFILERS, "sinks") if name not in ONNX_PROFILERS}
        report = dataclasses.replace(report, skipped={**report.skipped, **hidden})
    quality = None
    if quality_reason is None:
        with clock.stage("quality"), quiet_transformers():
            windows = _read_windows(kept)
            reference = Reference.load(kept / REFERENCE_FOLDER, loaded.device, trust_remote_code=trust_remote_code)
            quality = plain(measure_quality(loaded.model, windows, reference, text_name=text_name, progress=progress))
    return {
        "profile": report.to_dict(),
        "quality": quality,
        "quality_reason": quality_reason,
        "provider": loaded.model.graph.provider,
        "provider_reason": loaded.device_reason,
        "seconds": clock.seconds,
    }


def first_look(
    *,
    checkpoint: str,
    before_folder: str,
    device: str,
    dtype: str,
    kernels: Literal["auto", "plain"],
    tokens: int,
    text_name: str,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Measure a written checkpoint's quality on the first windows alone.

    Parameters
    ----------
    tokens : int
        As many windows as hold them, one at least.
    checkpoint, before_folder, device, dtype, kernels, text_name, trust_remote_code, progress
        As for :func:`after`.
    """
    from effcli import checkpoint as checkpoints
    from effcli.quiet import quiet_transformers
    from profilers.quality import Reference, measure_quality

    clock, kept = Clock(), Path(before_folder)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with clock.stage("quality"), quiet_transformers():
        found = checkpoints.load(checkpoint, device=device, dtype=dtype, kernels=kernels, progress=progress, **trust)
        whole = Reference.load(kept / REFERENCE_FOLDER, found.source.device, **trust)
        count = max(1, math.ceil(tokens / whole.windows.shape[1]))
        reference = dataclasses.replace(whole, windows=whole.windows[:count], states=whole.states[:count])
        quality = measure_quality(found.model, reference.windows, reference, text_name=text_name, progress=progress)
    return {"quality": plain(quality), "seconds": clock.seconds}


def _measured(
    found: Loaded,
    before_profile: Mapping[str, Any],
    after_profile: Mapping[str, Any],
    batch: int,
    context: int,
    seed: int,
    progress: Progress,
) -> list[Any]:
    """Return what each pass of the run measured itself, None for one that measures nothing."""
    from effcli import planning
    from passes import registry
    from passes.base import MeasureContext

    point = MeasureContext(
        before=before_profile,
        after=after_profile,
        peaks=planning.peaks_of(after_profile),
        batch=batch,
        context=context,
        seed=seed,
        progress=progress,
    )
    done = found.provenance.passes if found.provenance is not None else ()
    return [
        plain(registry.load(record.name).from_mapping(record.parameters).measure(found.model, point)) for record in done
    ]


def logit_agreement(fast: Reference, simple: Reference) -> KernelAgreement:
    """Compare two recordings of the same windows, a few positions at a time.

    Parameters
    ----------
    fast : Reference
        Of the model with its kernels.
    simple : Reference
        Of the model with plain weights.
    """
    error = norm = largest = 0.0
    agreeing = 0
    count, length = simple.windows.shape
    for window, start in itertools.product(range(count), range(0, length, AGREEMENT_POSITIONS)):
        stop = min(start + AGREEMENT_POSITIONS, length)
        ours, theirs = (item.logits(window, start, stop).double() for item in (fast, simple))
        difference = ours - theirs
        error += difference.square().sum().item()
        norm += theirs.square().sum().item()
        largest = max(largest, difference.abs().max().item())
        agreeing += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
    return KernelAgreement(count * length, math.sqrt(error / norm), largest, agreeing / (count * length))


def _profile(
    loaded: LoadedModel, batch: int, context: int, seed: int, command: str, progress: Progress
) -> ProfileReport:
    """Profile at one point; sinks at a short context of their own."""
    from effcli.api import profile
    from effcli.quiet import quiet_transformers
    from profilers.phases import context_limit
    from profilers.sinks import measure_sinks

    report = profile(
        loaded, only=PROFILERS, refuse_inapplicable=False, batch=(batch,), context=(context,), seed=seed,
        progress=progress, command=command,
    )  # fmt: skip
    started = time.perf_counter()
    profiles, skipped = dict(report.profiles), dict(report.skipped)
    limit = context_limit(loaded.config)
    try:
        with quiet_transformers():
            sinks = measure_sinks(
                loaded.model, loaded.tokenizer, contexts=(min(SINK_CONTEXT, limit or SINK_CONTEXT),),
                sequences=SINK_SEQUENCES, seed=seed, progress=progress,
            )  # fmt: skip
        profiles["sinks"] = plain(sinks)
    except NotApplicableError as error:
        skipped["sinks"] = str(error)
    spent = report.seconds_spent + time.perf_counter() - started
    return dataclasses.replace(report, profiles=profiles, skipped=skipped, seconds_spent=spent)


def _check_finite(model: PreTrainedModel, spec: str) -> None:
    """Refuse weights that are broken before an hour is spent on them."""
    import torch

    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
            raise SourceError(
                f"the weights of '{spec}' hold NaN or infinity in '{name}'; fetch the checkpoint again, or use another"
            )


def _read_windows(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / WINDOWS_FILE)["windows"]


def _task_result(data: Mapping[str, Any] | None) -> Any:
    from profilers.tasks import TaskResult

    if data is None:
        return None
    return TaskResult(**{**data, "correct": {name: tuple(flags) for name, flags in data["correct"].items()}})
