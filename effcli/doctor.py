"""What this machine offers effcli: devices, measured peaks, versions, extras, caches, and problems with remedies.

Facts only; ``effcli doctor`` prints them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from effcli import builtin_models
from effcli.disk import free_bytes, nearest_existing, used_bytes

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

    from profilers.base import Progress
    from profilers.peaks import Peaks

DISTRIBUTION = "effcli"
PURPOSES = {
    "quantize": "quantization with llm-compressor",
    "diffusion": "diffusers pipelines",
    "onnx": "export to and timing in ONNX Runtime",
    "ray": "more than one machine",
    "search": "searches of a batch with Optuna",
    "test": "the tests and checks",
}
# Room that profiling needs beside the built-in model: reports and the hub's small files.
_SPARE_DISK_BYTES = 1_000_000_000


@dataclass(frozen=True)
class DeviceFacts:
    """One device that a model could run on.

    Attributes
    ----------
    device : str
        torch's name, ``"cpu"`` or ``"cuda:0"``.
    name : str
        The processor's or GPU's own name.
    memory_total_bytes, memory_available_bytes : int or None
        None where the device does not say.
    compute_capability : str or None
        CUDA only, ``"9.0"``.
    threads : int or None
        CPU only: threads that torch computes with.
    native_dtypes : tuple of str
        Floating-point types it multiplies matrices in without converting them.
    chosen : bool
        Whether ``--device auto`` picks it.
    peaks : Peaks or None
        Measured on the chosen device only.
    peaks_reason : str or None
        Why ``peaks`` is None.
    """

    device: str
    name: str
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    compute_capability: str | None
    threads: int | None
    native_dtypes: tuple[str, ...]
    chosen: bool
    peaks: Peaks | None
    peaks_reason: str | None


@dataclass(frozen=True)
class ExtraFacts:
    """One optional part: what it is for, whether all of it is here, and the pip line that adds it."""

    name: str
    purpose: str
    present: bool
    versions: dict[str, str | None]  # distribution -> installed version
    install: str


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
    """Everything ``effcli doctor`` says.

    Attributes
    ----------
    python, platform : str
    device_reason : str
        Why ``--device auto`` picks what it picks.
    devices : tuple of DeviceFacts
        GPUs first.
    torch_build : str
        Version and what it was built for.
    onnx_runtime : str or None
        Version of ONNX Runtime and the providers it was built with; None where it is not installed.
    cuda_runtime : str or None
        CUDA version torch was built for.
    cuda_driver : str or None
        NVIDIA driver version, read through NVML also where torch cannot use the GPU.
    versions : dict of str to str or None
        Installed version of each core requirement, None where it is missing.
    extras : tuple of ExtraFacts
    cache_folder : str
    cache_bytes : int
        Taken by the cache folder.
    disk_free_bytes : int
        On the cache folder's disk.
    builtin_models : tuple of BuiltinFacts
    hub_cache_folder : str
    offline : bool
        Whether the hub client was told to stay offline.
    problems : tuple of Problem
    """

    python: str
    platform: str
    device_reason: str
    devices: tuple[DeviceFacts, ...]
    torch_build: str
    onnx_runtime: str | None
    cuda_runtime: str | None
    cuda_driver: str | None
    versions: dict[str, str | None]
    extras: tuple[ExtraFacts, ...]
    cache_folder: str
    cache_bytes: int
    disk_free_bytes: int
    builtin_models: tuple[BuiltinFacts, ...]
    hub_cache_folder: str
    offline: bool
    problems: tuple[Problem, ...]


def examine(measure_peaks: bool = True, progress: Progress | None = None) -> Diagnosis:
    """Examine this machine.

    Parameters
    ----------
    measure_peaks : bool
        Measure the chosen device's ceilings too (a few seconds).
    progress : Progress or None
    """
    import torch
    from huggingface_hub import constants

    from effcli.devices import choose_device

    chosen, device_reason = choose_device("auto")
    devices = tuple(
        _device_facts(device, chosen=device == chosen, measure_peaks=measure_peaks, progress=progress)
        for device in _devices()
    )
    built_for = torch.version.cuda or torch.version.hip
    driver, gpus_seen = _nvml()
    core, extras = _requirements()
    cache_folder = builtin_models.cache_folder()
    disk_free = free_bytes(cache_folder)
    builtins = tuple(
        BuiltinFacts(name, builtin_models.cached(name), model.download_bytes)
        for name, model in builtin_models.CATALOGUE.items()
    )
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        device_reason=device_reason,
        devices=devices,
        torch_build=f"{torch.__version__}, built for {'CUDA ' + built_for if built_for else 'the CPU only'}",
        onnx_runtime=_onnx_runtime(),
        cuda_runtime=torch.version.cuda,
        cuda_driver=driver,
        versions={requirement.name: _installed(requirement.name) for requirement in core},
        extras=tuple(_extra_facts(name, parts) for name, parts in extras.items()),
        cache_folder=str(cache_folder),
        cache_bytes=used_bytes(cache_folder),
        disk_free_bytes=disk_free,
        builtin_models=builtins,
        hub_cache_folder=str(constants.HF_HUB_CACHE),
        offline=bool(constants.HF_HUB_OFFLINE),
        problems=(
            *_requirement_problems(core),
            *_gpu_problems(gpus_seen),
            *_cache_problems(cache_folder, disk_free, builtins),
        ),
    )


def _onnx_runtime() -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    providers = (name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return f"{onnxruntime.__version__}, built with {', '.join(providers)}"


def _devices() -> list[torch.device]:
    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    apple = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [*gpus, *apple, torch.device("cpu")]


def _device_facts(device: torch.device, *, chosen: bool, measure_peaks: bool, progress: Progress | None) -> DeviceFacts:
    import torch

    from effcli.devices import native_dtypes
    from profilers import device as devices
    from profilers import peaks
    from profilers.base import ProfilerError

    native = native_dtypes(device)
    measured, reason = None, None
    if not chosen:
        reason = "not the chosen device"
    elif not measure_peaks:
        reason = "not asked for"
    else:
        try:
            measured = peaks.measure_peaks(device, native, progress)
        except ProfilerError as error:
            reason = str(error)
    knows_memory = device.type in ("cpu", "cuda")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return DeviceFacts(
        device=str(device),
        name=devices.device_name(device),
        memory_total_bytes=devices.memory_total_bytes(device) if knows_memory else None,
        memory_available_bytes=devices.memory_available_bytes(device) if knows_memory else None,
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        native_dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in native),
        chosen=chosen,
        peaks=measured,
        peaks_reason=reason,
    )


def _nvml() -> tuple[str | None, int]:
    """Return the NVIDIA driver's version and the number of GPUs it sees; (None, 0) without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, 0
    try:
        return str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


