"""Diffusers' own caches, FirstBlockCache and MagCache, driven to a given cost for comparison.

::

    first_block_cache:  threshold ──> runs ──> blocks that were run ──> cost ──┐ bisection, until the mean cost
                            └──────────────────────────────────────────────────┘ is just not above the target
    mag_cache:          ratios of the model's residuals ──> full steps of every setting, without a run ──> runs

The cost of a run is the number of blocks that were run, over the number of blocks, in steps: a full step costs 1, a
step that MagCache skips 0, a step that FirstBlockCache skips 1 / blocks, since its first block runs to decide.
FirstBlockCache decides on a batch as a whole; what it is good at is a decision for each sample, so give it a run for
each. MagCache decides from the step alone, the same for all samples.

Some pipelines of diffusers open no cache context, and some denoisers are no ``CacheMixin``, so that ``enable_cache`` is
not there and nothing resets what a cache keeps of the last run; both are done here, for all pipelines alike.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    ModelHook,
    apply_first_block_cache,
    apply_mag_cache,
)
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK
from diffusers.hooks.mag_cache import _MAG_CACHE_BLOCK_HOOK, _MAG_CACHE_LEADER_BLOCK_HOOK
from diffusers.models.cache_utils import CacheMixin
from diffusers.utils.torch_utils import unwrap_module

from passes.base import PassError
from passes.lemica import targets
from passes.lemica.driving import Call
from passes.lemica.hook import attach
from profilers.base import Progress, SilentProgress, Task

T = TypeVar("T")

FIRST_BLOCK_CACHE = "first-block-cache"
MAG_CACHE = "mag-cache"
_COUNTER_HOOK = "effcli_lemica_peer_counter"
_HOOKS = (  # outermost first
    _FBC_LEADER_BLOCK_HOOK,
    _FBC_BLOCK_HOOK,
    _MAG_CACHE_LEADER_BLOCK_HOOK,
    _MAG_CACHE_BLOCK_HOOK,
    _COUNTER_HOOK,
)

TOLERANCE_STEPS = 0.25
"""A mean cost so far below the target, or nearer, ends the search of a threshold."""
SEARCH_RUNS = 4
"""A threshold is first searched on so many runs, then corrected on all."""
_ROUNDS = 12
_NARROW = 1.005
"""A search ends after so many thresholds, or once the bracket's ends have this ratio."""
_FIRST_THRESHOLD = 0.05
_POWER = 1.33
"""From one attempt alone, the threshold is taken to grow as the cost to this power falls."""
_LEAST, _FARTHEST = 1.05, 8.0
"""Factors of a threshold that is tried beyond the only attempt."""

RETENTION_RATIOS = (0.2, 0.1, 0.0)
MAX_SKIP_STEPS = (3, 5, 8, 16)
"""MagCache's settings that are tried: diffusers' defaults come first, then those that allow to skip more."""

_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What diffusers' hooks raise on denoisers that they do not fit."""


@dataclass(frozen=True)
class PeerRun(Generic[T]):
    """What one of diffusers' caches made.

    Attributes
    ----------
    method : str
    settings : dict of str to float
        Of its configuration.
    results : tuple
        What each run returned.
    steps : int
        Of one run.
    full_steps : tuple of float
        Of each run: steps at which every block ran; of guidance branches that are calls of their own, the mean.
    cost_steps : tuple of float
        Of each run: blocks that were run, in steps.
    full : tuple of int or None
        Which steps run in full, where they are the same for every sample.
    """

    method: str
    settings: dict[str, float]
    results: tuple[T, ...]
    steps: int
    full_steps: tuple[float, ...]
    cost_steps: tuple[float, ...]
    full: tuple[int, ...] | None = None

    @property
    def mean_full_steps(self) -> float:
        """Mean over the runs."""
        return statistics.fmean(self.full_steps)

    @property
    def mean_cost_steps(self) -> float:
        """Mean over the runs."""
        return statistics.fmean(self.cost_steps)


