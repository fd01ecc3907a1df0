"""What a batch shows while it runs: drawn on recorded consoles of a known size, written to a string."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console

from effcli.batch.live import Estimates, LineView, TableView
from effcli.batch.model import Event, JobState, Outcome

from . import states

NOW = states.START + 200


def drawn(jobs: list[JobState], width: int = 120, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    view = TableView(console, now=lambda: NOW)
    view.opened(jobs, ("local 0: cpu",))
    view.closed()
    with console.capture() as capture:
        console.print(view.picture())
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_table_shows_every_job_and_what_the_running_one_does() -> None:
    lines = drawn(states.batch())
    assert lines[0].split() == ["job", "stage", "step", "progress", "memory", "GPU", "time", "left"]
    running = next(line for line in lines if line.startswith("big.w4"))
    # The one optimize that passed and the one that missed a gate took 84.2 s and 80 s; this one runs for 110 s.
    assert running.split() == [
        "big.w4",
        "running",
        "(2)",
        "pass:",
        "quantize",
        "━" * 8,
        "2.10",
        "GB",
        "7.30",
        "GB",
        "01:50",
    ]
    assert next(line for line in lines if line.startswith("smol.w3")).split()[1:4] == ["failed", "a", "gate"]
    assert lines[-2].startswith("1 running · 1 failed · 1 failed a gate · 1 waiting · 1 passed")
    assert lines[-1] == "5 of 7 jobs done · 00:00 so far · about 00:12 left"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 50)])
def test_the_table_fits_its_screen_and_running_jobs_come_first(width: int, height: int) -> None:
    waiting = states.batch()[-1]
    many = [replace(waiting, job=replace(waiting.job, name=f"job-{index:04}")) for index in range(1000)]
    many[777] = replace(states.batch()[5], job=many[777].job)
    lines = drawn(many, width, height)
    assert len(lines) < height and all(len(line) <= width for line in lines)
    assert lines[1].startswith("job-0777" if width > 40 else "job-0")
    assert "running" in lines[1]
    assert "1 running · 999 waiting" in lines[-2]


def test_a_frame_of_a_thousand_jobs_is_cheap() -> None:
    many = [
        replace(state, job=replace(state.job, name=f"{index}.{state.job.name}"))
        for index in range(143)
        for state in states.batch()
    ]
    console = Console(file=io.StringIO(), width=120, height=40, force_terminal=True)
    view = TableView(console)
    view._states = many
    began = time.process_time()
    for _ in range(5):
        console.print(view.picture())
    assert (time.process_time() - began) / 5 < 0.1  # of the half second between two frames


def test_time_left_comes_from_the_jobs_most_alike() -> None:
    jobs = states.batch()
    estimates = Estimates(jobs)
    assert estimates.expected_seconds(jobs[0].job) == pytest.approx((84.2 + 80) / 2)  # the same model and recipe
    assert estimates.expected_seconds(jobs[5].job) == pytest.approx((84.2 + 80) / 2)  # the same kind
    assert estimates.expected_seconds(jobs[4].job) is None  # no export has finished
    assert estimates.seconds_left(jobs[5], NOW) == 0.0
    assert estimates.seconds_left(jobs[5], states.START + 100) == pytest.approx((84.2 + 80) / 2 - 10)
    assert estimates.batch_seconds_left(jobs, NOW) == pytest.approx(12.0)
    alone = replace(jobs[5], job=replace(jobs[5].job, kind="export"), done=0.25)
    assert estimates.seconds_left(alone, states.START + 110) == pytest.approx(60)  # 20 s for the first quarter
    assert estimates.seconds_left(replace(alone, done=0.02), NOW) is None
    export = replace(jobs[4], stage="waiting", outcome=None)
    assert Estimates(jobs).batch_seconds_left([*jobs, export], NOW) is None


def test_a_line_a_change_and_none_for_progress() -> None:
    stream = io.StringIO()
    view = LineView(stream, now=lambda: states.START)
    kept, state = states.batch()[1], states.batch()[-1]
    view.opened([kept, state], ("local 0: cpu, 1 thread",))
    view.changed(kept, None)

    def event(kind: str, **more: object) -> Event:
        return Event(state.job.name, kind, "local 0", states.START, **more)  # type: ignore[arg-type]

    state.stage, state.attempt = "running", 1
    view.changed(state, None)  # offered; on which worker is known when it starts
    state.worker = "local 0 (pid 7)"
    view.changed(state, event("started"))
    for _ in range(50):
        view.changed(state, event("progress", stage="latency", done=0.5))
    state.stage = "waiting"
    view.changed(state, event("lost", reason="killed by signal 9"))
    state.stage, state.attempt = "running", 2
    view.changed(state, event("started"))
    state.stage, state.outcome = "failed", Outcome("failed", "out of\nmemory", exit_code=4, seconds=3.0)
    view.changed(state, event("finished"))
    view.closed()
    stamps = {line[:19] for line in stream.getvalue().splitlines()}
    assert len(stamps) == 1 and len(stamps.pop().split(":")) == 3
    assert [line[20:] for line in stream.getvalue().splitlines()] == [
        "2 jobs",
        "worker: local 0: cpu, 1 thread",
        "[1/2] kept smol.quick",
        "[1/2] running big.quick on local 0 (pid 7)",
        "[1/2] lost big.quick: killed by signal 9",
        "[1/2] running big.quick, attempt 2 on local 0 (pid 7)",
        "[2/2] failed big.quick in 3.00 s: out of memory",
    ]
