"""What goes wrong while a model is optimized, as real processes: the target is untouched and the way on is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from effcli.staging import folder_for
from tests.conftest import Run, save_tiny
from tests.effcli.test_staging import mounted

PASS = ("--pass", "quantize:scheme=w4a16,group_size=16,method=rtn", "--context", 32, "--eval-tokens", 512)


def start(model: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "effcli", "optimize", model, *PASS, "-o", out, *more]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )


def stages(out: Path) -> list[str]:
    try:
        return list(json.loads((folder_for(out) / "state.json").read_text())["stages"])
    except (OSError, ValueError):
        return []


def stop_when(process: subprocess.Popen[str], ready: Callable[[], bool], how: signal.Signals = signal.SIGKILL) -> str:
    """Send a signal as soon as ``ready`` says so; return what the process said."""
    while not ready():
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        time.sleep(0.002)
    process.send_signal(how)
    return process.communicate(timeout=120)[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture(scope="module")
def staged(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill -9 in every stage, going on with --resume each time; return the staging of the last."""
    out = tmp_path_factory.mktemp("killed") / "out"
    folder = folder_for(out)
    stop_when(start(model, out), lambda: (folder / "before" / "reference").exists() or (folder / "before").exists())
    assert stages(out) == []
    stop_when(start(model, out), lambda: "plan" in stages(out))  # what finished nothing needs no --resume
    assert stages(out)[:2] == ["before", "plan"]
    before = json.loads((folder / "state.json").read_text())["stages"]["before"]
    stop_when(start(model, out, "--resume"), lambda: (folder / "after" / "after.job.json").exists())
    state = json.loads((folder / "state.json").read_text())
    assert list(state["stages"]) == ["before", "plan", "pass-1"]
    assert state["stages"]["before"] == before  # not measured again
    assert not out.exists()
    return folder


@pytest.fixture
def killed(staged: Path, tmp_path: Path) -> Path:
    """Return an output whose run was killed while it measured the result."""
    shutil.copytree(staged, tmp_path / staged.name)
    return tmp_path / "out"


@pytest.mark.slow
def test_a_run_killed_in_every_stage_is_finished_by_resume(effcli: Run, model: Path, killed: Path) -> None:
    done = effcli("optimize", model, *PASS, "-o", killed, "--resume")
    assert done.returncode == 0, done.stderr
    report = json.loads((killed / "report.json").read_text())
    assert report["status"] == "passed"
    assert not folder_for(killed).exists()
    names = {stage["stage"] for stage in report["stages"]}
    assert {"before", "pass: quantize", "after"} <= names  # what earlier runs spent is counted


