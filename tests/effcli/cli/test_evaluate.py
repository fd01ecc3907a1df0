"""``effcli eval``: once as a process, the rest in this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effcli.cli.main import main
from tests.conftest import Run

SMALL = ("--tokens", "256", "--context", "64")
Output = pytest.CaptureFixture[str]


def test_json_on_stdout_is_the_report_and_nothing_else(effcli: Run, tiny_folder: Path) -> None:
    done = effcli("eval", tiny_folder, "--against", tiny_folder, *SMALL, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    assert data["schema"] == "effcli.eval/1"
    assert data["quality"]["kl"]["mean"] == 0 and data["quality"]["top1_agreement"] == 1
    assert data["quality"]["tokens"] == 4 * 63
    assert data["command"].startswith("effcli eval ")


def test_an_unreachable_data_set_is_one_line(effcli: Run, tiny_folder: Path) -> None:
    pytest.importorskip("datasets")
    done = effcli("eval", tiny_folder, "--dataset", "wikitext:wikitext-2-raw-v1:test")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot read data set 'wikitext:wikitext-2-raw-v1:test'")
    assert done.stderr.count("\n") == 1


def test_reports_go_to_files_and_render_again(tiny_folder: Path, tmp_path: Path, capsys: Output) -> None:
    tasks, saved, page = (tmp_path / name for name in ("quiz.jsonl", "r.json", "r.md"))
    tasks.write_text(json.dumps({"context": "one two", "continuation": "three"}) + "\n")
    arguments = ["eval", str(tiny_folder), *SMALL, "--tasks", str(tasks)]
    assert main([*arguments, "-o", str(saved), "-o", str(page)]) == 0
    shown = capsys.readouterr()
    assert "Perplexity" in shown.out and f"wrote {page}" in shown.out and shown.err == ""
    assert "quiz" in page.read_text()
    assert main(["report", str(saved)]) == 0
    assert "Perplexity" in capsys.readouterr().out
    assert main([*arguments, "--quiet", "-o", str(saved)]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eval-text", "none.txt"), "no text file at 'none.txt'"),
        (("--tasks", "none.jsonl"), "no task file at 'none.jsonl'"),
        (("--context", "2048"), "2048 is past the model's limit of 1024"),
        (("--tokens", "5"), "greater than or equal to 256"),
        (("--output", "absent/r.json"), "output folder 'absent' does not exist"),
        (("--against", "./absent"), "absent"),
        (("--dtype", "int3"), "int3"),
    ],
)
def test_bad_input_is_one_line(tiny_folder: Path, capsys: Output, arguments: tuple[str, ...], message: str) -> None:
    assert main(["eval", str(tiny_folder), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and message in shown.err
