"""Outputs on URLs, against file systems that are there, that fail for a while, and that fail for good."""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from effcli.batch import storage
from effcli.batch.model import Job
from effcli.batch.running import run_job
from effcli.batch.storage import StagedWork, Storage, StorageError, fetch, publish, run_on_url
from effcli.errors import BadInputError, NoRoomError
from effcli.staging import Staging, open_staging
from profilers.base import SilentProgress


class Flaky(MemoryFileSystem):
    """Memory that refuses as many operations as it is told, and remembers what was written in which order."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    refuse: list[Exception] = []
    written: list[str] = []
    damage = ""

    def _refuse(self) -> None:
        if self.refuse:
            raise self.refuse.pop()

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._refuse()
        self.written.append(rpath)
        super().put_file(lpath, rpath, **options)
        if self.damage and rpath.endswith(self.damage):
            self.pipe_file(rpath, b"other bytes")

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        self._refuse()
        content: bytes = super().cat_file(path, *arguments, **options)
        return content

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self._refuse()
        self.written.append(path2)
        super().mv(path1, path2, **options)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(storage, "PAUSES_SECONDS", (0.01, 0.01))
    for kind in (Flaky, MemoryFileSystem):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Flaky.refuse, Flaky.written, Flaky.damage = [], [], ""
    yield


@pytest.fixture(params=["folder", "file://", "memory://"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "runs")
    return f"file://{tmp_path}/runs" if request.param == "file://" else "memory://bucket/runs"


def finished_job(folder: Path, **files: str) -> Path:
    for name, text in ({"report_json": "{}", "weights_bin": "www"} | files).items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def content(store: Storage, name: str) -> dict[str, bytes]:
    return {path: store.read(f"{name}/{path}") for path in store.files(name)}


def test_a_finished_job_is_the_same_there_and_back(root: str, tmp_path: Path) -> None:
    store = Storage(root)
    publish(finished_job(tmp_path / "here", inner__a_txt="aaa"), store, "job")
    assert content(store, "job") == {"report.json": b"{}", "weights.bin": b"www", "inner/a.txt": b"aaa"}
    assert store.sha256("job/weights.bin") == hashlib.sha256(b"www").hexdigest()
    back = fetch(store, "job", tmp_path / "back")
    assert {path.relative_to(back).as_posix(): path.read_bytes() for path in back.rglob("*.*")} == content(store, "job")


def test_a_later_run_leaves_nothing_of_an_earlier_one(root: str, tmp_path: Path) -> None:
    store = Storage(root)
    publish(finished_job(tmp_path / "first", old_txt="old"), store, "job")
    publish(finished_job(tmp_path / "second", report_json='{"new": 1}'), store, "job")
    assert content(store, "job") == {"report.json": b'{"new": 1}', "weights.bin": b"www"}


def test_the_report_comes_last(tmp_path: Path) -> None:
    publish(finished_job(tmp_path / "here", a_txt="a", z_txt="z"), Storage("flaky://runs"), "job")
    assert Flaky.written[-1].endswith("/job/report.json")
    assert sum(path.endswith("report.json") for path in Flaky.written) == 1


def test_a_job_whose_upload_failed_has_no_report(tmp_path: Path) -> None:
    store = Storage("flaky://runs")
    publish(finished_job(tmp_path / "first"), store, "job")
    Flaky.damage = "weights.bin"
    with pytest.raises(StorageError, match=r"weights.bin' was written and reads back differently"):
        publish(finished_job(tmp_path / "second"), store, "job")
    assert not store.exists("job/report.json")


def test_a_damaged_file_is_not_used(tmp_path: Path) -> None:
    store = Storage("memory://runs")
    publish(finished_job(tmp_path / "here"), store, "job")
    store.write("job/weights.bin", b"else")
    with pytest.raises(StorageError, match=r"weights.bin' is damaged"):
        fetch(store, "job", tmp_path / "back")


def test_a_short_loss_of_the_network_costs_only_time() -> None:
    store = Storage("flaky://runs")
    store.write("a", b"1")
    Flaky.refuse = [ConnectionResetError("peer"), OSError(errno.EIO, "Input/output error")]
    assert store.read("a") == b"1"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            ConnectionResetError("reset by peer"),
            StorageError,
            "tried 3 times in 0 s: reset by peer; check that the place",
        ),
        (RuntimeError(""), StorageError, "tried 3 times in 0 s: RuntimeError; check that the place"),
        (PermissionError(errno.EACCES, "denied"), StorageError, "denied; check the rights on it"),
        (OSError(errno.ENOSPC, "No space left"), NoRoomError, "No space left; free some room"),
        (FileNotFoundError("a"), StorageError, "it is not there"),
    ],
)
def test_a_lost_place_is_said_in_one_line(error: Exception, kind: type[Exception], words: str) -> None:
    Flaky.refuse = [error] * 9
    with pytest.raises(kind) as caught:
        Storage("flaky://runs").read("a")
    assert str(caught.value).startswith("cannot read 'flaky://runs/a'")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [("webhdf://bucket/x", "(did you mean 'webhdfs'?)"), ("adl://x", "install it on this machine and on every node")],
)
def test_an_unknown_protocol_names_what_to_install(url: str, words: str) -> None:
    with pytest.raises(BadInputError, match="package") as caught:
        Storage(url)
    assert words in str(caught.value)


def two_passes(runs: list[str], stop_in: str | None = None) -> Callable[[str], str]:
    """Return a job with two stages, as optimize stages them; it can be stopped in one."""

    def run(output: str) -> str:
        target = Path(output) / "job"
        with open_staging(target, {"source": {"x": 1}}, resume=True, force=False) as staging:
            for name in ("pass-1", "pass-2"):
                if staging.finished(name) is None:
                    runs.append(name)
                    (staging.begin(name) / "weights.bin").write_text(name)
                    if name == stop_in:
                        return "stopped"
                    staging.finish(name, {"n": name})
            staging.out.mkdir()
            (staging.out / "effcli.json").write_text("{}")
            (staging.out / "report.json").write_text("{}")
            staging.publish(force=False)
        return "done"

    return run


def test_staged_work_goes_on_elsewhere(root: str) -> None:
    runs: list[str] = []
    store = Storage(root)
    assert run_on_url(root, "job", None, two_passes(runs, stop_in="pass-2")) == "stopped"
    assert store.files(".job.effcli") == ["pass-1/weights.bin", "state.json"]
    assert not store.exists("job")
    assert run_on_url(root, "job", None, two_passes(runs)) == "done"
    assert runs == ["pass-1", "pass-2", "pass-2"]
    assert store.files("job") == ["effcli.json", "report.json"]
    assert not store.exists(".job.effcli")


def test_a_stage_is_there_as_soon_as_it_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WATCH_SECONDS", 0.01)
    store = Storage("memory://runs")

    def killed(output: str) -> str:
        with open_staging(Path(output) / "job", {"source": {}}, resume=True, force=False) as staging:
            (staging.begin("pass-1") / "weights.bin").write_text("1")
            staging.finish("pass-1", {})
            wait_for(
                lambda: store.exists(".job.effcli/state.json") and b"pass-1" in store.read(".job.effcli/state.json")
            )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_url("memory://runs", "job", None, killed)
    assert list(json.loads(store.read(".job.effcli/state.json"))["stages"]) == ["pass-1"]


def test_a_state_never_names_what_is_not_there(tmp_path: Path) -> None:
    target = tmp_path / "job"
    with open_staging(target, {"source": {}}, resume=False, force=False) as staging:
        assert isinstance(staging, Staging)
        (staging.begin("pass-1") / "weights.bin").write_text("1")
        staging.finish("pass-1", {})
        Flaky.refuse = [ConnectionError("gone")] * 3
        staged = StagedWork(Storage("flaky://runs"), target)
        with pytest.raises(StorageError, match="gone"):
            staged.push()
        assert not Storage("flaky://runs").exists(".job.effcli/state.json")
        staged.push()
        assert Flaky.written[-1].endswith("state.json")


def test_a_job_reads_another_ones_output() -> None:
    def first(output: str) -> None:
        finished_job(Path(output) / "first")

    def second(output: str) -> str:
        return (Path(output) / "first" / "weights.bin").read_text()

    run_on_url("memory://runs", "first", None, first)
    assert run_on_url("memory://runs", "second", "first", second) == "www"
    assert Storage("memory://runs").files("second") == []


def test_a_log_comes_to_its_url_also_from_a_job_that_fails() -> None:
    with pytest.raises(RuntimeError), storage.log_file("memory://runs/logs/job.log") as log:
        Path(log).write_text("said")
        raise RuntimeError
    assert Storage("memory://runs").read("logs/job.log") == b"said"
    with storage.log_file("/logs/job.log") as log:
        assert log == "/logs/job.log"


def test_a_job_runs_the_same_way_on_a_url(tmp_path: Path) -> None:
    job = Job("nap", "call", "", "none", "x", {"function": "operator:add", "arguments": {}})
    refused = run_job(job, "memory://runs", SilentProgress())
    assert (refused.status, refused.retry) == ("failed", False)
    passed = replace(job, settings={"function": "tests.effcli.batch.ray_jobs:compute", "arguments": {"loops": 3}})
    here, there = (run_job(passed, output, SilentProgress()) for output in (str(tmp_path), "memory://runs"))
    assert here.status == there.status == "passed"
    assert (here.report, here.report_sha256) == (there.report, there.report_sha256)
    assert Storage("memory://runs").read("nap/result.json") == (tmp_path / "nap" / "result.json").read_bytes()
    Flaky.refuse = [ConnectionError("gone")] * 9
    lost = run_job(passed, "flaky://runs", SilentProgress())
    assert (lost.status, lost.retry) == ("failed", True)
    assert "gone; check that the place can be reached" in lost.message


def test_the_report_of_a_gate_that_failed_is_kept() -> None:
    def run(output: str) -> None:
        (Path(output) / "job.failed.json").write_text("{}")

    run_on_url("memory://runs", "job", None, run)
    assert Storage("memory://runs").read("job.failed.json") == b"{}"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
