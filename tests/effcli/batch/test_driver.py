"""Every rule of the loop, against an engine that does as it is told."""

from __future__ import annotations

import errno
import json
import shutil
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effcli.batch import driver, journal
from effcli.batch.driver import BatchRun
from effcli.batch.engine import JobSource
from effcli.batch.fingerprint import Fingerprints
from effcli.batch.keeping import Fingerprinting
from effcli.batch.model import STATE_FOLDER, Event, Job, Limits, Outcome
from effcli.batch.storage import Storage
from effcli.errors import BadInputError, InterruptedRunError, NoRoomError
from tests.effcli.batch.fake_engine import (
    HANGS,
    LOST,
    FakeEngine,
    RecordingView,
    WordFingerprints,
    failed,
    job,
)

GATE = Outcome("gate-failed", "gate 'ppl<=+1%' failed: it rose by 2 %", 3, report="b.failed.json")


def _run(
    output: Path | str,
    jobs: Sequence[Job],
    engine: FakeEngine | None = None,
    prints: Fingerprinting | None = None,
    **more: Any,
) -> tuple[BatchRun, FakeEngine]:
    engine = engine or FakeEngine()
    return driver.run(jobs, str(output), engine, fingerprints=prints or WordFingerprints(), **more), engine


def _stages(run: BatchRun) -> dict[str, str]:
    return {state.job.name: state.stage for state in run.states}


def _message(run: BatchRun, name: str) -> str:
    outcome = next(state.outcome for state in run.states if state.job.name == name)
    assert outcome is not None
    return outcome.message


def test_jobs_run_in_order_and_no_more_at_once_than_the_engine_takes(tmp_path: Path) -> None:
    names = ["c", "a", "b", "d"]
    run, engine = _run(tmp_path, [job(name) for name in names])
    assert engine.ran == names
    assert engine.most_at_once == 2
    assert set(_stages(run).values()) == {"passed"}
    assert [state.job.name for state in run.states] == names
    assert run.exit_code == 0
    assert (engine.entered, engine.left) == (1, 1)
    assert run.workers == ("fake 0", "fake 1")
    assert run.states[0].log == f"{STATE_FOLDER}/logs/c.log"
    assert (tmp_path / STATE_FOLDER / "logs").is_dir()


def test_a_second_run_keeps_what_is_still_good(tmp_path: Path) -> None:
    jobs = [job("a"), job("b", needs=("a",))]
    first, _ = _run(tmp_path, jobs)
    run, engine = _run(tmp_path, jobs)
    assert _stages(run) == {"a": "kept", "b": "kept"}
    assert engine.ran == []
    assert run.exit_code == 0
    assert run.states[0].outcome == first.states[0].outcome
    assert run.states[0].attempt == 0


def test_only_what_is_missing_failed_or_changed_runs(tmp_path: Path) -> None:
    jobs = [job("good"), job("gone"), job("broke"), job("model"), job("settings"), job("report")]
    _run(tmp_path, jobs, FakeEngine({"broke": [failed()]}))
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "report" / "result.json").write_text("{}")
    changed = [replace(item, settings={"x": 1}) if item.name == "settings" else item for item in jobs]
    run, engine = _run(tmp_path, [*changed, job("new")], prints=WordFingerprints({"model": "other"}))
    assert engine.ran == ["gone", "broke", "model", "settings", "report", "new"]
    assert _stages(run)["good"] == "kept"


def test_what_only_the_run_finds_out_is_noted_with_its_result(tmp_path: Path) -> None:
    class HubFingerprints(WordFingerprints):
        commit: str | None = None

        def of(self, item: Job) -> dict[str, Any]:
            return {"commit": self.commit}

        def difference(self, old: Any, new: Any) -> str:
            return "commit" if None not in (old["commit"], new["commit"]) and old != new else ""

    prints = HubFingerprints()

    def fetch() -> None:
        prints.commit = "first"

    _run(tmp_path, [job("a")], FakeEngine({"a": [fetch]}), prints)
    run, engine = _run(tmp_path, [job("a")], prints=prints)
    assert _stages(run) == {"a": "kept"}
    prints.commit = "second"
    run, engine = _run(tmp_path, [job("a")], prints=prints)
    assert engine.ran == ["a"]


