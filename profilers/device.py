"""What a device is called, how much memory it has, and when its work is done.

Memory of the CPU is what this process may use: the machine's, or its control group's limit where that is lower.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from profilers.base import ProfilerError

if TYPE_CHECKING:
    import torch

_CPUINFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_OWN_GROUP = Path("/proc/self/cgroup")
_GROUP_ROOT = Path("/sys/fs/cgroup")
_RESET_PEAK = "5"  # what clear_refs takes to set the peak resident size back to the present one (man 5 proc)


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on ``device`` is done; the CPU queues nothing."""
    import torch

    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def return_freed_memory() -> None:
    """Give freed heap pages back to the system, so that the process holds what its tensors take.

    glibc keeps them: after a checkpoint was read and repacked, hundreds of megabytes that would count as the model's.
    Does nothing where the C library has no ``malloc_trim``.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def device_name(device: torch.device) -> str:
    """Return the processor's or GPU's own name, such as ``"NVIDIA H100 80GB HBM3"``."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    return processor_name()


def processor_name() -> str:
    """Return the CPU's own name; needs no torch."""
    if _CPUINFO.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def memory_total_bytes(device: torch.device) -> int:
    """Return the bytes of memory that ``device`` has for this process.

    Raises
    ------
    ProfilerError
        On a device that is neither a CPU nor a CUDA GPU.
    """
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    _require_cpu(device)
    return machine_memory_bytes()[0]


def memory_available_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on ``device`` without swapping.

    On CUDA this adds what PyTorch's allocator has reserved and not given to a tensor. In a control group, file pages
    that the kernel can drop do not count as used.

    Raises
    ------
    ProfilerError
        On a device that is neither a CPU nor a CUDA GPU.
    """
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    _require_cpu(device)
    return machine_memory_bytes()[1]


def machine_memory_bytes() -> tuple[int, int]:
    """Return the bytes of memory that this process may use, and how many of them are free; needs no torch."""
    found, groups = psutil.virtual_memory(), _memory_groups()
    return (
        min([int(found.total), *(group.limit_bytes for group in groups)]),
        min([int(found.available), *(max(0, group.limit_bytes - group.used_bytes) for group in groups)]),
    )


@dataclass
class PeakMemory:
    """Result of :func:`track_peak_memory`, filled when its block ends.

    Attributes
    ----------
    bytes : int or None
        CUDA: most bytes in live tensors. CPU: largest resident size of the process. ``None``: not measurable here.
    before_bytes : int or None
        The same figure when the block was entered.
    reason : str or None
        Why ``bytes`` is ``None``.
    """

    bytes: int | None = None
    before_bytes: int | None = None
    reason: str | None = None


@contextlib.contextmanager
def track_peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Record the largest memory in use inside the block; blocks do not nest, because the counter is reset on entry.

    On a CPU it is Linux's ``VmHWM``, reset through ``/proc/self/clear_refs``; ``None`` with the reason elsewhere.
    """
    import torch

    peak = PeakMemory()
    if device.type == "cuda":
        torch.accelerator.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak.before_bytes = torch.cuda.memory_allocated(device)
        yield peak
        torch.accelerator.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    try:
        _require_cpu(device)
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except (ProfilerError, OSError) as error:
        peak.reason = f"peak memory cannot be measured on this system ({error})"
        yield peak
        return
    peak.before_bytes = _status_bytes("VmRSS")
    yield peak
    peak.bytes = _status_bytes("VmHWM")


def _require_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise ProfilerError(f"memory of device '{device}' cannot be read; use --device cpu or --device cuda")


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise ProfilerError(f"{_STATUS} has no {key}; peak memory of the CPU needs Linux")
    return int(found.group(1)) * 1024


@dataclass(frozen=True)
class _MemoryGroup:
    limit_bytes: int
    used_bytes: int


def _memory_groups() -> list[_MemoryGroup]:
    """Return this process's control group and its ancestors, those that limit memory (versions 1 and 2)."""
    if not _OWN_GROUP.is_file():
        return []
    groups = []
    for line in _OWN_GROUP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, limit, used, droppable = (
                "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        elif controllers == "":
            root, limit, used, droppable = "", "memory.max", "memory.current", "inactive_file"
        else:
            continue
        # In a container the path is often the host's and not visible: the group itself is then mounted at the root.
        top = _GROUP_ROOT / root
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and (folder / limit).is_file():
                group = _read_group(folder, limit, used, droppable)
                if group is not None:
                    groups.append(group)
    return groups


def _read_group(folder: Path, limit: str, used: str, droppable: str) -> _MemoryGroup | None:
    allowed = (folder / limit).read_text().strip()
    if allowed == "max":
        return None
    found = re.search(rf"^{droppable} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    return _MemoryGroup(int(allowed), int((folder / used).read_text()) - (int(found.group(1)) if found else 0))