@cache
def _requirements() -> tuple[tuple[Requirement, ...], dict[str, tuple[Requirement, ...]]]:
    """Return what effcli's own metadata requires here: the core, and each extra's additions."""
    from packaging.requirements import Requirement

    core: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return (), {}
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            core.append(requirement)
            continue
        for name in PURPOSES:
            if requirement.name != DISTRIBUTION and requirement.marker.evaluate({"extra": name}):
                extras.setdefault(name, []).append(requirement)
    return tuple(core), {name: tuple(parts) for name, parts in extras.items()}


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _satisfied(requirement: Requirement) -> bool:
    found = _installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _extra_facts(name: str, parts: tuple[Requirement, ...]) -> ExtraFacts:
    return ExtraFacts(
        name=name,
        purpose=PURPOSES[name],
        present=all(_satisfied(part) for part in parts),
        versions={part.name: _installed(part.name) for part in parts},
        install=f"pip install '{DISTRIBUTION}[{name}]'",
    )


def _requirement_problems(core: tuple[Requirement, ...]) -> list[Problem]:
    if not core:
        return [Problem(f"{DISTRIBUTION} is not installed, so no profiler is found", "pip install -e . in its folder")]
    problems = []
    for requirement in core:
        if not _satisfied(requirement):
            found = _installed(requirement.name)
            what = (
                f"{requirement.name} {found} is not in {requirement.specifier}" if found else f"no {requirement.name}"
            )
            problems.append(Problem(what, f"pip install '{requirement.name}{requirement.specifier}'"))
    return problems


def _gpu_problems(gpus_seen: int) -> list[Problem]:
    import torch

    if gpus_seen == 0 or torch.cuda.is_available():
        return []
    if torch.version.cuda is None:
        return [
            Problem(
                f"{gpus_seen} NVIDIA GPU(s) are here but torch {torch.__version__} is built without CUDA",
                "install a CUDA build of torch, chosen at https://pytorch.org/get-started/locally",
            )
        ]
    return [
        Problem(
            f"{gpus_seen} NVIDIA GPU(s) are here but torch cannot use them (built for CUDA {torch.version.cuda})",
            "check CUDA_VISIBLE_DEVICES, and update the NVIDIA driver if it is older than that CUDA version needs",
        )
    ]


def _cache_problems(folder: Path, free: int, builtins: tuple[BuiltinFacts, ...]) -> list[Problem]:
    problems = []
    if not os.access(nearest_existing(folder), os.W_OK):
        problems.append(
            Problem(f"the cache folder '{folder}' cannot be written", "set EFFCLI_CACHE to one that can be written")
        )
    missing = sum(builtin_models.CATALOGUE[item.name].disk_bytes for item in builtins if not item.cached)
    if free < missing + _SPARE_DISK_BYTES:
        from effcli.formatting import data_size

        problems.append(
            Problem(
                f"only {data_size(free)} of disk are free at '{folder}'",
                "free some space, or set EFFCLI_CACHE to a folder on another disk",
            )
        )
    return problems
