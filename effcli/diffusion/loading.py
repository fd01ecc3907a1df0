"""``effcli.load_pipeline``: a pipeline that follows its schedule, or a refusal that says what does not match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcli import provenance
from effcli.checkpoint_files import PIPELINE
from effcli.errors import BadInputError, SourceError
from passes.lemica.schedule import FILE, Schedule, read

REFERENCE = "reference"


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline as loaded, what it follows, and what a user should know.

    Attributes
    ----------
    pipeline : diffusers.DiffusionPipeline
    schedule : Schedule
    follower : passes.lemica.hook.Follower
        Counts calls.
    attached : passes.lemica.hook.Attached
        ``remove()`` makes the pipeline run every step again.
    notes : tuple of str
    """

    pipeline: Any
    schedule: Schedule
    follower: Any
    attached: Any
    notes: tuple[str, ...] = ()


def load_pipeline(
    folder: str | Path,
    schedule: str | None = None,
    *,
    steps: int | None = None,
    interpolate: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    **components: Any,
) -> Any:
    """Load a pipeline that ``effcli optimize`` wrote; it follows its schedule in every run.

    Parameters
    ----------
    folder : str or Path
    schedule : str, optional
        Name of one of its schedules (``slow``, ``medium``, ``fast``), or its full steps (``"17"``); default: the first.
    steps : int, optional
        Sampling steps that it will be run with, where they are not those of the calibration.
    interpolate : bool
        Stretch the schedule to ``steps``. Nothing was measured for that, so it is done only on request.
    device, dtype : str
        ``auto`` or a torch name.
    **components
        Handed to diffusers: models or a scheduler in place of the stored ones.

    Returns
    -------
    diffusers.DiffusionPipeline
        ``pipe.effcli_schedule.attached.remove()`` makes it run every step again.

    Raises
    ------
    effcli.errors.EffcliError, passes.base.PassError
        If the folder has no schedule, or one for another pipeline, scheduler or number of steps.
    """
    loaded = open_followed(
        Path(folder), schedule, steps=steps, interpolate=interpolate, device=device, dtype=dtype, components=components
    )
    loaded.pipeline.effcli_schedule = loaded
    return loaded.pipeline


def open_followed(
    folder: Path,
    schedule: str | None = None,
    *,
    steps: int | None = None,
    interpolate: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    components: dict[str, Any] | None = None,
) -> LoadedPipeline:
    """Load a pipeline and attach its schedule; see :func:`load_pipeline`."""
    from effcli.diffusion.opening import open_pipeline
    from passes.lemica import hook
    from passes.lemica.following import check_pipeline, chosen

    if not folder.is_dir():
        raise SourceError(f"no folder '{folder}'; give one that 'effcli optimize PIPELINE --pass lemica' wrote")
    if not (folder / FILE).is_file():
        raise BadInputError(
            f"'{folder}' has no {FILE}, so there is no schedule to follow; make one with: "
            f"effcli optimize '{folder}' --pass lemica -o OUT"
        )
    content = read(folder)
    follower = chosen(content, folder, schedule, steps=steps, interpolate=interpolate)
    opened = open_pipeline(weights_folder(folder), device=device, dtype=dtype, mode=content.calibration.mode)
    if components:
        opened.pipeline.register_modules(**components)
    check_pipeline(opened.pipeline, content)
    attached = hook.attach(opened.pipeline, follower, mode=follower.schedule.mode)
    return LoadedPipeline(opened.pipeline, follower.schedule, follower, attached)


def weights_folder(folder: Path) -> Path:
    """Return where a checkpoint's weights are: itself, or what it refers to.

    Raises
    ------
    SourceError
        If that is no longer there, or its weights are not those of the calibration.
    """
    made = provenance.read(folder)
    source = made.source if made is not None else {}
    if source.get("weights") != REFERENCE:
        return folder
    place = Path(str(source.get("path")))
    if not (place / PIPELINE).is_file():
        raise SourceError(
            f"the weights of '{folder}' are a reference to '{place}', and no pipeline is there; put it back, or "
            "optimize again with weights=copy"
        )
    for name, size in source["sizes"].items():
        path = place / name
        if not path.is_file() or path.stat().st_size != size:
            raise SourceError(
                f"'{path}' is not the file of {size:,} bytes that the schedule of '{folder}' was calibrated with; "
                "optimize again"
            )
    return place
