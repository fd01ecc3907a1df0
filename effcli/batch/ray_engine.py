"""Jobs on a Ray cluster. See ``docs/batch-ray.md``.

::

    offer(job) ──> an idle Slot that reserves enough, else a new one where a node has room ──> Slot.run(job)
    events()   <── ray.wait over the slots' streams of events
    a stream that breaks ──> is the slot dead? Ray says so ──> Event lost ──> the driver tries the job elsewhere

A slot is an actor and not a task: it keeps imports and a model warm for the next job, and while it does, its memory
and its GPU stay reserved, which those of a task that has ended are not. Ray itself retries nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from effcli.batch.machine import devices_of
from effcli.batch.memory import estimate
from effcli.batch.model import Event, Job, Outcome
from effcli.batch.ray_address import connect, said_by_ray
from effcli.batch.ray_worker import Slot, event_from, package_versions
from effcli.batch.storage import is_url
from effcli.errors import EXIT_BAD_INPUT, EXIT_BUG, BadInputError
from effcli.formatting import data_size
from effcli.reports.model import plain

IDLE_SECONDS = 60.0
"""After which a slot without a job gives its place back, to other users of the cluster."""
ASK_SECONDS = 60.0
"""How long a node may take to say what its device is; it starts a process for that."""
_ID_LETTERS = 6


@dataclass(frozen=True)
class _Need:
    """What a slot reserves."""

    cpus: float
    gpus: float
    memory_bytes: int
    labels: Mapping[str, str]

    def met_by(self, other: _Need, labels: Mapping[str, str]) -> bool:
        """Say whether a slot that reserves ``other``, on a node with these labels, can take a job that needs this."""
        same = self.gpus == other.gpus and self.cpus == other.cpus
        return same and self.memory_bytes <= other.memory_bytes and self.labels.items() <= labels.items()

    def __str__(self) -> str:
        """Return it as people read it."""
        parts = [f"{self.cpus:g} CPU", f"{self.gpus:g} GPU" if self.gpus else "", data_size(self.memory_bytes)]
        parts += [f"{name}={value}" for name, value in self.labels.items()]
        return ", ".join(part for part in parts if part)


@dataclass
class _Node:
    """A node that is alive, and what is left of it."""

    name: str
    labels: Mapping[str, str]
    cpus: float
    gpus: float
    memory_bytes: float
    death: str = ""

    def fits(self, need: _Need) -> bool:
        return (
            need.cpus <= self.cpus
            and need.gpus <= self.gpus
            and need.memory_bytes <= self.memory_bytes
            and need.labels.items() <= self.labels.items()
        )

    def take(self, need: _Need) -> None:
        self.cpus -= need.cpus
        self.gpus -= need.gpus
        self.memory_bytes -= need.memory_bytes


@dataclass
class _Slot:
    """A slot's actor as the driver sees it."""

    actor: Any
    need: _Need
    node: str | None = None
    job: Job | None = None
    stream: Any = None
    doubted: str | None = None
    """What Ray said when the stream broke while the slot may still live; ``stream`` then asks whether it does."""
    model: str | None = None
    used: float = field(default_factory=time.monotonic)