def test_an_output_is_good_again_when_a_change_is_taken_back(tmp_path: Path) -> None:
    _run(tmp_path, [job("a")])
    _run(tmp_path, [job("a", x=1)], FakeEngine({"a": [failed()]}))
    run, engine = _run(tmp_path, [job("a")])
    assert _stages(run) == {"a": "kept"}
    assert engine.ran == []


def test_a_job_whose_need_failed_is_skipped_and_the_others_go_on(tmp_path: Path) -> None:
    jobs = [job("last", needs=("middle",)), job("middle", needs=("first",)), job("first"), job("other")]
    run, engine = _run(tmp_path, jobs, FakeEngine({"first": [failed()]}))
    assert _stages(run) == {"last": "skipped", "middle": "skipped", "first": "failed", "other": "passed"}
    assert _message(run, "middle") == "needs 'first', which failed"
    assert _message(run, "last") == "needs 'middle', which was skipped"
    assert engine.ran == ["first", "other"]
    assert run.exit_code == 1


def test_only_failed_gates_make_exit_code_3(tmp_path: Path) -> None:
    jobs = [job("a"), job("b"), job("c", needs=("b",))]
    run, _ = _run(tmp_path, jobs, FakeEngine({"b": [GATE]}))
    assert _stages(run) == {"a": "passed", "b": "gate-failed", "c": "skipped"}
    assert _message(run, "c") == "needs 'b', which failed its gates"
    assert run.exit_code == 3
    run, _ = _run(tmp_path, jobs, FakeEngine({"b": [GATE], "a": [failed()]}), WordFingerprints({"a": "other"}))
    assert run.exit_code == 1


def test_a_job_that_needs_another_starts_after_it(tmp_path: Path) -> None:
    _, engine = _run(tmp_path, [job("b", needs=("a", "c")), job("a"), job("c")])
    assert engine.ran == ["a", "c", "b"]


def test_a_job_on_anothers_output_runs_again_when_that_one_was_made_again(tmp_path: Path) -> None:
    made = Job("w4.quick", "call", "", "w4", "quick", model_from="w4", needs=("w4",))
    _run(tmp_path, [job("w4"), made])
    run, engine = _run(tmp_path, [job("w4"), made])
    assert engine.ran == []
    again = FakeEngine(report=lambda item: {"job": item.name, "time": 2})
    _run(tmp_path, [job("w4", x=2), made], again)
    assert again.ran == ["w4", "w4.quick"]


@pytest.mark.parametrize("act", [LOST, failed("out of memory", exit_code=4, retry=True)])
def test_a_lost_worker_is_retried_as_often_as_its_limit_says(tmp_path: Path, act: Any) -> None:
    jobs = [job("a", limits=Limits(retries=2)), job("b", limits=Limits(retries=1)), job("c", limits=Limits(retries=0))]
    view = RecordingView()
    engine = FakeEngine({"a": [act, act], "b": [act, act], "c": [act]}, slots=1)
    run, _ = _run(tmp_path, jobs, engine, view=view)
    assert _stages(run) == {"a": "passed", "b": "failed", "c": "failed"}
    assert engine.ran == ["a", "a", "a", "b", "b", "c"]
    assert engine.attempts == [1, 2, 3, 1, 2, 1]
    assert run.states[0].attempt == 3
    assert [stage for name, stage in view.stages if name == "a"].count("waiting") == 2
    if act == LOST:
        assert view.reasons == ["killed by signal 9"] * 5
        assert _message(run, "b").startswith("lost (attempt 2): killed by signal 9; see '")
        assert "limits.retries" in _message(run, "c")
        lines = (tmp_path / STATE_FOLDER / "journal.jsonl").read_text().splitlines()
        assert sum(json.loads(line).get("reason") == "killed by signal 9" for line in lines) == 5
    assert run.exit_code == 1


def test_bad_input_is_not_retried(tmp_path: Path) -> None:
    run, engine = _run(tmp_path, [job("a", limits=Limits(retries=5))], FakeEngine({"a": [failed()]}))
    assert engine.ran == ["a"]
    assert _message(run, "a") == "it broke; mend it"


