"""LeMiCa: which sampling steps of a diffusion pipeline run in full, chosen from the model's own errors.

::

    pipeline ──graph.py──> ErrorGraph ──path.py──> Schedule ──hook.py──> the pipeline, skipping
      (replay of every segment of reuse)  (lexicographic minimax)   (residual of the blocks, or whole output, reused)
                                              └──reuse.py──> weights of what the last full steps left

See ``docs/passes/lemica.md``.
"""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import MissingExtraError, PassError, PassRecord, PipelineContext, PipelinePass
from passes.lemica import inputs, path
from passes.lemica.parameters import DEFAULT_SPEEDUP, LemicaParameters
from passes.lemica.schedule import (
    COEFFICIENTS_FILE,
    Calibration,
    ErrorGraph,
    LemicaFile,
    Mode,
    Schedule,
    write,
)

if TYPE_CHECKING:
    import torch

    from passes.lemica.inputs import Sample
    from passes.lemica.reuse import Coefficients
    from passes.lemica.targets import Target

__all__ = ["LemicaParameters", "LemicaPass"]

_NAMES = {1: ("fast",), 2: ("slow", "fast"), 3: ("slow", "medium", "fast"), 4: ("slow", "medium", "fast", "fastest")}
_MODES: dict[Mode, str] = {"residual": "the blocks' residual", "output": "the whole output"}
_MODES_FILE = "modes.json"
_UNNAMED = ("_class_name", "_diffusers_version", "_use_default_values", "_name_or_path")


