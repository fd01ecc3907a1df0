"""What ``effcli batch`` costs beyond its jobs, whether its driver grows, and what a second worker brings."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from effcli.batch import driver
from effcli.batch.fingerprint import Fingerprints
from effcli.batch.local import LocalEngine
from effcli.batch.model import Event, Job, JobState
from tests.conftest import save_tiny

JOBS = 200
MOST_OVERHEAD_SECONDS = 0.05
MOST_GROWTH_BYTES = 5e6
"""Of the driver, from its 20th job to its last."""
LEAST_SPEEDUP = 1.6
PARTS, NUMBERS = 8, 40_000_000
FUNCTIONS = "tests.effcli.batch.job_functions"


class Memory:
    """A view that shows nothing and notes what the driver holds whenever a job ends."""

    def __init__(self) -> None:
        self.resident_bytes: list[int] = []

    def opened(self, states: Sequence[JobState], workers: Sequence[str]) -> None:
        return None

    def added(self, state: JobState) -> None:
        return None

    def changed(self, state: JobState, event: Event | None) -> None:
        if state.stage == "passed":
            self.resident_bytes.append(psutil.Process().memory_info().rss)

    def closed(self) -> None:
        return None


def busy() -> dict[str, float]:
    """Return how much of the machine other programs use, as reports of times need it."""
    return {"others_use_of_cores": psutil.cpu_percent(2.0) / 100, "load_average": os.getloadavg()[0]}


def bench_overhead() -> dict[str, object]:
    """Profile a tiny model 200 times with one worker; the first job, which starts it, is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny("llama", Path(folder) / "tiny")
        jobs = [
            Job(f"tiny.kv-{number}", "profile", str(model), "tiny", "kv", {"only": ["kv"], "context": [32]})
            for number in range(JOBS + 1)
        ]
        memory, others = Memory(), busy()
        started = time.perf_counter()
        engine = LocalEngine(workers=1, threads=1)
        run = driver.run(jobs, str(Path(folder) / "runs"), engine, fingerprints=Fingerprints(), view=memory)
        wall = time.perf_counter() - started
    assert run.exit_code == 0
    first, *counted = sorted(run.states, key=lambda state: state.ended or 0.0)
    assert first.ended is not None and counted[-1].ended is not None
    in_jobs = sum(state.outcome.seconds for state in counted if state.outcome is not None)
    overhead = (counted[-1].ended - first.ended - in_jobs) / len(counted)
    growth = memory.resident_bytes[-1] - memory.resident_bytes[20]
    return {
        "benchmark": "batch_overhead",
        "jobs": len(counted),
        "wall_seconds": wall,
        "job_seconds": in_jobs / len(counted),
        "overhead_seconds_per_job": overhead,
        "driver_resident_bytes": memory.resident_bytes[-1],
        "driver_growth_bytes": growth,
        **others,
        "must_reach": f"overhead < {MOST_OVERHEAD_SECONDS} s a job, driver grows < {MOST_GROWTH_BYTES:.0f} bytes",
        "reached": overhead < MOST_OVERHEAD_SECONDS and growth < MOST_GROWTH_BYTES,
    }


def seconds_of(workers: int, folder: Path) -> float:
    """Return the time that independent one-thread jobs take on warm workers."""
    with LocalEngine(workers=workers, threads=1) as engine:

        def run(jobs: list[Job]) -> None:
            waiting, ended = list(jobs), 0
            while ended < len(jobs):
                while waiting and engine.offer(waiting[0], str(folder), str(folder / "log"), 1):
                    waiting.pop(0)
                ended += sum(event.kind == "finished" for event in engine.events(1.0))

        run([_call(f"warm-{number}", "wait", seconds=1.0) for number in range(workers)])
        started = time.perf_counter()
        run([_call(f"part-{number}", "count", numbers=NUMBERS) for number in range(PARTS)])
        return time.perf_counter() - started


def _call(name: str, function: str, **arguments: float) -> Job:
    return Job(name, "call", "", "", "", {"function": f"{FUNCTIONS}:{function}", "arguments": arguments})


def bench_two_workers() -> dict[str, object]:
    """Time independent jobs on one worker and on two; interleaved, the best of two."""
    others = busy()
    with tempfile.TemporaryDirectory() as folder:
        times: dict[int, list[float]] = {1: [], 2: []}
        for workers in (1, 2, 1, 2):
            times[workers].append(seconds_of(workers, Path(folder)))
    one, two = min(times[1]), min(times[2])
    return {
        "benchmark": "batch_two_workers",
        "one_worker_seconds": one,
        "two_workers_seconds": two,
        "speedup": one / two,
        "cores": os.cpu_count(),
        **others,
        "must_reach": f">= {LEAST_SPEEDUP} on a quiet machine of 2 cores",
        "reached": one / two >= LEAST_SPEEDUP,
    }


def main() -> None:
    """Print one JSON line a benchmark."""
    for bench in (bench_overhead, bench_two_workers):
        print(json.dumps(bench()), flush=True)


if __name__ == "__main__":
    main()