def test_a_job_over_its_time_is_stopped_and_fails(tmp_path: Path) -> None:
    jobs = [job("slow", limits=Limits(time_seconds=0.05)), job("b")]
    run, engine = _run(tmp_path, jobs, FakeEngine({"slow": [HANGS]}))
    assert engine.stopped == ["slow"]
    assert _stages(run) == {"slow": "failed", "b": "passed"}
    assert _message(run, "slow").startswith("took longer than its limit of 50.0 ms; raise limits.time")
    events = [json.loads(line).get("event") for line in _lines(tmp_path) if "slow" in line]
    assert events == ["started", "stopped", "finished"]


def _lines(output: Path) -> list[str]:
    return (output / STATE_FOLDER / "journal.jsonl").read_text().splitlines()


def test_a_model_that_cannot_be_read_fails_its_job_alone(tmp_path: Path) -> None:
    run, engine = _run(tmp_path, [job("a"), job("b")], prints=WordFingerprints({"a": "missing"}))
    assert _stages(run) == {"a": "failed", "b": "passed"}
    assert _message(run, "a") == "no model at '/models/a'; check the path"
    assert engine.ran == ["b"]


def test_a_job_that_can_never_run_fails_with_the_reason(tmp_path: Path) -> None:
    run, engine = _run(tmp_path, [job("a"), job("b")], FakeEngine(never={"a": "it needs 9 GPUs and there is none"}))
    assert _stages(run) == {"a": "failed", "b": "passed"}
    assert _message(run, "a") == "cannot run: it needs 9 GPUs and there is none"
    assert engine.ran == ["b"]


def test_what_an_engine_has_no_room_for_does_not_hold_back_smaller_jobs(tmp_path: Path) -> None:
    class NarrowEngine(FakeEngine):
        def offer(self, item: Job, output: str, log: str, attempt: int) -> bool:
            if item.part == "large" and self._busy:
                self.offered.append(item.name)
                return False
            return super().offer(item, output, log, attempt)

    large = [Job(f"large-{number}", "call", "m", "m", "large") for number in range(50)]
    engine = NarrowEngine()
    run, _ = _run(tmp_path, [job("first"), *large, job("small")], engine)
    assert engine.ran[:2] == ["first", "small"]
    assert set(_stages(run).values()) == {"passed"}
    assert len(engine.offered) < 3 * len(large), "of jobs that are alike, one refusal answers for all"


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_stops_the_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    jobs = [job("a"), job("b"), job("c"), job("d")]
    view = RecordingView()
    engine = FakeEngine({"b": [HANGS], "c": [_interrupt]})
    with pytest.raises(
        InterruptedRunError, match=r"interrupted; 1 of 4 jobs are finished and kept in '.*': run the same"
    ):
        _run(tmp_path, jobs, engine, view=view)
    assert engine.stopped == ["b"]
    assert engine.left == view.closings == 1
    records = journal.read(tmp_path / STATE_FOLDER)
    assert (records["b"].last.event, records["b"].last.reason) == ("stopped", "interrupted")
    run, again = _run(tmp_path, jobs)
    assert again.ran == ["b", "c", "d"]
    assert run.exit_code == 0


def test_an_output_that_was_published_just_before_its_worker_was_lost_counts(tmp_path: Path) -> None:
    class LateEngine(FakeEngine):
        def events(self, timeout_seconds: float) -> Sequence[Event]:
            events = super().events(timeout_seconds)
            return [
                replace(event, kind="lost", outcome=None, reason="killed") if event.kind == "finished" else event
                for event in events
            ]

    run, engine = _run(tmp_path, [job("a", limits=Limits(retries=0))], LateEngine())
    assert _stages(run) == {"a": "passed"}
    run, engine = _run(tmp_path, [job("a", limits=Limits(retries=0))])
    assert (engine.ran, _stages(run)) == ([], {"a": "kept"})


@pytest.mark.parametrize("changed", [False, True])
def test_an_output_that_was_published_just_before_the_driver_was_killed_counts(tmp_path: Path, changed: bool) -> None:
    def killed(*_: object) -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEngine, "events", killed)
        with pytest.raises(MemoryError):
            _run(tmp_path, [job("a")])
    lines = driver.dry_run([job("a")], str(tmp_path), FakeEngine(), fingerprints=WordFingerprints())
    assert lines[0] == "a: kept"
    run, engine = _run(tmp_path, [job("a")], prints=WordFingerprints({"a": "other"} if changed else {}))
    assert engine.ran == (["a"] if changed else [])
    run, engine = _run(tmp_path, [job("a")], prints=WordFingerprints({"a": "other"} if changed else {}))
    assert (engine.ran, _stages(run)) == ([], {"a": "kept"})


