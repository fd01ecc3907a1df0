"""``effcli profile`` on a diffusion pipeline: what a step costs, and what skipping steps would do to the result.

::

    open ──> peaks ──> denoising: whole runs, their parts, the roofline ──> error map: every segment of reuse, alone
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.diffusion.comparing import Bench
from effcli.diffusion.opening import environment_of, open_pipeline
from effcli.errors import BadInputError
from effcli.reports.pipeline_model import PIPELINE_PROFILE_SCHEMA, PipelineProfileReport
from passes.base import PassError
from profilers.base import Progress, SilentProgress

if TYPE_CHECKING:
    from effcli.diffusion.opening import OpenedPipeline
    from passes.lemica.inputs import Sample
    from passes.lemica.schedule import ErrorGraph
    from profilers.denoising import DenoisingResult

DENOISING, ERROR_MAP = "denoising", "error-map"
PARTS = (DENOISING, ERROR_MAP)
"""What ``--only`` takes for a pipeline."""
DEFAULT_STEPS = 50
DEFAULT_MAX_GAP = 8
MOST_SAMPLES = 4
FEW_MINUTES_SECONDS = 180.0
"""The error map averages over as many samples as fit this, at most four; one that takes longer is announced."""


@dataclass(frozen=True)
class Sampling:
    """How a pipeline is run to be profiled; None leaves a setting to the pipeline.

    Attributes
    ----------
    steps : int
        Sampling steps.
    prompt : str or None
        Prompt, or a class by number or label; default: neutral ones.
    guidance : float or None
        Guidance scale.
    height, width : int or None
        Pixels.
    frames : int or None
        Of a video.
    samples : int or None
        That the error map averages over; default: one to four, as fit a few minutes.
    max_gap : int
        Longest segment of reuse in the error map, in steps.
    batch : int
        Pictures or videos of one timed run.
    """

    steps: int = DEFAULT_STEPS
    prompt: str | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    samples: int | None = None
    max_gap: int = DEFAULT_MAX_GAP
    batch: int = 1

    def check(self) -> None:
        """Refuse numbers that mean nothing.

        Raises
        ------
        BadInputError
        """
        least = {"steps": 1, "height": 1, "width": 1, "frames": 1, "samples": 1, "max_gap": 2, "batch": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise BadInputError(f"--{name.replace('_', '-')} {value} is too small; give {bound} or more")
        if self.prompt is not None and not self.prompt.strip():
            raise BadInputError("--prompt is empty; give a prompt, or for a class-conditional pipeline a class")

    def arguments(self) -> dict[str, Any]:
        """Return what the pipeline's call is given beside prompt and steps, by the names that diffusers uses."""
        named = {
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
        }
        return {key: value for key, value in named.items() if value is not None}


def profile_pipeline(
    model: str | Path,
    sampling: Sampling | None = None,
    *,
    only: Sequence[str] = PARTS,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
    command: str | None = None,
) -> PipelineProfileReport:
    """Measure a diffusion pipeline on this device.

    Parameters
    ----------
    model : str or Path
        Folder of a diffusers pipeline, or a built-in name.
    sampling : Sampling, optional
        Steps, prompt, sizes.
    only : sequence of str
        ``denoising``, ``error-map``, or both.
    seed : int
        Of the first sample's noise; each further sample has the next one.
    device, dtype : str
        ``auto`` or a torch name.
    revision : str, optional
    trust_remote_code : bool
        Run code that comes with the pipeline.
    progress : Progress, optional
    on_warning : callable, optional
        Given a line before something starts that takes more than a few minutes.
    command : str, optional
        What the report records as the way to repeat it.

    Raises
    ------
    effcli.errors.EffcliError
        If the pipeline, device, dtype or a setting cannot be used.
    passes.base.PassError
        If the pipeline has no denoiser, or does not take a setting; if the error map is all that was asked for and
        cannot be made.
    profilers.base.ProfilerError
        If a measurement cannot be made.
    """
    asked, started = sampling or Sampling(), time.perf_counter()
    asked.check()
    unknown = [name for name in only if name not in PARTS]
    if unknown or not only:
        raise BadInputError(f"--only '{','.join(unknown)}' is not known for a pipeline; known: {', '.join(PARTS)}")
    shown, warnings = progress or SilentProgress(), list[str]()
    with shown.task(f"profile {model}", total=1 + len(only)) as overall:
        opened = open_pipeline(
            model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, progress=shown
        )
        opened.measure_peaks(shown)
        overall.advance()
        denoising, graph, reason = None, None, "left out: --only denoising"
        if DENOISING in only:
            samples = _samples(opened, asked, asked.batch, seed)
            bench = Bench(opened.pipeline, opened.target, samples, asked.steps, asked.arguments())
            denoising = measure_denoising(opened, bench, shown)
            warnings += denoising.warnings
            overall.advance()
        if ERROR_MAP in only:
            try:
                graph, lines = _error_map(opened, asked, denoising, seed, shown, on_warning)
                warnings += lines
            except PassError as error:
                if DENOISING not in only:
                    raise
                reason = str(error)
            overall.advance()
    return PipelineProfileReport(
        schema=PIPELINE_PROFILE_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command or f"effcli.profile_pipeline({str(model)!r}, ...)",
        seconds_spent=time.perf_counter() - started,
        pipeline=opened.info,
        environment=environment_of(opened),
        steps=asked.steps,
        batch=asked.batch,
        arguments=asked.arguments(),
        denoising=denoising,
        error_map=None if graph is None else graph.model_dump(mode="json"),
        error_map_reason=None if graph is not None else reason,
        warnings=tuple(warnings),
    )


