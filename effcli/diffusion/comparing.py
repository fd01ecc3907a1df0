"""Hold runs that skip steps against runs that do not, on samples that nothing was calibrated on.

::

    held-out samples ──all steps──> reference (latents, pictures)
                     └─ each method at each budget ──> Likeness, full calls ──> ComparisonRow, Sheet
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from effcli.reports.pipeline_model import ComparisonRow, Likeness, Sheet, Spread
from passes.base import PassError
from passes.lemica import path
from passes.lemica.schedule import ErrorGraph, LemicaFile, Mode, Schedule

if TYPE_CHECKING:
    import torch

    from passes.lemica.hook import Follower
    from passes.lemica.inputs import Sample
    from passes.lemica.targets import Target
    from profilers.base import Progress

CELL_PIXELS = 128
"""Longest side of a picture in a sheet, at least: smaller ones are enlarged by whole numbers."""
SHEET_COLUMNS = 8
_BASELINES = ("uniform", "greedy", "shortest-sum")


@dataclass(frozen=True)
class Outcome:
    """What one way to run left on all held-out samples.

    Attributes
    ----------
    latents : torch.Tensor
        Final latents, first dimension samples; on the CPU.
    pictures : torch.Tensor
        In [0, 1]: shape (samples, channels, height, width), or (samples, frames, channels, height, width).
    full_calls : float
        Cost of one run, in full steps.
    """

    latents: torch.Tensor
    pictures: torch.Tensor
    full_calls: float


@dataclass(frozen=True)
class Bench:
    """A pipeline without reuse, and what it is run with.

    Attributes
    ----------
    pipeline : diffusers.DiffusionPipeline
    target : Target
    samples : tuple of Sample
        Held out.
    steps : int
        As the pipeline's call is given them.
    arguments : dict
        Of the pipeline's call.
    """

    pipeline: Any
    target: Target
    samples: tuple[Sample, ...]
    steps: int
    arguments: Mapping[str, Any]

    def run(self, driver: Follower | None = None) -> Outcome:
        """Run all samples following a schedule, or in all steps."""
        from passes.lemica import hook, inputs

        with contextlib.ExitStack() as stack:
            last = stack.enter_context(_last_sample(self.pipeline.scheduler))
            if driver is not None:
                stack.enter_context(hook.attach(self.pipeline, driver, mode=driver.schedule.mode))
            latents, pictures = [], []
            for group in [self.samples] if inputs.takes_batches(self.pipeline) else [(one,) for one in self.samples]:
                made = inputs.generate(
                    self.pipeline, group, steps=self.steps, arguments=dict(self.arguments), output="pt"
                )
                pictures.append(made.float().cpu())
                # Guidance in one batch may leave each sample twice.
                latents.append(last[-1][: len(group)].float().cpu())
        import torch

        full = float(self.steps) if driver is None else driver.schedule.steps * driver.full_calls / driver.calls
        return Outcome(torch.cat(latents), torch.cat(pictures), full)

    def alone(self, sample: Sample) -> Bench:
        """Return the same for one sample."""
        return replace(self, samples=(sample,))


@contextlib.contextmanager
def _last_sample(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """Keep what the scheduler's last step returned, as the only item of a list."""
    from passes.lemica.driving import output_tensor

    kept: list[torch.Tensor] = []
    step, before = scheduler.step, scheduler.__dict__.get("step")

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        kept[:] = [output_tensor(result)]
        return result

    scheduler.step = watched
    try:
        yield kept
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


def likeness(reference: Outcome, other: Outcome) -> Likeness:
    """Return how close two outcomes of the same samples are."""
    from profilers import image_quality as quality

    perceptual, reason = quality.load_lpips(reference.pictures.device)
    latents = _spread(quality.latent_l1(other.latents, reference.latents))
    assert latents is not None
    return Likeness(
        samples=len(other.pictures),
        psnr_db=_spread(quality.psnr(other.pictures, reference.pictures)),
        ssim=_spread(quality.ssim(other.pictures, reference.pictures)),
        lpips=None if perceptual is None else _spread(perceptual(other.pictures, reference.pictures)),
        lpips_reason=reason,
        latent_l1=latents,
    )


