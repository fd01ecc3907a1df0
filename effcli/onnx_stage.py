"""``effcli optimize --export onnx``: the result as ONNX graphs too, measured on ONNX Runtime beside torch.

::

    the last pass-N ──effcli/export, held against torch──> onnx/ ──measuring process──> after_onnx ──> OUT/onnx

The export depends on all that the staged work depends on, and on its format and the packages that write and run it.
These are kept with its stage, not in the fingerprint of the whole: so a resumed run may ask for an export that the
first one did not, and only that is done; or do without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import BadInputError
from effcli.reports.optimize_model import OnnxResult

if TYPE_CHECKING:
    from effcli.preflight import Job
    from effcli.staging import Staging
    from passes.base import Pass
    from profilers.base import Progress

FOLDER = "onnx"
"""Of the export in the checkpoint, as on the hub; the stage that writes it is called the same."""
MEASURED = "after-onnx"
_OPTION = "--export"
_GRAPH_BYTES = 4 * 10**6
"""What graphs and report take beside the weights."""


def check(export: str, model: str, device: str, dtype: str, chain: Sequence[Pass]) -> None:
    """Refuse what cannot be exported or run, before anything is measured.

    Parameters
    ----------
    export : str
        What was asked for.
    model, device, dtype : str
        As given.
    chain : sequence of Pass

    Raises
    ------
    BadInputError
        Naming what is in the way.
    """
    from effcli.export import exporting, opening
    from effcli.export import job as exports
    from effcli.export.quantized import SUPPORTED
    from passes.quantize.parameters import QuantizeParameters

    check_format(export)
    exporting.check_installed(f"{_OPTION} {export}")
    exports.refuse_passes(model, (item.name for item in chain))
    for item in chain:
        given = item.parameters
        if isinstance(given, QuantizeParameters) and (not given.takes_group_size or given.kv_cache != "none"):
            what = "kv_cache=fp8" if given.kv_cache != "none" else f"scheme={given.scheme}"
            raise BadInputError(
                f"{_OPTION} {export} cannot keep {item.name}:{what}; it keeps {SUPPORTED}: give one of these, or leave "
                f"{_OPTION} out"
            )
    chosen, _ = opening.choose_device(device)
    exports.choose_dtype(dtype, chosen.type)


def check_format(export: str) -> None:
    """Refuse a format that is not known.

    Raises
    ------
    BadInputError
    """
    from effcli.export.exporting import check_format as known

    known(export, _OPTION)


def refused_pipeline(model: str, export: str) -> BadInputError:
    """Return the error for a pipeline, of which there is no export."""
    return BadInputError(
        f"{_OPTION} {export} takes a language model and '{model}' is a diffusers pipeline; leave {_OPTION} out"
    )


def needed_bytes(job: Job) -> int:
    """Return the bytes that an export takes at most; integers of quantized layers take less."""
    import torch

    from effcli.devices import DTYPES
    from effcli.export import opening
    from effcli.export.job import choose_dtype

    chosen, _ = opening.choose_device(job.options.device)
    name, _ = choose_dtype(job.options.dtype, chosen.type)
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return job.parameters * dtype.itemsize + _GRAPH_BYTES


def forget_other(job: Job, staging: Staging) -> None:
    """Take a finished export back that was made by other packages, or in another format, than this run would."""
    known = staging.finished(FOLDER)
    if known is not None and known["made_with"] != made_with(job):
        staging.forget(FOLDER, MEASURED)


def made_with(job: Job) -> dict[str, Any]:
    """Return what an export depends on besides all that the staged work does."""
    from effcli.export import job as exports

    versions = {name: exports.installed_version(name) for name in exports.PACKAGES}
    return {"format": job.options.export, "versions": versions}


def write(job: Job, staging: Staging, folder: Path, progress: Progress) -> dict[str, Any]:
    """Export the last pass's checkpoint into a stage's folder, and return the export's report.

    Raises
    ------
    effcli.errors.GateFailedError
        If the written files differ from torch by more than the tolerance.
    effcli.export.graphs.NotExportableError
        Naming the module that cannot be lowered.
    """
    from effcli.export import opening, tasks
    from effcli.export.job import Job as Export
    from effcli.sources import Source

    started, shown = time.perf_counter(), str(job.target)
    chosen, _ = opening.choose_device(job.options.device)
    export = Export(
        spec=shown,
        source=Source(shown, "folder", staging.path(f"pass-{len(job.chain)}")),
        output=Path(job.output) / FOLDER,
        target=job.target,
        device=str(chosen),
        dtype=job.options.dtype,
        task=tasks.TEXT_GENERATION,
        opset=None,
        tolerance=None,
        force=False,
        trust=job.options.trust,
        seed=job.recipe.seed,
        progress=progress,
        command=job.command,
        remedy=(
            f"the work is kept in '{staging.folder}': run again with --resume and without {_OPTION} to publish the "
            "checkpoint alone"
        ),
    )
    return {"export": export.write(folder, started).to_dict(), "made_with": made_with(job)}


def result_of(export: dict[str, Any], measured: dict[str, Any]) -> OnnxResult:
    """Return what the report says of an export, from what both stages left."""
    return OnnxResult(
        folder=FOLDER,
        profile=measured["profile"],
        quality=measured["quality"],
        quality_reason=measured["quality_reason"],
        provider=measured["provider"],
        provider_reason=measured["provider_reason"],
        **{
            key: export[key]
            for key in (
                *("opset", "dtype", "dtype_reason", "quantization", "file_bytes", "tolerance"),
                *("max_absolute_error", "mean_absolute_error"),
            )
        },
        weight_bytes=measured["profile"]["model"]["weight_bytes"],
        positions=sum(item["positions"] for item in export["agreement"]),
        notes=tuple(export["notes"]),
    )
