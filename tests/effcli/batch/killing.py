"""Kill a batch at random with signal 9, run it again until it ends, and look at what it left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from effcli.batch import journal
from effcli.batch.model import STATE_FOLDER
from effcli.checkpoint_files import sha256_of

_ROOT = Path(__file__).parents[3]
_DRIVER, _WORKER, _HELPER, _NODE = "driver", "worker", "its measuring process", "Ray node"


@dataclass
class Killer:
    """Runs :mod:`tests.effcli.batch.killable` and kills it.

    Parameters
    ----------
    output : Path
    model : Path or None
        None for the batch that needs none.
    random : random.Random
    longest_seconds : float
        Between two kills.
    """

    output: Path
    model: Path | None
    random: random.Random
    longest_seconds: float
    killed: dict[str, int] = field(default_factory=lambda: dict.fromkeys((_DRIVER, _WORKER, _HELPER, _NODE), 0))
    runs: int = 0
    _staged: dict[str, set[str]] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[str]:
        """Start the batch as a process."""
        self.runs += 1
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.effcli.batch.killable",
                str(self.output),
                *map(str, filter(None, [self.model])),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | self.where(),
        )

    def where(self) -> dict[str, str]:
        """Return the variables that say where the batch runs."""
        return {}

    @property
    def kills(self) -> int:
        """Say how often something was killed so far."""
        return sum(self.killed.values())

    def kill(self, times: int) -> None:
        """Kill at random moments until that was so often, or until the batch has ended."""
        until = self.kills + times
        while self.kills < until:
            with self._running() as batch:
                while self.kills < until:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        batch.wait(self.random.uniform(0.0, self.longest_seconds))
                    self._check_staged()
                    if batch.returncode == 0:
                        return
                    if batch.returncode is not None or self._kill_one(batch.pid) == _DRIVER:
                        break  # and run it again; it ends by itself, with 1, where a job lost its worker too often

    def finish(self, tries: int = 3) -> str:
        """Run the batch, undisturbed, until all of it has passed; return what the last run said."""
        for _ in range(tries):
            batch = self.start()
            said, errors = batch.communicate(timeout=900)
            if batch.returncode == 0:
                return said
        raise AssertionError(f"the batch does not end: {said}{errors}")

    @contextlib.contextmanager
    def _running(self) -> Iterator[subprocess.Popen[str]]:
        batch = self.start()
        try:
            yield batch
        finally:
            started = descendants(batch.pid)
            batch.kill()
            batch.communicate()
            _, alive = psutil.wait_procs(started, timeout=20)
            assert not alive, f"outlive a driver that was killed: {[process.cmdline() for process in alive]}"

    def _check_staged(self) -> None:
        """Check that no pass that was once finished had to be done again."""
        now: dict[str, set[str]] = {}
        for path in self.output.glob(".*.effcli/state.json"):
            with contextlib.suppress(FileNotFoundError):  # published meanwhile
                now[path.parent.name[1:].removesuffix(".effcli")] = set(json.loads(path.read_text())["stages"])
        for name, stages in self._staged.items():
            lost = stages - now.get(name, set())
            assert not lost or (self.output / name).is_dir(), f"{name} lost its finished {lost}"
        self._staged = now

    def _kill_one(self, driver: int) -> str | None:
        """Kill a worker, or what one has started, and every other time the driver."""
        below, process, what = descendants(driver), psutil.Process(driver), _DRIVER
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.kills % 2 == 0:
                if not below:
                    return None
                process = self.random.choice(below)
                what = _WORKER if process.ppid() == driver else _HELPER
            process.kill()
            self.killed[what] += 1
            return what
        return None


@dataclass
class RayKiller(Killer):
    """Runs the batch on a Ray cluster of three nodes; kills drivers, workers and whole nodes in turn.

    Parameters
    ----------
    cluster : ray.cluster_utils.Cluster
        With a head without CPUs; a node that is killed is replaced.
    nodes : list
        Of the cluster, without its head.
    add : callable
        Starts a node.
    """

    cluster: Any = None
    nodes: list[Any] = field(default_factory=list)
    add: Callable[[], Any] | None = None

    def where(self) -> dict[str, str]:
        """Return the variable that names the cluster."""
        return {"KILLABLE_ON": self.cluster.address}

    def _kill_one(self, driver: int) -> str | None:
        what = (_WORKER, _DRIVER, _NODE)[self.kills % 3]
        with contextlib.suppress(psutil.NoSuchProcess):
            if what == _NODE:
                assert self.add is not None
                gone = self.nodes.pop(self.random.randrange(len(self.nodes)))
                self.cluster.remove_node(gone, allow_graceful=False)
                self.nodes.append(self.add())
            elif what == _DRIVER:
                psutil.Process(driver).kill()
            else:
                raylets = [node.all_processes["raylet"][0].process.pid for node in self.nodes]
                workers = [
                    process
                    for raylet in raylets
                    for process in descendants(raylet)
                    if "effcli.batch.worker" in " ".join(process.cmdline())
                ]
                if not workers:
                    return None
                self.random.choice(workers).kill()
            self.killed[what] += 1
            return what
        return None


def descendants(pid: int) -> list[psutil.Process]:
    """Return the processes that a process has started, and those that they have."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def check(output: Path, names: set[str]) -> None:
    """Check that every job has exactly one finished output, that nothing half-done is left, and that all is noted."""
    assert {item.name for item in output.iterdir()} == names | {STATE_FOLDER}
    state = output / STATE_FOLDER
    assert {item.name for item in state.iterdir()} == {"journal.jsonl", "lock", "logs"}
    records = journal.read(state)
    assert set(records) == names
    for name, record in records.items():
        assert record.passed is not None and record.passed.outcome is not None, name
        assert record.passed.outcome.report is not None, name
        assert sha256_of(output / record.passed.outcome.report) == record.passed.outcome.report_sha256, name


def results(output: Path) -> dict[str, object]:
    """Return what does not depend on when and how fast a job ran: results of calls, weights, measured sizes."""
    found: dict[str, object] = {}
    for path in sorted(output.glob("*/*")):
        if path.parent.name == STATE_FOLDER:
            continue
        name = f"{path.parent.name}/{path.name}"
        if path.suffix == ".safetensors" or path.name in ("result.json", "config.json", "tokenizer.json"):
            found[name] = path.read_bytes()
        elif path.name == "report.json":
            report = json.loads(path.read_text(encoding="utf-8"))
            found[name] = (report["schema"], (report.get("profiles") or {}).get("kv"), report.get("size"))
        else:
            found[name] = None  # pages and notes hold times; that they are there is what counts
    return found
