"""The files that a batch leaves, read back by what reads such files."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from effcli.batch import summary
from effcli.errors import BadInputError
from effcli.reports.model import plain, read_report

from . import states


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets.append(dict(attrs)["href"] or "")


def test_every_file_says_the_same(tmp_path: Path) -> None:
    report = states.report()
    assert summary.write(report, str(tmp_path)) == ("summary.jsonl", "summary.csv", "batch.json", "index.html")
    assert read_report(tmp_path / "batch.json") == plain(report)
    lines = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == plain(report.jobs)
    with (tmp_path / "summary.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [job.name for job in report.jobs]
    first = report.jobs[0]
    assert float(rows[0]["ppl"]) == first.figures["ppl"] and float(rows[0]["tpot"]) == first.figures["tpot"]
    assert rows[0]["kl"] == "" and rows[0]["accuracy"] == ""
    assert rows[2]["message"] == report.jobs[2].message
    page = Links()
    page.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    files = [target for target in page.targets if not target.startswith("#")]
    assert set(files) == {
        *("./smol.w4/report.html", "./smol.quick/report.html", "./smol.w3.failed.html"),
        *(f"./.effcli-batch/logs/{name}.log" for name in ("smol.w4", "smol.w3", "gone.w4")),
    }
    assert re.search(r"2 of 5 jobs passed, 1 failed a gate \(smol\.w3\)", (tmp_path / "index.html").read_text("utf-8"))


def test_files_are_replaced_whole_or_stay(tmp_path: Path) -> None:
    for name in ("summary.jsonl", "summary.csv", "batch.json", "index.html"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot hold nan"):
        summary.write(replace(states.report(), seconds_spent=float("nan")), str(tmp_path))
    assert {path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"old"}
    with pytest.raises(BadInputError, match="cannot write"):
        summary.write(states.report(), str(tmp_path / "gone"))


def test_a_job_that_was_never_run_took_no_measured_time() -> None:
    skipped = next(job for job in states.report().jobs if job.stage == "skipped")
    assert skipped.seconds is None and skipped.report is None and skipped.peak_memory_bytes is None


def test_the_report_is_valid_by_its_schema() -> None:
    import jsonschema

    from effcli.reports.schema import batch_schema

    checked = jsonschema.Draft202012Validator(batch_schema())
    for found in (states.report(), states.hostile()):
        checked.validate(found.to_dict())
    with pytest.raises(jsonschema.ValidationError):
        checked.validate({key: value for key, value in states.report().to_dict().items() if key != "exit_code"})
