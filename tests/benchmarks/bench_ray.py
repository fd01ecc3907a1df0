"""Two Ray workers against one on independent jobs of one thread, on a real cluster of this machine."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from effcli.batch.model import Job, Limits
from effcli.batch.ray_engine import RayEngine

JOBS, LOOPS, ROUNDS = 8, 12_000_000, 3
MUST_REACH = 1.6


def jobs(name: str) -> list[Job]:
    """Return jobs of about a second each."""
    settings = {"function": "tests.effcli.batch.ray_jobs:compute", "arguments": {"loops": LOOPS}}
    limits = Limits(memory_bytes=10**9)
    return [Job(f"{name}-{n}", "call", "", "none", "compute", settings, limits=limits) for n in range(JOBS)]


def run(engine: RayEngine, waiting: list[Job], output: Path, workers: int) -> float:
    """Run jobs, so many at once, and return the seconds that it took."""
    started, running = time.perf_counter(), 0
    waiting = list(waiting)
    while waiting or running:
        while waiting and running < workers:
            if not engine.offer(waiting[0], str(output), f"{output}/{waiting[0].name}.log", 1):
                break
            waiting.pop(0)
            running += 1
        for event in engine.events(1.0):
            if event.kind in ("finished", "lost"):
                assert event.outcome is not None and event.outcome.status == "passed", event
                running -= 1
    return time.perf_counter() - started


def main() -> None:
    """Print one line: medians of rounds that alternate, and how busy the machine was before them."""
    with tempfile.TemporaryDirectory() as folder, RayEngine(None) as engine:
        run(engine, jobs("warm"), Path(folder), 2)  # both workers have imported what jobs need
        busy = psutil.cpu_percent(interval=2.0)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for index in range(ROUNDS):
            for workers, found in seconds.items():
                found.append(run(engine, jobs(f"r{index}-{workers}"), Path(folder), workers))
    one, two = (statistics.median(found) for found in seconds.values())
    line = {
        "benchmark": "ray",
        "jobs": JOBS,
        "one_worker_seconds": one,
        "two_workers_seconds": two,
        "speed_up": one / two,
        "cores": psutil.cpu_count(),
        "busy_percent_before": busy,
        "must_reach": f">= {MUST_REACH} on two cores that nothing else uses",
        "reached": one / two >= MUST_REACH,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
