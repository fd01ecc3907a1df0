"""``effcli profile`` and ``effcli report`` as processes: in a terminal, in a pipe, interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from tests.conftest import Run

SCHEMA = json.loads(
    (Path(__file__).resolve().parents[3] / "docs" / "schema" / "effcli.profile-1.schema.json").read_text()
)
ESCAPE = "\x1b["


@pytest.fixture(scope="module")
def saved(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profile the tiny model with every instrument, once, as a process in a pipe."""
    path = tmp_path_factory.mktemp("saved") / "p.json"
    done = subprocess.run(
        [sys.executable, "-m", "effcli", "profile", str(tiny_folder), "--sequences", "4", "--context", "32,64"]
        + ["--batch", "1,2", "--format", "json"],
        capture_output=True,
        text=True,
        cwd=path.parent,
    )
    assert done.returncode == 0
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr
    path.write_text(done.stdout)
    return path


def test_json_on_stdout_is_the_report_and_nothing_else(saved: Path, tiny_folder: Path) -> None:
    data = json.loads(saved.read_text())
    jsonschema.validate(data, SCHEMA)
    assert data["schema"] == "effcli.profile/1"
    assert data["model"]["source"] == str(tiny_folder)
    assert data["model"]["architecture"] == "LlamaForCausalLM"
    assert set(data["profiles"]) == {"intensity", "sinks", "kv", "latency", "energy", "outliers"}
    assert data["environment"]["peaks"]["copy_bytes_per_second"] > 0
    phases = {(point["phase"], point["batch"], point["context"]) for point in data["profiles"]["intensity"]["points"]}
    assert phases == {(phase, b, c) for phase in ("prefill", "decode") for b in (1, 2) for c in (32, 64)}
    assert data["profiles"]["energy"]["joules_per_token"] is not None or data["profiles"]["energy"]["reason"]


@pytest.mark.parametrize("suffix", ["html", "md", "txt", "json"])
def test_a_saved_report_renders_without_the_model(effcli: Run, saved: Path, tmp_path: Path, suffix: str) -> None:
    done = effcli("report", saved, "-o", tmp_path / f"r.{suffix}")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"wrote {tmp_path / f'r.{suffix}'}" in done.stdout
    text = (tmp_path / f"r.{suffix}").read_text()
    assert "LlamaForCausalLM" in text
    assert ESCAPE not in text


def test_quiet_writes_the_file_and_says_nothing(effcli: Run, saved: Path, tmp_path: Path) -> None:
    done = effcli("report", saved, "--quiet", "-o", tmp_path / "r.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "r.html").stat().st_size > 0


def test_a_pipe_gets_no_colour_and_no_bars(effcli: Run, saved: Path) -> None:
    done = effcli("report", saved)
    assert done.returncode == 0
    assert ESCAPE not in done.stdout and done.stderr == ""
    assert "decode" in done.stdout.lower()


def test_config_only_needs_no_weights(effcli: Run, tiny_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((tiny_folder / "config.json").read_bytes())
    done = effcli("profile", config, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    jsonschema.validate(data, SCHEMA)
    assert data["config_only"] is True
    assert set(data["profiles"]) == {"intensity", "kv"}
    assert "needs weights" in data["skipped"]["sinks"]
    refused = effcli("profile", config, "--only", "sinks")
    assert refused.returncode == 2 and "needs weights" in refused.stderr


def test_a_context_past_the_limit_is_refused_before_anything_runs(effcli: Run, tiny_folder: Path) -> None:
    done = effcli("profile", tiny_folder, "--context", "2048", "-o", "x.json")
    assert done.returncode == 2
    assert (
        done.stderr.count("\n") == 1
        and "2048" in done.stderr.replace(",", "")
        and "1024" in done.stderr.replace(",", "")
    )


def _in_terminal(arguments: list[str], until: str | None = None, folder: Path | None = None) -> tuple[int, str]:
    """Run effcli in a pseudo-terminal; interrupt it when ``until`` shows up. Return exit code and screen text."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "effcli", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=folder,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
        start_new_session=True,
    )
    os.close(follower)
    screen = ""
    interrupted = False
    deadline = time.monotonic() + 120
    with contextlib.suppress(OSError):  # the terminal closes when the process ends
        while time.monotonic() < deadline:
            if select.select([leader], [], [], 0.2)[0]:
                screen += os.read(leader, 65536).decode(errors="replace")
            if until is not None and not interrupted and until in screen:
                process.send_signal(signal.SIGINT)
                interrupted = True
    os.close(leader)
    return process.wait(timeout=60), screen


def test_a_terminal_gets_colour(saved: Path) -> None:
    code, screen = _in_terminal(["report", str(saved)])
    assert code == 0
    assert ESCAPE in screen


@pytest.mark.thorough
def test_ctrl_c_leaves_no_half_file(tiny_folder: Path, tmp_path: Path) -> None:
    code, screen = _in_terminal(
        ["profile", str(tiny_folder), "--only", "sinks", "--sequences", "1000000", "-o", "x.json"],
        until="Attention sinks",
        folder=tmp_path,
    )
    assert code == 130, screen
    assert "interrupted; nothing was written" in screen
    assert list(tmp_path.iterdir()) == []