def test_an_output_that_was_published_under_other_gates_does_not_count(tmp_path: Path) -> None:
    def killed(*_: object) -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEngine, "events", killed)
        with pytest.raises(MemoryError):
            _run(tmp_path, [_gated("ppl<=+5%")], FakeEngine(report=lambda item: _report(10.2)))
    _, engine = _run(tmp_path, [_gated("ppl<=+1%")], FakeEngine(report=lambda item: _report(10.2)))
    assert engine.ran == ["a"]


def test_what_is_there_from_before_does_not_count_as_published(tmp_path: Path) -> None:
    _run(tmp_path, [job("a")])
    run, engine = _run(tmp_path, [job("a", x=1, limits=Limits(retries=0))], FakeEngine({"a": [LOST]}))
    assert _stages(run) == {"a": "failed"}
    run, engine = _run(tmp_path, [job("a", x=1)])
    assert engine.ran == ["a"]


def test_an_engine_that_cannot_take_a_job_fails_it_alone(tmp_path: Path) -> None:
    class Picky(FakeEngine):
        def offer(self, item: Job, output: str, log: str, attempt: int) -> bool:
            if item.name == "a":
                raise BadInputError("no config.json in '/models/a'; add it")
            return super().offer(item, output, log, attempt)

    run, engine = _run(tmp_path, [job("a"), job("b")], Picky())
    assert _stages(run) == {"a": "failed", "b": "passed"}
    assert _message(run, "a") == "no config.json in '/models/a'; add it"


def test_an_output_can_be_a_url(tmp_path: Path) -> None:
    url = "memory://test-driver/runs"
    _run(url, [job("a"), job("b")], state=tmp_path)
    run, engine = _run(url, [job("a"), job("b")], state=tmp_path)
    assert (engine.ran, _stages(run)) == ([], {"a": "kept", "b": "kept"})
    Storage(url).remove("a")
    Storage(url).write("b/result.json", b"{}")
    run, engine = _run(url, [job("a"), job("b")], state=tmp_path)
    assert engine.ran == ["a", "b"]
    first = FakeEngine(report=lambda item: _report(10.2))
    _run(url, [_gated("ppl<=+5%")], first, state=tmp_path)
    run, engine = _run(url, [_gated("ppl<=+1%")], state=tmp_path)
    assert (engine.ran, run.exit_code) == ([], 3)


def test_a_full_disk_ends_the_batch_and_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = journal.Journal.append

    def full(self: journal.Journal, entry: journal.Entry) -> None:
        if entry.job == "b" and entry.event == "finished":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        append(self, entry)

    monkeypatch.setattr(journal.Journal, "append", full)
    engine = FakeEngine(slots=1)
    with pytest.raises(
        NoRoomError, match="is full; every finished job is kept: free some space and run the same"
    ) as told:
        _run(tmp_path, [job("a"), job("b"), job("c")], engine)
    assert told.value.exit_code == 4
    assert engine.left == 1
    monkeypatch.undo()
    _, again = _run(tmp_path, [job("a"), job("b"), job("c")])
    assert again.ran == ["c"], "b had published its output before the journal could say so"


def test_a_job_that_filled_the_disk_ends_the_batch_and_one_that_is_too_large_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = failed("no space left", exit_code=4)
    run, _ = _run(tmp_path, [job("a"), job("b")], FakeEngine({"a": [full]}))
    assert _stages(run) == {"a": "failed", "b": "passed"}
    monkeypatch.setattr(driver, "free_bytes", lambda folder: 0)
    with pytest.raises(NoRoomError, match="free some space"):
        _run(tmp_path, [job("a"), job("c")], FakeEngine({"a": [full]}))


def test_a_second_driver_is_refused_before_its_engine_starts(tmp_path: Path) -> None:
    second = FakeEngine()

    def start_another() -> None:
        with pytest.raises(BadInputError, match="in use by another batch"):
            _run(tmp_path, [job("z")], second)

    run, _ = _run(tmp_path, [job("a")], FakeEngine({"a": [start_another]}))
    assert run.exit_code in (0, 1)
    assert second.entered == 0


