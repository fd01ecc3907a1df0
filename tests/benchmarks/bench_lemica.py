"""Schedules of ``dit-tiny`` at 25, 17 and 10 of 50 steps: likeness by what is reused, path and samples; time.

``--time`` measures times alone, which depend on how many steps are full and not on which: with uniform spacing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effcli.diffusion.comparing import Bench, Outcome, likeness
from effcli.diffusion.opening import open_pipeline
from effcli.diffusion.timing import timed_run
from passes.lemica import graph, inputs, path, peers, targets
from passes.lemica.following import follower
from passes.lemica.hook import Follower
from passes.lemica.schedule import ErrorGraph, Mode, Schedule
from passes.lemica.trying import Trial, modes_tried, nearest, tried_on
from profilers.image_quality import psnr, spread

STEPS, MAX_GAP, BUDGETS = 50, 8, (25, 17, 10)
ERROR_SAMPLES, FIT_SAMPLES, HELD_OUT = 8, 16, 32
MODES: tuple[Mode, ...] = ("output", "residual")
COUNTS = (1, 5, 20)
"""Calibration samples that are compared."""
BATCHES = ((1, 15), (16, 7), (32, 7))
"""Pictures of one timed run, and timed runs."""
LEAST_SHARE = 0.9
"""Of the speed-up that a schedule allows the denoiser."""


def emit(**values: Any) -> None:
    """Print one JSON line."""
    print(json.dumps({"benchmark": "lemica", **values}), flush=True)


def main() -> int:
    """Print the tables; return 1 if another way is above the pass's default in the mean."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--time", action="store_true", help="times alone")
    only_time = parser.parse_args().time
    pipeline = open_pipeline("dit-tiny", device="cpu").pipeline
    known = inputs.calibration_samples(pipeline, max(*COUNTS, FIT_SAMPLES))
    bench = Bench(pipeline, targets.find(pipeline), inputs.held_out_samples(pipeline, known, HELD_OUT), STEPS, {})
    call: dict[str, Any] = {"steps": STEPS, "arguments": {}}

    def tried(schedule: Schedule, fit_samples: int = FIT_SAMPLES, aim: torch.Tensor | None = None) -> Trial:
        return tried_on(pipeline, known[:fit_samples], schedule, aim, **call)

    def follow(schedule: Schedule, fit_samples: int = FIT_SAMPLES) -> Follower:
        if schedule.reuse != "fitted":
            return follower(schedule, None)
        return follower(schedule, tried(schedule, fit_samples).coefficients)

    if only_time:
        for mode in MODES:
            full = {budget: path.uniform(STEPS, {}, budget) for budget in BUDGETS}
            _time(bench, {budget: _schedule(full[budget], "fitted", mode) for budget in BUDGETS}, follow)
        return 0
    graphs: dict[Mode, ErrorGraph] = {}
    for mode in MODES:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            graphs[mode] = graph.build(pipeline, known, max_gap=MAX_GAP, work=Path(work), mode=mode, **call)
        seconds, found = time.perf_counter() - started, graphs[mode]
        emit(case="graph", mode=mode, samples=len(known), seconds=seconds, forwards=found.forwards, noise=found.noise)
    reference = bench.run()

    def report(case: str, budget: int, outcome: Outcome, **more: Any) -> torch.Tensor:
        found = likeness(reference, outcome)
        assert found.psnr_db is not None and found.ssim is not None
        emit(
            case=case,
            budget=budget,
            psnr_db=found.psnr_db.mean,
            interval=[found.psnr_db.low, found.psnr_db.high],
            ssim=found.ssim.mean,
            latent_l1=found.latent_l1.mean,
            **more,
        )
        return psnr(outcome.pictures, reference.pictures)

    reached = True
    aim = inputs.generate(pipeline, known[:FIT_SAMPLES], **call)
    by_mode = modes_tried(pipeline, known[:FIT_SAMPLES], min(BUDGETS), "fitted", aim, **call)
    best_mode = nearest(by_mode).schedule.mode
    emit(
        case="what is reused",
        taken=best_mode,
        calibration_latent_l1={item.schedule.mode: item.error for item in by_mode},
    )
    defaults: dict[int, Schedule] = {}
    for budget in BUDGETS:
        best = torch.zeros(())
        for mode in (best_mode, *(mode for mode in MODES if mode != best_mode)):
            weights = graphs[mode].weights(ERROR_SAMPLES)
            paths = {name: solve(STEPS, weights, budget) for name, solve in path.SOLVERS.items()}
            trials = {name: tried(_schedule(full, "fitted", mode), aim=aim) for name, full in paths.items()}
            if mode == best_mode:
                taken = nearest(list(trials.values()))
                name = next(name for name, trial in trials.items() if trial is taken)
                errors = {name: trial.error for name, trial in trials.items()}
                defaults[budget] = taken.schedule
                ours = bench.run(follower(taken.schedule, taken.coefficients))
                best = report("default", budget, ours, path=name, mode=mode, calibration_latent_l1=errors)
            for name, trial in trials.items():
                others = {reuse: follow(_schedule(paths[name], reuse, mode)) for reuse in ("last", "linear")}
                others["fitted"] = follower(trial.schedule, trial.coefficients)
                for reuse, driver in others.items():
                    case = f"{mode}, {name}, {reuse}"
                    reached &= _gain(case, budget, best - report(case, budget, bench.run(driver)))
        for name, outcome in _peers(bench, known[:ERROR_SAMPLES], budget):
            reached &= _gain(name, budget, best - report(name, budget, outcome, full_steps=outcome.full_calls))
        for count in COUNTS:
            full = path.SOLVERS["minimax"](STEPS, graphs[best_mode].weights(count), budget)
            for reuse in ("last", "fitted"):
                outcome = bench.run(follow(_schedule(full, reuse, best_mode), count))
                report(f"{best_mode}, minimax, {reuse}, {count} samples", budget, outcome)
    _time(bench, defaults, follow)
    return 0 if reached else 1


