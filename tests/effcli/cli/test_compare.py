"""``effcli compare`` and ``effcli report`` on a checkpoint's folder, as processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.effcli.reports import optimize_samples
from tests.effcli.reports.optimize_samples import AFTER, BEFORE, profiled


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "before.json").write_text(profiled(BEFORE).to_json())
    (tmp_path / "after.json").write_text(profiled(AFTER).to_json())
    (tmp_path / "out" / "report.json").write_text(optimize_samples.optimized().to_json())
    return tmp_path


def test_compare_prints_the_verdict_and_the_table(effcli: Run, saved: Path) -> None:
    done = effcli("compare", "before.json", "out/report.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2.14× as fast" in done.stdout and "no gain outside noise" in done.stdout and "\x1b" not in done.stdout


def test_compare_writes_json_and_html(effcli: Run, saved: Path) -> None:
    done = effcli("compare", "before.json", "after.json", "-o", "c.json", "-o", "c.html")
    assert done.returncode == 0 and done.stdout.startswith("B is better in ")
    assert json.loads((saved / "c.json").read_text())["schema"] == "effcli.compare/1"
    assert 'id="changes"' in (saved / "c.html").read_text()
    again = effcli("report", "c.json")
    assert (again.returncode, again.stderr) == (0, "") and "A against B" in again.stdout


def test_compare_refuses_another_device_in_one_line(effcli: Run, saved: Path) -> None:
    data = json.loads((saved / "after.json").read_text())
    data["environment"]["device_name"] = "Example GPU"
    (saved / "after.json").write_text(json.dumps(data))
    done = effcli("compare", "before.json", "after.json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "Example CPU, 2 threads against Example GPU, 2 threads" in done.stderr and "--anyway" in done.stderr
    assert effcli("compare", "before.json", "after.json", "--anyway").returncode == 0


def test_report_takes_the_folder_of_a_checkpoint(effcli: Run, saved: Path) -> None:
    done = effcli("report", "out", "-o", "r.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Gained: ") and "wrote r.html" in done.stdout
    refused = effcli("report", ".")
    assert refused.returncode == 2 and "has no report.json" in refused.stderr
