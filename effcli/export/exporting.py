"""``effcli export``: write a model as ONNX graphs over one file of weights, check it against torch, and publish it.

::

    load (plain weights) ──> trace prefill, decode ──> integers put back ──> weights.bin, *.onnx   (staged folder)
                                                                                   │ read back by onnxruntime
      target <──rename── report, hashes <──within tolerance── logits against torch ┘

Whatever stops it, the target is absent or as it was; see ``docs/export.md``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli import sources
from effcli.errors import BadInputError, did_you_mean
from effcli.export import graphs, tasks
from effcli.export.job import DryRun, Job
from effcli.export.report import ExportReport
from effcli.staging import check_target, open_staging
from profilers.base import SilentProgress

if TYPE_CHECKING:
    from profilers.base import Progress

FORMATS = ("onnx",)
NOT_EXPORTED = {"config": "only a config", "diffusers": "a diffusers pipeline", "onnx": "an ONNX export already"}
"""Kinds of sources that have nothing to export, and what to call them."""


def export(
    model: str,
    output: Path,
    *,
    format: str = "onnx",
    device: str = "auto",
    dtype: str = "auto",
    task: str = "auto",
    opset: int | None = None,
    tolerance: float | None = None,
    force: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    command: str | None = None,
) -> ExportReport | DryRun:
    """Write a model as ONNX and check it against torch on real text before it appears.

    Parameters
    ----------
    model : str
        A source as on the command line.
    output : Path
        Folder; it appears whole or not at all.
    format : str
        ``onnx``.
    device, dtype : str
        ``auto`` or a torch name. ``auto`` dtype is float32 on a CPU, float16 on a GPU.
    task : str
        ``auto``, from the architecture, or a name of :data:`effcli.export.tasks.TASKS`.
    opset : int, optional
        Default: the highest that the exporter writes.
    tolerance : float, optional
        Largest difference of an output that is let pass; default: :data:`effcli.export.job.TOLERANCES`.
    force : bool
        Replace an export or checkpoint that is there, at the very end.
    dry_run : bool
        Stop after the checks that need no weights.
    revision, allow_pickle, trust_remote_code
        As in :func:`effcli.sources.resolve`.
    seed : int
        Of random tokens, where the model has no tokenizer.
    progress : Progress, optional
    command : str, optional
        What the report records as the way to repeat it.

    Raises
    ------
    effcli.errors.GateFailedError
        If the written files differ from torch by more than the tolerance; nothing is published.
    effcli.export.graphs.NotExportableError
        Naming the module that cannot be lowered.
    effcli.errors.EffcliError
        If a source, output or option cannot be used.
    """
    started = time.perf_counter()
    check_format(format, "--format")
    _check_options(task, opset, tolerance, dtype)
    shown = progress or SilentProgress()
    target = Path(output).absolute()
    check_installed("'effcli export'")
    trust: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    source = sources.resolve(model, revision=revision, progress=shown, **trust)
    what = NOT_EXPORTED.get(source.kind)
    if what is not None or source.path is None:
        raise BadInputError(f"'{model}' is {what}; 'effcli export' takes a language or encoder model with its weights")
    check_target(target, source.path, force=force)
    job = Job(model, source, output, target, device, dtype, task, opset, tolerance, force, trust, seed, shown, command)
    if dry_run:
        return job.dry_run()
    with open_staging(target, {}, resume=False, force=force) as staging:
        report = job.write(staging.begin(staging.out.name), started)
        staging.publish(force=force)
    return report


def check_format(format: str, option: str) -> None:
    """Refuse a format that nothing here writes; ``option`` is what named it.

    Raises
    ------
    BadInputError
    """
    if format not in FORMATS:
        raise BadInputError(
            f"{option} '{format}' is not known{did_you_mean(format, FORMATS)}; known: {', '.join(FORMATS)}"
        )


def _check_options(task: str, opset: int | None, tolerance: float | None, dtype: str) -> None:
    from effcli.devices import check_dtype_name

    tasks.check_task(task)
    check_dtype_name(dtype)
    if opset is not None and not graphs.LOWEST_OPSET <= opset <= graphs.HIGHEST_OPSET:
        raise BadInputError(
            f"--opset {opset} cannot be written; the exporter knows {graphs.LOWEST_OPSET} to {graphs.HIGHEST_OPSET}"
        )
    if tolerance is not None and not tolerance > 0:
        raise BadInputError(f"--tolerance {tolerance} lets nothing pass; give a positive number, e.g. 0.001")


def check_installed(what: str) -> None:
    """Refuse to begin where the packages that write and run ONNX are missing.

    Parameters
    ----------
    what : str
        What needs them.

    Raises
    ------
    BadInputError
    """
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInputError(f"{what} needs {', '.join(missing)}; pip install 'effcli[onnx]'")