class RayEngine:
    """Runs jobs on a Ray cluster; implements :class:`effcli.batch.engine.Engine`.

    Parameters
    ----------
    address : str or None
        ``auto`` (the cluster of this machine), ``host:port``, ``ray://host:port``, or None for one that is started here
        and ends with the batch.
    workers : int, optional
        Jobs at once at most; default: as many as the nodes have room for.
    threads : int or None
        CPUs that a job reserves and computes with. None: ``OMP_NUM_THREADS`` where that is set here, else an equal
        share of the CPUs (or, for jobs on GPUs, of those beside the GPUs) between ``workers``; one where these are not
        given.
    """

    name = "ray"

    def __init__(self, address: str | None = "auto", *, workers: int | None = None, threads: int | None = 1) -> None:
        self._address, self._workers, self._threads = address, workers, threads
        self._slots: list[_Slot] = []
        self._ended: list[Event] = []
        self._connected = False
        self._memory: dict[str, int] = {}
        self._devices: dict[tuple[Any, ...], list[dict[str, str]]] = {}
        self._ran_on: dict[str, dict[str, str]] = {}
        self._versions = package_versions()

    def __enter__(self) -> Self:
        """Connect.

        Raises
        ------
        BadInputError
            If Ray is not installed, or the address does not answer.
        """
        try:
            import ray
        except ImportError:
            raise BadInputError(
                "the engine 'ray' needs the package ray, which is not installed; pip install 'effcli[ray]', or use "
                "--engine local"
            ) from None
        self._ray = ray
        if not ray.is_initialized():
            connect(self._address)
            self._connected = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            self._kill(slot)
        self._slots.clear()
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def workers(self) -> tuple[str, ...]:
        """Return one line a node."""
        return tuple(
            f"node {node.name}: {node.cpus:g} CPU, {node.gpus:g} GPU, {data_size(node.memory_bytes)}"
            + "".join(f", {name}={value}" for name, value in sorted(node.labels.items()) if not _own(name))
            for node in self._nodes().values()
        )

    def cannot_run(self, job: Job) -> str | None:
        """Say why no node that is alive can ever run the job, else None."""
        if job.gpus > 1:
            return f"it asks for {job.gpus:g} GPUs and a job runs on one; write gpus: 1, or a share of one"
        nodes, need = tuple(self._nodes().values()), self._need(job)
        if any(node.fits(need) for node in nodes):
            return None
        where = f"the Ray cluster ({len(nodes)} nodes)"
        labelled = [node for node in nodes if need.labels.items() <= node.labels.items()]
        if not labelled:
            wanted = ", ".join(f"{name}={value}" for name, value in need.labels.items())
            there = sorted(
                {f"{name}={value}" for node in nodes for name, value in node.labels.items() if not _own(name)}
            )
            return f"no node of {where} is labelled {wanted}; there are: {', '.join(there) or 'no labels'}"
        most = max(node.gpus for node in labelled)
        if need.gpus > most:
            return (
                f"it needs {need.gpus:g} GPU and no node of {where} has more than {most:g}; add such a node, or choose "
                "device cpu"
            )
        memory = max(node.memory_bytes for node in labelled)
        if need.memory_bytes > memory:
            return (
                f"it needs {data_size(need.memory_bytes)} of memory and no node of {where} has more than "
                f"{data_size(memory)}; use a smaller context, batch or dtype, or say what it takes in limits.memory"
            )
        return f"it needs {need} at once, and no node of {where} has that"

    def placement(self, job: Job) -> str:
        """Say what is reserved for the job, and on how many nodes it could run."""
        need = self._need(job)
        return f"{need}, on any of {sum(node.fits(need) for node in self._nodes().values())} nodes"

    def room_for(self, job: Job) -> int:
        """Return how many jobs like this the nodes that are alive have room for, ``workers`` at most."""
        need, found = self._need(job), 0
        for node in self._nodes().values():
            while node.fits(need):
                node.take(need)
                found += 1
        return found if self._workers is None else min(found, self._workers)

    def device_class(self, job: Job) -> Mapping[str, Any]:
        """Return what the device of the node is where a job of this run ran, else of all nodes where it may run.

        Raises
        ------
        BadInputError
            If no node answers.
        """
        if job.name in self._ran_on:
            return self._ran_on[job.name]
        gpus, labels = self._gpus(job), tuple(sorted(job.labels.items()))
        kind = "cuda" if gpus else "cpu" if job.device == "auto" else job.device.partition(":")[0]
        key = (kind, gpus, labels)
        if key not in self._devices:
            self._devices[key] = self._ask_nodes(kind, _Need(0.0, gpus, 0, job.labels))
        found = self._devices[key]
        if not found:
            return {"type": kind, "name": "not in this cluster"}
        return found[0] if len(found) == 1 else {"any_of": found}

    def _ask_nodes(self, kind: str, need: _Need) -> list[dict[str, str]]:
        """Return the devices of a type on the nodes that have what is needed; a node need not be idle to answer."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ask = self._ray.remote(devices_of)
        asked = [
            ask.options(
                num_cpus=0, num_gpus=0, max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            ).remote(kind)
            for node, has in self._nodes().items()
            if has.fits(need) and has.cpus
        ]  # fmt: skip
        if not asked:
            return []
        answered, late = self._ray.wait(asked, num_returns=len(asked), timeout=ASK_SECONDS)
        found, said = [], f"{len(late)} did not answer within {ASK_SECONDS:.0f} s"
        for reference in answered:
            try:
                found += self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                said = _not_importable(error) or said_by_ray(error)
        if not found:
            raise BadInputError(f"no node of the Ray cluster says what its '{kind}' device is: {said}")
        return sorted({tuple(device.items()): device for device in found}.values(), key=str)

    def offer(self, job: Job, output: str, log: str, attempt: int) -> bool:
        """Start the job if a node has room for it; else return False and change nothing."""
        if self._workers is not None and sum(slot.job is not None for slot in self._slots) >= self._workers:
            return False
        need = self._need(job, output)
        slot = self._slot_for(job, need)
        if slot is None:
            return False
        slot.job, slot.model = job, job.model
        # Ray has chosen the GPU, and the process sees no other.
        placed = replace(job, gpus=need.gpus, device="cuda" if job.device.startswith("cuda:") else job.device)
        slot.stream = slot.actor.run.options(num_returns="streaming").remote(
            plain(placed), output, log, attempt, self._versions
        )
        return True

    def events(self, timeout_seconds: float) -> Sequence[Event]:
        """Return what happened; wait at most this long for something to happen."""
        running = [slot for slot in self._slots if slot.job is not None]
        if not running and not self._ended:
            time.sleep(timeout_seconds)
        waiting = 0.0 if self._ended else timeout_seconds
        while running:
            ready, _ = self._ray.wait([slot.stream for slot in running], num_returns=1, timeout=waiting)
            if not ready:
                break
            waiting = 0.0
            slot = next(slot for slot in running if slot.stream == ready[0])
            self._read(slot)
            running = [other for other in running if other.job is not None and (other is not slot or not slot.doubted)]
        for slot in [slot for slot in self._slots if slot.job is None and _idle_seconds(slot) > IDLE_SECONDS]:
            self._retire(slot)
        found, self._ended = self._ended, []
        return found

    def release(self) -> None:
        """End the slots that have nothing to do."""
        for slot in [slot for slot in self._slots if slot.job is None]:
            self._retire(slot)

    def stop(self, job: str) -> None:
        """Kill a running job and its slot."""
        for slot in [slot for slot in self._slots if slot.job is not None and slot.job.name == job]:
            self._retire(slot)
        self._ended = [event for event in self._ended if event.job != job]

    def _read(self, slot: _Slot) -> None:
        """Take in what a slot's stream holds next."""
        errors = self._ray.exceptions
        assert slot.job is not None
        try:
            if slot.doubted is not None:
                self._ray.get(slot.stream)  # it lives, and its stream is lost: end it, and hear that it has ended
                self._kill(slot)
                slot.stream = slot.actor.ready.remote()
                return
            data = self._ray.get(next(slot.stream))
        except errors.ActorUnavailableError as error:
            slot.doubted = slot.doubted or said_by_ray(error)
            slot.stream = slot.actor.ready.remote()
        except (errors.RayActorError, errors.ObjectLostError) as error:
            self._lose(slot, error)
        except (errors.RayError, StopIteration) as error:
            self._end(slot, Outcome("failed", f"bug: in the Ray worker: {said_by_ray(error)}", EXIT_BUG))
        else:
            if "node" in data:
                slot.node = data["node"]
                self._ran_on[slot.job.name] = data["device"]
                return
            event = event_from(data, self._where(slot))
            self._ended.append(event)
            if event.kind in ("finished", "lost"):
                slot.job, slot.stream, slot.used = None, None, time.monotonic()

    def _lose(self, slot: _Slot, error: Exception) -> None:
        """Say that a slot is dead, which Ray has just made sure of."""
        assert slot.job is not None
        self._ran_on.pop(slot.job.name, None)
        message = _not_importable(error)
        if message is not None:
            self._end(slot, Outcome("failed", message, EXIT_BAD_INPUT))
            return
        node = self._nodes(alive=False).get(slot.node or "")
        if slot.node is not None and not self._nodes().get(slot.node):
            reason = f"{self._where(slot)} is gone{f' ({node.death})' if node is not None and node.death else ''}"
        else:
            reason = f"its Ray worker ended: {slot.doubted or said_by_ray(error)}"
        event = Event(slot.job.name, "lost", self._where(slot), time.time(), reason=reason)
        self._slots.remove(slot)
        slot.job = None
        self._ended.append(event)

    def _end(self, slot: _Slot, outcome: Outcome) -> None:
        """End a job whose slot is of no use any more."""
        assert slot.job is not None
        self._ended.append(Event(slot.job.name, "finished", self._where(slot), time.time(), outcome=outcome))
        slot.job = None
        self._retire(slot)

    def _slot_for(self, job: Job, need: _Need) -> _Slot | None:
        """Return an idle slot that will do, else a new one if a node has room; idle ones in its way are ended."""
        idle = sorted((slot for slot in self._slots if slot.job is None), key=lambda slot: slot.used)
        nodes = self._nodes()
        suited = [slot for slot in idle if slot.node in nodes and need.met_by(slot.need, nodes[slot.node].labels)]
        if suited:
            return max(suited, key=lambda slot: (slot.model == job.model, slot.used))
        kept = list(idle)
        while not self._room(need, without=idle[: len(idle) - len(kept)]):
            if not kept:
                return None
            kept.pop(0)
        for slot in idle[: len(idle) - len(kept)]:
            self._retire(slot)
        actor = (
            self._ray.remote(Slot)
            .options(
                num_cpus=need.cpus,
                num_gpus=need.gpus,
                memory=need.memory_bytes,
                label_selector=dict(need.labels),
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(int(need.cpus), need.gpus)
        )
        slot = _Slot(actor, need)
        self._slots.append(slot)
        return slot

    def _room(self, need: _Need, *, without: Sequence[_Slot]) -> bool:
        """Say whether a node has room beside the slots; Ray places them, this only keeps its queue short."""
        nodes = self._nodes()
        unplaced = []
        for slot in self._slots:
            if any(slot is other for other in without):
                continue
            if slot.node in nodes:
                nodes[slot.node].take(slot.need)
            else:
                unplaced.append(slot.need)
        for wanted in (*unplaced, need):
            node = next((node for node in nodes.values() if node.fits(wanted)), None)
            if node is None:
                return False
            node.take(wanted)
        return True

    def _need(self, job: Job, output: str | None = None) -> _Need:
        nodes, gpus = self._labelled(job), self._gpus(job)
        known = self._memory.get(job.name)
        if known is None:
            folder = None if output is None or is_url(output) else Path(output)
            estimated = estimate(job, folder, on_gpu=gpus > 0)
            if estimated is not None:
                known = self._memory[job.name] = estimated.ram_bytes
        if known is None:  # not known before its model is there: alone on a node
            known = int(min((node.memory_bytes for node in nodes if node.gpus >= gpus), default=0))
        return _Need(float(self._share(nodes, gpus)), gpus, known, job.labels)

    def _labelled(self, job: Job) -> list[_Node]:
        return [node for node in self._nodes().values() if job.labels.items() <= node.labels.items()]

    def _gpus(self, job: Job) -> float:
        """Return the GPUs of a job: those it asks for, else one if it runs on a GPU."""
        on_gpu = job.device == "auto" and any(node.gpus for node in self._labelled(job))
        return job.gpus or float(on_gpu or job.device.startswith("cuda"))

    def _share(self, nodes: Sequence[_Node], gpus: float) -> int:
        """Return the CPUs of a job; found out once, so that a node that dies changes no result."""
        if self._threads is None:
            asked = os.environ.get("OMP_NUM_THREADS", "")
            most = int(max((node.cpus for node in nodes), default=1))
            shares = (
                cpus
                for cpus in range(most, 0, -1)
                if sum(int(min(node.cpus // cpus, node.gpus // gpus if gpus else math.inf)) for node in nodes)
                >= (self._workers or math.inf)
            )
            self._threads = int(asked) if asked.isdecimal() else next(shares, 1)
        return self._threads

    def _nodes(self, *, alive: bool = True) -> dict[str, _Node]:
        """Return the nodes by id, with all that they have."""
        found = {}
        for entry in self._ray.nodes():
            if alive and not entry["Alive"]:
                continue
            has = entry["Resources"]
            name = f"{entry['NodeManagerAddress']} (id {entry['NodeID'][:_ID_LETTERS]})"
            found[entry["NodeID"]] = _Node(
                name, entry.get("Labels") or {}, has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0),
                " ".join((entry.get("DeathReasonMessage") or "").split()),
            )  # fmt: skip
        return found

    def _where(self, slot: _Slot) -> str:
        if slot.node is None:
            return "a node that Ray chooses"
        node = self._nodes(alive=False).get(slot.node)
        return f"node {node.name if node is not None else slot.node[:_ID_LETTERS]}"

    def _retire(self, slot: _Slot) -> None:
        self._kill(slot)
        self._slots.remove(slot)

    def _kill(self, slot: _Slot) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):  # it is dead already
            self._ray.kill(slot.actor, no_restart=True)


def _idle_seconds(slot: _Slot) -> float:
    return time.monotonic() - slot.used


def _not_importable(error: Exception) -> str | None:
    """Return what to say of a node that lacks a module, None where an error is about something else."""
    missing = re.search(r"No module named '([^']*)'", str(error))
    if missing is None:
        return None
    return f"a node of the cluster cannot import '{missing[1]}'; install effcli there, in the same version as here"


def _own(label: str) -> bool:
    """Say whether Ray itself gave a label."""
    return label.startswith("ray.io/")