@dataclass(frozen=True)
class Unavailable:
    """Why one of diffusers' caches could not be run at a target."""

    method: str
    reason: str


@dataclass(frozen=True)
class MagSettings:
    """One configuration of MagCache, and the steps that it runs in full."""

    threshold: float
    max_skip_steps: int
    retention_ratio: float
    full: tuple[int, ...]


def first_block_cache(
    pipeline: Any,
    runs: Sequence[Callable[[], T]],
    target_steps: float,
    *,
    progress: Progress | None = None,
) -> PeerRun[T] | Unavailable:
    """Run FirstBlockCache at the threshold whose mean cost is nearest to a target and not above it.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
        With one denoiser. It is as before when this returns.
    runs : sequence of callable
        Each calls the pipeline once and returns what it made, the same at each call; one sample each, since a batch is
        decided on as a whole.
    target_steps : float
        Largest mean cost, in full steps.

    Raises
    ------
    PassError
        If there are no runs, or the pipeline cannot be driven.
    """
    reason = _cannot(pipeline, runs)
    if reason is not None:
        return Unavailable(FIRST_BLOCK_CACHE, reason)
    blocks = len(targets.find(pipeline).blocks[0])
    if blocks == 1:
        return Unavailable(FIRST_BLOCK_CACHE, "the denoiser has one block, and the first block always runs")

    def attempt(threshold: float, chosen: Sequence[Callable[[], T]]) -> PeerRun[T]:
        def put(module: torch.nn.Module) -> None:
            apply_first_block_cache(module, FirstBlockCacheConfig(threshold=threshold))

        return _run_with(pipeline, chosen, FIRST_BLOCK_CACHE, {"threshold": threshold}, put)

    try:
        with (progress or SilentProgress()).task(f"{FIRST_BLOCK_CACHE}, {target_steps:g} steps") as task:
            few = runs[:SEARCH_RUNS]
            found = attempt(_FIRST_THRESHOLD, few)
            least = 1 + (found.steps - 1) / blocks
            if least > target_steps:
                return Unavailable(
                    FIRST_BLOCK_CACHE,
                    f"the first of its {blocks} blocks runs at each of {found.steps} steps, so that a run costs "
                    f"{least:.1f} full steps or more, above {target_steps:g}",
                )
            found = _nearest(lambda threshold: attempt(threshold, few), found, target_steps, task)
            if len(few) < len(runs):
                found = attempt(found.settings["threshold"], runs)
                found = _nearest(lambda threshold: attempt(threshold, runs), found, target_steps, task)
    except _FAILURES as error:
        return Unavailable(FIRST_BLOCK_CACHE, _failure(pipeline, error))
    if _above(found, target_steps):
        threshold = found.settings["threshold"]
        reason = f"no threshold was found that costs {target_steps:g} steps or less; {threshold:g} is the nearest"
        return Unavailable(FIRST_BLOCK_CACHE, reason)
    return found


