"""A batch that is killed at any moment goes on when it is run again; longer: ``tests.benchmarks.kill_batch``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from effcli.batch.model import STATE_FOLDER
from tests.effcli.batch.killable import JOBS, work
from tests.effcli.batch.killing import Killer, check, descendants

SEED = 7
KILLS = 6


@pytest.mark.slow
def test_a_batch_that_is_killed_at_random_makes_what_an_undisturbed_one_makes(tmp_path: Path) -> None:
    killer = Killer(tmp_path / "runs", None, random.Random(SEED), longest_seconds=1.5)
    killer.kill(KILLS)
    assert killer.killed["driver"] and killer.killed["worker"], "a fast machine ends it before all six"
    stages = json.loads(killer.finish().splitlines()[0])
    assert set(stages.values()) <= {"kept", "passed"}
    check(tmp_path / "runs", {f"call-{number}" for number in range(JOBS)})
    for number in range(JOBS):
        assert json.loads((tmp_path / "runs" / f"call-{number}" / "result.json").read_text()) == work(number, 0.0)
    journal = (tmp_path / "runs" / STATE_FOLDER / "journal.jsonl").read_text()
    assert set(json.loads(killer.finish(tries=1).splitlines()[0]).values()) == {"kept"}
    again = (tmp_path / "runs" / STATE_FOLDER / "journal.jsonl").read_text()
    assert len(again) <= len(journal), "nothing ran, and what no longer matters is dropped"


def _holder(killer: Killer) -> subprocess.Popen[str]:
    """Start a batch and wait until it holds its output."""
    batch = killer.start()
    until = time.monotonic() + 30
    while not (killer.output / STATE_FOLDER / "lock.json").exists() or not descendants(batch.pid):
        assert time.monotonic() < until and batch.poll() is None
        time.sleep(0.05)
    return batch


def test_a_second_driver_is_refused_and_kill_9_or_ctrl_c_of_the_first_lets_the_next_one_in(tmp_path: Path) -> None:
    killer = Killer(tmp_path / "runs", None, random.Random(SEED), 0.0)
    first = _holder(killer)
    second = killer.start()
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"in use by another batch (process {first.pid} on " in said
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    (tmp_path / "runs" / STATE_FOLDER / "lock.json").unlink()
    third = _holder(killer)
    workers = descendants(third.pid)
    third.send_signal(signal.SIGINT)
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 130
    assert f"of {JOBS} jobs are finished and kept in '{killer.output}': run the same command again to go on" in said
    assert not any(process.is_running() for process in workers)
