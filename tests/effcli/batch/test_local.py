"""Real worker processes: what they keep, what they print, how they end; and which jobs run beside which."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from effcli.batch import local
from effcli.batch.local import LocalEngine
from effcli.batch.machine import Gpu, Machine
from effcli.batch.model import Event, Job, Limits, Outcome
from effcli.errors import BadInputError

FUNCTIONS = "tests.effcli.batch.job_functions"
GB = 10**9
PATIENCE_SECONDS = 400.0
CPU = Machine(cores=8, total_bytes=32 * GB, free_bytes=10 * GB)
TWO_GPUS = replace(
    CPU, gpus=(Gpu(0, "GPU-a", "NVIDIA X", 80 * GB, 70 * GB), Gpu(1, "GPU-b", "NVIDIA X", 80 * GB, 70 * GB))
)
STUB = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)["job"]
    print(json.dumps({"event": "started", "time": 1.0}), flush=True)
    time.sleep(job["settings"].get("seconds", 0.0))
    said = json.dumps([job["device"], *(os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))])
    outcome = {"status": "passed", "message": said}
    print(json.dumps({"event": "finished", "time": 2.0, "outcome": outcome, "model_loads": 0}), flush=True)
"""


def call(name: str, function: str, *, environment: dict[str, str] | None = None, **arguments: object) -> Job:
    settings = {"function": f"{FUNCTIONS}:{function}", "arguments": arguments}
    return Job(name, "call", "", "", function, settings=settings, environment=environment or {})


def profile(name: str, model: object, *, memory: float | None = 0.0, device: str = "cpu", **settings: Any) -> Job:
    limits = Limits(memory_bytes=None if memory is None else int(memory * GB))
    return Job(name, "profile", str(model), "m", name, settings=settings, device=device, limits=limits)


def until_end(engine: LocalEngine, job: str) -> list[Event]:
    """Return the events of a job up to its last one."""
    found: list[Event] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(event.kind in ("finished", "lost") for event in found):
        assert time.monotonic() < deadline, f"{job} does not end: {found}"
        found += [event for event in engine.events(1.0) if event.job == job]
    return found


def run(engine: LocalEngine, job: Job, output: Path) -> Outcome:
    assert engine.offer(job, str(output), str(output / f"{job.name}.log"), 1)
    outcome = until_end(engine, job.name)[-1].outcome
    assert outcome is not None
    return outcome


def result(output: Path, name: str) -> Any:
    return json.loads((output / name / "result.json").read_text())


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    with LocalEngine(workers=1, threads=1) as started:
        yield started


def test_one_process_runs_the_jobs_and_loads_their_model_once(
    engine: LocalEngine, tiny_folder: Path, tmp_path: Path
) -> None:
    names = ("first", "second")
    ended = [
        run(engine, profile(name, tiny_folder, memory=None, only=["kv"], context=[64]), tmp_path) for name in names
    ]
    assert [outcome.status for outcome in ended] == ["passed", "passed"]
    assert engine._slots[0].loads == 1
    assert (ended[0].peak_memory_bytes or 0) > 100e6
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in names]
    assert reports[0]["environment"]["peaks"] == reports[1]["environment"]["peaks"]  # measured once
    for name, report in zip(names, reports, strict=True):
        assert report["profiles"]["kv"]["points"][0]["context"] == 64
        assert (tmp_path / name / "report.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "first.log", "second", "second.log"]


def test_the_log_has_what_the_job_printed_and_nothing_of_other_jobs(engine: LocalEngine, tmp_path: Path) -> None:
    assert run(engine, call("loud", "speak"), tmp_path).status == "passed"
    assert run(engine, call("quiet", "wait", seconds=0), tmp_path).status == "passed"
    log = (tmp_path / "loud.log").read_text().splitlines()
    assert log[0].startswith("--- loud, attempt 1, ")
    said = ("said by Python", "said to stderr", "said by printf", "said by write", "said by a child")
    assert set(said) <= set(log)
    assert "said" not in (tmp_path / "quiet.log").read_text()


def test_a_job_has_its_variables_and_the_next_one_has_not(engine: LocalEngine, tmp_path: Path) -> None:
    run(engine, call("with", "variable", environment={"EFFCLI_TEST_ZONE": "north"}, key="EFFCLI_TEST_ZONE"), tmp_path)
    run(engine, call("without", "variable", key="EFFCLI_TEST_ZONE"), tmp_path)
    assert (result(tmp_path, "with"), result(tmp_path, "without")) == ("north", None)


def test_a_model_that_fails_to_load_fails_its_job_alone(engine: LocalEngine, tiny_folder: Path, tmp_path: Path) -> None:
    gone = run(engine, profile("gone", tmp_path / "gone", only=["kv"]), tmp_path)
    assert (gone.status, gone.exit_code, gone.retry) == ("failed", 2, False)
    assert gone.message.startswith("no file or folder")
    assert gone.message in (tmp_path / "gone.log").read_text()
    assert run(engine, call("next", "wait", seconds=0), tmp_path).status == "passed"


def test_a_job_without_a_log_says_so(engine: LocalEngine, tmp_path: Path) -> None:
    assert engine.offer(call("mute", "wait", seconds=0), str(tmp_path), str(tmp_path / "no" / "log"), 1)
    outcome = until_end(engine, "mute")[-1].outcome
    assert outcome is not None
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert "no/log' cannot be written" in outcome.message


def test_a_job_that_runs_out_of_memory_may_be_tried_again_in_a_new_process(engine: LocalEngine, tmp_path: Path) -> None:
    before = run(engine, call("before", "speak"), tmp_path)
    outcome = run(engine, call("large", "fill_memory"), tmp_path)
    assert before.status == "passed"
    assert (outcome.status, outcome.exit_code, outcome.retry) == ("failed", 4, True)
    assert outcome.message.startswith("out of memory")
    assert run(engine, call("after", "speak"), tmp_path).status == "passed"
    assert result(tmp_path, "after") != result(tmp_path, "before")


@pytest.mark.parametrize(
    ("how", "reason"),
    [(signal.SIGKILL, "was killed (signal 9), as systems do when memory"), (signal.SIGSEGV, "signal 11 (SIGSEGV)")],
)
def test_a_worker_that_dies_is_lost_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals, reason: str
) -> None:
    monkeypatch.setattr(local, "WORKER", (sys.executable, "-c", STUB))
    with LocalEngine(workers=1, threads=1, machine=CPU) as engine:
        assert engine.offer(profile("slow", "m", seconds=60), str(tmp_path), "log", 1)
        process = engine._slots[0].process
        assert process is not None
        process.send_signal(how)
        lost = until_end(engine, "slow")[-1]
        assert (lost.kind, reason in (lost.reason or "")) == ("lost", True), lost
        assert run(engine, profile("next", "m"), tmp_path).status == "passed"
        assert engine._slots[0].process is not process


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WORKER", (sys.executable, "-c", "raise SystemExit('torch is broken')"))
    with LocalEngine(workers=1, machine=CPU) as engine:
        assert engine.offer(profile("job", "m"), str(tmp_path), "log", 1)
        assert until_end(engine, "job")[-1].reason == "its worker ended with code 1: torch is broken"