def mag_cache(
    pipeline: Any,
    runs: Sequence[Callable[[], T]],
    target_steps: float,
    ratios: Sequence[float],
    *,
    trial: Callable[[], float] | None = None,
    progress: Progress | None = None,
) -> PeerRun[T] | Unavailable:
    """Run MagCache at the settings whose full steps are nearest to a target and not above it.

    Its decisions depend on the settings alone, not on the sample, so that a run may be a batch.

    Parameters
    ----------
    pipeline, runs, target_steps
        As :func:`first_block_cache`.
    ratios : sequence of float
        From :func:`magnitude_ratios`, of samples other than those of ``runs``.
    trial : callable, optional
        Makes samples other than those of ``runs`` and returns their error; called once for each setting that comes
        equally near to the target, with the setting in place, and the least error wins. Without it, the first of
        :func:`mag_cache_settings` is taken.

    Raises
    ------
    PassError
        As :func:`first_block_cache`.
    """
    reason = _cannot(pipeline, runs)
    if reason is not None:
        return Unavailable(MAG_CACHE, reason)
    known = mag_cache_settings(ratios, target_steps)
    if not known:
        return Unavailable(
            MAG_CACHE, f"no setting that was tried runs {target_steps:g} of {len(ratios)} steps or fewer"
        )

    def putter(setting: MagSettings) -> Callable[[torch.nn.Module], None]:
        config = MagCacheConfig(
            threshold=setting.threshold,
            max_skip_steps=setting.max_skip_steps,
            retention_ratio=setting.retention_ratio,
            num_inference_steps=len(ratios),
            mag_ratios=list(ratios),
        )
        return lambda module: apply_mag_cache(module, config)

    best = known[0]
    try:
        if trial is not None and len(known) > 1:
            errors = []
            with (progress or SilentProgress()).task(f"{MAG_CACHE}, {target_steps:g} steps", len(known)) as task:
                for setting in known:
                    with _cached(pipeline, putter(setting)):
                        errors.append(trial())
                    task.advance()
            best = known[errors.index(min(errors))]
        settings = {
            "threshold": best.threshold,
            "max_skip_steps": float(best.max_skip_steps),
            "retention_ratio": best.retention_ratio,
        }
        found = _run_with(pipeline, runs, MAG_CACHE, settings, putter(best))
    except _FAILURES as error:
        return Unavailable(MAG_CACHE, _failure(pipeline, error))
    if found.steps != len(ratios):
        raise PassError(f"the runs have {found.steps} steps, and the magnitude ratios are for {len(ratios)}")
    return replace(found, full=best.full)


def magnitude_ratios(pipeline: Any, runs: Sequence[Callable[[], object]]) -> tuple[float, ...]:
    """Measure what MagCache needs to know of a model: how the size of its residual changes from step to step.

    Ratio t is the mean over tokens of ‖R_t‖ / ‖R_(t−1)‖, with R_t the residual of the block stack at step t; 1 at step
    0. It is averaged over runs and guidance branches. This is what ``MagCacheConfig(calibrate=True)`` prints for one
    run and branch.

    Raises
    ------
    PassError
        If there are no runs, their steps differ, or the pipeline cannot be driven.
    """
    if not runs:
        raise PassError("no runs to measure magnitude ratios on; give one or more")
    meter = _Magnitudes()
    with attach(pipeline, meter):
        for run in runs:
            run()
    return meter.ratios()


def mag_cache_settings(ratios: Sequence[float], target_steps: float) -> tuple[MagSettings, ...]:
    """Return MagCache's settings that come nearest to a target and not above it, found without a run.

    For each of :data:`RETENTION_RATIOS` and :data:`MAX_SKIP_STEPS` the least threshold that comes nearest is taken, and
    of these the ones that share the largest number of full steps. Settings with the same full steps are listed once.
    """
    steps = len(ratios)
    found: list[MagSettings] = []
    for retention, most in itertools.product(RETENTION_RATIOS, MAX_SKIP_STEPS):
        retained = int(retention * steps + 0.5)
        errors = _accumulated_errors(ratios, most)
        best: MagSettings | None = None
        for threshold in sorted({error for row in errors for error in row} | {0.0}):
            full = _mag_full_steps(errors, retained, threshold)
            if len(full) <= target_steps and (best is None or len(full) > len(best.full)):
                best = MagSettings(threshold, most, retention, full)
        if best is not None:
            found.append(best)
    most_steps = max((len(item.full) for item in found), default=0)
    nearest = {item.full: item for item in reversed(found) if len(item.full) == most_steps}
    return tuple(item for item in found if nearest.get(item.full) is item)


