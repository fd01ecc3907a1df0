"""``effcli batch`` as a user meets it: a jobs file in, exit code, table, summary files; engines that tests hold."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from effcli.batch import engines
from effcli.batch.model import Outcome
from effcli.cli import batch
from effcli.cli.main import main
from tests.conftest import Run
from tests.effcli.batch.fake_engine import Act, FakeEngine

JOBS = """
version: 1
output: runs
models: {{tiny: {source}, other: {source}}}
profiles: {{quick: {{only: [kv], context: [32], batch: [1]}}, again: {{only: [kv], context: [64], batch: [1]}}}}
jobs:
  - {{name: last, model: tiny, profile: quick, after: [other.again]}}
"""
MISSED = Outcome("gate-failed", "gate 'ppl<=+1%' failed: too much. The rest is here", exit_code=3, seconds=4.0)
BROKEN = Outcome("failed", "it broke; mend it", exit_code=2, seconds=1.0)

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}

Batch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Batch:
    """Run a batch of five jobs whose ends the test chooses."""
    monkeypatch.chdir(tmp_path)
    Path("jobs.yaml").write_text(JOBS.format(source=tiny_folder), encoding="utf-8")

    def run(*arguments: str, **acts: Act) -> tuple[int, str, str]:
        engine = FakeEngine({name.replace("_", "."): [act] for name, act in acts.items()})
        monkeypatch.setattr(engines, "engine_for", lambda *given: engine)
        capsys.readouterr()
        code = main(["batch", "jobs.yaml", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_all_pass(run: Batch) -> None:
    code, out, err = run()
    assert code == 0
    assert "5 of 5 jobs passed." in out and "wrote " in out and "error:" not in err
    lines = err.splitlines()
    assert sum(" running " in line for line in lines) == 5 and sum(" passed " in line for line in lines) == 5
    assert not any("half of it" in line for line in lines)  # no progress in a pipe
    assert "[5/5] passed" in lines[-1]
    names = [json.loads(line)["name"] for line in Path("runs/summary.jsonl").read_text("utf-8").splitlines()]
    assert names == ["tiny.quick", "tiny.again", "other.quick", "other.again", "last"]
    with Path("runs/summary.csv").open(encoding="utf-8", newline="") as stream:
        assert [row["stage"] for row in csv.DictReader(stream)] == ["passed"] * 5
    assert json.loads(Path("runs/batch.json").read_text("utf-8"))["exit_code"] == 0
    assert main(["report", "runs/batch.json", "-o", "page.md"]) == 0
    assert "5 of 5 jobs passed" in Path("page.md").read_text("utf-8")


def test_a_second_run_keeps_what_passed(run: Batch) -> None:
    assert run(tiny_quick=BROKEN)[0] == 1
    code, out, err = run()
    assert code == 0 and "Kept from an earlier run, as nothing that they depend on has changed: 4." in out
    assert " running tiny.quick" in err and " kept tiny.again" in err and " running tiny.again" not in err


def test_a_gate_that_failed_is_exit_code_3(run: Batch) -> None:
    code, out, err = run(tiny_quick=MISSED)
    assert code == 3
    assert err.splitlines()[-1] == "error: 1 of 5 jobs failed a gate: tiny.quick"
    assert "4 of 5 jobs passed, 1 failed a gate (tiny.quick)." in out
    out = " ".join(out.split())
    assert "too much" in out and "The rest is here" not in out


def test_a_job_that_failed_is_exit_code_1_and_the_others_go_on(run: Batch) -> None:
    code, out, err = run(tiny_quick=MISSED, tiny_again=BROKEN, other_again=BROKEN)
    assert code == 1
    assert err.splitlines()[-2:] == [
        "error: 1 of 5 jobs failed a gate: tiny.quick",
        "error: 2 of 5 jobs failed: tiny.again, other.again",
    ]
    assert "1 of 5 jobs passed" in out and "1 skipped (last)" in out


def test_quiet_says_only_what_failed(run: Batch) -> None:
    assert run("--quiet") == (0, "", "")
    assert run("--quiet", "-o", "elsewhere", tiny_quick=BROKEN) == (1, "", "error: 1 of 5 jobs failed: tiny.quick\n")
    assert Path("elsewhere/index.html").is_file()


def test_only_takes_what_is_needed_along(run: Batch) -> None:
    code, out, err = run("--only", "last", "--only", "tiny.q*")
    assert code == 0 and "3 of 3 jobs passed." in out
    assert " passed other.again" in err and "tiny.again" not in err
    code, _, err = run("--only", "tiny.quik")
    assert code == 2 and "did you mean 'tiny.quick'?" in err and len(err.splitlines()) == 1


def test_a_long_batch_ends_with_a_table_of_what_did_not_pass(run: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MOST_ROWS", 4)
    _, out, _ = run(other_again=BROKEN)
    table = out.partition("jobs passed")[0]
    assert "other.again" in table and "last" in table and "tiny" not in table


def test_a_dry_run_writes_nothing(run: Batch) -> None:
    code, out, err = run("--dry-run")
    assert code == 0 and err == "" and len(out.splitlines()) == 6 and out.startswith("tiny.quick: runs (new)")
    assert not Path("runs").exists()


def test_prometheus_has_the_end_of_it(run: Batch) -> None:
    run("--prometheus", "batch.prom", tiny_quick=BROKEN)
    text = Path("batch.prom").read_text("utf-8")
    assert 'effcli_batch_jobs{stage="failed"} 1' in text and 'effcli_batch_jobs{stage="passed"} 4' in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such.yaml"], "no jobs file at 'no-such.yaml'"),
        (["typo.yaml"], "'typo.yaml', line 5, column 1: 'profilles' is an unknown key (did you mean 'profiles'?)"),
        (["jobs.yaml", "--address", "auto"], "--address 'auto' is for --engine ray"),
        (["jobs.yaml", "--engine", "rya"], "rya"),
        (["jobs.yaml", "--workers", "0"], "--workers"),
        (["jobs.yaml", "--set", "A"], "--set 'A' is not NAME=VALUE"),
        (["jobs.yaml", "--set", "=A"], "--set '=A' is not NAME=VALUE"),
        (["jobs.yaml", "--prometheus", "no/such/batch.prom"], "output folder 'no/such' does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Batch, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("jobs.yaml").read_text("utf-8")
    Path("typo.yaml").write_text(text.replace("profiles:", "profilles:"), encoding="utf-8")
    assert main(["batch", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and says in captured.err
    assert not Path("runs").exists()


def test_a_reader_that_leaves_stops_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(JOBS.format(source=tiny_folder), encoding="utf-8")
    code = (
        "import sys; from effcli.batch import engines; from effcli.cli import main; "
        "from tests.effcli.batch.fake_engine import FakeEngine; "
        "from tests.effcli.cli.test_batch import MISSED; "
        "engines.engine_for = lambda *given: FakeEngine({'last': [MISSED]}); "
        "sys.exit(main.main(['batch', 'jobs.yaml']))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=write, cwd=tmp_path, env=ENVIRONMENT)
    os.close(write)
    assert done.returncode == 3
    assert len((tmp_path / "runs" / "summary.jsonl").read_text("utf-8").splitlines()) == 5


@pytest.mark.slow
def test_a_real_batch_with_a_job_of_each_kind(effcli: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(
        f"""
        version: 1
        output: runs
        models: {{tiny: {tiny_folder}, gone: ./gone}}
        profiles: {{quick: {{only: [kv], context: [32], batch: [1]}}}}
        recipes:
          w8:
            passes: [{{quantize: {{scheme: w8a16, group_size: 16}}}}]
            evaluation: {{tokens: 256, context: 64}}
            context: 32
            gates: ["size<=0.01x"]
        exclude: [{{model: gone, recipe: w8}}]
        """,
        encoding="utf-8",
    )
    done = effcli("batch", "jobs.yaml")
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "error: 1 of 3 jobs failed a gate: tiny.w8",
        "error: 1 of 3 jobs failed: gone.quick",
    ]
    assert "1 of 3 jobs passed, 1 failed a gate (tiny.w8), 1 failed (gone.quick)." in done.stdout
    runs = tmp_path / "runs"
    assert (runs / "tiny.quick" / "report.html").is_file() and (runs / "tiny.w8.failed.html").is_file()
    page = (runs / "index.html").read_text(encoding="utf-8")
    for target in ("./tiny.quick/report.html", "./tiny.w8.failed.html", "./.effcli-batch/logs/tiny.w8.log"):
        assert f'href="{target}"' in page and (runs / target).is_file()
    jobs = {job["name"]: job for job in json.loads((runs / "batch.json").read_text(encoding="utf-8"))["jobs"]}
    assert [jobs[name]["exit_code"] for name in ("tiny.quick", "tiny.w8", "gone.quick")] == [0, 3, 2]
    assert jobs["tiny.w8"]["figures"]["size"] > 0 and jobs["gone.quick"]["log"] is None
