"""``effcli eval`` as a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run

SMALL = ("--tokens", "256", "--context", "64")


def test_json_on_stdout_is_the_report_and_nothing_else(effcli: Run, tiny_folder: Path) -> None:
    done = effcli("eval", tiny_folder, "--against", tiny_folder, *SMALL, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    assert data["schema"] == "effcli.eval/1"
    assert data["quality"]["kl"]["mean"] == 0 and data["quality"]["top1_agreement"] == 1
    assert data["quality"]["tokens"] == 4 * 63
    assert data["command"].startswith("effcli eval ")


def test_reports_go_to_files_and_render_again(effcli: Run, tiny_folder: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "quiz.jsonl"
    tasks.write_text(json.dumps({"context": "one two", "continuation": "three"}) + "\n")
    done = effcli("eval", tiny_folder, *SMALL, "--tasks", tasks, "-o", tmp_path / "r.json", "-o", tmp_path / "r.md")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Perplexity" in done.stdout and f"wrote {tmp_path / 'r.md'}" in done.stdout
    assert "quiz" in (tmp_path / "r.md").read_text()
    again = effcli("report", tmp_path / "r.json")
    assert again.returncode == 0 and "Perplexity" in again.stdout
    quiet = effcli("eval", tiny_folder, *SMALL, "--quiet", "-o", tmp_path / "q.json")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eval-text", "none.txt"), "no text file at 'none.txt'"),
        (("--tasks", "none.jsonl"), "no task file at 'none.jsonl'"),
        (("--context", "2048"), "2048 is past the model's limit of 1024"),
        (("--tokens", "5"), "greater than or equal to 256"),
        (("--dataset", "wikitext:wikitext-2-raw-v1:test"), "cannot read data set 'wikitext:wikitext-2-raw-v1:test'"),
        (("--output", "absent/r.json"), "output folder 'absent' does not exist"),
        (("--against", "no-such-model"), "no-such-model"),
    ],
)
def test_bad_input_is_one_line(effcli: Run, tiny_folder: Path, arguments: tuple[str, ...], message: str) -> None:
    done = effcli("eval", tiny_folder, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