def _accumulated_errors(ratios: Sequence[float], most: int) -> list[list[float]]:
    """Return what MagCache has added up after each number of skipped steps, up to ``most``, from each step on."""
    scales = torch.tensor(list(ratios))
    rows = []
    for start in range(len(ratios)):
        # In the hook's own arithmetic: scalar tensors in float32.
        ratio: Any = 1.0
        error: Any = 0.0
        row = []
        for step in range(start, min(start + most, len(ratios))):
            ratio = ratio * scales[step]
            error = error + abs(1.0 - ratio)
            row.append(float(error))
        rows.append(row)
    return rows


def _mag_full_steps(errors: list[list[float]], retained: int, threshold: float) -> tuple[int, ...]:
    full = []
    start = retained
    for step in range(len(errors)):
        skipped = step - start
        if step > 0 and step >= retained and skipped < len(errors[start]) and errors[start][skipped] <= threshold:
            continue
        full.append(step)
        start = max(step + 1, retained)
    return tuple(full)


# --- search and measurement ------------------------------------------------------------------------------------------


def _nearest(attempt: Callable[[float], PeerRun[T]], start: PeerRun[T], target: float, task: Task) -> PeerRun[T]:
    """Search a threshold; return the attempt of the largest cost not above the target.

    The cost falls about as a power of the threshold, except in details, so that every attempt counts, whatever its side
    of the bracket. Where all are above the target, the cheapest is returned.
    """
    attempts = [start]
    low: PeerRun[T] | None = None
    high: PeerRun[T] | None = None
    while True:
        task.advance()
        latest = attempts[-1]
        if _above(latest, target):
            low = latest
        elif latest.mean_cost_steps >= min(target, start.steps) - TOLERANCE_STEPS:
            break
        else:
            high = latest
        if len(attempts) == _ROUNDS or (low and high and _threshold(high) < _threshold(low) * _NARROW):
            break
        # Interpolation gets there in few attempts; where one end stays put, halving gets there for certain.
        halve = len(attempts) > 2 and len(attempts) % 2 == 0
        attempts.append(attempt(_next_threshold(low, high, target - TOLERANCE_STEPS / 2, halve=halve)))
    within = [item for item in attempts if not _above(item, target)]
    if within:
        return max(within, key=lambda item: item.mean_cost_steps)
    return min(attempts, key=lambda item: item.mean_cost_steps)


def _next_threshold(low: PeerRun[Any] | None, high: PeerRun[Any] | None, aim: float, *, halve: bool) -> float:
    """Return the threshold to try between two attempts, or beyond the only one."""
    if low is not None and high is not None:
        ends = [math.log(_threshold(item)) for item in (low, high)]
        over, under = (math.log(item.mean_cost_steps / aim) for item in (low, high))
        share = 0.5 if halve else min(max(over / (over - under), 0.1), 0.9)
        return math.exp(ends[0] + share * (ends[1] - ends[0]))
    known = low or high
    assert known is not None
    # Beyond a single attempt, on the side where the target is.
    factor = min(math.pow(known.mean_cost_steps / aim, _POWER), _FARTHEST)
    return _threshold(known) * (max(factor, _LEAST) if known is low else max(min(factor, 1 / _LEAST), 1 / _FARTHEST))


def _threshold(run: PeerRun[Any]) -> float:
    found: float = run.settings["threshold"]
    return found


def _above(run: PeerRun[Any], target: float) -> bool:
    return run.mean_cost_steps > target + 1e-9  # sums of fractions of steps round


def _run_with(
    pipeline: Any,
    runs: Sequence[Callable[[], T]],
    method: str,
    settings: dict[str, float],
    put: Callable[[torch.nn.Module], None],
) -> PeerRun[T]:
    results, full_steps, cost_steps = [], [], []
    with _cached(pipeline, put) as meter:
        for run in runs:
            meter.calls = meter.full_calls = meter.blocks_run = 0
            results.append(run())
            full_steps.append(meter.full_calls / meter.calls * meter.steps)
            cost_steps.append(meter.blocks_run / meter.blocks / meter.calls * meter.steps)
    return PeerRun(method, settings, tuple(results), meter.steps, tuple(full_steps), tuple(cost_steps))


