"""The Ray engine on a real cluster of three nodes on this machine, one of which is killed at its work."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effcli.batch import ray_engine
from effcli.batch.model import Event, Job, JobState, Limits
from effcli.batch.ray_engine import RayEngine
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError
from effcli.staging import folder_for
from tests.effcli.batch.killable import calls
from tests.effcli.batch.killing import check, results
from tests.effcli.batch.ray_cluster import PATIENCE_SECONDS, is_alive, two_nodes, wait_for

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'effcli[ray]'")

# What Ray leaves open in its own processes' files and sockets, and announces for its next versions.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SMALL = Limits(memory_bytes=10**9)


def call(name: str, function: str = "where", **arguments: Any) -> Job:
    settings = {"function": f"tests.effcli.batch.ray_jobs:{function}", "arguments": arguments}
    return Job(name, "call", "", "none", function, settings, limits=SMALL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def connected(cluster: Any) -> Iterator[RayEngine]:
    with RayEngine(cluster.address) as engine:
        yield engine


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "logs").mkdir(parents=True)
    return tmp_path / "runs"


def offer(engine: RayEngine, job: Job, output: Path | str) -> bool:
    return engine.offer(job, str(output), f"{output}/logs/{job.name}.log", 1)


def run(
    engine: RayEngine, jobs: list[Job], output: Path | str, until: Callable[[list[Event]], bool] | None = None
) -> list[Event]:
    """Run jobs as the driver does; return all events."""
    waiting, found, end = list(jobs), [], time.monotonic() + PATIENCE_SECONDS
    names = {job.name for job in jobs}
    while names:
        while waiting and offer(engine, waiting[0], output):
            waiting.pop(0)
        for event in engine.events(1.0):
            found.append(event)
            if event.kind in ("finished", "lost"):
                names.discard(event.job)
        if until is not None and until(found):
            break
        assert time.monotonic() < end, found
    return found


def result(output: Path, name: str) -> Any:
    return json.loads((output / name / "result.json").read_text())


def ends(events: list[Event]) -> dict[str, Event]:
    return {event.job: event for event in events if event.kind in ("finished", "lost")}


@pytest.mark.slow
@pytest.mark.thorough
def test_jobs_run_on_the_nodes_that_they_ask_for(connected: RayEngine, output: Path) -> None:
    jobs = [replace(call(f"{zone}{number}"), labels={"zone": zone}) for number in range(2) for zone in "ab"]
    events = run(connected, jobs, output)
    assert all(event.outcome is not None and event.outcome.status == "passed" for event in ends(events).values())
    for job in jobs:
        kinds = [event.kind for event in events if event.job == job.name]
        assert "started" in kinds
        assert kinds[-1] == "finished"
    places = {name: event.worker for name, event in ends(events).items()}
    assert places["a0"] == places["a1"] != places["b0"] == places["b1"]
    results = {job.name: result(output, job.name) for job in jobs}
    assert results["a0"]["pid"] == results["a1"]["pid"] != results["b0"]["pid"]  # warm
    assert results["a0"]["gpus"] == ""
    assert results["a0"]["threads"] == "1"
    assert (output / "logs" / "a0.log").read_text().startswith("--- a0, attempt 1")


@pytest.mark.slow
def test_a_crash_harms_no_other_job(connected: RayEngine, output: Path) -> None:
    events = ends(run(connected, [call("bad", "crash"), call("good"), call("next")], output))
    assert events["bad"].kind == "lost"
    assert "signal 11 (SIGSEGV)" in str(events["bad"].reason)
    assert [events[name].kind for name in ("good", "next")] == ["finished"] * 2


@pytest.mark.slow
def test_what_the_cluster_does_not_have_is_said(connected: RayEngine) -> None:
    job = call("x")
    assert connected.cannot_run(job) is None
    assert connected.placement(job) == "1 CPU, 1.00 GB, on any of 2 nodes"
    assert len(connected.workers()) == 3
    assert sum("1 CPU, 0 GPU" in line and ", zone=" in line for line in connected.workers()) == 2
    for changed, words in (
        (replace(job, gpus=1.0), "it needs 1 GPU and no node of the Ray cluster (3 nodes) has more than 0"),
        (replace(job, device="cuda:1"), "it needs 1 GPU"),
        (replace(job, gpus=2.0), "it asks for 2 GPUs and a job runs on one"),
        (replace(job, labels={"zone": "c"}), "is labelled zone=c; there are: zone=a, zone=b"),
        (replace(job, name="y", limits=Limits(memory_bytes=10**15)), "it needs 1.00 PB of memory and no node"),
    ):
        assert words in str(connected.cannot_run(changed))
        assert not connected.offer(changed, "/x", "/x/log", 1)


@pytest.mark.slow
@pytest.mark.thorough
def test_jobs_that_do_not_fit_together_wait(connected: RayEngine, output: Path) -> None:
    told = output / "told"
    jobs = [replace(call(f"n{n}", "nap", seconds=60, told=f"{told}{n}"), labels={"zone": "a"}) for n in range(2)]
    assert offer(connected, jobs[0], output)
    assert not offer(connected, jobs[1], output)
    wait_for(lambda: Path(f"{told}0").exists() and bool(Path(f"{told}0").read_text()))
    connected.stop("n0")
    wait_for(lambda: not is_alive(int(Path(f"{told}0").read_text())))
    assert run(connected, [replace(call("after"), labels={"zone": "a"})], output)[-1].kind == "finished"


@pytest.mark.slow
def test_workers_that_idle_give_their_place_back(
    connected: RayEngine, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(connected, [call("idle")], output)
    pid = result(output, "idle")["pid"]
    monkeypatch.setattr(ray_engine, "IDLE_SECONDS", 0.0)
    connected.events(0.0)
    wait_for(lambda: not is_alive(pid))


@pytest.mark.slow
def test_nodes_that_are_not_as_this_machine_are_refused(
    connected: RayEngine, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = ends(run(connected, [call("lost")], output / "not-shared"))["lost"].outcome
    assert elsewhere is not None
    assert elsewhere.exit_code == 2
    assert f"does not see the folder '{output / 'not-shared'}'" in elsewhere.message
    monkeypatch.setattr(connected, "_versions", {"effcli": "99.1", "torch": "1.0"})
    other = ends(run(connected, [call("other")], output))["other"].outcome
    assert other is not None
    assert f"node {socket.gethostname()} has other versions: effcli " in other.message
    assert "(driver: 99.1)" in other.message


@pytest.mark.slow
@pytest.mark.thorough
def test_outputs_on_a_url(connected: RayEngine, output: Path) -> None:
    run(connected, [call("far", "where")], f"file://{output}")
    assert set(result(output, "far")) == {"pid", "gpus", "threads"}
    assert "passed after" in (output / "logs" / "far.log").read_text()
    assert sorted(path.name for path in output.iterdir()) == [".effcli-batch", "far", "logs"]


class KillANode:
    """Watches a batch; kills the node of a job once its first pass is finished."""

    def __init__(self, cluster: Any, output: Path, job: str) -> None:
        self._cluster, self._output, self._job = cluster, output, job
        self.first_pass: dict[str, Any] = {}
        self.lost: list[str] = []
        self.workers: dict[str, list[str]] = {}
        self._thread = threading.Thread(target=self._watch)

    def opened(self, states: Any, workers: Any) -> None:
        self._thread.start()

    def added(self, state: JobState) -> None: ...

    def changed(self, state: JobState, event: Event | None) -> None:
        if event is not None and event.kind == "started":
            self.workers.setdefault(event.job, []).append(event.worker)
        if event is not None and event.kind == "lost":
            self.lost.append(str(event.reason))

    def closed(self) -> None:
        self._thread.join()

    def _watch(self) -> None:
        state = folder_for(self._output / self._job) / "state.json"

        def done() -> bool:
            return state.exists() and "pass-1" in json.loads(state.read_text())["stages"]

        wait_for(done)
        self._cluster.remove_node(self._cluster.killable["b"], allow_graceful=False)
        self.first_pass = json.loads(state.read_text())["stages"]["pass-1"]["result"]["record"]


@pytest.mark.slow
@pytest.mark.thorough
def test_a_node_killed_at_its_work_costs_its_current_pass(
    cluster: Any, connected: RayEngine, output: Path, tiny_folder: Path
) -> None:
    """The job goes on elsewhere from its finished pass and ends as one that nothing happened to, here or locally."""
    connected.__exit__(None, None, None)  # its idle workers hold the nodes
    (output / "logs").rmdir()
    from effcli.batch import driver
    from effcli.batch.fingerprint import Fingerprints
    from effcli.batch.local import LocalEngine

    chain = [
        {"quantize": {"scheme": "w4a16", "group_size": 16, "method": "rtn"}},
        {"kv-pq": {"bits": 2, "samples": 24, "length": 64, "recent": 16, "iterations": 4}},
    ]
    settings = {"recipe": {"version": 1, "passes": chain, "evaluation": {"tokens": 512, "context": 64}}, "context": 32}
    hit, spared = (
        Job(name, "optimize", str(tiny_folder), "tiny", "two", settings, limits=SMALL, labels=labels)
        for name, labels in (("hit", {}), ("spared", {"zone": "a"}))
    )
    # The node that is killed is the only one left for the first job: the other is taken by the second.
    view = KillANode(cluster, output, "hit")
    prints = Fingerprints(device_class=lambda name: {"type": "cpu"})
    done = driver.run([spared, hit, *calls(3)], str(output), RayEngine(cluster.address), fingerprints=prints, view=view)
    assert [(state.job.name, state.stage, state.attempt) for state in done.states] == [
        ("spared", "passed", 1),
        ("hit", "passed", 2),
        *((f"call-{number}", "passed", 1) for number in range(3)),
    ], done.states
    assert [bool(re.fullmatch(r"node \S+ \(id \w+\) is gone \(.+\)", reason)) for reason in view.lost] == [True]
    assert len(set(view.workers["hit"])) == 2
    assert set(view.workers["spared"]) == {view.workers["hit"][1]}
    report = json.loads((output / "hit" / "report.json").read_text())
    assert report["passes"][0]["seconds"] == view.first_pass["seconds"]  # it ran once
    weights = [
        {path.name: sha256_of(path) for path in (output / name).glob("*.safetensors")} for name in ("hit", "spared")
    ]
    assert weights[0] == weights[1]
    assert len(weights[0]) == 2
    check(output, {state.job.name for state in done.states})
    local = output.with_name("local")
    driver.run(calls(3), str(local), LocalEngine(workers=1, threads=1), fingerprints=prints)
    found = results(output)
    assert {name: found[name] for name in results(local)} == results(local)
    assert "call-2/result.json" in results(local)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInputError, match=r"pip install 'effcli\[ray\]'"):
        RayEngine(None).__enter__()
