"""Schedules of ``dit-tiny`` at 25, 17 and 10 of 50 steps: likeness by path, reuse and calibration samples; time.

``--time`` measures times alone, which depend on how many steps are full and not on which: with uniform spacing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from effcli.diffusion.comparing import Bench, Outcome, likeness
from effcli.diffusion.opening import open_pipeline
from effcli.diffusion.timing import timed_run
from passes.lemica import graph, inputs, path, peers, targets
from passes.lemica.following import follower
from passes.lemica.schedule import Reuse, Schedule
from passes.lemica.trying import Trial, nearest, tried_on
from profilers.image_quality import psnr, spread

STEPS, MAX_GAP, BUDGETS = 50, 8, (25, 17, 10)
ERROR_SAMPLES, FIT_SAMPLES, HELD_OUT = 8, 16, 32
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
    target = targets.find(pipeline)
    known = inputs.calibration_samples(pipeline, max(*COUNTS, FIT_SAMPLES))
    bench = Bench(pipeline, target, inputs.held_out_samples(pipeline, known, HELD_OUT), STEPS, {})

    def tried(name: str, full: tuple[int, ...], fit_samples: int, aim: torch.Tensor | None = None) -> Trial:
        schedule = Schedule(name=name, steps=STEPS, full=full, reuse="fitted")
        return tried_on(pipeline, target, known[:fit_samples], schedule, aim, steps=STEPS, arguments={})

    def follow(full: tuple[int, ...], reuse: Reuse, fit_samples: int = FIT_SAMPLES) -> Any:
        if reuse != "fitted":
            return follower(Schedule(name="benchmark", steps=STEPS, full=full, reuse=reuse), None)
        found = tried("benchmark", full, fit_samples)
        return follower(found.schedule, found.coefficients)

    if only_time:
        _time(bench, {budget: path.SOLVERS["uniform"](STEPS, {}, budget) for budget in BUDGETS}, follow)
        return 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        errors = graph.build(pipeline, known, steps=STEPS, max_gap=MAX_GAP, arguments={}, work=Path(work))
    emit(
        case="graph",
        samples=len(known),
        seconds=time.perf_counter() - started,
        forwards=errors.forwards,
        noise=errors.noise,
    )
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
    weights = errors.weights(ERROR_SAMPLES)
    aim = inputs.generate(pipeline, known[:FIT_SAMPLES], steps=STEPS, arguments={})
    defaults: dict[int, tuple[int, ...]] = {}
    for budget in BUDGETS:
        trials = [tried(name, solve(STEPS, weights, budget), FIT_SAMPLES, aim) for name, solve in path.SOLVERS.items()]
        taken = nearest(trials)
        defaults[budget] = taken.schedule.full
        errors_of = {trial.schedule.name: trial.error for trial in trials}
        ours = bench.run(follower(taken.schedule, taken.coefficients))
        best = report("default", budget, ours, path=taken.schedule.name, calibration_latent_l1=errors_of)
        for trial in trials:
            name, full = trial.schedule.name, trial.schedule.full
            fitted = bench.run(follower(trial.schedule, trial.coefficients))
            others = {reuse: bench.run(follow(full, reuse)) for reuse in ("last", "linear")} | {"fitted": fitted}
            for reuse, outcome in others.items():
                reached &= _gain(f"{name}, {reuse}", budget, best - report(f"{name}, {reuse}", budget, outcome))
        for name, outcome in _peers(bench, known[:ERROR_SAMPLES], budget):
            reached &= _gain(name, budget, best - report(name, budget, outcome, full_steps=outcome.full_calls))
        for count in COUNTS:
            full = path.SOLVERS["minimax"](STEPS, errors.weights(count), budget)
            for reuse in ("last", "fitted"):
                outcome = bench.run(follow(full, reuse, count))
                report(f"minimax, {reuse}, {count} samples", budget, outcome)
    _time(bench, defaults, follow)
    return 0 if reached else 1


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


def _time(bench: Bench, schedules: dict[int, tuple[int, ...]], follow: Any) -> None:
    """Print times with and without each schedule, in turn."""
    device = torch.device("cpu")
    for batch, runs in BATCHES:
        timed = Bench(bench.pipeline, bench.target, bench.samples[:batch], STEPS, {})
        for budget, full in schedules.items():
            driver = follow(full, "fitted")
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
