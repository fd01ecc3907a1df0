"""A real Ray cluster on this machine, whose nodes can be killed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_SECONDS = 300.0
STORE_BYTES = 80 * 2**20
QUICK_DEATH = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Start a head without CPUs and two nodes with one each: ``killable["a"]`` and ``["b"]``, labelled ``zone``."""
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": STORE_BYTES, "include_dashboard": False, "include_log_monitor": False}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # pytest's own folders make the paths of sockets too long
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 without; beside other work that is a standstill
        made = Cluster(initialize_head=True, head_node_args={**common, "num_cpus": 0, "_system_config": QUICK_DEATH})
        made.killable = {zone: made.add_node(num_cpus=1, labels={"zone": zone}, **common) for zone in ("a", "b")}
        yield made
        made.shutdown()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
