"""Two saved reports held against each other: what is said, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effcli.comparison import Comparison, compare
from effcli.errors import BadInputError
from effcli.reports.verdict import verdict
from tests.effcli.reports import optimize_samples, samples
from tests.effcli.reports.optimize_samples import AFTER, BEFORE, profiled


def save(folder: Path, name: str, data: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(data if isinstance(data, dict) else data.to_dict()), encoding="utf-8")
    return path


def statuses(found: Comparison) -> dict[str, str]:
    return {change.metric: change.status for change in found.changes}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    save(folder, "report.json", optimize_samples.optimized())
    return folder


def test_a_profile_against_what_optimize_made_of_it(tmp_path: Path, checkpoint: Path) -> None:
    found = compare(save(tmp_path, "before.json", profiled(BEFORE)), checkpoint / "report.json")
    assert (found.batch, found.context, found.mismatches) == (1, 512, ())
    assert statuses(found)["tpot_seconds"] == "better" and statuses(found)["ttft_seconds"] == "noise"
    assert found.b.name == "smollm2-135m, after" and found.a.name == "smollm2-135m"
    # Same weights as the report's source (by fingerprint): its quality is the one measured before.
    perplexity = next(change for change in found.changes if change.metric == "perplexity")
    assert (perplexity.before, perplexity.after) == (15.24, 17.05)
    assert perplexity.status == "worse"  # by the report's paired interval, not by the two that overlap
    assert json.loads(found.to_json())["schema"] == "effcli.compare/1"


def test_quality_is_not_taken_from_another_model(tmp_path: Path, checkpoint: Path) -> None:
    report = profiled(BEFORE)
    other = replace(report, model=replace(report.model, fingerprint="0" * 64))
    found = compare(save(tmp_path, "before.json", other), checkpoint)
    assert next(change for change in found.changes if change.metric == "perplexity").before is None


def test_one_report_is_compared_with_itself_before_and_after(checkpoint: Path) -> None:
    found = compare(checkpoint)
    assert found.a.name.endswith(", before") and found.b.name.endswith(", after")
    assert statuses(found)["perplexity"] == "worse"  # by the paired interval: those of each side overlap
    assert statuses(found)["task:arc-like"] == "noise"


def test_two_runs_of_the_same_model_show_no_gain(tmp_path: Path) -> None:
    again = replace(BEFORE, tpot_seconds=0.0366, ttft_seconds=0.82)
    found = compare(
        save(tmp_path, "a.json", profiled(BEFORE, relative=0.1)),
        save(tmp_path, "b.json", profiled(again, relative=0.1)),
    )
    assert {statuses(found)[key] for key in ("tpot_seconds", "ttft_seconds", "tokens_per_second")} == {"noise"}
    first, second = verdict(found.to_dict())
    assert first == "B shows no gain outside noise at batch 1, context 512."
    assert second.startswith("Within noise, so no change is claimed: ")


def test_slower_is_said(tmp_path: Path) -> None:
    found = compare(save(tmp_path, "a.json", profiled(AFTER)), save(tmp_path, "b.json", profiled(BEFORE)))
    sentences = verdict(found.to_dict())
    assert any(sentence.startswith("B is worse than A in ") and "time per token" in sentence for sentence in sentences)


def changed(what: str) -> dict[str, Any]:
    report = profiled(BEFORE)
    data = report.to_dict()
    if what == "device":
        data["environment"]["device_name"] = "Another CPU"
    elif what == "threads":
        data["environment"]["threads"] = 8
    elif what == "dtype":
        data["model"]["dtype"] = "float32"
    elif what == "architecture":
        data["model"]["architecture"] = "MistralForCausalLM"
    elif what == "size":
        data["model"]["hidden_size"] = 2048
    elif what == "text":
        data["profiles"]["sinks"]["text"] = "a novel"
    elif what == "context":
        for name in ("latency", "intensity"):
            for point in data["profiles"][name]["points"]:
                point["context"] = 4096
    return data


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("device", "device differs: Example CPU, 2 threads against Another CPU, 2 threads"),
        ("threads", "device differs: Example CPU, 2 threads against Example CPU, 8 threads"),
        ("dtype", "dtype differs: bfloat16 against float32"),
        (
            "architecture",
            "model architecture differs: LlamaForCausalLM with hidden size 576 against MistralForCausalLM",
        ),
        ("size", "with hidden size 576 against LlamaForCausalLM with hidden size 2048"),
        ("text", "text of the sinks differs: Python language reference (pydoc_data.topics) against a novel"),
        ("context", "batch and context differs: 1 × 512 against 1 × 4096"),
    ],
)
def test_other_conditions_are_refused_unless_told_otherwise(tmp_path: Path, what: str, says: str) -> None:
    a, b = save(tmp_path, "a.json", profiled(BEFORE)), save(tmp_path, "b.json", changed(what))
    with pytest.raises(BadInputError) as refused:
        compare(a, b)
    assert says in str(refused.value) and str(refused.value).endswith("; add --anyway to compare all the same")
    assert "\n" not in str(refused.value) and refused.value.exit_code == 2
    found = compare(a, b, anyway=True)
    assert len(found.mismatches) == 1
    assert verdict(found.to_dict())[-1].startswith("Compared although these differ: ")


def test_quality_on_another_text_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    other = optimize_samples.optimized()
    other = replace(other, quality=replace(optimize_samples.quality(), text="a novel"))
    with pytest.raises(BadInputError, match="evaluation text differs: Python documentation .* against a novel"):
        compare(checkpoint, save(tmp_path, "b.json", other))


def test_further_points_that_both_hold_are_compared_too(tmp_path: Path) -> None:
    sides = []
    for name, figures in (("a.json", BEFORE), ("b.json", AFTER)):
        data = profiled(figures).to_dict()
        (point,) = data["profiles"]["latency"]["points"]
        data["profiles"]["latency"]["points"].append({**point, "context": 2048})
        sides.append(save(tmp_path, name, data))
    found = compare(*sides)
    (further,) = found.points
    assert (further.batch, further.context) == (1, 2048)
    assert {change.metric for change in further.changes} >= {"ttft_seconds", "tpot_seconds"}


def test_counted_profiles_can_be_compared_without_times(tmp_path: Path) -> None:
    a = save(tmp_path, "a.json", samples.config_only())
    found = compare(a, a)
    assert statuses(found)["tpot_seconds"] == "unknown" and statuses(found)["decode_flops_per_byte"] == "same"


def test_versions_that_differ_are_noted(tmp_path: Path) -> None:
    data = profiled(AFTER).to_dict()
    data["environment"]["versions"]["torch"] = "2.12.0"
    found = compare(save(tmp_path, "a.json", profiled(BEFORE)), save(tmp_path, "b.json", data))
    assert found.notes == ("torch 2.13.0+cpu on one side, 2.12.0 on the other",)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    plan = save(tmp_path, "plan.json", optimize_samples.plan())
    profile = save(tmp_path, "a.json", profiled(BEFORE))
    with pytest.raises(BadInputError, match=r"has schema 'effcli.plan/1'; compare takes 'effcli.profile/1' and"):
        compare(profile, plan)
    with pytest.raises(BadInputError, match="is one measurement .*; name a second report"):
        compare(profile)
    with pytest.raises(BadInputError, match="no report at"):
        compare(profile, tmp_path / "missing.json")
