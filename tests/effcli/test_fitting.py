"""Predictions held against measurements: a miss is explained from facts, or said to be unexplained."""

from __future__ import annotations

from typing import Any

import pytest

from effcli.fitting import fit
from effcli.reports.optimize_model import PlannedPass
from passes.base import Figures, KernelUse, Prediction


def profile_of(**times: float) -> dict[str, Any]:
    spread = times.get("spread", 0.01)
    timing = {"p50": 0.1, "relative_spread": spread}
    point = {"ttft_seconds": timing, "tpot_seconds": timing, "peak_memory_bytes": times.get("peak", 1000)}
    roofline = {"phase": "decode", "time_seconds": 0.1, "attainable_seconds": times.get("attainable", 0.09)}
    return {
        "profiles": {"latency": {"points": [point]}, "intensity": {"points": [roofline]}},
        "model": {"weight_bytes": 900},
        "environment": {"device": "cpu"},
    }


@pytest.mark.parametrize(
    ("report", "kernels", "words"),
    [
        (profile_of(), [], "not known"),
        (profile_of(spread=0.5), [], "the measured time is uncertain: 10th to 90th percentile span 50 %"),
        (profile_of(attainable=0.04), [], "60 % of the measured time is neither memory nor compute"),
        (
            profile_of(),
            [KernelUse("q_proj", "aten.linear", 4, "no AVX")],
            "4 layers (q_proj) run on aten.linear: no AVX",
        ),
    ],
)
def test_a_miss_is_explained_from_facts(report: dict[str, Any], kernels: list[KernelUse], words: str) -> None:
    said = PlannedPass("p", {}, "p", Prediction(Figures(tpot_seconds=0.05, kv_bytes_per_token=8.0)), None)
    found, _ = fit(
        [said], Figures(tpot_seconds=0.2), Figures(tpot_seconds=0.1, kv_bytes_per_token=8.5), report, kernels, 1.0
    )
    assert found is not None
    rows = {row.metric: row for row in found.metrics}
    assert rows["tpot_seconds"].relative_error == pytest.approx(-0.5)
    assert rows["tpot_seconds"].explanation is not None
    assert rows["tpot_seconds"].explanation.startswith(words)
    assert rows["kv_bytes_per_token"].explanation is None  # 6 % is no miss
    assert rows["ttft_seconds"].relative_error is None


def test_memory_beside_the_weights_explains_a_miss_on_a_cpu() -> None:
    said = PlannedPass("p", {}, "p", Prediction(Figures(peak_memory_bytes=1000)), None)
    report = profile_of(peak=2000)
    found, _ = fit([said], Figures(), Figures(peak_memory_bytes=2000), report, [], 1.0)
    assert found is not None
    (row,) = [row for row in found.metrics if row.metric == "peak_memory_bytes"]
    assert row.explanation is not None
    assert row.explanation.startswith("1.10 kB of the measured peak are not weights")
    report["environment"]["device"] = "cuda:0"  # there it is live tensors only
    found, _ = fit([said], Figures(), Figures(peak_memory_bytes=2000), report, [], 1.0)
    assert found is not None
    assert {row.metric: row.explanation for row in found.metrics}["peak_memory_bytes"] == "not known"


def test_seconds_of_all_passes_are_added_where_each_was_predicted() -> None:
    known = PlannedPass("p", {}, "p", Prediction(Figures(), pass_seconds=2.0), None)
    unknown = PlannedPass("p", {}, "p", Prediction(Figures()), None)
    report = profile_of()
    both, _ = fit([known, known], Figures(), Figures(), report, [], 5.0)
    assert both is not None
    assert (both.pass_seconds, both.measured_pass_seconds) == (4.0, 5.0)
    half, _ = fit([known, unknown], Figures(), Figures(), report, [], 5.0)
    assert half is not None
    assert half.pass_seconds is None


def test_nothing_predicted_is_said() -> None:
    assert fit([], Figures(), Figures(), profile_of(), [], 1.0) == (None, "nothing was predicted")


def test_what_came_out_better_than_predicted_is_not_blamed_on_extra_costs() -> None:
    said = PlannedPass("p", {}, "p", Prediction(Figures(tpot_seconds=0.2, peak_memory_bytes=4000)), None)
    report = profile_of(attainable=0.04, peak=2000)
    kernels = [KernelUse("q_proj", "aten.linear", 4, "no AVX")]
    found, _ = fit([said], Figures(), Figures(tpot_seconds=0.1, peak_memory_bytes=2000), report, kernels, 1.0)
    assert found is not None
    said_of = {row.metric: row.explanation for row in found.metrics if row.explanation is not None}
    assert set(said_of.values()) == {"not known; it came out better than predicted"}
    assert set(said_of) == {"tpot_seconds", "peak_memory_bytes"}