def test_a_stopped_job_sends_no_more_and_its_worker_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "WORKER", (sys.executable, "-c", STUB))
    with LocalEngine(workers=1, machine=CPU) as engine:
        assert engine.offer(profile("slow", "m", seconds=60), str(tmp_path), "log", 1)
        process = engine._slots[0].process
        assert process is not None
        engine.stop("slow")
        assert process.poll() == -signal.SIGKILL
        assert engine.events(0.1) == []
        assert engine.offer(profile("next", "m"), str(tmp_path), "log", 1)


def test_nothing_outlives_a_driver_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import time; from effcli.batch.local import LocalEngine\n"
        "from tests.effcli.batch.test_local import call\n"
        "with LocalEngine(workers=1, threads=1) as engine:\n"
        f"    assert engine.offer(call('w', 'wait_with_child', pids={str(pids)!r}), {str(tmp_path)!r}, "
        f"{str(tmp_path / 'log')!r}, 1)\n"
        "    while True: engine.events(1.0)\n"
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    with subprocess.Popen([sys.executable, "-c", code]) as driver:
        while driver.poll() is None and not pids.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        driver.kill()
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in started):
        assert time.monotonic() < deadline, "a process is still there"
        time.sleep(0.05)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers that do nothing take the place of real ones."""
    monkeypatch.setattr(local, "WORKER", (sys.executable, "-c", STUB))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.usefixtures("stub")
def test_jobs_that_do_not_fit_together_do_not_run_together(tmp_path: Path) -> None:
    with LocalEngine(workers=3, machine=CPU) as engine:

        def offer(name: str, memory: float) -> bool:
            return engine.offer(profile(name, name, memory=memory, seconds=0.3), str(tmp_path), "log", 1)

        assert offer("six", 6)
        assert not offer("five", 5)
        assert offer("four", 4)
        assert not offer("none", 0.1)
        until_end(engine, "six")
        assert offer("none", 0.1)
        assert offer("five", 5)


@pytest.mark.usefixtures("stub")
def test_a_job_larger_than_what_is_free_runs_alone_and_one_larger_than_the_machine_not_at_all(tmp_path: Path) -> None:
    large = profile("large", "m", memory=20, seconds=0.3)
    with LocalEngine(workers=2, machine=CPU) as engine:
        assert engine.cannot_run(large) is None
        assert engine.placement(large) == "cpu, 20.0 GB (limits.memory); more than is free, so it runs alone"
        assert engine.offer(profile("small", "m", memory=1, seconds=0.3), str(tmp_path), "log", 1)
        assert not engine.offer(large, str(tmp_path), "log", 1)
        until_end(engine, "small")
        assert engine.offer(large, str(tmp_path), "log", 1)
        assert not engine.offer(profile("small", "m", memory=1), str(tmp_path), "log", 1)
        said = engine.cannot_run(profile("huge", "m", memory=33))
        assert said is not None
        assert "'huge' takes about 33.0 GB (limits.memory) and this machine has 32.0 GB" in said


@pytest.mark.usefixtures("stub")
def test_a_job_of_unknown_size_runs_alone(tmp_path: Path) -> None:
    unknown = profile("unknown", "org/not-fetched", memory=None, seconds=0.3)
    with LocalEngine(workers=2, machine=CPU) as engine:
        assert "alone: its memory is not known" in engine.placement(unknown)
        assert engine.offer(unknown, str(tmp_path), "log", 1)
        assert not engine.offer(profile("small", "m", memory=1), str(tmp_path), "log", 1)


@pytest.mark.usefixtures("stub")
def test_a_job_goes_to_the_worker_that_has_its_model(tmp_path: Path) -> None:
    with LocalEngine(workers=2, machine=CPU) as engine:
        for name, model in (("a1", "a"), ("b1", "b")):
            assert engine.offer(profile(name, model, seconds=0.2), str(tmp_path), "log", 1)
        seen: list[Event] = []
        while sum(event.kind == "finished" for event in seen) < 2:
            seen += engine.events(5.0)
        where = {event.job: event.worker for event in seen}
        for name, model in (("b2", "b"), ("a2", "a")):
            assert engine.offer(profile(name, model), str(tmp_path), "log", 1)
            assert until_end(engine, name)[-1].worker == where[f"{model}1"]


@pytest.mark.usefixtures("stub")
def test_an_idle_model_makes_room(tmp_path: Path) -> None:
    with LocalEngine(workers=2, machine=CPU) as engine:
        run(engine, profile("kept", "a", memory=6), tmp_path)
        holder = engine._slots[0].process
        assert holder is not None
        run(engine, profile("small", "b", memory=1), tmp_path)
        assert holder.poll() is None
        run(engine, profile("large", "b", memory=9), tmp_path)
        assert holder.poll() == -signal.SIGKILL


@pytest.mark.usefixtures("stub")
def test_a_worker_a_gpu_sees_that_gpu_alone(tmp_path: Path) -> None:
    with LocalEngine(machine=TWO_GPUS) as engine:
        assert len(engine.workers()) == 2
        assert engine.workers()[1] == "local 1: NVIDIA X, cuda:1, 70.0 GB of 80.0 GB free"
        told = json.loads(run(engine, profile("second", "m", device="cuda:1", memory=1), tmp_path).message)
        assert told == ["cuda", "GPU-b", "4"]
        assert json.loads(run(engine, profile("any", "n", device="auto", memory=1), tmp_path).message)[:2] == [
            "auto", "GPU-a",
        ]  # fmt: skip
        assert engine.placement(profile("x", "m", device="cuda:1", memory=1)).startswith("cuda:1, 800 MB + 1.00 GB of")
        assert "device 'cuda:2' and the GPUs of the local workers are: cuda:0, cuda:1" in str(
            engine.cannot_run(profile("x", "m", device="cuda:2", memory=1))
        )
        assert "asks for 2 GPUs" in str(engine.cannot_run(replace(profile("x", "m", device="cuda", memory=1), gpus=2)))
        assert engine.cannot_run(profile("too-large", "m", device="cuda", memory=81)) is not None


@pytest.mark.usefixtures("stub")
def test_workers_that_share_a_gpu_share_its_memory(tmp_path: Path) -> None:
    with LocalEngine(workers=4, machine=TWO_GPUS) as engine:

        def offer(name: str, memory: float, device: str) -> bool:
            return engine.offer(profile(name, name, memory=memory, device=device, seconds=0.5), str(tmp_path), "log", 1)

        assert offer("a", 40, "cuda:0")
        assert not offer("b", 40, "cuda:0")
        assert offer("c", 40, "cuda:1")
        assert offer("d", 30, "cuda:0")


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with LocalEngine(machine=CPU) as engine:
        assert str(engine.cannot_run(profile("x", "m", device="cuda"))).endswith("the local workers are: none")
        assert "a local worker has none" in str(engine.cannot_run(replace(profile("x", "m"), gpus=1)))


def test_threads_are_an_equal_share_of_the_cores_unless_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert LocalEngine(workers=3, machine=CPU).workers()[0] == "local 0: cpu, 2 threads, 10.0 GB of 32.0 GB free"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert ", 1 thread, " in LocalEngine(workers=3, machine=CPU).workers()[0]
    with pytest.raises(BadInputError, match="9 workers on 8 cores; give --workers 8"):
        LocalEngine(workers=9, machine=CPU)


def test_importing_the_engine_loads_no_torch() -> None:
    code = "import sys, effcli.batch.local as e; e.LocalEngine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}).returncode == 0
