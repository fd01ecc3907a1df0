"""The saved reports of diffusion pipelines: what ``effcli profile`` and ``effcli optimize`` found, as plain data.

Numbers are SI base units with the unit in the name. What is not known is None beside a reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from effcli.reports.model import PIPELINE_OPTIMIZE_SCHEMA as PIPELINE_OPTIMIZE_SCHEMA
from effcli.reports.model import PIPELINE_PROFILE_SCHEMA as PIPELINE_PROFILE_SCHEMA
from effcli.reports.model import Environment, plain
from effcli.reports.optimize_model import GateResult, StageTime
from passes.base import PassRecord


@dataclass(frozen=True)
class Component:
    """One model of a pipeline."""

    name: str  # as the pipeline calls it: "transformer", "vae"
    architecture: str
    parameters: int
    weight_bytes: int


@dataclass(frozen=True)
class PipelineInfo:
    """Which pipeline was measured, and what it is.

    Attributes
    ----------
    source, kind : str
        As the user named it; ``folder``, ``hub`` or ``builtin``.
    architecture : str
        Class of the pipeline.
    denoiser, denoiser_architecture : str
        Name and class of the model that runs each step.
    mode : str
        What can be reused: ``residual`` of the block stack, or the denoiser's whole ``output``.
    blocks : int or None
        In the stack.
    scheduler : str
        Class.
    fingerprint : str or None
        sha256 over the weights' files.
    """

    source: str
    kind: str
    architecture: str
    denoiser: str
    denoiser_architecture: str
    mode: str
    blocks: int | None
    scheduler: str
    components: tuple[Component, ...]
    dtype: str
    revision: str | None
    fingerprint: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineProfileReport:
    """One run of ``effcli profile`` on a pipeline.

    ``denoising`` is :class:`profilers.denoising.DenoisingResult`, ``error_map`` is
    :class:`passes.lemica.schedule.ErrorGraph` as plain data.
    """

    schema: str
    created: str  # ISO 8601, UTC
    command: str
    seconds_spent: float
    pipeline: PipelineInfo
    environment: Environment
    steps: int
    batch: int
    arguments: dict[str, Any]  # of the pipeline's call
    denoising: Any
    error_map: Any
    error_map_reason: str | None  # why there is none
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Spread:
    """A mean over samples, and the 95 % confidence interval of it (None for a single sample)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Likeness:
    """How close results are to those of the same prompts and seeds without reuse; none of them was calibrated on.

    Attributes
    ----------
    samples : int
    psnr_db, ssim : Spread or None
        Of decoded images, or of all frames of a video. PSNR is None where every image is the same to the bit.
    lpips : Spread or None
    lpips_reason : str or None
        Why there is none.
    latent_l1 : Spread
        Mean absolute difference of the final latents.
    """

    samples: int
    psnr_db: Spread | None
    ssim: Spread | None
    lpips: Spread | None
    lpips_reason: str | None
    latent_l1: Spread


@dataclass(frozen=True)
class ScheduleResult:
    """One schedule, run from the written checkpoint.

    Attributes
    ----------
    full : tuple of int
        Full steps.
    mode : str
        What is reused at the others: the ``residual`` of the blocks, or the denoiser's whole ``output``.
    full_calls, calls : float
        Denoiser calls of one run: in full, and all.
    run_seconds_before, run_seconds_after : float
        Median time of one run from prompt to image.
    denoiser_seconds_before, denoiser_seconds_after : float
        The denoiser's part of it.
    """

    name: str
    steps: int
    full: tuple[int, ...]
    reuse: str
    mode: str
    origin: str
    full_calls: float
    calls: float
    run_seconds_before: float
    run_seconds_after: float
    denoiser_seconds_before: float
    denoiser_seconds_after: float
    likeness: Likeness


@dataclass(frozen=True)
class ComparisonRow:
    """One way to skip steps, at a budget, on the same held-out samples.

    Attributes
    ----------
    method : str
        ``fitted`` and ``linear`` (the schedule's own path, with these kinds of reuse), ``fitted-residual`` or
        ``fitted-output`` (the same, of what the schedule does not reuse); ``lemica`` (minimax path) and ``uniform``,
        ``greedy``, ``shortest-sum``, with what the last full step left; ``first-block-cache``, ``mag-cache``.
    budget : int
        Full steps that were asked for.
    full_calls : float or None
        Cost of one run in full steps, the mean over samples; a block that runs at a skipped step counts.
    full : tuple of int or None
        Which steps, where they are the same for every sample.
    chosen : bool
        Whether it is the schedule that was published at this budget.
    reason : str or None
        Why it could not be run at this budget.
    """

    method: str
    budget: int
    full_calls: float | None
    full: tuple[int, ...] | None
    run_seconds: float | None
    likeness: Likeness | None
    chosen: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Sheet:
    """Pictures side by side: rows are ways to run, columns are samples (or frames of one video).

    Attributes
    ----------
    rows, columns : tuple of str
        Labels.
    png_base64 : str
        One picture with all cells, in reading order, each of the same size.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cell_pixels: tuple[int, int]  # width, height
    png_base64: str


@dataclass(frozen=True)
class PipelineOptimizeReport:
    """One run of ``effcli optimize`` on a pipeline.

    ``lemica`` is :class:`passes.lemica.schedule.LemicaFile` as plain data: schedules, calibration and error graph.
    ``denoising`` is that of the pipeline without reuse.
    """

    schema: str
    created: str  # ISO 8601, UTC
    command: str
    seconds_spent: float
    status: str  # "passed" | "gate failed"
    source: dict[str, Any]
    recipe: dict[str, Any]
    seed: int
    pipeline: PipelineInfo
    environment: Environment
    steps: int
    batch: int
    arguments: dict[str, Any]
    denoising: Any
    passes: tuple[PassRecord, ...]
    lemica: Any
    schedules: tuple[ScheduleResult, ...]
    comparison: tuple[ComparisonRow, ...]
    sheets: tuple[Sheet, ...]
    gates: tuple[GateResult, ...]
    stages: tuple[StageTime, ...]
    warnings: tuple[str, ...]
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
