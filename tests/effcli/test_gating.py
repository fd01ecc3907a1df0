"""Gates held against saved reports: the same figures as when the report was made, and what has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from effcli.cli.main import main
from effcli.errors import BadInputError
from effcli.gating import check, values
from tests.effcli.reports import optimize_samples
from tests.effcli.reports.optimize_samples import BEFORE, profiled


@pytest.fixture
def optimized() -> dict[str, Any]:
    return optimize_samples.optimized().to_dict()


def test_an_optimize_report_has_before_and_after(optimized: dict[str, Any]) -> None:
    found = values(optimized)
    quality, size = optimized["quality"], optimized["size"]
    assert (
        found.before["ppl"] == quality["perplexity"]["before"] and found.after["ppl"] == quality["perplexity"]["after"]
    )
    assert found.after["bits"] == size["bits_per_parameter"]
    assert found.before["bits"] == 8 * size["before_bytes"] / size["parameters"]
    assert found.after["tpot"] == optimized["figures_after"]["tpot_seconds"]
    rise = quality["perplexity"]["after"] / quality["perplexity"]["before"] - 1
    one, other = check(optimized, [f"ppl<=+{100 * rise + 0.1:.3f}%", f"ppl<=+{100 * rise - 0.1:.3f}%"])
    assert one.passed and not other.passed and one.measured == pytest.approx(rise)


def test_what_was_not_measured_fails_its_gate_with_the_reason(optimized: dict[str, Any]) -> None:
    optimized |= {"quality": None, "quality_reason": "the text is too short"}
    (result,) = check(optimized, ["kl<=0.1"])
    assert not result.passed and "the text is too short" in result.explanation


def test_a_profile_is_one_measurement() -> None:
    report = profiled(BEFORE).to_dict()
    seconds = report["profiles"]["latency"]["points"][0]["tpot_seconds"]["p50"]
    held, compared, quality = check(report, [f"tpot<={2 * seconds}", "tpot<=0.7x", "ppl<=20"])
    assert held.passed and held.measured == seconds
    assert not compared.passed and "not measured before" in compared.explanation
    assert not quality.passed and "one measurement" in quality.explanation


def test_a_report_without_figures_is_refused() -> None:
    with pytest.raises(BadInputError, match="no figures for gates"):
        check({"schema": "effcli.compare/1"}, ["ppl<=20"])


@pytest.mark.parametrize("damage", [{"quality": 3}, {"size": []}, {"before": None}, {"figures_after": "x"}])
def test_a_damaged_part_is_not_measured(optimized: dict[str, Any], damage: dict[str, Any]) -> None:
    assert all(
        isinstance(result.passed, bool) for result in check(optimized | damage, ["ppl<=+3%", "size<=1x", "tpot<=9"])
    )


def test_the_command_says_each_gate_and_exits_with_3(
    tmp_path: Path, optimized: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps(optimized), encoding="utf-8")
    assert main(["gate", str(saved), "size<=0.9x"]) == 0
    assert capsys.readouterr().out.startswith("holds   size<=0.9x: size of the weights is ")
    assert main(["gate", str(tmp_path), "size<=0.9x", "size<=0.01x"]) == 3
    said = capsys.readouterr()
    assert "failed  size<=0.01x: " in said.out and said.err == "error: 1 of 2 gates failed: 'size<=0.01x'\n"
    assert main(["gate", str(saved), "size<=0.01x", "--format", "json"]) == 3
    assert json.loads(capsys.readouterr().out)[0]["passed"] is False
    assert main(["gate", str(saved), "pppl<=3"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["gate", str(tmp_path / "none.json"), "ppl<=3"]) == 2