def test_needs_that_are_not_there_or_go_in_a_circle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="job 'a' needs the job 'nope', which is not in this batch"):
        _run(tmp_path, [job("a", needs=("nope",))])
    with pytest.raises(BadInputError, match="a, b need each other in a circle"):
        _run(tmp_path, [job("a", needs=("b",)), job("b", needs=("a",))])
    with pytest.raises(BadInputError, match="two jobs are called 'a'"):
        _run(tmp_path, [job("a"), job("a")])


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot write .*choose another --output"):
        _run(tmp_path / "file" / "runs", [job("a")])


def test_the_state_can_lie_elsewhere(tmp_path: Path) -> None:
    _run(tmp_path / "runs", [job("a")], state=tmp_path / "state")
    assert (tmp_path / "state" / "journal.jsonl").is_file()
    run, engine = _run(tmp_path / "runs", [job("a")], state=tmp_path / "state")
    assert engine.ran == []


class Countdown:
    """A search that wants each next job only when it knows enough of those before."""

    name = "countdown"

    def __init__(self, total: int, at_once: int, act: Callable[[str], None] = lambda name: None) -> None:
        self.left, self.at_once, self.told, self.made, self.most = total, at_once, [], 0, 0  # type: ignore[var-annotated]

    def ask(self, running: int) -> Sequence[Job]:
        self.most = max(self.most, running)
        if running >= self.at_once or not self.left:
            return []
        self.left -= 1
        self.made += 1
        return [job(f"trial-{self.made}")]

    def tell(self, item: Job, outcome: Outcome) -> None:
        self.told.append((item.name, outcome.status))

    def finished(self) -> bool:
        return not self.left


def test_a_search_is_asked_while_there_is_room_and_told_what_came_of_it(tmp_path: Path) -> None:
    search, view = Countdown(6, at_once=2), RecordingView()
    sources: list[JobSource] = [search]
    run, engine = _run(tmp_path, [job("a")], FakeEngine({"trial-2": [GATE]}), sources=sources, view=view)
    assert engine.ran[0] == "a"
    assert sorted(search.told) == [(f"trial-{n}", "gate-failed" if n == 2 else "passed") for n in range(1, 7)]
    assert search.most == 2
    assert view.names == [state.job.name for state in run.states]
    assert run.exit_code == 0, "a trial that misses a gate is an answer"
    again = Countdown(6, at_once=2)
    run, engine = _run(tmp_path, [job("a")], sources=[again])
    assert engine.ran == ["trial-2"]
    assert len(again.told) == 6


def test_a_search_is_not_asked_while_jobs_have_to_wait(tmp_path: Path) -> None:
    search = Countdown(3, at_once=9)
    _, engine = _run(tmp_path, [job(name) for name in "abcdef"], sources=[search])
    assert engine.ran[:6] == list("abcdef")


def test_a_view_sees_every_step(tmp_path: Path) -> None:
    view = RecordingView()
    _run(tmp_path, [job("a")], view=view)
    assert view.stages == [("a", "running"), ("a", "running"), ("a", "running"), ("a", "passed")]
    assert view.closings == 1


def _gated(*gates: str) -> Job:
    recipe = {"version": 1, "passes": [{"quantize": {}}], "gates": list(gates)}
    return Job("a", "optimize", "/models/a", "a", "w4", {"recipe": recipe})


def _report(after: float) -> dict[str, Any]:
    return {
        "schema": "effcli.eval/1",
        "quality": {"perplexity": {"before": 10.0, "after": after}, "kl": {"mean": 0.02}, "top1_agreement": 0.9},
    }


def test_gates_alone_are_held_against_the_saved_report(tmp_path: Path) -> None:
    first = FakeEngine(report=lambda item: _report(10.2))
    _run(tmp_path, [_gated("ppl<=+5%")], first)
    run, engine = _run(tmp_path, [_gated("ppl<=+3%", "kl<=0.1")])
    assert _stages(run) == {"a": "kept"}
    run, engine = _run(tmp_path, [_gated("ppl<=+1%")])
    assert (engine.ran, _stages(run), run.exit_code) == ([], {"a": "gate-failed"}, 3)
    assert _message(run, "a").startswith("gate 'ppl<=+1%' failed: perplexity rose by 2 %")
    run, engine = _run(tmp_path, [_gated("ppl<=+5%")])
    assert _stages(run) == {"a": "kept"}
    run, engine = _run(tmp_path, [_gated("accuracy>=0.5")], FakeEngine(report=lambda item: _report(10.2)))
    assert engine.ran == ["a"], "what was not measured has to be"


