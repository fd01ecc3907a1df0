"""What this machine offers effcli: devices, measured peaks, versions, extras, caches, and problems with remedies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profilers.base import Progress
    from profilers.peaks import Peaks


@dataclass(frozen=True)
class DeviceFacts:
    """One device that a model could run on."""

    device: str  # torch's name, "cpu" or "cuda:0"
    name: str
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    compute_capability: str | None  # CUDA only, "9.0"
    threads: int | None  # CPU only
    native_dtypes: tuple[str, ...]
    chosen: bool  # the one that --device auto picks
    peaks: Peaks | None
    peaks_reason: str | None


@dataclass(frozen=True)
class ExtraFacts:
    """One optional part: what it is for, whether it is here, and how to get it."""

    name: str
    purpose: str
    present: bool
    versions: dict[str, str | None]  # distribution -> installed version
    install: str  # the exact pip line


@dataclass(frozen=True)
class BuiltinFacts:
    """One built-in model and whether it is in the cache."""

    name: str
    cached: bool
    download_bytes: int


@dataclass(frozen=True)
class Problem:
    """Something that is wrong or missing, and what to do about it."""

    problem: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``effcli doctor`` says."""

    python: str
    platform: str
    device_reason: str
    devices: tuple[DeviceFacts, ...]
    torch_build: str
    cuda_runtime: str | None
    cuda_driver: str | None  # NVIDIA driver version
    versions: dict[str, str | None]
    extras: tuple[ExtraFacts, ...]
    cache_folder: str
    cache_bytes: int
    disk_free_bytes: int | None
    builtin_models: tuple[BuiltinFacts, ...]
    hub_cache_folder: str
    offline: bool
    problems: tuple[Problem, ...]


def examine(measure_peaks: bool = True, progress: Progress | None = None) -> Diagnosis:
    """Examine this machine."""
    raise NotImplementedError