class LemicaPass(PipelinePass):
    """Finds which sampling steps must run in full, and what stands for the others."""

    name = "lemica"
    title = "Cache schedules for diffusion pipelines"
    papers = (
        "LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation, NeurIPS 2025",
    )
    parameters_type = LemicaParameters
    excludes = ("lemica",)
    files = (COEFFICIENTS_FILE,)
    extra = "diffusion"
    gentler = "speedup=1.5"

    parameters: LemicaParameters
    content: LemicaFile
    coefficients: dict[str, Coefficients]

    def check_pipeline(self, pipeline: Any) -> None:
        """Refuse a pipeline that has no denoiser whose steps can be skipped, or is not called as the parameters say.

        Raises
        ------
        PassError
        """
        from passes.lemica import targets

        given = self.parameters
        targets.find(pipeline, given.mode)
        targets.check_steps(given.steps)
        inputs.check_arguments(pipeline, given.arguments())
        if given.published is not None:
            _published(pipeline, given.published, given.steps)
        for budget in self._budgets(given.steps):
            _smallest_gap(given.steps, budget, given.max_gap)
        if given.prompts is not None:
            inputs.read_conditions(pipeline, given.prompts)

    def apply_pipeline(self, pipeline: Any, context: PipelineContext) -> PassRecord:
        """Calibrate, choose the schedules, and fit what stands for skipped steps."""
        from passes.lemica import targets

        given = self.parameters
        target = targets.find(pipeline, given.mode)
        samples: tuple[Sample, ...] = ()
        tried: dict[str, list[dict[str, Any]]] = {}
        by_mode: dict[Mode, float] = {}
        if given.published is not None:
            self.content, self.coefficients = self._published(pipeline, target), {}
        else:
            samples = self.calibration_samples(pipeline, context.seed, given.samples)
            fitting = self.calibration_samples(pipeline, context.seed, given.fit_samples)
            several_modes = given.mode == "auto" and given.reuse != "last" and target.mode == "residual"
            aim = None
            if several_modes or (given.path == "measured" and given.max_error is None):
                aim = inputs.generate(pipeline, fitting, steps=given.steps, arguments=given.arguments())
            if several_modes:
                assert aim is not None
                by_mode = self._modes(pipeline, fitting, aim, context)
                target = targets.find(pipeline, min(by_mode.items(), key=lambda found: found[1])[0])
            graph = self._graph(pipeline, target, samples, context)
            schedules, self.coefficients, tried = self._schedules(pipeline, target, graph, fitting, aim, context)
            self.content = LemicaFile(
                schedules=schedules,
                default=schedules[0].name,
                calibration=self._calibration(pipeline, target, samples),
                graph=graph,
            )
        return self._record(target, samples, by_mode, tried, context)

    def save_pipeline(self, pipeline: Any, folder: Path) -> None:
        """Write ``lemica.json``, and ``lemica.safetensors`` where something was fitted."""
        from passes.lemica import reuse

        write(folder, self.content)
        reuse.write(folder, self.coefficients)

    def calibration_samples(self, pipeline: Any, seed: int, count: int) -> tuple[Sample, ...]:
        """Return ``count`` samples to calibrate on; fewer are the first of more."""
        given = self.parameters
        conditions = None if given.prompts is None else inputs.read_conditions(pipeline, given.prompts)
        return inputs.calibration_samples(pipeline, count, seed=seed, conditions=conditions)

    def _budgets(self, steps: int) -> tuple[int, ...]:
        """Return the full steps that are asked for, most first; empty where the graph or the authors decide."""
        given = self.parameters
        if given.max_error is not None or given.published is not None:
            return ()
        if given.budgets is not None:
            return tuple(sorted(given.budgets, reverse=True))
        if given.budget is not None:
            return (given.budget,)
        return (path.for_speedup(steps, given.speedup or DEFAULT_SPEEDUP),)

    def _modes(
        self, pipeline: Any, samples: tuple[Sample, ...], aim: torch.Tensor, context: PipelineContext
    ) -> dict[Mode, float]:
        """Return how far runs end from all steps by what they reuse; a resumed run takes what it had found."""
        from passes.lemica.trying import modes_tried

        kept = context.work / _MODES_FILE
        if kept.is_file():
            found: dict[Mode, float] = json.loads(kept.read_text(encoding="utf-8"))
            return found
        given = self.parameters
        budget = min(self._budgets(given.steps), default=path.for_speedup(given.steps, DEFAULT_SPEEDUP))
        with context.progress.task("trying what to reuse"):
            trials = modes_tried(
                pipeline, samples, budget, given.reuse, aim, steps=given.steps, arguments=given.arguments()
            )
        found = {trial.schedule.mode: trial.error for trial in trials if trial.error is not None}
        draft = kept.with_suffix(".part")
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(kept)
        return found

    def _graph(
        self, pipeline: Any, target: Target, samples: tuple[Sample, ...], context: PipelineContext
    ) -> ErrorGraph:
        from passes.lemica import graph

        given = self.parameters
        return graph.build(
            pipeline,
            samples,
            steps=given.steps,
            max_gap=given.max_gap,
            arguments=given.arguments(),
            work=context.work,
            distance=given.distance,
            mode=target.mode,
            batch=given.batch,
            progress=context.progress,
            spread=context.spread,
            opening=context.opening,
        )

    def _schedules(
        self,
        pipeline: Any,
        target: Target,
        graph: ErrorGraph,
        samples: tuple[Sample, ...],
        aim: torch.Tensor | None,
        context: PipelineContext,
    ) -> tuple[tuple[Schedule, ...], dict[str, Coefficients], dict[str, list[dict[str, Any]]]]:
        """Return the schedules, what was fitted for each, and what each path that was tried came to."""
        from passes.lemica.trying import Trial, nearest, tried_on

        given = self.parameters
        candidates = self._candidates(graph, target)
        call: dict[str, Any] = {"steps": given.steps, "arguments": given.arguments()}
        chosen: list[Schedule] = []
        coefficients: dict[str, Coefficients] = {}
        tried: dict[str, list[dict[str, Any]]] = {}
        with context.progress.task("trying schedules", total=sum(map(len, candidates))) as task:
            for several in candidates:
                trials = []
                for schedule in several:
                    needed = len(several) > 1 or given.reuse == "fitted"
                    found = tried_on(pipeline, samples, schedule, aim, **call) if needed else Trial(schedule)
                    trials.append(found)
                    task.advance()
                best = nearest(trials)
                chosen.append(best.schedule)
                if best.coefficients is not None:
                    coefficients[best.schedule.name] = best.coefficients
                tried[best.schedule.name] = [
                    {"path": trial.schedule.path, "error": trial.error, "share_left": trial.left} for trial in trials
                ]
        return tuple(chosen), coefficients, tried

    def _candidates(self, graph: ErrorGraph, target: Target) -> list[list[Schedule]]:
        """Return, for each budget, the schedules to choose from: one of each path, LeMiCa's first."""
        given = self.parameters
        weights = graph.weights()
        budgets = self._budgets(graph.steps)
        if given.max_error is not None:
            budgets = (path.smallest_budget(graph.steps, weights, given.max_error),)
        names = _NAMES.get(len(budgets), tuple(f"b{budget}" for budget in budgets))
        # Only the minimax path holds the largest error that was asked for.
        only = "minimax" if given.max_error is not None and given.path == "measured" else given.path
        solvers = tuple(path.SOLVERS) if only == "measured" else (only,)
        found: list[list[Schedule]] = []
        for name, budget in zip(names, budgets, strict=True):
            several: dict[tuple[int, ...], Schedule] = {}
            for solver in solvers:
                try:
                    full = path.SOLVERS[solver](graph.steps, weights, budget)
                except PassError:
                    if len(solvers) == 1 or solver == "minimax":
                        raise
                    continue  # simpler rules cannot make every budget
                schedule = Schedule(
                    name=name,
                    steps=graph.steps,
                    full=full,
                    reuse=given.reuse,
                    mode=target.mode,
                    path=solver,
                    errors=path.segment_errors(full, weights),
                    origin=f"calibrated: {solver} path over {len(graph.errors[0])} samples",
                )
                several.setdefault(full, schedule)
            found.append(list(several.values()))
        return found

    def _published(self, pipeline: Any, target: Target) -> LemicaFile:
        assert self.parameters.published is not None
        schedule = _published(pipeline, self.parameters.published, self.parameters.steps)
        schedule = schedule.model_copy(update={"mode": target.mode})
        return LemicaFile(
            schedules=(schedule,), default=schedule.name, calibration=self._calibration(pipeline, target, ())
        )

    def _calibration(self, pipeline: Any, target: Target, samples: tuple[Sample, ...]) -> Calibration:
        return Calibration(
            pipeline=type(pipeline).__name__,
            denoiser=architecture(pipeline, target),
            scheduler=type(pipeline.scheduler).__name__,
            scheduler_config=scheduler_config(pipeline),
            mode=target.mode,
            inference_steps=self.parameters.steps,
            inputs=tuple(str(sample.condition) for sample in samples),
            seeds=tuple(sample.seed for sample in samples),
            arguments=self.parameters.arguments(),
            versions=_versions(),
        )

    def _record(
        self,
        target: Target,
        samples: tuple[Sample, ...],
        by_mode: dict[Mode, float],
        tried: dict[str, list[dict[str, Any]]],
        context: PipelineContext,
    ) -> PassRecord:
        content = self.content
        shown = ", ".join(f"{item.name}: {item.budget} of {item.steps} steps in full" for item in content.schedules)
        notes = []
        if content.graph is not None:
            notes.append(
                f"the graph cost {content.graph.equivalent_runs:.0f} full runs a sample; "
                f"{len(content.graph.edges)} if each segment were run from the start"
            )
        if by_mode:
            errors = ", ".join(f"{_MODES[mode]} {error:.4g}" for mode, error in by_mode.items())
            notes.append(
                f"{_MODES[target.mode]} is reused: mean difference of the final latents to all steps on "
                f"{self.parameters.fit_samples} calibration samples, even spacing: {errors}"
            )
        for schedule in content.schedules:
            trials = tried.get(schedule.name, [])
            if len(trials) > 1:
                shown_errors = ", ".join(f"{trial['path']} {trial['error']:.4g}" for trial in trials)
                notes.append(
                    f"schedule '{schedule.name}' takes the {schedule.path} path: mean difference of the final latents "
                    f"to all steps on {self.parameters.fit_samples} calibration samples: {shown_errors}"
                )
        return PassRecord(
            name=self.name,
            parameters=self.parameters.model_dump(mode="json"),
            summary=shown,
            seed=context.seed,
            notes=tuple(notes),
            details={
                "denoisers": list(target.denoisers),
                "mode": target.mode,
                "modes_tried": dict(by_mode),
                "samples": len(samples),
                "tried": tried,
            },
            versions=_versions(),
        )


