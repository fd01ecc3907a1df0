"""Schedules run over calibration samples: fits what stands for skipped steps, finds the nearest to all steps."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.lemica import hook, inputs, path, reuse
from passes.lemica.following import follower
from passes.lemica.inputs import Sample
from passes.lemica.schedule import Mode, Reuse, Schedule


@dataclass(frozen=True)
class Trial:
    """A schedule's run over calibration samples.

    Attributes
    ----------
    schedule : Schedule
    error : float or None
        Mean absolute difference of its final latents to those of all steps; None: not asked for.
    coefficients : Coefficients or None
        What was fitted in that run; None where nothing is to be.
    left : float or None
        Share of the power of what is skipped that the combinations leave, the mean over skipped steps.
    """

    schedule: Schedule
    error: float | None = None
    coefficients: reuse.Coefficients | None = None
    left: float | None = None


def tried_on(
    pipeline: Any,
    samples: Sequence[Sample],
    schedule: Schedule,
    aim: torch.Tensor | None = None,
    *,
    steps: int,
    arguments: dict[str, Any],
) -> Trial:
    """Run a schedule over calibration samples; where its reuse is fitted, fit it in that run, which is one in full.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
    samples : sequence of Sample
    schedule : Schedule
    aim : torch.Tensor, optional
        Final latents of all steps, as :func:`passes.lemica.inputs.generate` gives them for the samples.
    steps : int
    arguments : dict
        Of the pipeline's call.
    """
    fitting = reuse.Fitting(schedule) if schedule.reuse == "fitted" else None
    with hook.attach(pipeline, fitting or follower(schedule, None), mode=schedule.mode):
        latents = inputs.generate(pipeline, samples, steps=steps, arguments=arguments)
    error = None if aim is None else _apart(latents, aim)
    if fitting is None:
        return Trial(schedule, error)
    errors = list(fitting.errors.values())
    left = sum(errors) / len(errors) if errors else 0.0
    return Trial(schedule, error, reuse.Coefficients(dict(fitting.weights)), left)


def modes_tried(
    pipeline: Any,
    samples: Sequence[Sample],
    budget: int,
    how: Reuse,
    aim: torch.Tensor,
    *,
    steps: int,
    arguments: dict[str, Any],
) -> tuple[Trial, ...]:
    """Try what may be reused, the whole output and the residual of the blocks, with ``budget`` even full steps.

    Parameters are those of :func:`tried_on`; ``aim`` must be of the pipeline's last run, whose scheduler steps count.
    """
    calls = len(pipeline.scheduler.timesteps)
    full = path.uniform(calls, {}, budget)
    modes: tuple[Mode, ...] = ("output", "residual")
    return tuple(
        tried_on(
            pipeline,
            samples,
            Schedule(name=mode, steps=calls, full=full, reuse=how, mode=mode),
            aim,
            steps=steps,
            arguments=arguments,
        )
        for mode in modes
    )


def nearest(trials: Sequence[Trial]) -> Trial:
    """Return the trial of the least error; of equal ones, and where none was measured, the first."""
    return min(trials, key=lambda trial: trial.error or 0.0)


def _apart(latents: torch.Tensor, aim: torch.Tensor) -> float:
    """Return the mean absolute difference; what is not finite is farthest."""
    found = float((latents - aim).abs().mean())
    return found if math.isfinite(found) else sys.float_info.max