def measure_denoising(opened: OpenedPipeline, bench: Bench, progress: Progress) -> DenoisingResult:
    """Measure what a run of a bench costs, without reuse; see :func:`profilers.denoising.measure`.

    Parameters
    ----------
    opened : OpenedPipeline
        Whose device and ceilings count; they are measured if they were not.
    bench : Bench
        All its samples are one run.
    progress : Progress
    """
    import torch

    from passes.lemica import inputs, targets
    from profilers.denoising import measure

    pipeline, target = bench.pipeline, bench.target
    denoisers = [targets.denoiser(pipeline, name) for name in target.denoisers]
    return measure(
        lambda: inputs.generate(
            pipeline, bench.samples, steps=bench.steps, arguments=dict(bench.arguments), output="pt"
        ),
        denoisers,
        others={
            name: component
            for name, component in pipeline.components.items()
            if isinstance(component, torch.nn.Module) and name not in target.denoisers
        },
        blocks=[
            module.get_submodule(name) for module, names in zip(denoisers, target.blocks, strict=True) for name in names
        ],
        steps=bench.steps,
        peaks=opened.measure_peaks(progress),
        progress=progress,
    )


def map_calls(steps: int, max_gap: int) -> int:
    """Return how many full calls of the denoiser an error map takes, for one sample: the run itself, and every replay.

    The replay of segment (i, j) runs in full from step j on.
    """
    gap = min(max_gap, steps - 1)
    return steps + sum((min(end, gap) - 1) * (steps - end) for end in range(2, steps))


def _samples(opened: OpenedPipeline, asked: Sampling, count: int, seed: int) -> tuple[Sample, ...]:
    from passes.lemica.inputs import calibration_samples

    conditions = None if asked.prompt is None else (asked.prompt,)
    samples: tuple[Sample, ...] = calibration_samples(opened.pipeline, count, seed=seed, conditions=conditions)
    return samples


def _error_map(
    opened: OpenedPipeline,
    asked: Sampling,
    denoising: DenoisingResult | None,
    seed: int,
    progress: Progress,
    on_warning: Callable[[str], None] | None,
) -> tuple[ErrorGraph, list[str]]:
    """Return the error map, and warnings about what it takes."""
    from passes.lemica import graph, targets

    targets.check_steps(asked.steps)
    count, warnings, about = asked.samples, list[str](), ""
    if denoising is not None:
        # Of one sample in a batch of its own; replays that share a batch are faster.
        each = map_calls(asked.steps, asked.max_gap) * denoising.step_seconds / asked.batch
        count = count or max(1, min(MOST_SAMPLES, int(FEW_MINUTES_SECONDS / each)))
        about = f": about {_minutes(each * count)}"
        if each * count > FEW_MINUTES_SECONDS:
            plural = "s" if count > 1 else ""
            warnings.append(
                f"the error map takes about {_minutes(each * count)} for {count} sample{plural} of {asked.steps} "
                "steps; --only denoising leaves it out, a smaller --max-gap makes it shorter"
            )
            if on_warning is not None:
                on_warning(warnings[0])
    samples = _samples(opened, asked, count or 1, seed)
    with tempfile.TemporaryDirectory(prefix="effcli-") as work, progress.task(f"error map{about}"):
        found = graph.build(
            opened.pipeline,
            samples,
            steps=asked.steps,
            max_gap=min(asked.max_gap, asked.steps - 1),
            arguments=asked.arguments(),
            work=Path(work),
            progress=progress,
        )
    return found, warnings


def _minutes(seconds: float) -> str:
    """Return a long time in words, not more exactly than an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