def architecture(pipeline: Any, target: Target) -> str:
    """Return the class of a pipeline's (first) denoiser."""
    from passes.lemica import targets

    return type(targets.denoiser(pipeline, target.denoisers[0])).__name__


def scheduler_config(pipeline: Any) -> dict[str, Any]:
    """Return the configuration of a pipeline's scheduler, without what names files and versions.

    What JSON has no number for (DPM-Solver's ``lambda_min_clipped`` is −∞) is text.
    """
    config = {key: value for key, value in sorted(dict(pipeline.scheduler.config).items()) if key not in _UNNAMED}
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in config.items()
    }


def _published(pipeline: Any, name: str, steps: int) -> Schedule:
    """Return a published schedule.

    Raises
    ------
    PassError
        If there is none of that name, or it is for another class of pipeline or number of steps.
    """
    from passes.lemica import published

    schedule = published.find(name)
    wanted = published.PUBLISHED[name].pipeline
    if type(pipeline).__name__ != wanted:
        raise PassError(f"schedule '{name}' was published for {wanted}, and this is {type(pipeline).__name__}")
    if schedule.steps != steps:
        raise PassError(f"schedule '{name}' was published for {schedule.steps} steps; give steps={schedule.steps}")
    return schedule


def _smallest_gap(steps: int, budget: int, max_gap: int) -> None:
    """Refuse a gap with which no path of this many full steps exists."""
    needed = -(-(steps - 1) // (budget - 1))
    if max_gap < needed:
        raise PassError(
            f"max_gap={max_gap} is too small for {budget} full steps of {steps}; the smallest that works is {needed}"
        )


def _versions() -> dict[str, str]:
    try:
        return {name: version(name) for name in ("effcli", "torch", "diffusers")}
    except ImportError:
        raise MissingExtraError("pass 'lemica' needs diffusers: pip install 'effcli[diffusion]'") from None
