"""What a batch shows while it runs: a table of jobs on a terminal, a line for each change anywhere else.

Both read the driver's live :class:`effcli.batch.model.JobState` objects and write to stderr only.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, TextIO

from effcli.batch.model import Event, Job, JobState, Stage
from effcli.cli.output import perhaps_unread
from effcli.formatting import data_size, duration, percent, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

    from effcli.batch.engine import View

FRAMES_PER_SECOND = 2
MOST_ROWS = 25  # rich takes most of a millisecond for one, of the driver's time
LEAST_SHARE = 0.1  # of a job: what it has taken until then says little of the rest
COUNT_LINES = 3  # below the rows, and the heading above them
WORDS: dict[Stage, str] = {"gate-failed": "failed a gate"}
STYLES: dict[Stage, str] = {
    "running": "bold cyan",
    "passed": "green",
    "kept": "green",
    "failed": "bold red",
    "gate-failed": "bold red",
    "waiting": "dim",
    "skipped": "dim",
}
# What is shown first where not every job has room.
RANKS: tuple[Stage, ...] = ("running", "failed", "gate-failed", "waiting", "passed", "skipped", "kept")
OPEN: tuple[Stage, ...] = ("waiting", "running")


def view_for(*, quiet: bool) -> View:
    """Return what shows a batch here: a table where stderr is a terminal, else lines, or nothing."""
    if quiet:
        return Views()
    if not sys.stderr.isatty():
        return LineView(sys.stderr)
    from rich.console import Console

    return TableView(Console(stderr=True))


class Views:
    """Several views as one; none is a silent one."""

    def __init__(self, *views: View) -> None:
        self._views = views

    def opened(self, states: Sequence[JobState], workers: Sequence[str]) -> None:
        """Tell every view."""
        for view in self._views:
            view.opened(states, workers)

    def added(self, state: JobState) -> None:
        """Tell every view."""
        for view in self._views:
            view.added(state)

    def changed(self, state: JobState, event: Event | None) -> None:
        """Tell every view."""
        for view in self._views:
            view.changed(state, event)

    def closed(self) -> None:
        """Tell every view."""
        for view in self._views:
            view.closed()


class LineView:
    """One line a change of stage, with the time; progress inside a job is left out.

    Parameters
    ----------
    stream : file
    now : callable
        Seconds since the epoch.
    """

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.time) -> None:
        self._stream, self._now = stream, now
        self._jobs = self._done = 0

    def opened(self, states: Sequence[JobState], workers: Sequence[str]) -> None:
        """Say how much there is to do, and where."""
        self._say(_jobs(len(states)))
        for worker in workers:
            self._say(f"worker: {worker}")
        self._jobs = len(states)

    def added(self, state: JobState) -> None:
        """Count a job more; it gets a line when it starts."""
        self._jobs += 1

    def changed(self, state: JobState, event: Event | None) -> None:
        """Write a line if the job started, has lost its worker, or has ended."""
        name, kind = state.job.name, event.kind if event is not None else None
        if event is not None and kind == "lost":
            self._say(f"lost {name}: {event.reason or 'its worker is gone'}")
        if state.stage not in OPEN:
            self._done += 1
            self._say(f"{WORDS.get(state.stage, state.stage)} {name}{_ending(state)}")
        elif kind == "started":
            again = f", attempt {state.attempt}" if state.attempt > 1 else ""
            self._say(f"running {name}{again} on {state.worker}")

    def closed(self) -> None:
        """Do nothing: every line is written already."""

    def _say(self, line: str) -> None:
        stamp = datetime.fromtimestamp(self._now()).isoformat(" ", "seconds")
        count = f" [{self._done}/{self._jobs}]" if self._jobs else ""
        with perhaps_unread(self._stream):
            self._stream.write(f"{stamp}{count} {printable(line)}\n")


def _ending(state: JobState) -> str:
    """Return what a line says after the name of a job that has ended."""
    if state.outcome is None or state.stage == "kept":
        return ""
    took = f" in {duration(state.outcome.seconds)}" if state.outcome.seconds else ""
    return f"{took}: {state.outcome.message}"


def _jobs(count: int) -> str:
    return f"{count:,} job{'' if count == 1 else 's'}"


class Estimates:
    """How long jobs take, from those that have finished, in this run or in an earlier one."""

    def __init__(self, states: Sequence[JobState]) -> None:
        self._times: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for state in states:
            if state.outcome is not None and state.stage in ("passed", "gate-failed", "kept"):
                for key in _keys(state.job):
                    self._times[key][0] += state.outcome.seconds
                    self._times[key][1] += 1

    def expected_seconds(self, job: Job) -> float | None:
        """Return the mean time of the finished jobs that are most like this one, None where none is of its kind."""
        for key in _keys(job):
            if key in self._times:
                total, count = self._times[key]
                return total / count
        return None

    def seconds_left(self, state: JobState, now: float) -> float | None:
        """Return how long a job still needs: from jobs like it, else from its own progress; None where neither says."""
        running = state.stage == "running" and state.started is not None
        spent = now - state.started if running and state.started is not None else 0.0
        expected = self.expected_seconds(state.job)
        if expected is None and running and state.done is not None and state.done >= LEAST_SHARE:
            expected = spent / state.done
        return None if expected is None else max(0.0, expected - spent)

    def batch_seconds_left(self, states: Sequence[JobState], now: float) -> float | None:
        """Return how long the rest takes if as many jobs run side by side as now, None until each kind was seen."""
        open_ = [state for state in states if state.stage in OPEN]
        left = [seconds for state in open_ if (seconds := self.seconds_left(state, now)) is not None]
        if not left or len(left) < len(open_):
            return None
        running = sum(state.stage == "running" for state in open_)
        return max(sum(left) / max(1, running), max(left))


def _keys(job: Job) -> tuple[tuple[str, ...], ...]:
    """Return what makes jobs alike, the closest first."""
    return (job.kind, job.part, job.model_name, job.device), (job.kind, job.model_name), (job.kind,)


class TableView:
    """A table that redraws itself below whatever else the terminal shows, and is gone when the batch ends.

    Parameters
    ----------
    console : rich.console.Console
    now : callable
        Seconds since the epoch.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.time) -> None:
        self._console, self._now = console, now
        self._states: list[JobState] = []
        self._live: Live | None = None
        self._started = 0.0

    def opened(self, states: Sequence[JobState], workers: Sequence[str]) -> None:
        """Start drawing."""
        from rich.live import Live

        self._states = list(states)
        self._started = self._now()
        self._live = Live(
            get_renderable=self.picture,
            console=self._console,
            refresh_per_second=FRAMES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def added(self, state: JobState) -> None:
        """Take in a job that a search made."""
        self._states.append(state)

    def changed(self, state: JobState, event: Event | None) -> None:
        """Do nothing: the next frame reads the states."""

    def closed(self) -> None:
        """Clear the table."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def picture(self) -> RenderableType:
        """Return what the terminal shows now."""
        from rich.console import Group
        from rich.text import Text

        now, states = self._now(), list(self._states)
        estimates = Estimates(states)
        room = max(1, min(MOST_ROWS, self._console.height - COUNT_LINES - 2))
        shown = states
        if len(states) > room:
            shown = sorted(states, key=lambda state: RANKS.index(state.stage))[:room]
        stages = Counter(state.stage for state in states)
        counts = Text(" · ", no_wrap=True, overflow="ellipsis").join(
            Text(f"{stages[stage]:,} {WORDS.get(stage, stage)}", style=STYLES[stage])
            for stage in RANKS
            if stages[stage]
        )
        done = len(states) - sum(stages[stage] for stage in OPEN)
        line = f"{done:,} of {_jobs(len(states))} done · {_clock(now - self._started)} so far"
        left = estimates.batch_seconds_left(states, now)
        if left is not None:
            line += f" · about {_clock(left)} left"
        return Group(self._table(shown, estimates, now), Text(), counts, Text(line, no_wrap=True, overflow="ellipsis"))

    def _table(self, states: Sequence[JobState], estimates: Estimates, now: float) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        on_gpu = any(state.gpu_memory_bytes is not None for state in states)
        wide = self._console.width >= 100
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        table.add_column("job", no_wrap=True, overflow="ellipsis", max_width=self._console.width * 2 // 5)
        table.add_column("stage", no_wrap=True, min_width=7)
        table.add_column("step", no_wrap=True, overflow="ellipsis", ratio=1)
        if wide:
            table.add_column("progress", no_wrap=True, width=20)
        for title in ("memory", *(("GPU",) if on_gpu else ()), "time", "left"):
            table.add_column(title, no_wrap=True, justify="right")
        for state in states:
            running = state.stage == "running"
            share = min(1.0, state.done) if running and state.done is not None else None
            bar: RenderableType = "" if share is None else ProgressBar(1.0, share, width=20)
            percentage = "" if share is None or wide else f"{percent(share)} "
            left = estimates.seconds_left(state, now) if running else None
            table.add_row(
                Text(printable(state.job.name)),
                Text(_stage(state), style=STYLES[state.stage]),
                Text(percentage + printable(_step(state))),
                *((bar,) if wide else ()),
                _size(state.memory_bytes, state),
                *((_size(state.gpu_memory_bytes, state),) if on_gpu else ()),
                _clock(_spent(state, now)),
                f"~{_clock(left)}" if left else "",
            )
        return table


def _size(held: int | None, state: JobState) -> str:
    return data_size(held) if held is not None and state.stage == "running" else ""


def _clock(value: float | None) -> str:
    return "" if value is None else str(timedelta(seconds=round(value))).removeprefix("0:")


def _stage(state: JobState) -> str:
    again = f" ({state.attempt})" if state.stage == "running" and state.attempt > 1 else ""
    return WORDS.get(state.stage, state.stage) + again


def _step(state: JobState) -> str:
    if state.stage == "running":
        return state.step or ""
    return state.outcome.message if state.outcome is not None and state.stage not in ("passed", "kept") else ""


def _spent(state: JobState, now: float) -> float | None:
    if state.stage == "running":
        return now - state.started if state.started is not None else None
    return (state.outcome.seconds or None) if state.outcome is not None else None