def _spread(values: torch.Tensor) -> Spread | None:
    from profilers.image_quality import spread

    found = spread(values)
    return None if found is None else Spread(found.mean, found.low, found.high)


@dataclass(frozen=True)
class Comparison:
    """Rows of all methods at all budgets, and what each made."""

    rows: tuple[ComparisonRow, ...]
    outcomes: dict[tuple[str, int], Outcome]


def compare(
    bench: Bench,
    calibration: Bench,
    reference: Outcome,
    content: LemicaFile,
    known: Mapping[str, Outcome],
    drive: Callable[[Schedule], Follower],
    progress: Progress,
) -> Comparison:
    """Run each method at the budget of each schedule.

    Parameters
    ----------
    bench, calibration : Bench
        On held-out samples, and on those that were calibrated on.
    reference : Outcome
        Of all steps, on held-out samples.
    content : LemicaFile
        The schedules that were chosen; baselines that need errors take those of its graph.
    known : mapping of str to Outcome
        Of the chosen schedules, by name: they are not run again.
    drive : callable
        Returns the driver that follows a schedule; fits it first where its reuse is fitted.
    progress : Progress
    """
    rows: list[ComparisonRow] = []
    outcomes: dict[tuple[str, int], Outcome] = {}
    other = _other_mode(bench.pipeline, content.calibration.mode)
    candidates = {schedule.name: _candidates(schedule, content.graph, other) for schedule in content.schedules}
    with progress.task("comparing", total=sum(map(len, candidates.values()))) as task:
        for schedule in content.schedules:
            for method, tried, chosen in candidates[schedule.name]:
                task.describe(f"comparing: {method}, {schedule.budget} full steps")
                if isinstance(tried, PassError):
                    rows.append(ComparisonRow(method, schedule.budget, None, None, None, None, reason=str(tried)))
                else:
                    outcome = known[schedule.name] if chosen else bench.run(drive(tried))
                    outcomes[method, schedule.budget] = outcome
                    rows.append(
                        ComparisonRow(
                            method,
                            schedule.budget,
                            outcome.full_calls,
                            tried.full,
                            None,
                            likeness(reference, outcome),
                            chosen=chosen,
                        )
                    )
                task.advance()
    budgets = sorted({schedule.budget for schedule in content.schedules}, reverse=True)
    rows += _peers(bench, calibration, reference, budgets, outcomes, progress)
    return Comparison(tuple(rows), outcomes)


def _other_mode(pipeline: Any, mode: Mode) -> Mode | None:
    """Return what could be reused instead; a pipeline without a stack of blocks has the whole output alone."""
    from passes.lemica import targets

    if mode == "residual":
        return "output"
    try:
        found = targets.find(pipeline).mode
    except PassError:
        return None
    return found if found == "residual" else None


def _candidates(
    schedule: Schedule, graph: ErrorGraph | None, other: Mode | None
) -> list[tuple[str, Schedule | PassError, bool]]:
    """Return the ways to skip steps at a schedule's budget: name, schedule (or why there is none), whether chosen.

    ``other`` is what could be reused and is not.
    """
    weights = {} if graph is None else graph.weights()
    found: list[tuple[str, Schedule | PassError, bool]] = []
    if schedule.reuse == "fitted":
        found.append(("fitted", schedule, True))
        if other is not None:
            found.append((f"fitted-{other}", schedule.model_copy(update={"mode": other}), False))
    found.append(("linear", schedule.model_copy(update={"reuse": "linear"}), schedule.reuse == "linear"))
    # LeMiCa's own reuse and path, then the simpler rules; one of them may be what was chosen.
    chosen = schedule.reuse != "last"
    for method, solver in (("lemica", "minimax"), *((name, name) for name in _BASELINES)):
        try:
            published = graph is None and method == "lemica"
            full = schedule.full if published else path.SOLVERS[solver](schedule.steps, weights, schedule.budget)
        except PassError as error:
            found.append((method, error, False))
            continue
        own = not chosen and full == schedule.full
        chosen |= own
        tried = schedule if own else schedule.model_copy(update={"name": method, "full": full, "reuse": "last"})
        found.append((method, tried, own))
    return found


