"""What counts as a change: against simulated repeats of the same measurement, and case by case."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from effcli.reports.changes import (
    LEAST_TIMING_NOISE,
    P10_TO_P90_SIGMAS,
    Change,
    Metric,
    Side,
    Value,
    change,
    changes,
    optimize_changes,
    sink_shifts,
    timing_sigma,
)
from profilers.timing import Distribution

from . import optimize_samples, samples

TIME = Metric("tpot_seconds", "time per token", "seconds", "lower")


def by_metric(report: dict[str, Any]) -> dict[str, Change]:
    return {found.metric: found for found in optimize_changes(report)}


def timing(samples_: np.ndarray) -> dict[str, Any]:
    return asdict(Distribution.of([float(value) for value in samples_]))


@pytest.mark.parametrize("count", [3, 4, 5, 8, 16, 32, 64])
def test_sigma_of_few_samples_is_not_underestimated(count: int) -> None:
    true = 0.05
    draws = np.random.default_rng(0).normal(1.0, true, size=(4000, count))
    found = [timing_sigma(timing(row)) for row in draws]
    assert true <= float(np.mean([value for value in found if value is not None])) <= 1.15 * true


def test_sigma_of_many_samples_is_the_standard_deviation() -> None:
    draws = np.random.default_rng(1).normal(1.0, 0.04, size=200_000)
    assert timing_sigma(timing(draws)) == pytest.approx(float(draws.std()), rel=0.01)
    # 2.563 is the distance of the 10th from the 90th percentile of a normal distribution.
    assert math.isclose(P10_TO_P90_SIGMAS, 2 * 1.2815515655446004, rel_tol=1e-3)


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("count", [3, 16])
def test_two_runs_of_the_same_model_are_rarely_called_a_change(spread: float, count: int) -> None:
    """Runs drift together: each run has a level of its own, as wide as the spread within a run."""
    generator = np.random.default_rng(2)
    wrong, runs = 0, 400
    for _ in range(runs):
        sides = []
        for _ in range(2):
            level = math.exp(generator.normal(0.0, spread / P10_TO_P90_SIGMAS))
            found = timing(level * np.exp(generator.normal(0.0, spread / P10_TO_P90_SIGMAS, size=count)))
            sides.append(Value(found["p50"], timing_sigma(found)))
        wrong += change(TIME, *sides).status not in ("noise", "same")
    # Nominally 5 %; the spread of 3 samples is itself a guess.
    assert wrong / runs <= (0.25 if count == 3 else 0.13)


def test_a_doubling_is_found_through_a_spread_of_a_tenth() -> None:
    found = change(TIME, Value(0.04, 0.04), Value(0.02, 0.04))
    assert (found.status, found.ratio) == ("better", 0.5)
    assert change(TIME, Value(0.02, 0.04), Value(0.04, 0.04)).status == "worse"
    # The same doubling inside a spread of 100 % is no claim.
    assert change(TIME, Value(0.04, 0.4), Value(0.02, 0.4)).status == "noise"


def test_noise_is_symmetric_and_never_below_the_floor() -> None:
    assert change(TIME, Value(1.0, 0.0), Value(1.02, 0.0)).noise == LEAST_TIMING_NOISE
    for ratio in (1.02, 1 / 1.02):
        assert change(TIME, Value(1.0, 0.0), Value(ratio, 0.0)).status == "noise"
    for ratio, status in ((1.04, "worse"), (1 / 1.04, "better")):
        assert change(TIME, Value(1.0, 0.0), Value(ratio, 0.0)).status == status
    # hypot(3 %, 4 %) = 5 %, at 1.96 sigma
    assert change(TIME, Value(1.0, 0.03), Value(1.0, 0.04)).noise == pytest.approx(math.expm1(1.96 * 0.05))


def test_a_timing_whose_spread_is_not_known_is_never_a_gain() -> None:
    single = {"p50": 1.0, "relative_spread": 0.0, "samples": 1}
    assert timing_sigma(single) is None
    assert timing_sigma({"p50": 1.0}) is None
    found = change(TIME, Value(2.0, 0.01), Value(1.0, None))
    assert (found.status, found.noise) == ("unknown", None)


@pytest.mark.parametrize(
    ("interval", "status"),
    [((1.01, 1.2), "worse"), ((0.9, 0.99), "better"), ((0.99, 1.01), "noise"), ((1.0, 1.2), "noise")],
)
def test_the_paired_interval_decides_on_perplexity(interval: tuple[float, float], status: str) -> None:
    metric = Metric("perplexity", "perplexity", "perplexity", "lower")
    middle = 10 * sum(interval) / 2
    assert change(metric, Value(10.0, None), Value(middle, None), interval).status == status


def test_without_pairs_overlapping_intervals_are_noise() -> None:
    metric = Metric("perplexity", "perplexity", "perplexity", "lower")
    before = Value(10.0, None, (9.0, 11.0))
    assert change(metric, before, Value(11.5, None, (10.5, 12.5))).status == "noise"
    assert change(metric, before, Value(13.0, None, (12.0, 14.0))).status == "worse"
    assert change(metric, before, Value(13.0, None)).status == "unknown"


def test_counted_bytes_have_no_noise() -> None:
    metric = Metric("weight_bytes", "weights", "bytes", "lower")
    assert change(metric, Value(100.0), Value(100.0)).status == "same"
    assert change(metric, Value(100.0), Value(99.0)).status == "better"
    assert change(metric, Value(0.0), Value(1.0)).status == "worse"
    assert change(metric, Value(0.0), Value(1.0)).ratio is None


def test_words_change_without_being_better() -> None:
    metric = Metric("decode_bound", "decode is bound by", "text")
    assert change(metric, Value("memory"), Value("overhead")).status == "changed"
    assert change(metric, Value("memory"), Value("memory")).status == "same"
    assert change(metric, Value("memory"), Value(None)).status == "unknown"


def test_the_changes_of_a_run_are_those_of_its_figures() -> None:
    found = by_metric(optimize_samples.optimized().to_dict())
    assert found["stored_bytes"].ratio == pytest.approx(98_400_000 / 269_030_016)
    assert found["bits_per_parameter"].before == pytest.approx(16.0)
    assert found["tpot_seconds"].status == "better" and found["tokens_per_second"].status == "better"
    assert found["tokens_per_second"].ratio == pytest.approx(0.0375 / 0.0175)
    assert found["ttft_seconds"].status == "noise"
    assert found["peak_memory_bytes"].status == "better"
    assert found["perplexity"].status == "worse"
    assert found["kl_mean"].before is None and found["kl_mean"].after == 0.1102
    assert found["task:arc-like"].status == "noise"
    assert found["decode_flops_per_byte"].ratio is not None and found["decode_flops_per_byte"].ratio > 2


def test_peak_memory_of_a_process_has_noise_and_that_of_cuda_has_none() -> None:
    for device, status in (("cpu", "noise"), ("cuda:0", "better")):
        sides = []
        for memory in (1_000_000_000, 990_000_000):
            report = optimize_samples.profiled(optimize_samples.BEFORE, memory=memory)
            sides.append(Side(replace(report, environment=replace(report.environment, device=device)).to_dict()))
        found = {entry.metric: entry for entry in changes(*sides, (1, 512))}
        assert found["peak_memory_bytes"].status == status


def test_a_point_that_a_side_lacks_is_not_compared() -> None:
    side = Side(optimize_samples.profiled(optimize_samples.BEFORE).to_dict())
    found = {entry.metric: entry for entry in changes(side, side, (8, 512))}
    assert found["tpot_seconds"].before is None and found["tpot_seconds"].status == "unknown"
    assert "no timing at this batch and context" in (found["tpot_seconds"].reason or "")


def moved(report: dict[str, Any], heads: int) -> dict[str, Any]:
    """Put the first heads of the second half of layers below ε, at the point without BOS."""
    alpha = report["profiles"]["sinks"]["points"][0]["alpha"]
    left = heads
    for row in alpha[15:]:
        for head, value in enumerate(row):
            if left and value > 0.3:
                row[head] = 0.1
                left -= 1
    return report


def test_sinks_are_compared_head_by_head() -> None:
    before, after = samples.full().to_dict(), moved(samples.full().to_dict(), 27)
    first, second = sink_shifts(before, after)
    assert (first.heads, first.crossed, second.crossed) == (samples.LAYERS * samples.HEADS, 27, 0)
    old = np.array(before["profiles"]["sinks"]["points"][0]["alpha"])
    new = np.array(after["profiles"]["sinks"]["points"][0]["alpha"])
    assert first.mean_difference == pytest.approx(float(np.abs(new - old).mean()))
    after["profiles"]["sinks"]["epsilon"] = 0.5
    assert sink_shifts(before, after) == []
    assert sink_shifts(before, {}) == []
