"""What this machine offers a batch: cores, memory, and GPUs as NVML counts them. Nothing here starts CUDA."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from profilers.device import machine_memory_bytes, processor_name

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """A GPU that jobs may have.

    Attributes
    ----------
    index : int
        As in ``cuda:INDEX``.
    visible : str
        What ``CUDA_VISIBLE_DEVICES`` has to be for a process to see this one alone.
    name : str
    total_bytes, free_bytes : int
        Of its memory; free at the time of asking.
    """

    index: int
    visible: str
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """Cores, memory and GPUs.

    Attributes
    ----------
    cores : int
        That this process may run on.
    total_bytes, free_bytes : int
    gpus : tuple of Gpu
    """

    cores: int
    total_bytes: int
    free_bytes: int
    gpus: tuple[Gpu, ...] = ()


def this_machine() -> Machine:
    """Look at the machine as it is now."""
    total, free = machine_memory_bytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cores, total, free, gpus())


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that torch can use here, in the order of the PCI bus, or of ``CUDA_VISIBLE_DEVICES``."""
    with _nvml() as nvml:
        if nvml is None:
            return ()
        import torch

        if not torch.cuda.is_available():
            return ()
        asked = os.environ.get(VISIBLE)
        names = asked.split(",") if asked is not None else [str(index) for index in range(nvml.nvmlDeviceGetCount())]
        return tuple(_gpu(nvml, index, name.strip()) for index, name in enumerate(names) if name.strip())


def local_device(name: str) -> dict[str, str]:
    """Return type and name of a device of this machine, as the local engine uses it; needs torch only beside a GPU."""
    kind, _, number = name.partition(":")
    found = gpus() if kind in ("auto", "cuda") else ()
    if kind == "cuda" or found:
        names = [gpu.name for gpu in found if number in ("", str(gpu.index))]
        return {"type": "cuda", "name": names[0] if names else "not in this machine"}
    if kind in ("auto", "cpu"):
        return {"type": "cpu", "name": processor_name()}
    return {"type": kind, "name": kind}


def devices_of(kind: str) -> list[dict[str, str]]:
    """Return type and name of the devices of a type that this machine has, those that this process does not see too."""
    if kind != "cuda":
        return [local_device(kind)]
    with _nvml() as nvml:
        handles = [] if nvml is None else map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        names = sorted({str(nvml.nvmlDeviceGetName(handle)) for handle in handles})
    return [{"type": "cuda", "name": name} for name in names]


def _gpu(nvml: Any, index: int, visible: str) -> Gpu:
    handle = (
        nvml.nvmlDeviceGetHandleByIndex(int(visible))
        if visible.isdecimal()
        else nvml.nvmlDeviceGetHandleByUUID(visible.encode())
    )
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(index, visible, str(nvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free))


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Yield NVML, None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