def _peers(
    bench: Bench,
    calibration: Bench,
    reference: Outcome,
    budgets: Sequence[int],
    outcomes: dict[tuple[str, int], Outcome],
    progress: Progress,
) -> list[ComparisonRow]:
    """Run diffusers' own caches at the cost of each budget; calibration samples say what they need to know."""
    from passes.lemica import peers

    # FirstBlockCache decides by what it sees, so each sample runs alone; MagCache by its settings.
    runs = [bench.alone(sample).run for sample in bench.samples]
    ratios = peers.magnitude_ratios(bench.pipeline, [calibration.run])
    target = calibration.run()
    rows = []
    for budget in budgets:

        def trial() -> float:
            return float((calibration.run().latents - target.latents).abs().mean())

        for found in (
            peers.mag_cache(bench.pipeline, [bench.run], budget, ratios, trial=trial, progress=progress),
            peers.first_block_cache(bench.pipeline, runs, budget, progress=progress),
        ):
            if isinstance(found, peers.Unavailable):
                rows.append(ComparisonRow(found.method, budget, None, None, None, None, reason=found.reason))
                continue
            outcome = _joined(found.results, found.mean_cost_steps)
            outcomes[found.method, budget] = outcome
            like = likeness(reference, outcome)
            rows.append(ComparisonRow(found.method, budget, found.mean_cost_steps, found.full, None, like))
    return rows


def _joined(parts: Sequence[Outcome], full_calls: float) -> Outcome:
    import torch

    return Outcome(
        torch.cat([part.latents for part in parts]), torch.cat([part.pictures for part in parts]), full_calls
    )


def sheet(title: str, rows: Sequence[tuple[str, torch.Tensor]], columns: Sequence[str]) -> Sheet:
    """Lay pictures out side by side.

    Parameters
    ----------
    title : str
    rows : sequence of (str, torch.Tensor)
        Label and pictures in [0, 1], shape (columns, channels, height, width).
    columns : sequence of str
        Labels.
    """
    import torch
    from PIL import Image

    tensors = [pictures[: len(columns)] for _, pictures in rows]
    height, width = tensors[0].shape[-2:]
    cells = torch.cat([torch.cat(list(row.unbind(0)), dim=-1) for row in tensors], dim=-2)
    array = (cells.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
    scale = CELL_PIXELS / max(height, width)
    if scale > 1:
        factor = int(scale)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        height, width = height * factor, width * factor
    elif scale < 1:
        height, width = round(height * scale), round(width * scale)
        image = image.resize((width * len(columns), height * len(rows)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return Sheet(
        title,
        tuple(label for label, _ in rows),
        tuple(columns),
        (int(width), int(height)),
        base64.b64encode(buffer.getvalue()).decode("ascii"),
    )


def sheets(
    samples: Sequence[Sample], reference: Outcome, made: Sequence[tuple[str, Outcome]], steps: int
) -> tuple[Sheet, ...]:
    """Return the pictures of all steps above those of each way to skip; of a video, frames of the first sample."""
    labelled = [(f"all {steps} steps", reference), *made]
    if reference.pictures.ndim == 5:
        frames = reference.pictures.shape[1]
        chosen = [
            round(item * (frames - 1) / max(1, min(frames, SHEET_COLUMNS) - 1))
            for item in range(min(frames, SHEET_COLUMNS))
        ]
        rows = [(label, outcome.pictures[0, chosen]) for label, outcome in labelled]
        return (sheet(str(samples[0].condition), rows, [f"frame {index}" for index in chosen]),)
    names = [str(sample.condition) for sample in samples[:SHEET_COLUMNS]]
    return (sheet("Held-out samples", [(label, outcome.pictures) for label, outcome in labelled], names),)
