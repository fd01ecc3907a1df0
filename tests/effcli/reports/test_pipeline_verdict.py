"""What is said first of a pipeline: gains, shortfalls, ways that do better, and what to do next."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from effcli.reports.pipeline_model import ComparisonRow, Likeness, ScheduleResult, Spread
from effcli.reports.pipeline_reading import error_map
from effcli.reports.pipeline_verdict import optimize_verdict, reusable
from effcli.reports.render import render
from effcli.reports.verdict import verdict
from passes.base import PassRecord

from . import pipeline_examples
from .pipeline_examples import PSNR, comparison, likeness, optimized, schedule_result


def said(report: Any) -> str:
    return " ".join(verdict(report.to_dict()))


def one(budget: int = 17, **changes: Any) -> Any:
    """A report with one schedule, changed."""
    return replace(optimized(), schedules=(replace(schedule_result(budget), **changes),), comparison=())


def test_gains_are_those_of_the_times() -> None:
    first = optimize_verdict(one(run_seconds_after=1.2, denoiser_seconds_after=1.0).to_dict())[0]
    assert first == (
        "Runs 2.6× as fast with 17 of 50 steps in full (denoiser 2.9× of at most 2.94×); pictures have 34.1 dB PSNR "
        "(95 % interval 33.0 to 35.2) against those of all steps on 16 held-out samples."
    )


@pytest.mark.parametrize(("seconds", "words"), [(3.12, "No faster: 1×"), (3.5, "Slower: 0.891×"), (3.0, "Runs 1.04×")])
def test_a_run_that_is_not_faster_is_called_so(seconds: float, words: str) -> None:
    assert optimize_verdict(one(run_seconds_after=seconds).to_dict())[0].startswith(words)


@pytest.mark.parametrize(("share", "short"), [(0.89, True), (0.91, False)])
def test_a_denoiser_below_nine_tenths_of_what_is_allowed_is_named(share: float, short: bool) -> None:
    text = said(one(denoiser_seconds_after=2.9 * 17 / 50 / share))
    assert ("less than 90 % as fast as its schedule allows" in text) is short
    if short:
        assert f"medium {2.9 / (2.9 * 17 / 50 / share):.2f}× where 2.94× is allowed" in text
        # Blocks are 2.75 of 2.9 s: what is left is 1 / (0.34 + 0.66 · 0.15 / 2.9).
        assert f"leave {1 / (0.34 + 0.66 * (0.15 / 2.9)):.2f}×" in text


def test_a_denoiser_that_reaches_what_heads_leave_is_not_held_against_it() -> None:
    data = one(denoiser_seconds_after=2.9 * 17 / 50 / 0.89).to_dict()
    data["denoising"]["blocks_share"] = 0.8
    text = " ".join(optimize_verdict(data))
    assert "2.62× where 2.94× is allowed (all that embedders and heads leave, which run at every step)" in text
    data["schedules"][0]["mode"] = "output"  # heads do not run
    assert "2.62× where 2.94× is allowed." in " ".join(optimize_verdict(data))


def test_other_passes_share_in_the_gain() -> None:
    quantized = PassRecord("quantize", {"scheme": "w8a16"}, "28 layers to 8 bits")
    report = replace(one(denoiser_seconds_after=0.8), passes=(quantized, *optimized().passes))
    text = said(report)
    assert "(denoiser 3.62× by the schedule and quantize)" in text and "at most" not in text
    slow = replace(one(denoiser_seconds_after=2.8), passes=report.passes)
    assert "than 90 %" not in said(slow) and "than 90 %" in said(one(denoiser_seconds_after=2.8))
    assert "What quantize did is part of the difference." in render(report.to_dict(), "markdown")


def test_every_schedule_that_falls_short_is_named() -> None:
    report = replace(optimized(), schedules=tuple(schedule_result(budget, reached=0.5) for budget in (25, 17)))
    assert "slow 1× where 2× is allowed" in said(report) and "medium 1.47× where 2.94×" in said(report)


def test_a_way_that_does_better_at_the_same_budget_is_named() -> None:
    assert "Better at" not in said(optimized())
    assert "No other way that was run comes nearer to all steps" in said(optimized())
    text = said(pipeline_examples.slow())
    assert "Better at 17 of 50 steps than what was chosen (34.1 dB): shortest sum (36.5 dB)." in text
    assert "No other way" not in text


@pytest.mark.parametrize(("calls", "named"), [(17.0, True), (17.4, True), (18.0, False)])
def test_a_way_that_takes_more_full_calls_is_no_better_way(calls: float, named: bool) -> None:
    rows = tuple(
        replace(row, full_calls=calls, likeness=likeness(40.0)) if row.method == "mag-cache" else row
        for row in comparison((17,))
    )
    text = said(replace(optimized(), comparison=rows))
    assert ("MagCache (40.0 dB)" in text) is named
    assert ("next minimax, linear reuse with 33.6 dB" in text) is not named


def test_a_missing_lpips_is_said_with_its_reason() -> None:
    assert f"LPIPS was not measured: {pipeline_examples.NO_LPIPS}." in said(optimized())
    there = replace(likeness(34.0), lpips=Spread(0.02, 0.01, 0.03), lpips_reason=None)
    assert "LPIPS" not in said(one(likeness=there))


def test_pictures_that_do_not_differ_have_no_psnr() -> None:
    text = said(pipeline_examples.published())
    assert "videos are the same to the bit as those of all steps on 1 held-out sample" in text
    nothing = Likeness(4, None, None, None, None, Spread(0.5, None, None))
    assert "how far pictures are from those of all steps was not measured" in said(one(likeness=nothing))


def test_what_to_do_next() -> None:
    assert 'Next: effcli.load_pipeline("out") runs it; schedule="slow" or schedule="fast" picks another.' in said(
        optimized()
    )
    assert 'Next: effcli.load_pipeline("out") runs it.' in said(pipeline_examples.published())
    assert "Next: nothing was published, a gate failed (PSNR is 34.1 dB, at least 40 dB asked for)" in said(
        pipeline_examples.slow()
    )


def test_the_default_comes_first_and_the_others_after_it() -> None:
    first, second, *_ = verdict(optimized().to_dict())
    assert "17 of 50" in first
    assert second.startswith("Also written: slow (25 of 50 steps,") and "fast (10 of 50 steps" in second


def test_a_profile_says_where_time_goes_and_what_could_be_reused() -> None:
    text = said(pipeline_examples.profiled())
    assert text.startswith("A 50-step run takes 3.12 s; the transformer is 93 % of it, compute-bound at 81 %")
    assert "Reuse can skip its blocks, 88 % of a run." in text
    assert "--pass lemica:budget=" in text
    batched = said(replace(pipeline_examples.profiled(), batch=4))
    assert batched.startswith("A 50-step run of 4 samples at once takes 3.12 s;")
    bare = said(pipeline_examples.profiled_without_map())
    assert "What reuse would cost is not known: left out: --no-error-map." in bare and "budget" not in bare


def test_steps_that_could_reuse_are_counted_as_brute_force_counts_them() -> None:
    steps = 11
    graph = pipeline_examples.graph(steps, 4)
    found = error_map(graph.model_dump(mode="json"))
    assert found is not None
    weights = graph.weights()

    def worst(full: tuple[int, ...]) -> float:
        return max(weights.get(edge, 9e9) for edge in zip(full, full[1:], strict=False))

    limit = worst((*range(0, steps, 2),))
    paths = [(0, *inner, steps - 1) for size in range(steps - 1) for inner in combinations(range(1, steps - 1), size)]
    fewest = min(len(path) for path in paths if worst(path) <= limit)
    assert found.fewest(limit) == fewest
    assert found.fewest(-1.0) is None or found.fewest(-1.0) == steps
    (said_, *_) = reusable(found, "x")
    assert f"{steps - fewest} of {steps} steps can reuse at no more than that, not 5." in said_


def test_psnr_of_examples_are_of_the_rows() -> None:
    rows: tuple[ComparisonRow, ...] = comparison()
    result: ScheduleResult = schedule_result(17)
    assert result.likeness.psnr_db == next(
        row.likeness.psnr_db for row in rows if row.likeness and row.method == "fitted" and row.budget == 17
    )
    assert PSNR["fitted"][1] == 34.11