def test_the_drivers_memory_does_not_grow_with_events(tmp_path: Path) -> None:
    class Chatty(FakeEngine):
        def _say(self, item: Job, kind: Any, **more: Any) -> None:
            for _ in range(200 if kind == "progress" else 1):
                super()._say(item, kind, **more)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            _run(tmp_path / str(count), [job(f"j{number}") for number in range(count)], Chatty())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(5)
    per_job = (peak(120) - peak(20)) / 100
    assert per_job < 8_000


def test_dry_run_says_what_runs_why_where_and_how_long(tmp_path: Path) -> None:
    jobs = [job("good"), job("broke"), job("model"), job("gone"), job("never"), job("after", needs=("never",))]
    made = Job("w4.quick", "call", "", "w4", "quick", model_from="model", needs=("model",))
    kept = Job("kept.quick", "call", "", "good", "quick", model_from="good", needs=("good",))
    assert driver.dry_run([job("a")], str(tmp_path), FakeEngine(), fingerprints=WordFingerprints()) == [
        "a: runs (new); cpu, 2.1 GB; time not known",
        "1 job: 1 to run; how long is not known",
    ]
    assert list(tmp_path.iterdir()) == []
    _run(tmp_path, [*jobs, made, kept], FakeEngine({"broke": [failed()]}))
    shutil.rmtree(tmp_path / "gone")
    before = (tmp_path / STATE_FOLDER / "journal.jsonl").read_bytes()
    engine = FakeEngine(never={"never": "no GPU is here"})
    search = Countdown(3, 1)
    prints = WordFingerprints({"model": "other", "never": "x", "nope": "missing"})
    lines = driver.dry_run(
        [*jobs, made, kept, job("nope")], str(tmp_path), engine, fingerprints=prints, sources=[search]
    )
    assert lines == [
        "good: kept",
        "broke: runs (failed before: it broke; mend it); cpu, 2.1 GB; time not known",
        "model: runs (changed: model); cpu, 2.1 GB; about 2.00 s",
        "gone: runs (its output 'gone/result.json' is gone or was changed); cpu, 2.1 GB; about 2.00 s",
        "never: cannot run: no GPU is here",
        "after: is skipped: needs 'never', which cannot run",
        "w4.quick: runs (its model, the output of 'model', is made again); cpu, 2.1 GB; about 2.00 s",
        "kept.quick: kept",
        "nope: cannot run: no model at '/models/nope'; check the path",
        "countdown: a search; its jobs come from its results",
        "9 jobs: 2 kept, 4 to run, 3 that cannot; about 6.00 s of work, and 1 whose time is not known",
    ]
    assert engine.ran == []
    assert (tmp_path / STATE_FOLDER / "journal.jsonl").read_bytes() == before


def test_a_job_is_kept_while_what_it_ran_on_is_among_what_there_is(tmp_path: Path) -> None:
    """Workers differ: the journal has the device that a job ran on, and any that it may run on now is good enough."""
    old, new, other = ({"type": "cuda", "name": name} for name in ("A100", "H100", "L40S"))

    def run(*there: dict[str, str]) -> tuple[list[str], list[str]]:
        def device_class(asked: Job) -> Mapping[str, Any]:
            if asked.name in engine.ran:
                return there[0]
            return there[0] if len(there) == 1 else {"any_of": list(there)}

        engine = FakeEngine()
        called = Job("a", "call", "", "", "part", {"function": "x:y", "arguments": {}})
        done, _ = _run(tmp_path, [called], engine, Fingerprints(device_class=device_class))
        return [state.stage for state in done.states], engine.ran

    assert run(old, new) == (["passed"], ["a"])
    assert run(new, old) == run(old) == run(other, old) == (["kept"], [])
    assert run(new) == (["passed"], ["a"])
    assert run(old) == (["passed"], ["a"])
