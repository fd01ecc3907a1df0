"""Measuring processes: results, errors as they were raised, and that none outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from effcli.errors import NoRoomError, SourceError
from effcli.worker import Worker, WorkerError

BEFORE = {
    "device": "cpu", "dtype": "auto", "batch": 1, "context": 32, "seed": 0, "text_name": "text", "tasks": None,
    "command": "test", "profile": False, "allow_pickle": False, "trust_remote_code": False,
}  # fmt: skip


class Recorded:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Recorded]:
        self.events.append(("task", description))
        yield self
        self.events.append(("end", description))

    def advance(self, steps: float = 1.0) -> None:
        self.events.append(("advance", steps))

    def describe(self, text: str) -> None:
        self.events.append(("describe", text))


def source(folder: Path) -> dict[str, object]:
    return {"spec": str(folder), "kind": "folder", "path": str(folder), "revision": None, "notes": []}


def windows(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    save_file({"windows": torch.randint(0, 90, (4, 64))}, folder / "windows.safetensors")
    return folder


def test_a_job_runs_in_another_process_and_its_progress_is_relayed(tiny_folder: Path, tmp_path: Path) -> None:
    progress = Recorded()
    arguments = BEFORE | {"source": source(tiny_folder), "kept_in": str(windows(tmp_path))}
    with Worker() as worker:
        result = worker.run("before", arguments, tmp_path, progress)
    assert result["dtype"] == "float32"
    assert (result["profile"], result["quality_reason"]) == (None, None)
    assert set(result["seconds"]) == {"profile", "quality"}
    assert ("task", "Reference") in progress.events
    assert ("end", "Reference") in progress.events
    assert sum(event[1] for event in progress.events if event[0] == "advance") > 0
    assert (tmp_path / "reference" / "states.safetensors").is_file()


def test_an_error_comes_back_as_it_was_raised(tmp_path: Path) -> None:
    arguments = BEFORE | {"source": source(tmp_path / "gone"), "kept_in": str(tmp_path)}
    with Worker() as worker, pytest.raises(SourceError, match="gone"):
        worker.run("before", arguments, tmp_path)


def test_nan_weights_are_refused_before_they_are_measured(tiny_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = BEFORE | {"source": source(broken), "kept_in": str(windows(tmp_path))}
    with Worker() as worker, pytest.raises(SourceError, match=r"hold NaN .* in 'model.layers.1.mlp.up_proj.weight'"):
        worker.run("before", arguments, tmp_path)


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with Worker() as worker, pytest.raises(WorkerError, match=r"stopped with code 1: .*TypeError.* \(see .*before.log"):
        worker.run("before", {"unheard": 1}, tmp_path)
    assert "Traceback" in (tmp_path / "before.log").read_text()


def kill_the_job(worker: Worker) -> None:
    """Kill the process of the next job as soon as it is there."""
    while not (jobs := psutil.Process(worker._process.pid).children()):
        time.sleep(0.01)
    jobs[0].kill()


def test_a_job_that_the_system_kills_is_a_lack_of_memory_and_the_next_one_runs(
    tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = BEFORE | {"source": source(tiny_folder), "kept_in": str(windows(tmp_path))}
    with Worker() as worker:
        killer = threading.Thread(target=kill_the_job, args=(worker,))
        killer.start()
        with pytest.raises(NoRoomError, match="was killed, as systems do when memory runs out"):
            worker.run("before", arguments, tmp_path)
        killer.join()
        idle = psutil.Process(worker._process.pid).memory_info().rss
        assert worker.run("before", arguments, tmp_path)["dtype"] == "float32"
        assert abs(psutil.Process(worker._process.pid).memory_info().rss - idle) < 5e6  # it has loaded nothing itself


def test_a_worker_that_the_system_kills_is_a_lack_of_memory(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = BEFORE | {"source": source(tiny_folder), "kept_in": str(windows(tmp_path))}
    with Worker() as worker:
        threading.Timer(0.3, worker._process.kill).start()
        with pytest.raises(NoRoomError, match="was killed, as systems do when memory runs out"):
            worker.run("before", arguments, tmp_path)


def test_leaving_ends_a_worker_that_waits() -> None:
    with Worker() as worker:
        pid = worker._process.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("import_seconds", [0, 600])
def test_no_worker_outlives_its_parent(tmp_path: Path, import_seconds: int) -> None:
    """Not even one that still imports, as it does for long on a busy machine."""
    if import_seconds:
        (tmp_path / "transformers.py").write_text(
            f"import pathlib, time\npathlib.Path(__file__).with_name('begun').touch()\ntime.sleep({import_seconds})\n"
        )
    code = (
        f"import sys, time; sys.path.insert(0, {str(tmp_path)!r}); from effcli.worker import Worker; w = Worker(); "
        "print(w._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while import_seconds and not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline, "the worker does not start"
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)


def test_the_worker_imports_what_the_parent_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's that is called like one of ours must not get in the way."""
    (tmp_path / "profilers").mkdir()
    (tmp_path / "profilers" / "__init__.py").write_text("raise SystemExit('the wrong profilers')")
    monkeypatch.chdir(tmp_path)
    job = {**BEFORE, "source": source(tmp_path / "gone"), "kept_in": str(tmp_path)}
    with Worker() as worker, pytest.raises(SourceError, match="gone"):
        worker.run("before", job, tmp_path)
    assert json.loads((tmp_path / "before.job.json").read_text())["job"] == "before"
    assert os.getcwd() == str(tmp_path)