@contextmanager
def _cached(pipeline: Any, put: Callable[[torch.nn.Module], None]) -> Iterator[_Meter]:
    """Put one of diffusers' caches into a pipeline and count what it runs; take both out again."""
    target = targets.find(pipeline)
    module = targets.denoiser(pipeline, target.denoisers[0])
    blocks = [unwrap_module(module.get_submodule(name)) for name in target.blocks[0]]
    meter = _Meter(module, len(blocks))
    # From the innermost to the outermost: what attach() leaves no trace of, the counters, the cache.
    with attach(pipeline, meter):
        try:
            for block in blocks:
                HookRegistry.check_if_exists_or_initialize(block).register_hook(_Counter(meter), _COUNTER_HOOK)
            put(module)
            HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()
            yield meter
        finally:
            for block in blocks:
                registry = HookRegistry.check_if_exists_or_initialize(block)
                for name in _HOOKS:
                    registry.remove_hook(name, recurse=False)
            HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()


class _Meter:
    """The driver that runs every call, each branch in its own cache context, and counts."""

    def __init__(self, module: torch.nn.Module, blocks: int) -> None:
        self.steps = 0
        self.blocks = blocks
        self.calls = 0
        self.full_calls = 0
        self.blocks_run = 0
        self._module = module

    def begin(self, steps: int) -> None:
        self.steps = steps
        HookRegistry.check_if_exists_or_initialize(self._module).reset_stateful_hooks()

    def denoise(self, step: int, branch: int, call: Call) -> Any:
        before = self.blocks_run
        # Called as a function, since not every denoiser inherits it.
        with CacheMixin.cache_context(self._module, f"branch {branch}"):
            output, _ = call.full(keep=False)
        self.calls += 1
        self.full_calls += self.blocks_run - before == self.blocks
        return output

    def stepped(self, step: int, sample: torch.Tensor) -> None:
        """Nothing is counted by step."""


class _Counter(ModelHook):  # type: ignore[misc]
    """Beneath a cache's hook: runs when the block does."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__()
        self._meter = meter

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._meter.blocks_run += 1
        return args, kwargs


class _Magnitudes:
    """The driver that runs every call and compares each residual with the one before."""

    def __init__(self) -> None:
        self._found: list[list[float]] = []
        self._previous: dict[int, torch.Tensor] = {}

    def begin(self, steps: int) -> None:
        if not self._found:
            self._found = [[] for _ in range(steps)]
        if len(self._found) != steps:
            raise PassError(f"one run has {len(self._found)} steps and another {steps}; magnitude ratios are of one")
        self._previous.clear()

    def denoise(self, step: int, branch: int, call: Call) -> Any:
        output, residual = call.full(keep=True)
        assert residual is not None
        size = residual.hidden.float().norm(dim=-1)
        previous = self._previous.get(branch)
        if previous is not None and previous.shape == size.shape:
            self._found[step].append(float((size / (previous + 1e-8)).mean()))
        self._previous[branch] = size
        return output

    def stepped(self, step: int, sample: torch.Tensor) -> None:
        """Nothing is measured by step."""

    def ratios(self) -> tuple[float, ...]:
        return tuple(statistics.fmean(found) if found else 1.0 for found in self._found)


def _cannot(pipeline: Any, runs: Sequence[Callable[[], object]]) -> str | None:
    """Return why diffusers' caches cannot be compared on this pipeline, if so."""
    if not runs:
        raise PassError("no runs to compare caches on; give one or more")
    target = targets.find(pipeline)
    if target.mode == "output":
        return f"it caches transformer blocks, and {type(pipeline).__name__} has a UNet"
    if len(target.denoisers) > 1:
        return f"it keeps one state, and {type(pipeline).__name__} changes its denoiser on the way"
    return None


def _failure(pipeline: Any, error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    said = str(error).strip().splitlines()
    return f"fails on {type(pipeline).__name__}: {type(error).__name__}{': ' + said[0] if said else ''}"
