"""One job in this process: what it leaves in the output, and how it says that it went wrong."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effcli import errors, pipeline
from effcli.batch import running
from effcli.batch.model import Job, Outcome
from effcli.batch.model_cache import ModelCache
from effcli.batch.running import begin, published, run_job
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError, GateFailedError, NoRoomError
from effcli.gates import METRICS
from effcli.reports.model import PROFILE_SCHEMA
from effcli.staging import UnusableWorkError, folder_for
from passes.base import PassDoesNotFitError, PassError
from profilers.base import DoesNotFitError, ProfilerError, SilentProgress

RECIPE = {
    "version": 1,
    "passes": [{"quantize": {"scheme": "w8a16", "method": "rtn"}}],
    "evaluation": {"tokens": 256, "context": 64},
}


@pytest.fixture(scope="module")
def models() -> ModelCache:
    return ModelCache()


def profile(model: object, **settings: Any) -> Job:
    return Job("tiny.kv", "profile", str(model), "tiny", "kv", settings={"only": ["kv"], "context": [64], **settings})


def run(job: Job, output: Path, models: ModelCache | None = None) -> Outcome:
    return run_job(job, str(output), SilentProgress(), models)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    return fail


def test_a_profile_is_the_report_that_effcli_profile_writes(
    tiny_folder: Path, tmp_path: Path, models: ModelCache
) -> None:
    outcome = run(profile(tiny_folder), tmp_path, models)
    assert (outcome.status, outcome.exit_code, outcome.retry) == ("passed", 0, False)
    folder = tmp_path / "tiny.kv"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.kv"]
    report = json.loads((folder / "report.json").read_text())
    assert report["schema"] == PROFILE_SCHEMA
    assert shlex.split(report["command"]) == [
        "effcli", "profile", str(tiny_folder), "--only", "kv", "--context", "64",
    ]  # fmt: skip
    assert outcome.report == "tiny.kv/report.json"
    assert outcome.report_sha256 == sha256_of(folder / "report.json")
    assert set(outcome.figures) == set(METRICS)
    assert outcome.figures["kv_bytes"] == report["profiles"]["kv"]["bytes_per_token"]
    assert outcome.figures["size"] == report["model"]["weight_bytes"]
    assert outcome.figures["ppl"] is None
    assert outcome.message
    assert "\n" not in outcome.message


def test_a_folder_that_is_there_is_replaced_when_the_new_one_is_whole(
    tiny_folder: Path, tmp_path: Path, models: ModelCache
) -> None:
    run(profile(tiny_folder), tmp_path, models)
    report = tmp_path / "tiny.kv" / "report.json"
    before = report.read_bytes()
    failed = run(profile(tiny_folder, context=[10**6]), tmp_path, models)
    assert (failed.status, failed.exit_code) == ("failed", 2)
    assert report.read_bytes() == before
    (tmp_path / "tiny.kv.failed.json").write_text("{}")
    assert run(profile(tiny_folder, context=[32]), tmp_path, models).status == "passed"
    assert json.loads(report.read_text())["profiles"]["kv"]["points"][0]["context"] == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.kv"]


def test_a_folder_of_somebody_else_is_left(tiny_folder: Path, tmp_path: Path, models: ModelCache) -> None:
    (tmp_path / "tiny.kv").mkdir()
    (tmp_path / "tiny.kv" / "thesis.tex").write_text("x")
    outcome = run(profile(tiny_folder), tmp_path, models)
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert (tmp_path / "tiny.kv" / "thesis.tex").read_text() == "x"


def test_what_a_killed_run_staged_is_no_leftover(tiny_folder: Path, tmp_path: Path, models: ModelCache) -> None:
    staged = folder_for(tmp_path / "tiny.kv")
    (staged / "out").mkdir(parents=True)
    (staged / "out" / "report.json").write_text("half of")
    assert run(profile(tiny_folder), tmp_path, models).status == "passed"
    assert not staged.exists()


def test_a_published_folder_tells_how_an_attempt_ended_that_could_not_say_so(
    tiny_folder: Path, tmp_path: Path, models: ModelCache
) -> None:
    job = profile(tiny_folder)
    assert published(job, str(tmp_path), 0.0) is None
    outcome = run(job, tmp_path, models)
    told = published(job, str(tmp_path), 0.0)
    assert told == replace(outcome, seconds=0.0, peak_memory_bytes=None)
    written = (tmp_path / "tiny.kv" / "report.json").stat().st_mtime
    assert published(job, str(tmp_path), written + 0.009) == told, "kernels date files by a tick that has passed"
    assert published(job, str(tmp_path), written + 1) is None


def test_an_attempt_begins_after_what_was_there_before_it(tiny_folder: Path, tmp_path: Path) -> None:
    job = profile(tiny_folder)
    report = tmp_path / "tiny.kv" / "report.json"
    report.parent.mkdir()
    for _ in range(3):
        report.write_text("{}")
        begun = begin(job, str(tmp_path))
        assert begun >= report.stat().st_mtime + 0.01
        assert published(job, str(tmp_path), begun) is None


@pytest.mark.parametrize(
    ("error", "code", "retry"),
    [
        (BadInputError("bad"), 2, False),
        (NoRoomError("full"), 4, True),
        (PassError("pass"), 2, False),
        (PassDoesNotFitError("large"), 4, True),
        (ProfilerError("no"), 2, False),
        (DoesNotFitError("large"), 4, True),
        (MemoryError("all"), 4, True),
        (OSError(errno.ENOSPC, "No space", "disk"), 4, True),
        (ZeroDivisionError("by\nzero"), 1, False),
    ],
)
def test_an_error_ends_as_it_does_on_the_command_line(
    error: Exception,
    code: int,
    retry: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(running.importlib, "import_module", raising(error))
    job = Job("job", "call", "", "", "", settings={"function": "a:b", "arguments": {}})
    outcome = run(job, tmp_path)
    line, expected = errors.explain(error)
    assert (outcome.status, outcome.exit_code, outcome.retry) == ("failed", code, retry)
    assert code == expected
    assert outcome.message == " ".join(line.split()).removeprefix("error: ")
    said = capfd.readouterr().err
    assert outcome.message in said
    assert ("Traceback" in said) == (code == 1)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_setting_of_the_other_kind_of_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    outcome = run(profile(tiny_folder, steps=4), tmp_path)
    assert outcome.message == (
        f"'steps' means nothing for a profile of the language model '{tiny_folder}'; leave it out, or exclude the pair"
    )
    outcome = run(profile("dit-tiny"), tmp_path)
    assert "'context' means nothing for a profile of the diffusion pipeline 'dit-tiny'" in outcome.message


@pytest.mark.slow
def test_a_pipeline_is_profiled_too(tmp_path: Path) -> None:
    job = Job("dit", "profile", "dit-tiny", "dit", "d", settings={"only": ["denoising"], "steps": 4, "batch": [2]})
    outcome = run(job, tmp_path)
    assert outcome.status == "passed", outcome.message
    report = json.loads((tmp_path / "dit" / "report.json").read_text())
    assert (report["steps"], report["batch"]) == (4, 2)
    assert outcome.figures["time"] == report["denoising"]["run_seconds"]["p50"]


def test_the_environment_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFCLI_TEST_A", "before")
    settings = {"function": "os:getenv", "arguments": {"key": "EFFCLI_TEST_A"}}
    variables = {"EFFCLI_TEST_A": "within", "EFFCLI_TEST_B": "new"}
    job = Job("env", "call", "", "", "", settings=settings, environment=variables)
    assert run(job, tmp_path).status == "passed"
    assert json.loads((tmp_path / "env" / "result.json").read_text()) == "within"
    assert os.environ["EFFCLI_TEST_A"] == "before"
    assert "EFFCLI_TEST_B" not in os.environ


def test_a_result_that_is_no_json_publishes_nothing(tmp_path: Path) -> None:
    settings = {"function": "math:sqrt", "arguments": {}}
    assert run(Job("bad", "call", "", "", "", settings=settings), tmp_path).exit_code == 1
    settings = {"function": "builtins:float", "arguments": {}}
    assert run(Job("ok", "call", "", "", "", settings=settings), tmp_path).status == "passed"
    settings = {"function": "tests.effcli.batch.test_running:nan", "arguments": {}}
    assert run(Job("nan", "call", "", "", "", settings=settings), tmp_path).status == "failed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ok"]


def nan() -> float:
    return float("nan")


def test_staged_work_is_gone_on_with_if_it_is_of_this_work_and_dropped_if_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[bool, bool]] = []

    def optimize(model: str, recipe: object, output: Path, *, resume: bool, force: bool, **options: Any) -> None:
        asked.append((resume, force))
        if resume:
            raise UnusableWorkError("cannot resume: recipe 'seed' was 0, is 1")
        raise NoRoomError("the disk is full")

    monkeypatch.setattr(pipeline, "optimize", optimize)
    outcome = run(Job("w8", "optimize", "m", "m", "w8", settings={"recipe": RECIPE}), tmp_path)
    assert asked == [(True, True), (False, True)]
    assert outcome.message == "the disk is full"
    assert "staged work is dropped: cannot resume: recipe 'seed' was 0, is 1" in capfd.readouterr().err


def test_a_gate_that_fails_is_told_even_without_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "optimize", raising(GateFailedError("gate 'size<=0.1x' failed")))
    outcome = run(Job("w8", "optimize", "m", "m", "w8", settings={"recipe": RECIPE}), tmp_path)
    assert (outcome.status, outcome.exit_code, outcome.report) == ("gate-failed", 3, None)


@pytest.mark.slow
@pytest.mark.thorough
def test_gates_that_fail_keep_the_work_for_gates_that_hold(tiny_folder: Path, tmp_path: Path) -> None:
    def job(gate: str) -> Job:
        settings = {"recipe": RECIPE | {"gates": [gate]}, "context": 32}
        return Job("tiny.w8", "optimize", str(tiny_folder), "tiny", "w8", settings=settings)

    failed = run(job("size<=0.1x"), tmp_path)
    assert (failed.status, failed.exit_code) == ("gate-failed", 3)
    assert failed.message.startswith("gate 'size<=0.1x' failed: ")
    assert failed.report == "tiny.w8.failed.json"
    assert failed.report_sha256 == sha256_of(tmp_path / "tiny.w8.failed.json")
    assert failed.figures["size"]
    assert failed.figures["kl"] is not None
    assert failed.peak_memory_bytes
    assert not (tmp_path / "tiny.w8").exists()

    passed = run(job("size<=0.9x"), tmp_path)
    assert passed.status == "passed", passed.message
    assert passed.seconds < failed.seconds / 2  # nothing was measured again
    assert passed.figures == failed.figures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.w8"]
    command = shlex.split(json.loads((tmp_path / "tiny.w8" / "report.json").read_text())["command"])
    assert command[:4] == ["effcli", "optimize", str(tiny_folder), "--pass"]
    assert command[-4:] == ["--context", "32", "--output", "tiny.w8"]
    assert command[command.index("--gate") :][:2] == ["--gate", "size<=0.9x"]