def _schedule(full: tuple[int, ...], reuse: Any, mode: Mode) -> Schedule:
    return Schedule(name="benchmark", steps=STEPS, full=full, reuse=reuse, mode=mode)


def _gain(name: str, budget: int, difference: torch.Tensor) -> bool:
    """Print by how much the pass's default is above another way, sample by sample; say whether it is in the mean."""
    found = spread(difference)
    assert found is not None
    emit(case=f"gain over {name}", budget=budget, psnr_db=found.mean, interval=[found.low, found.high])
    return found.mean >= 0  # another way may find the same path


def _peers(bench: Bench, known: tuple[inputs.Sample, ...], budget: int) -> list[tuple[str, Outcome]]:
    calibration = Bench(bench.pipeline, bench.target, known, STEPS, {})
    ratios = peers.magnitude_ratios(bench.pipeline, [calibration.run])
    aim = calibration.run()
    runs = [bench.alone(sample).run for sample in bench.samples]

    def trial() -> float:
        return float((calibration.run().latents - aim.latents).abs().mean())

    found = []
    for made in (
        peers.mag_cache(bench.pipeline, runs, budget, ratios, trial=trial),
        peers.first_block_cache(bench.pipeline, runs, budget),
    ):
        if isinstance(made, peers.Unavailable):
            emit(case=made.method, budget=budget, reason=made.reason)
            continue
        joined = Outcome(
            torch.cat([part.latents for part in made.results]),
            torch.cat([part.pictures for part in made.results]),
            made.mean_cost_steps,
        )
        found.append((made.method, joined))
    return found


def _time(bench: Bench, schedules: dict[int, Schedule], follow: Callable[[Schedule], Follower]) -> None:
    """Print times with and without each schedule, in turn."""
    device = torch.device("cpu")
    for batch, runs in BATCHES:
        timed = Bench(bench.pipeline, bench.target, bench.samples[:batch], STEPS, {})
        for budget, schedule in schedules.items():
            driver = follow(schedule)
            before, after = [], []
            for _ in range(runs + 1):
                before.append(timed_run(timed, None, device))
                after.append(timed_run(timed, driver, device))
            whole, denoiser = (
                statistics.median(getattr(run, figure) for run in before[1:])
                / statistics.median(getattr(run, figure) for run in after[1:])
                for figure in ("seconds", "denoiser_seconds")
            )
            emit(
                case="time",
                mode=schedule.mode,
                budget=budget,
                pictures=batch,
                run_speedup=whole,
                denoiser_speedup=denoiser,
                share_of_allowed=denoiser * budget / STEPS,
                must_reach_share=LEAST_SHARE,
                reached=denoiser * budget / STEPS >= LEAST_SHARE,
            )


if __name__ == "__main__":
    raise SystemExit(main())
