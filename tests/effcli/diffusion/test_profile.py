"""``effcli profile`` on pipelines: what it measures, what it costs, what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from effcli.diffusion import profile as profiling
from effcli.diffusion.profile import Sampling, map_calls, profile_pipeline
from effcli.errors import BadInputError
from effcli.reports.pipeline_model import PIPELINE_PROFILE_SCHEMA
from passes.base import PassError
from passes.lemica.schedule import ErrorGraph
from profilers.peaks import Peaks, WorkingSetBandwidth
from tests.conftest import Run
from tests.passes.lemica import tiny_pipelines

SHORT = Sampling(steps=6, max_gap=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    tiny_pipelines.dit().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring a machine's ceilings takes seconds, and is tested where it belongs."""
    found = Peaks(
        device="a CPU",
        copy_bytes_per_second=1e10,
        read_bytes_per_second=1e10,
        memory_bytes_per_second=1e10,
        by_working_set=(WorkingSetBandwidth(1 << 16, 1e10),),
        flops_per_second={"float32": 1e11},
        op_overhead_seconds=1e-6,
        seconds_spent=0.0,
    )
    monkeypatch.setattr("profilers.peaks.measure_peaks", lambda *_: found)


@pytest.fixture
def no_map(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Note what an error map was asked for, and make none."""
    asked: list[dict[str, Any]] = []

    def build(pipeline: Any, samples: Any, **settings: Any) -> ErrorGraph:
        asked.append({"samples": samples, **settings})
        return ErrorGraph(steps=settings["steps"], max_gap=2, edges=((0, 2),), errors=((0.5,) * len(samples),))

    monkeypatch.setattr("passes.lemica.graph.build", build)
    return asked


def test_a_profile_has_every_part(saved: Path) -> None:
    report = profile_pipeline(saved, SHORT, device="cpu", command="effcli profile x")
    data = json.loads(report.to_json())
    assert (data["schema"], data["command"]) == (PIPELINE_PROFILE_SCHEMA, "effcli profile x")
    assert data["pipeline"]["architecture"] == "DiTPipeline"
    assert (data["steps"], data["batch"], data["arguments"]) == (6, 1, {})
    assert data["environment"]["peaks"]["flops_per_second"] == {"float32": 1e11}
    assert "diffusers" in data["environment"]["versions"]
    denoising = data["denoising"]
    assert (denoising["steps"], denoising["denoiser_calls"]) == (6, 6)
    assert 0 < denoising["blocks_share"] < 1 and 0 < denoising["denoiser_share"] < 1
    assert [item["name"] for item in denoising["components"]] == ["vae"]
    assert denoising["cost"]["bound"] in ("compute", "memory")
    graph = ErrorGraph.model_validate(data["error_map"])
    assert (graph.steps, graph.max_gap) == (6, 3)
    assert set(graph.edges) == {(i, j) for j in range(2, 6) for i in range(max(0, j - 3), j - 1)}
    assert data["error_map_reason"] is None


@pytest.mark.parametrize(("steps", "max_gap"), [(50, 8), (6, 3), (5, 4), (5, 100), (2, 2)])
def test_the_cost_of_a_map_is_known_before(steps: int, max_gap: int) -> None:
    edges = [(i, j) for j in range(steps) for i in range(j - 1) if j - i <= max_gap]
    assert map_calls(steps, max_gap) == steps + sum(steps - j for _, j in edges)


def test_the_published_cost_of_50_steps() -> None:
    assert round(map_calls(50, 8) / 50) == 146  # 145 of replays, and the run itself


def test_only_denoising(saved: Path, no_map: list[dict[str, Any]]) -> None:
    report = profile_pipeline(saved, SHORT, only=("denoising",), device="cpu")
    assert report.denoising is not None and report.error_map is None
    assert report.error_map_reason == "left out: --only denoising"
    assert not no_map


def test_only_the_error_map(saved: Path, no_map: list[dict[str, Any]]) -> None:
    report = profile_pipeline(saved, SHORT, only=("error-map",), device="cpu")
    assert report.denoising is None and report.error_map is not None
    assert len(no_map[0]["samples"]) == 1


def test_settings_reach_the_pipeline(
    saved: Path, no_map: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from passes.lemica import inputs

    asked: list[dict[str, Any]] = []
    genuine = inputs.generate

    def generate(pipeline: Any, samples: Any, **settings: Any) -> Any:
        asked.append({"samples": samples, **settings})
        return genuine(pipeline, samples, **settings)

    monkeypatch.setattr(inputs, "generate", generate)
    sampling = Sampling(steps=6, prompt="3", guidance=2.0, samples=3, max_gap=100, batch=2)
    report = profile_pipeline(saved, sampling, device="cpu", seed=7)

    assert (report.arguments, report.batch) == ({"guidance_scale": 2.0}, 2)
    assert Counter((item["steps"], str(item["arguments"])) for item in asked) == {
        (6, "{'guidance_scale': 2.0}"): len(asked)
    }
    assert {tuple((s.condition, s.seed) for s in item["samples"]) for item in asked} == {(("3", 7), ("3", 8))}
    assert [(s.condition, s.seed) for s in no_map[0]["samples"]] == [("3", 7), ("3", 8), ("3", 9)]
    assert (no_map[0]["steps"], no_map[0]["max_gap"]) == (6, 5)
    assert no_map[0]["arguments"] == {"guidance_scale": 2.0}


@pytest.mark.parametrize(("limit", "samples", "said"), [(1e6, 4, False), (1e-9, 1, True)])
def test_a_long_map_is_announced_and_kept_short(
    saved: Path,
    no_map: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    limit: float,
    samples: int,
    said: bool,
) -> None:
    monkeypatch.setattr(profiling, "FEW_MINUTES_SECONDS", limit)
    lines: list[str] = []
    report = profile_pipeline(saved, SHORT, device="cpu", on_warning=lines.append)
    assert len(no_map[0]["samples"]) == samples
    assert bool(lines) == said
    assert [line for line in report.warnings if "--only denoising" in line] == lines


def test_too_few_steps_leave_the_map_out_with_the_reason(saved: Path, no_map: list[dict[str, Any]]) -> None:
    report = profile_pipeline(saved, Sampling(steps=2), device="cpu")
    assert report.denoising is not None and report.error_map is None
    assert "nothing to skip" in str(report.error_map_reason)
    with pytest.raises(PassError, match="nothing to skip"):
        profile_pipeline(saved, Sampling(steps=2), only=("error-map",), device="cpu")


def test_the_pipeline_is_measured_without_a_trace_left(saved: Path, no_map: list[dict[str, Any]]) -> None:
    from effcli.diffusion.comparing import Bench
    from effcli.diffusion.opening import open_pipeline
    from passes.lemica.inputs import calibration_samples, generate
    from profilers.base import SilentProgress

    opened = open_pipeline(saved, device="cpu")
    samples = calibration_samples(opened.pipeline, 1)
    before = generate(opened.pipeline, samples, steps=4, arguments={}, output="pt")
    result = profiling.measure_denoising(
        opened, Bench(opened.pipeline, opened.target, samples, 4, {}), SilentProgress()
    )
    after = generate(opened.pipeline, samples, steps=4, arguments={}, output="pt")
    assert torch.equal(before, after)
    assert result.cost.attainable_seconds is not None
    assert all(not module._forward_hooks for module in opened.pipeline.transformer.modules())


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(steps=0), "--steps 0"),
        (Sampling(max_gap=1), "--max-gap 1"),
        (Sampling(samples=0), "--samples 0"),
        (Sampling(prompt=" "), "--prompt is empty"),
    ],
)
def test_settings_that_mean_nothing(saved: Path, sampling: Sampling, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        profile_pipeline(saved, sampling)


def test_a_setting_that_the_pipeline_does_not_take(saved: Path) -> None:
    with pytest.raises(PassError, match="height"):
        profile_pipeline(saved, Sampling(steps=6, height=64), device="cpu")


@pytest.mark.parametrize("only", [(), ("latency",)])
def test_parts_that_are_not_known(saved: Path, only: tuple[str, ...]) -> None:
    with pytest.raises(BadInputError, match="known: denoising, error-map"):
        profile_pipeline(saved, SHORT, only=only)


def test_the_python_api_says_which_function_is_for_pipelines(saved: Path) -> None:
    import effcli

    with pytest.raises(BadInputError, match="profile_pipeline"):
        effcli.profile(saved)
    assert effcli.profile_pipeline is profile_pipeline


def test_the_command_line(effcli: Run, saved: Path) -> None:
    done = effcli("profile", saved, "--steps", 6, "--only", "denoising", "--format", "json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["schema"], data["steps"]) == (PIPELINE_PROFILE_SCHEMA, 6)
    assert data["command"].endswith("--device cpu")
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{pipeline}", "--context", "512"], "--context is for language models"),
        (["{pipeline}", "--config-only"], "--config-only is for language models"),
        (["{pipeline}", "--batch", "1,2"], "must be one number"),
        (["{pipeline}", "--only", "latency"], "known: denoising, error-map"),
        (["{model}", "--steps", "50"], "is no diffusion pipeline"),
        (["{model}", "--max-gap", "4"], "leave --max-gap out"),
    ],
)
def test_options_of_the_other_kind_are_refused_in_one_line(
    saved: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    from effcli.cli.main import main

    named = [item.format(pipeline=saved, model=tiny_folder) for item in arguments]
    assert main(["profile", *named]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