@pytest.mark.slow
@pytest.mark.thorough
def test_unfinished_work_needs_a_decision(effcli: Run, model: Path, killed: Path) -> None:
    done = effcli("optimize", model, *PASS, "-o", killed)
    assert done.returncode == 2
    assert "(finished: before, plan, pass-1)" in done.stderr
    assert "--resume" in done.stderr
    assert "--force" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_corrupted_staged_file_is_named(effcli: Run, model: Path, killed: Path) -> None:
    weights = folder_for(killed) / "pass-1" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    done = effcli("optimize", model, *PASS, "-o", killed, "--resume")
    assert done.returncode == 2
    assert f"staged file '{weights}' is damaged" in done.stderr
    assert f"remove the folder '{weights.parent}' and run again with --resume" in done.stderr
    assert not killed.exists()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_source_or_recipe_that_changed_is_not_resumed(effcli: Run, model: Path, killed: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    done = effcli("optimize", other, *PASS, "-o", killed, "--resume")
    assert done.returncode == 2
    assert "cannot resume" in done.stderr
    assert "source file 'model.safetensors' changed" in done.stderr
    done = effcli("optimize", model, *PASS, "--seed", 1, "-o", killed, "--resume")
    assert done.returncode == 2
    assert "recipe 'seed' was 0, is 1" in done.stderr


@pytest.mark.slow
@pytest.mark.thorough
def test_a_failing_gate_publishes_nothing_and_a_looser_one_resumes(effcli: Run, model: Path, killed: Path) -> None:
    done = effcli("optimize", model, *PASS, "-o", killed, "--resume", "--gate", "size<=0.1x", "--gate", "kl<=1")
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
    assert "gate 'size<=0.1x' failed: size of the weights is 0.42" in line
    assert not killed.exists()
    kept = killed.with_name("out.failed.json")
    assert str(kept) in line
    report = json.loads(kept.read_text())
    assert report["status"] == "gate failed"
    assert [gate["passed"] for gate in report["gates"]] == [False, True]
    assert killed.with_name("out.failed.html").is_file()
    assert "after" in stages(killed)
    started = time.monotonic()
    done = effcli("optimize", model, *PASS, "-o", killed, "--resume", "--gate", "size<=0.5x")
    assert done.returncode == 0, done.stderr
    assert json.loads((killed / "report.json").read_text())["after"]["created"] == report["after"]["created"]
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_finished(model: Path, killed: Path) -> None:
    folder = folder_for(killed)
    (folder / "after" / "after.job.json").unlink(missing_ok=True)
    process = start(model, killed, "--resume")
    said = stop_when(process, lambda: (folder / "after" / "after.job.json").exists(), signal.SIGINT)
    assert process.returncode == 130
    (line,) = [line for line in said.splitlines() if not line.startswith("warning")]
    assert "interrupted; finished stages are kept in" in line
    assert "--resume" in line
    assert stages(killed) == ["before", "plan", "pass-1"]
    assert not killed.exists()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_disk_that_fills_up_is_no_loss(effcli: Run, model: Path, staged: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=72m") as small:
        out = small / "out"
        shutil.copytree(staged, folder_for(out))
        shutil.rmtree(folder_for(out) / "pass-1")  # to be done again
        filler = small / "filler"

        def fill() -> None:
            while "pass-1" in stages(out):  # until the run has taken it back
                time.sleep(0.002)
            with filler.open("wb", buffering=0) as opened:
                try:
                    while True:
                        opened.write(bytes(1 << 16))
                except OSError:
                    return

        thread = threading.Thread(target=fill)
        thread.start()
        done = effcli("optimize", model, *PASS, "-o", out, "--resume")
        thread.join()
        assert done.returncode == 4, done.stderr
        assert "full" in done.stderr
        assert "--resume" in done.stderr
        assert not out.exists()
        filler.unlink()
        done = effcli("optimize", model, *PASS, "-o", out, "--resume")
        assert done.returncode == 0, done.stderr
        assert (out / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.thorough
def test_weights_that_hold_nan_are_named(effcli: Run, model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = effcli("optimize", broken, *PASS, "-o", "out")
    assert done.returncode == 2
    assert "hold NaN or infinity in 'model.layers.0.mlp.up_proj.weight'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.thorough
def test_a_model_with_nothing_to_quantize_is_refused(effcli: Run, tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "gpt2")  # its layers are Conv1D
    done = effcli("optimize", model, *PASS, "-o", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_a_text_that_is_too_short_is_refused(effcli: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hello")
    done = effcli("optimize", model, *PASS, "-o", "out", "--calibration-text", "short.txt")
    assert done.returncode == 2
    assert "the calibration text has 5 tokens" in done.stderr


@pytest.mark.thorough
def test_an_output_that_cannot_be_is_refused(effcli: Run, model: Path, tmp_path: Path) -> None:
    for out, said in ((model / "out", "is inside the source"), (model, "is inside the source")):
        done = effcli("optimize", model, *PASS, "-o", out)
        assert done.returncode == 2
        assert said in done.stderr
    with mounted(tmp_path / "closed", "ro,size=64k") as closed:
        done = effcli("optimize", model, *PASS, "-o", closed / "out")
        assert done.returncode == 2
        assert "cannot be written" in done.stderr
