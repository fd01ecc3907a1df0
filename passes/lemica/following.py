"""From ``lemica.json`` to a driver that follows it: which schedule, for how many steps, and on which pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import PassError
from passes.lemica import reuse
from passes.lemica.schedule import LemicaFile, Mode, Schedule

if TYPE_CHECKING:
    from passes.lemica.hook import Follower


def chosen(
    content: LemicaFile, folder: Path, name: str | None, *, steps: int | None = None, interpolate: bool = False
) -> Follower:
    """Return the driver of one of a file's schedules.

    Parameters
    ----------
    content : LemicaFile
    folder : Path
        That has its coefficients.
    name : str or None
        Of the schedule, or its full steps as a number; None: the default.
    steps : int or None
        Sampling steps of the runs to come; None: those of the calibration.
    interpolate : bool
        Whether the schedule may be stretched to another number of steps.

    Raises
    ------
    PassError
        If there is no such schedule, or it is for another number of steps and may not be stretched.
    """
    schedule = content.schedule(name)
    coefficients = reuse.read(folder, schedule.name) if schedule.reuse == "fitted" else None
    calibrated = content.calibration.inference_steps
    if steps is not None and steps != calibrated:
        if not interpolate:
            raise PassError(
                f"schedule '{schedule.name}' was calibrated for {calibrated} steps, not {steps}; calibrate it for "
                f"{steps} (--pass lemica:steps={steps}), or stretch it unmeasured with interpolate=True"
            )
        if schedule.steps != calibrated:
            raise PassError(
                f"the scheduler makes {schedule.steps} calls of {calibrated} steps, so that the schedule cannot be "
                f"stretched; calibrate it for {steps}: --pass lemica:steps={steps}"
            )
        return follower(interpolated(schedule, steps, content.calibration.mode), None)
    return follower(schedule, coefficients)


def follower(schedule: Schedule, coefficients: reuse.Coefficients | None) -> Follower:
    """Return the driver of a schedule."""
    from passes.lemica.hook import Follower

    if coefficients is None:
        return Follower(schedule)
    return Follower(schedule, combine=coefficients.combine, history=reuse.ANCHORS)


def interpolated(schedule: Schedule, steps: int, mode: Mode) -> Schedule:
    """Return a schedule stretched to another number of steps; the last full step is reused, as nothing is fitted.

    Raises
    ------
    PassError
        If so few steps are left that none would be skipped.
    """
    share = (steps - 1) / (schedule.steps - 1)
    full = tuple(sorted({round(step * share) for step in schedule.full}))
    if len(full) >= steps:
        raise PassError(f"schedule '{schedule.name}' stretched to {steps} steps skips none; run it without a schedule")
    return Schedule(
        name=schedule.name,
        steps=steps,
        full=full,
        reuse="last",
        mode=mode,
        origin=f"interpolated from {schedule.steps} steps, not measured",
    )


def check_pipeline(pipeline: Any, content: LemicaFile) -> None:
    """Refuse a pipeline that the schedules were not calibrated on.

    Raises
    ------
    PassError
        Naming what differs.
    """
    from passes.lemica import architecture, scheduler_config, targets

    known = content.calibration
    if type(pipeline).__name__ != known.pipeline:
        raise PassError(
            f"the schedules were calibrated for {known.pipeline}, this is {type(pipeline).__name__}; calibrate again"
        )
    if type(pipeline.scheduler).__name__ != known.scheduler:
        raise PassError(
            f"the schedules were calibrated with {known.scheduler}, the pipeline has "
            f"{type(pipeline.scheduler).__name__}; put that scheduler back, or calibrate with this one"
        )
    found = scheduler_config(pipeline)
    different = sorted(
        key
        for key in {*found, *known.scheduler_config}
        if _plain(found.get(key)) != _plain(known.scheduler_config.get(key))
    )
    if different:
        key = different[0]
        raise PassError(
            f"the scheduler's {key} is {found.get(key)!r}, and {known.scheduler_config.get(key)!r} in the calibration; "
            "put it back, or calibrate again"
        )
    denoiser = architecture(pipeline, targets.find(pipeline, known.mode))
    if denoiser != known.denoiser:
        raise PassError(f"the schedules were calibrated for {known.denoiser}, the denoiser is {denoiser}")


def _plain(value: Any) -> Any:
    """Return a configuration's value as JSON gives it back."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
