"""What ``effcli optimize --dry-run`` says: what a run would do and take, from checks that load no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effcli import onnx_stage, planning
from effcli.disk import free_bytes
from effcli.errors import NoRoomError
from effcli.formatting import data_size
from effcli.preflight import Job
from effcli.reports.optimize_model import PlannedPass
from effcli.staging import folder_for

if TYPE_CHECKING:
    from profilers.base import Progress

SPARE_BYTES = 64 * 10**6
"""Disk kept free for reports, logs and tokenizer files."""


@dataclass(frozen=True)
class DryRun:
    """What a run would do, from checks that load no weights.

    Attributes
    ----------
    spec : str
    target, staging : Path
    planned : tuple of PlannedPass
        With sizes from shapes; times are predicted only once the model was measured.
    gates : tuple of str
    disk_needed_bytes, disk_free_bytes : int
    notes : tuple of str
    loaded : bool
        Whether weights had to be loaded for the checks.
    export : str or None
        Format that the result would be written in too.
    export_bytes : int
        That this takes at most; they are in ``disk_needed_bytes``.
    """

    spec: str
    target: Path
    staging: Path
    planned: tuple[PlannedPass, ...]
    gates: tuple[str, ...]
    disk_needed_bytes: int
    disk_free_bytes: int
    notes: tuple[str, ...]
    loaded: bool = False
    export: str | None = None
    export_bytes: int = 0

    def lines(self) -> list[str]:
        """Return it in words, for a terminal."""
        lines = [f"would optimize {self.spec} into {self.target}"]
        for position, item in enumerate(self.planned, start=1):
            size = item.prediction.figures.weight_bytes if item.prediction is not None else None
            lines.append(f"pass {position}: {item.label}" + (f", weights {data_size(size)}" if size else ""))
        if self.export is not None:
            folder = self.target / onnx_stage.FOLDER
            lines.append(
                f"export: {self.export} into {folder}, at most {data_size(self.export_bytes)} more on the disk"
            )
        lines += [f"gate: {text}" for text in self.gates]
        lines.append(f"staging: {self.staging}")
        lines.append(f"disk: {data_size(self.disk_needed_bytes)} needed, {data_size(self.disk_free_bytes)} free")
        return [*lines, *self.notes, "nothing was written" if self.loaded else "nothing was loaded or written"]


def disk_needed(job: Job, planned: tuple[PlannedPass, ...]) -> int:
    """Return the bytes that staging takes at its largest, as far as it is known before the passes run.

    The finished checkpoint shares its files with the last stage. What a pass keeps to resume inside itself is not
    known.
    """
    head = job.bare.model.get_output_embeddings()
    windows = job.texts.windows.numel() * job.bare.config.get_text_config(decoder=True).hidden_size
    reference = windows + (head.weight.numel() if head is not None else 0)
    plain_bytes = job.parameters * job.bare.dtype.itemsize
    written = 0
    for item in planned:
        bits = item.prediction.bits_per_parameter if item.prediction is not None else None
        written += plain_bytes if bits is None else round(bits * job.parameters / 8)
    total: int = reference * job.bare.dtype.itemsize + written + SPARE_BYTES + export_bytes(job)
    return total


def export_bytes(job: Job) -> int:
    """Return the bytes that the export of a run takes at most, 0 where none is asked for."""
    return 0 if job.options.export is None else onnx_stage.needed_bytes(job)


def dry_run(job: Job, progress: Progress) -> DryRun:
    """Predict sizes from shapes and check the disk.

    Raises
    ------
    NoRoomError
        If the disk is too small.
    """
    from effcli.api import profile

    report = profile(
        job.bare, only=("kv",), refuse_inapplicable=False, batch=(job.options.batch,), context=(job.context,),
        progress=progress, command=job.command,
    ).to_dict()  # fmt: skip
    known = planning.model_profile(report, job.bare.model, job.device, batch=job.options.batch, context=job.context)
    planned = planning.plan_chain(job.chain, known, job.recipe.passes)
    needed, free = disk_needed(job, planned), free_bytes(job.target.parent)
    if needed > free:
        raise NoRoomError(
            f"'{job.target}' needs about {data_size(needed)} of disk while it is made and {data_size(free)} are free; "
            "free some, or choose another --output"
        )
    staging = folder_for(job.target)
    notes = (*job.bare.notes, *job.texts.notes)
    if staging.exists():
        notes += (f"staged work is there already: --resume goes on with it, --force drops it ('{staging}')",)
    return DryRun(
        job.spec, job.target, staging, planned, job.recipe.gates, needed, free, notes, export=job.options.export,
        export_bytes=export_bytes(job),
    )  # fmt: skip
