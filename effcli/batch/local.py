"""Jobs on this machine: a few long-lived worker processes, each with its threads and its GPU, none without memory.

::

    offer(job) ── fits the memory? ── a free worker, best the one that has its model ──> python -m effcli.batch.worker
    events()   <── one pipe a worker ── started │ progress │ finished; a pipe that ends: lost

What is reserved for the jobs that run never adds up to more than was free when the batch began. A worker is started
with its first job and replaced after it died or ran out of memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from effcli.batch.machine import VISIBLE, Gpu, Machine, local_device, this_machine
from effcli.batch.memory import Estimate, estimate
from effcli.batch.model import Event, Job, Outcome
from effcli.errors import BadInputError
from effcli.formatting import data_size
from effcli.reports.model import plain
from effcli.worker import import_path

WORKER = (sys.executable, "-P", "-m", "effcli.batch.worker")
_STOP_SECONDS = 10.0
_POLL_SECONDS = 1.0
_LOG_LINES = 3
_CHUNK_BYTES = 1 << 16


class LocalEngine:
    """Worker processes on this machine; see :class:`effcli.batch.engine.Engine`.

    Parameters
    ----------
    workers : int, optional
        Default: one a GPU, and one where there is no GPU.
    threads : int, optional
        Of each worker; default: ``OMP_NUM_THREADS`` where that is set, else an equal share of the cores, so that a
        job's times do not depend on whether others run beside it.
    machine : Machine, optional
        What there is; default: this machine as it is now.
    """

    name = "local"

    def __init__(self, workers: int | None = None, threads: int | None = None, machine: Machine | None = None) -> None:
        self._machine = machine or this_machine()
        gpus = self._machine.gpus
        count = workers or max(1, len(gpus))
        if count > self._machine.cores:
            raise BadInputError(f"{count} workers on {self._machine.cores} cores; give --workers {self._machine.cores}")
        asked = os.environ.get("OMP_NUM_THREADS", "")
        self._threads = threads or (int(asked) if asked.isdecimal() else self._machine.cores // count)
        self._slots = [_Slot(index, gpus[index % len(gpus)] if gpus else None) for index in range(count)]
        self._selector = selectors.DefaultSelector()
        self._pending: list[Event] = []
        self._estimates: dict[str, Estimate] = {}
        self._device = functools.cache(local_device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            self._end(slot)
        self._selector.close()

    def workers(self) -> tuple[str, ...]:
        """Return one line a worker."""
        threads = f"{self._threads} thread{'s' if self._threads > 1 else ''}"
        return tuple(
            f"local {slot.index}: {slot.gpu.name}, cuda:{slot.gpu.index}, {data_size(slot.gpu.free_bytes)} of "
            f"{data_size(slot.gpu.total_bytes)} free"
            if slot.gpu is not None
            else f"local {slot.index}: cpu, {threads}, {data_size(self._machine.free_bytes)} of "
            f"{data_size(self._machine.total_bytes)} free"
            for slot in self._slots
        )

    def cannot_run(self, job: Job) -> str | None:
        """Say why no worker can ever run the job, else None."""
        slots = self._suited(job)
        if not slots:
            gpus = ", ".join(f"cuda:{gpu.index}" for gpu in self._machine.gpus) or "none"
            return f"job '{job.name}' asks for device '{job.device}' and the GPUs of the local workers are: {gpus}"
        if job.gpus > 1 or (job.gpus > 0 and not self._machine.gpus):
            return (
                f"job '{job.name}' asks for {job.gpus:g} GPUs and a local worker has "
                f"{'one' if self._machine.gpus else 'none'}; use --engine ray, or fewer gpus"
            )
        wanted = self._estimate(job, None)
        if wanted is None:
            return None
        gpu_total = max((slot.gpu.total_bytes for slot in slots if slot.gpu is not None), default=0)
        for needed, total, whose in (
            (wanted.ram_bytes, self._machine.total_bytes, "this machine"),
            (wanted.gpu_bytes, gpu_total, "its GPU"),
        ):
            if needed > total:
                return (
                    f"job '{job.name}' takes about {data_size(needed)} ({wanted.how}) and {whose} has "
                    f"{data_size(total)}; if you know better, set its limits: {{memory: …}}"
                )
        return None

    def placement(self, job: Job) -> str:
        """Say where the job would run and what is reserved for it."""
        gpu = self._on_gpu(job)
        numbers = [f"cuda:{slot.gpu.index}" for slot in self._suited(job) if slot.gpu is not None]
        where = (numbers[0] if len(numbers) == 1 else "any GPU") if gpu else "cpu"
        wanted = self._estimate(job, None)
        if wanted is None:
            return f"{where}, alone: its memory is not known before its model is here"
        alone = "" if self._fits_empty(wanted, self._suited(job)) else "; more than is free, so it runs alone"
        return f"{where}, {wanted} ({wanted.how}){alone}"

    def room_for(self, job: Job) -> int:
        """Return how many jobs like this run side by side, beside what this machine holds now."""
        wanted, now = self._estimate(job, None), this_machine()
        if wanted is None:
            return 1
        found, ram = 0, min(self._machine.free_bytes, now.free_bytes)
        gpu = {one.index: one.free_bytes for one in now.gpus}
        for slot in self._suited(job):
            left = 0 if slot.gpu is None else gpu.get(slot.gpu.index, slot.gpu.free_bytes)
            if wanted.ram_bytes > ram or wanted.gpu_bytes > left:
                continue
            found, ram = found + 1, ram - wanted.ram_bytes
            if slot.gpu is not None:
                gpu[slot.gpu.index] = left - wanted.gpu_bytes
        return found

    def device_class(self, job: Job) -> Mapping[str, str]:
        """Return what the job's device is on this machine."""
        return self._device(job.device)

    def offer(self, job: Job, output: str, log: str, attempt: int) -> bool:
        """Start the job now if a worker and the memory for it are free; else return False and change nothing."""
        idle = [slot for slot in self._suited(job) if slot.job is None]
        if not idle:
            return False
        wanted = self._estimate(job, Path(output))
        slot = min(idle, key=lambda one: (one.distance(job), one.index))
        alone = not any(other.job for other in self._slots)
        if not alone and not self._fits(wanted, slot):
            return False
        note = ""
        if wanted is None:
            note = "its memory is not known before its model is here, so it runs alone\n"
        elif alone and not self._fits(wanted, slot):
            note = f"it takes about {wanted} ({wanted.how}), more than is free, so it runs alone\n"
        self._make_room(wanted, slot)
        if not slot.running():
            self._end(slot)
            self._start(slot)
        slot.take(job, wanted)
        request = {
            "job": plain(_seen_by_worker(job, slot)),
            "output": output,
            "log": log,
            "attempt": attempt,
            "note": note,
        }
        assert slot.process is not None and slot.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died while it was idle; events() says so
            slot.process.stdin.write((json.dumps(request) + "\n").encode())
            slot.process.stdin.flush()
        return True

    def events(self, timeout_seconds: float) -> Sequence[Event]:
        """Return what happened since the last call; wait at most this long for something to happen."""
        until = time.monotonic() + timeout_seconds
        while True:
            found, self._pending = self._pending, []
            left = 0.0 if found else max(0.0, until - time.monotonic())
            for key, _ in self._selector.select(min(left, _POLL_SECONDS)):
                found += self._read(key.data)
            for slot in self._slots:  # a child of it may keep the pipe of a worker that is gone open
                if slot.process is not None and not slot.running():
                    found += self._gone(slot)
            if found or time.monotonic() >= until:
                return found

    def release(self) -> None:
        """End the workers that have nothing to do."""
        for slot in self._slots:
            if slot.job is None:
                self._end(slot)

    def stop(self, job: str) -> None:
        """Kill a running job; its staged work stays."""
        for slot in self._slots:
            if slot.job is not None and slot.job.name == job:
                self._end(slot)
        self._pending = [event for event in self._pending if event.job != job]

    def _estimate(self, job: Job, output: Path | None) -> Estimate | None:
        known = self._estimates.get(job.name)
        if known is None:
            known = estimate(job, output, on_gpu=self._on_gpu(job))
            if known is not None:
                self._estimates[job.name] = known
        return known

    def _on_gpu(self, job: Job) -> bool:
        return bool(self._machine.gpus) and (job.device == "auto" or job.device.startswith("cuda"))

    def _suited(self, job: Job) -> list[_Slot]:
        """Return the workers that have the job's device."""
        if not job.device.startswith("cuda"):
            return self._slots
        number = job.device.partition(":")[2]
        return [slot for slot in self._slots if slot.gpu is not None and number in ("", str(slot.gpu.index))]

    def _fits_empty(self, wanted: Estimate, slots: Sequence[_Slot]) -> bool:
        gpu_free = max((slot.gpu.free_bytes for slot in slots if slot.gpu is not None), default=0)
        return wanted.ram_bytes <= self._machine.free_bytes and wanted.gpu_bytes <= gpu_free

    def _fits(self, wanted: Estimate | None, slot: _Slot, idle: Sequence[_Slot] = ()) -> bool:
        """Say whether a job fits beside those that run, and beside what idle workers keep."""
        others = [other for other in self._slots if other.job is not None or other in idle]
        if wanted is None or any(other.reserved is None for other in others):  # one of unknown size is alone
            return False
        held = [(other.gpu, other.reserved) for other in others if other.reserved is not None]
        if wanted.ram_bytes + sum(item.ram_bytes for _, item in held) > self._machine.free_bytes:
            return False
        if slot.gpu is None or not wanted.gpu_bytes:
            return True
        return wanted.gpu_bytes + sum(item.gpu_bytes for gpu, item in held if gpu == slot.gpu) <= slot.gpu.free_bytes

    def _make_room(self, wanted: Estimate | None, slot: _Slot) -> None:
        """End the idle workers that keep a model, where that is in the way."""
        idle = [other for other in self._slots if other is not slot and other.job is None and other.model is not None]
        if not self._fits(wanted, slot, idle):
            for other in idle:
                self._end(other)

    def _start(self, slot: _Slot) -> None:
        environment = os.environ | {
            "PYTHONPATH": import_path(),
            "OMP_NUM_THREADS": str(self._threads),
            "PYTHONUNBUFFERED": "1",
        }
        if slot.gpu is not None:
            environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VISIBLE: slot.gpu.visible}
        slot.log = tempfile.TemporaryFile()  # noqa: SIM115 - see _Slot.close
        slot.process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=slot.log,
            env=environment,
            process_group=0,  # ended as a whole, and not by Ctrl-C in the terminal
        )
        assert slot.process.stdout is not None
        os.set_blocking(slot.process.stdout.fileno(), False)
        self._selector.register(slot.process.stdout, selectors.EVENT_READ, slot)

    def _read(self, slot: _Slot) -> list[Event]:
        """Return the events of the whole lines that a worker has written, or that it is gone."""
        assert slot.process is not None and slot.process.stdout is not None
        try:
            data = os.read(slot.process.stdout.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return []
        if not data:
            return self._gone(slot)
        *lines, slot.rest = (slot.rest + data).split(b"\n")
        return [event for line in lines if (event := self._event(slot, json.loads(line))) is not None]

    def _event(self, slot: _Slot, message: Mapping[str, Any]) -> Event | None:
        if slot.job is None:
            return None
        job, worker, when = slot.job.name, slot.worker, message["time"]
        if message["event"] == "progress":
            return Event(
                job, "progress", worker, when, stage=message["stage"], done=message["done"],
                memory_bytes=message["memory"], gpu_memory_bytes=message["gpu_memory"],
            )  # fmt: skip
        if message["event"] == "started":
            return Event(job, "started", worker, when)
        outcome = Outcome(**message["outcome"])
        slot.job = None
        slot.loads = message["model_loads"]
        if outcome.retry:  # what did not fit may still be held
            self._end(slot)
        return Event(job, "finished", worker, when, outcome=outcome)

    def _gone(self, slot: _Slot) -> list[Event]:
        """Clean up after a worker that ended, and say so of its job."""
        job, worker = slot.job, slot.worker
        assert slot.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            slot.process.wait(_STOP_SECONDS)
        reason = slot.why_it_ended()
        self._end(slot)
        return [] if job is None else [Event(job.name, "lost", worker, time.time(), reason=reason)]

    def _end(self, slot: _Slot) -> None:
        """Kill a worker and all that it started."""
        if slot.process is not None and slot.process.stdout is not None:
            self._selector.unregister(slot.process.stdout)
        slot.close()


@dataclass
class _Slot:
    """A place for a worker process.

    Attributes
    ----------
    gpu : Gpu or None
    job : Job or None
        That runs now.
    reserved : Estimate or None
        Of the job that runs, or that ran last and left its model.
    model : tuple or None
        What the worker has in memory.
    loads : int
        How many models the process has loaded.
    """

    index: int
    gpu: Gpu | None
    process: subprocess.Popen[bytes] | None = None
    log: Any = None
    rest: bytes = b""
    job: Job | None = None
    reserved: Estimate | None = None
    model: tuple[Any, ...] | None = None
    loads: int = 0

    @property
    def worker(self) -> str:
        """What events call it."""
        return f"local {self.index} (pid {self.process.pid})" if self.process is not None else f"local {self.index}"

    def running(self) -> bool:
        """Say whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def distance(self, job: Job) -> int:
        """Return how far the worker is from the job: it has its model, it has none, it has another."""
        if self.model is None:
            return 1
        return 0 if self.model == _model_of(job) else 2

    def take(self, job: Job, wanted: Estimate | None) -> None:
        """Note what the worker is about to do."""
        self.job, self.reserved = job, wanted
        self.model = _model_of(job)

    def why_it_ended(self) -> str:
        """Say in words why the process is gone."""
        assert self.process is not None
        code = self.process.returncode
        if code == -signal.SIGKILL:
            return "its worker was killed (signal 9), as systems do when memory runs out"
        if code is not None and code < 0:
            return f"its worker was ended by signal {-code} ({signal.Signals(-code).name})"
        self.log.seek(0)
        lines = self.log.read().decode("utf-8", errors="replace").strip().splitlines()
        said = f": {' | '.join(lines[-_LOG_LINES:])}" if lines else ""
        return f"its worker ended with code {code}{said}"

    def close(self) -> None:
        """Kill the process and all that it started, and forget it."""
        if self.process is not None:
            _kill_tree(self.process)
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
            self.log.close()
        self.process, self.log, self.rest, self.job, self.reserved, self.model = None, None, b"", None, None, None


def _model_of(job: Job) -> tuple[Any, ...] | None:
    """Return what stays in a worker's memory after a job, None for nothing."""
    if job.kind != "profile":
        return None
    return (job.model, job.model_from, job.revision, job.device, job.dtype, bool(job.settings.get("config_only")))


def _seen_by_worker(job: Job, slot: _Slot) -> Job:
    """Return the job with the device that it has in a process that sees one GPU alone."""
    return replace(job, device="cuda") if slot.gpu is not None and job.device.startswith("cuda:") else job


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process, its group, and processes that it started in groups of their own."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is gone
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait(_STOP_SECONDS)
