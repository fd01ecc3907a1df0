"""Kill a batch of twenty jobs again and again with signal 9, and compare what it makes with an undisturbed run.

``python -m tests.benchmarks.kill_batch --kills 50 --rounds 2``: in every round a new output, kills at random moments
(the driver every other time, else a worker or what a worker has started), then the same command until it ends, then
the comparison; the last line is the result as JSON. It takes about twenty minutes. With ``--ray`` the batch runs on a
cluster of three nodes, and worker, driver and node are killed in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.conftest import save_tiny
from tests.effcli.batch.killable import JOBS, calls, jobs
from tests.effcli.batch.killing import Killer, RayKiller, check, results


def main() -> int:
    """Run all rounds; return 0 if every output is as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=20.0, help="seconds between two kills at most")
    parser.add_argument("--calls", action="store_true", help="only calls of a function: no model, much faster")
    parser.add_argument("--keep", type=Path, help="folder for the model and the outputs, to go on with what is there")
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster of three nodes, which are killed too")
    given = parser.parse_args()
    names = {job.name for job in (calls(JOBS) if given.calls else jobs(""))}
    with contextlib.ExitStack() as stack:
        here = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kill-batch-")))
        model = None if given.calls else here / "model"
        if model is not None and not model.is_dir():
            save_tiny("llama", model)
        undisturbed = Killer(here / "undisturbed", model, random.Random(), 0.0)
        undisturbed.finish(tries=1)
        expected = results(here / "undisturbed")
        make = stack.enter_context(_on_ray()) if given.ray else Killer
        killed: Counter[str] = Counter()
        rounds, runs, started = 0, 0, time.monotonic()
        while killed.total() < given.kills:  # a round has fewer where the batch ends before
            output = here / f"round-{rounds}"
            killer = make(output, model, random.Random(given.seed + rounds), given.longest)
            killer.kill(min(given.kills // given.rounds, given.kills - killed.total()))
            killed.update(killer.killed)
            _say(f"round {rounds}: {killer.killed}, {time.monotonic() - started:.0f} s")
            killer.finish()
            check(output, names)
            found = results(output)
            differs = sorted(name for name in {*expected, *found} if expected.get(name, 1) != found.get(name, 1))
            if differs:
                _say(f"round {rounds} differs: {', '.join(differs)}")
                return 1
            rounds += 1
            runs += killer.runs
        seconds = round(time.monotonic() - started)
        found_equal = {"equal": True, "jobs": len(names), "files": len(expected)}
        told = {"kills": killed.total(), "killed": killed, "rounds": rounds, "runs": runs, "seconds": seconds}
        _say(json.dumps(told | found_equal))
    return 0


@contextlib.contextmanager
def _on_ray() -> Iterator[Callable[..., Killer]]:
    """Start a cluster and yield what makes a killer on it."""
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    quick = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0, "_system_config": quick})
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(3)]
    try:
        yield partial(RayKiller, cluster=cluster, nodes=nodes, add=lambda: cluster.add_node(num_cpus=1, **small))
    finally:
        cluster.shutdown()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
