"""The command line as users and scripts meet it: exit codes, one clear line, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from effcli import errors
from effcli.cli import output
from effcli.cli.main import main
from tests.conftest import Run


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(item) for item in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, effcli.cli.main as m; assert m.main(['--help']) == 0; "
        "print(sorted({'torch', 'transformers', 'pydantic', 'jinja2', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for command in ("profile", "report", "doctor", "models", "profilers"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["profle", "x"], "Did you mean 'profile'"),
        (["profile", "x", "--onyl", "kv"], "--only"),
        (["profile", "x", "--only", "sink"], "did you mean 'sinks'?"),
        (["profile", "x", "--only", ""], "known: "),
        (["profile", "x", "--context", "512,abc"], "'abc' is not a positive whole number"),
        (["profile", "x", "--context", "0"], "'0' is not a positive whole number"),
        (["profile", "x", "--batch", "-1"], "'-1' is not a positive whole number"),
        (["profile", "x", "--epsilon", "1.5"], "'1.5' is not a number from 0 up to 1"),
        (["profile", "x", "--epsilon", "nan"], "'nan' is not a number from 0 up to 1"),
        (["profile", "x", "--text", "no-such.txt"], "no text file at 'no-such.txt'"),
        (["profile", "x", "--format", "htlm"], "htlm"),
        (["profile", "x", "-o", "report.pdf"], "cannot tell the format of 'report.pdf'"),
        (["profile", "x", "-o", "no/such/folder/x.json"], "output folder 'no/such/folder' does not exist"),
        (["report", "no-such.json"], "no report at 'no-such.json'"),
        (["models", "--fetch", "smollm-135m"], "did you mean 'smollm2-135m'?"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (errors.EXIT_BAD_INPUT, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_text_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    code, _, err = run(capsys, "profile", "x", "--text", tmp_path / "empty.txt")
    assert code == errors.EXIT_BAD_INPUT
    assert "is empty" in err


def test_a_bug_says_so_and_hides_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_path: Path) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("effcli.reports.model.read_report", broken)
    monkeypatch.delenv("EFFCLI_DEBUG", raising=False)
    code, _, err = run(capsys, "report", "x.json")
    assert code == errors.EXIT_BUG
    assert err.startswith("bug: ZeroDivisionError: by design") and "Traceback" not in err
    monkeypatch.setenv("EFFCLI_DEBUG", "1")
    _, _, err = run(capsys, "report", "x.json")
    assert "Traceback" in err and "broken" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadInputError("x"), 2),
        (errors.NoRoomError("x"), 4),
        (MemoryError("x"), 4),
        (OSError(28, "No space left on device", "/f"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fails(_path: Path) -> None:
        raise error

    monkeypatch.setattr("effcli.reports.model.read_report", fails)
    assert run(capsys, "report", "x.json")[0] == code


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    target.write_text("before")

    def full_disk(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(errors.NoRoomError, match="no space left"):
        output.write_file(target, "after")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert target.read_text() == "before"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder_is_refused_before_measuring(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    code, _, err = run(capsys, "profile", "x", "-o", folder / "x.json")
    assert code == errors.EXIT_BAD_INPUT and "cannot write" in err


def test_a_read_only_file_system_is_refused_before_measuring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    code, _, err = run(capsys, "profile", "x", "-o", tmp_path / "x.json")
    assert code == errors.EXIT_BAD_INPUT and "Read-only file system" in err


def test_profilers_lists_what_only_takes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "profilers", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert set(rows) >= {"intensity", "sinks", "kv", "latency", "energy", "outliers"}
    assert rows["kv"]["config_only"] and not rows["sinks"]["config_only"]
    assert [name for name, row in rows.items() if not row["default"]] == ["redundancy"]
    _, out, _ = run(capsys, "profilers")
    assert re.search(r"redundancy .*if named", out) and re.search(r"kv .*by default", out)


def test_models_lists_the_built_in_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFCLI_CACHE", str(tmp_path))
    code, out, _ = run(capsys, "models", "--json")
    assert code == 0
    row, shipped = json.loads(out)
    assert row["name"] == "smollm2-135m" and row["licence"] == "Apache-2.0" and row["cached"] is False
    assert row["parameters"] == 134_515_008 and row["download_bytes"] == 92_871_040
    assert shipped["name"] == "dit-tiny" and shipped["cached"] and shipped["shipped"] and not row["shipped"]
    _, out, _ = run(capsys, "models")
    assert re.search(r"smollm2-135m .* no ", out) and re.search(r"dit-tiny .*shipped", out)


def test_fetching_what_is_shipped_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFCLI_CACHE", str(tmp_path))
    code, out, err = run(capsys, "models", "--fetch", "dit-tiny")
    assert (code, err) == (0, "dit-tiny is shipped with effcli: nothing to fetch\n")
    assert (Path(out.strip()) / "model_index.json").is_file()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "offers"),
    [("effcli prof", "profile"), ("effcli profile smol", "smollm2-135m"), ("effcli profile x --only si", "sinks")],
)
def test_shell_completion_offers_commands_models_and_profilers(effcli: Run, words: str, offers: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from effcli.cli.main import app; app(prog_name='effcli')"],
        capture_output=True,
        text=True,
        env=os.environ
        | {"_EFFCLI_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)},
    )
    assert offers in done.stdout.split()
