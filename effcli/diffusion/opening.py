"""Open a diffusers pipeline from a folder or by its built-in name: whole, in safetensors, without code of its own.

::

    name ──sources.resolve──> folder ──check──> DiffusionPipeline.from_pretrained ──targets.find──> OpenedPipeline
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effcli import builtin_models
from effcli.checkpoint_files import (
    CONFIG,
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    PIPELINE,
    bytes_when_loaded,
    check_safetensors,
    fingerprint,
    read_json,
    stored_dtype,
)
from effcli.devices import DTYPES, check_dtype_name, choose_device, native_dtypes
from effcli.diffusion import quantized
from effcli.errors import NoRoomError, SourceError, did_you_mean
from effcli.formatting import data_size
from effcli.quiet import quiet_diffusers
from effcli.reports.pipeline_model import Component, PipelineInfo
from effcli.sources import Source, check_seen, resolve
from passes.base import MissingExtraError

if TYPE_CHECKING:
    import torch

    from effcli.reports.model import Environment
    from passes.lemica.targets import Target
    from profilers.base import Progress
    from profilers.peaks import Peaks

_LIBRARIES = ("diffusers", "transformers")
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
_DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass
class OpenedPipeline:
    """A pipeline ready to run, with everything a report says about where it came from.

    Attributes
    ----------
    pipeline : diffusers.DiffusionPipeline
        On its device, its models in evaluation mode, without a progress bar of its own.
    target : Target
        Denoiser, blocks and mode.
    info : PipelineInfo
    source : Source
    folder : Path
    device : torch.device
    device_reason, dtype_reason : str
        Why these were chosen.
    dtype : torch.dtype
        Of the weights.
    load_seconds : float
        Reading the weights onto the device.
    peaks : Peaks or None
        The device's ceilings, once they were measured: :meth:`measure_peaks`.
    """

    pipeline: Any
    target: Target
    info: PipelineInfo
    source: Source
    folder: Path
    device: torch.device
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str
    load_seconds: float
    peaks: Peaks | None = None

    def measure_peaks(self, progress: Progress | None = None) -> Peaks:
        """Measure the device's ceilings for the dtype of the weights and float32, the first time it is asked."""
        import torch

        from profilers.peaks import measure_peaks

        if self.peaks is None:
            self.peaks = measure_peaks(self.device, tuple(dict.fromkeys((self.dtype, torch.float32))), progress)
        return self.peaks


def is_pipeline(spec: str) -> bool:
    """Say whether a source is a diffusers pipeline here: a folder, its ``model_index.json``, or a built-in name.

    Looks at names of files only; a hub id is never one.
    """
    path = Path(spec).expanduser()
    with contextlib.suppress(OSError):
        if path.is_dir():
            return (path / PIPELINE).is_file() and not (path / CONFIG).is_file()
        if path.is_file():
            return path.name == PIPELINE
    return _is_shipped(spec)


def pipeline_of(folder: str, device: str, dtype: str, trust_remote_code: bool = False) -> Any:
    """Return the pipeline of a local folder, for a worker that does a part of a pass."""
    check_seen(Path(folder))
    return open_pipeline(Path(folder), device=device, dtype=dtype, trust_remote_code=trust_remote_code).pipeline


def open_pipeline(
    source: str | Path | Source,
    *,
    device: str = "auto",
    dtype: str = "auto",
    mode: Literal["auto", "residual", "output"] = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> OpenedPipeline:
    """Load a pipeline onto a device.

    Parameters
    ----------
    source : str, Path or Source
        Folder with a ``model_index.json``, or a built-in name.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    dtype : str
        ``auto`` or a torch name. ``auto`` is float32 on a CPU; elsewhere what the denoiser's weights are stored in, if
        the device computes in that natively, else float32.
    mode : str
        What may be reused: see :func:`passes.lemica.targets.find`.
    revision : str, optional
        Of a hub id.
    trust_remote_code : bool
        Run the code of a pipeline or component that comes with the folder.
    progress : Progress, optional

    Raises
    ------
    SourceError
        If there is no such pipeline, or it is damaged, incomplete, pickled, or needs code that is not trusted.
    BadInputError
        For an unknown device or dtype.
    NoRoomError
        If the weights do not fit the memory there is.
    passes.base.MissingExtraError
        If diffusers is not installed.
    passes.base.PassError
        If the pipeline has no denoiser that is known.
    """
    check_dtype_name(dtype)
    chosen, device_reason = choose_device(device)
    if not isinstance(source, Source):
        source = resolve(str(source), revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    folder = _folder(source)
    _require_diffusers()
    with quiet_diffusers(progress):
        index = read_json(folder / PIPELINE)
        notes = _check_code(index, folder, trust_remote_code=trust_remote_code)
        components = _components(index)
        files = {name: _weight_files(folder / name) for name in components}
        elements = {name: check_safetensors(found) for name, found in files.items()}
        parts = {name: (components[name][1], files[name]) for name in quantized.find(folder, components)}
        elements |= {name: quantized.elements(found) for name, (_, found) in parts.items()}
        torch_dtype, dtype_reason = _choose_dtype(dtype, chosen, elements)
        _check_room(source.spec, chosen, elements.values(), torch_dtype)
        start = time.perf_counter()
        pipeline, low_bit = _load(source.spec, folder, chosen, torch_dtype, parts, trust_remote_code=trust_remote_code)
        _synchronize(chosen)
        load_seconds = time.perf_counter() - start
        pipeline.set_progress_bar_config(disable=True)
        target = _find(pipeline, mode)
    info = describe(
        pipeline,
        target,
        source,
        torch_dtype,
        fingerprint=fingerprint(sorted((path for found in files.values() for path in found), key=Path.as_posix)),
        notes=[*notes, *(part.note(name) for name, part in low_bit.items())],
    )
    return OpenedPipeline(
        pipeline, target, info, source, folder, chosen, device_reason, torch_dtype, dtype_reason, load_seconds
    )


def describe(
    pipeline: Any,
    target: Target,
    source: Source,
    dtype: torch.dtype,
    *,
    fingerprint: str | None = None,
    notes: Sequence[str] = (),
) -> PipelineInfo:
    """Return which pipeline was opened and what it is, as reports say it.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
    target : Target
    source : Source
    dtype : torch.dtype
        Of the weights.
    fingerprint : str or None
        sha256 over the weights' files.
    notes : sequence of str
    """
    import torch

    from profilers.weights import weight_bytes_and_parameters

    models = []
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            size = weight_bytes_and_parameters(component)
            models.append(Component(name, type(component).__name__, size.parameters, size.bytes))
    first = target.denoisers[0]
    return PipelineInfo(
        source=source.spec,
        kind=_kind(source),
        architecture=type(pipeline).__name__,
        denoiser=first,
        denoiser_architecture=type(getattr(pipeline, first)).__name__,
        mode=target.mode,
        blocks=len(target.blocks[0]) or None,
        scheduler=type(pipeline.scheduler).__name__,
        components=tuple(models),
        dtype=str(dtype).removeprefix("torch."),
        revision=source.revision,
        fingerprint=fingerprint,
        notes=tuple(notes),
    )


def environment_of(opened: OpenedPipeline) -> Environment:
    """Return the device and software that a pipeline is measured on, as reports say it."""
    from effcli import api

    environment = api.environment_of(opened, opened.peaks)
    return replace(
        environment,
        peaks_reason=None if opened.peaks is not None else "not measured in this run",
        versions=environment.versions | {"diffusers": version("diffusers")},
    )


def _find(pipeline: Any, mode: Literal["auto", "residual", "output"]) -> Target:
    from passes.lemica.targets import find

    return find(pipeline, mode)


def _kind(source: Source) -> str:
    if Path(source.spec).expanduser().exists():
        return "folder"
    return "builtin" if _is_shipped(source.spec) else "hub"


def _is_shipped(spec: str) -> bool:
    return isinstance(builtin_models.CATALOGUE.get(spec), builtin_models.ShippedModel)


def _folder(source: Source) -> Path:
    if source.kind != "diffusers":
        raise SourceError(f"'{source.spec}' is no diffusers pipeline (no {PIPELINE}); give the folder of one")
    if source.path is None or not (source.path / PIPELINE).is_file():
        raise SourceError(
            f"'{source.spec}' is a diffusers pipeline on the hub, which is not fetched: "
            f"hf download {source.spec} --local-dir ./pipeline, then give that folder"
        )
    return source.path


def _require_diffusers() -> None:
    try:
        import diffusers  # noqa: F401 - whether it can be imported is the question
    except ImportError as error:
        raise MissingExtraError(f"a pipeline needs diffusers ({error}); pip install 'effcli[diffusion]'") from None


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return library and class of each component that the pipeline has."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
    }


def _check_code(index: Mapping[str, Any], folder: Path, *, trust_remote_code: bool) -> list[str]:
    """Refuse a pipeline whose classes come with its folder or from a library that nobody vouches for."""
    import diffusers

    name = index.get("_class_name")
    own = [f"the pipeline's class ({PIPELINE}: _class_name {name})"] if isinstance(name, list) else []
    own += [
        f"component '{component}' ({kind} of {library})"
        for component, (library, kind) in _components(index).items()
        if library not in _LIBRARIES and not hasattr(diffusers.pipelines, library)
    ]
    if own:
        if not trust_remote_code:
            raise SourceError(
                f"'{folder}' needs code that comes with it for {own[0]}; "
                "read it, and add --trust-remote-code if you trust it"
            )
        return ["runs the code that came with the checkpoint, as asked with --trust-remote-code"]
    if not isinstance(name, str) or not name.endswith("Pipeline"):
        raise SourceError(f"'{folder / PIPELINE}' names no pipeline class (_class_name: {name!r}); fetch it again")
    if not hasattr(diffusers, name):
        known = [other for other in dir(diffusers) if other.endswith("Pipeline")]
        raise SourceError(
            f"diffusers {diffusers.__version__} has no {name}{did_you_mean(name, known)}; "
            "a newer one may: pip install -U diffusers"
        )
    return []


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return a component's safetensors files, those of variants apart; none for what has no weights."""
    if not folder.is_dir():
        return ()
    names = sorted(path.name for path in folder.iterdir())
    found = tuple(folder / name for name in names if _WEIGHTS.fullmatch(name))
    for name in names:
        if name.endswith(f".safetensors{INDEX_SUFFIX}"):
            shards = read_json(folder / name).get("weight_map")
            missing = sorted(set(shards.values()) - set(names)) if isinstance(shards, dict) else ["weight_map"]
            if missing:
                raise SourceError(f"'{folder / name}' names '{missing[0]}', which is not there; fetch it again")
    if found:
        return found
    if variants := [name for name in names if name.endswith(".safetensors")]:
        raise SourceError(
            f"'{folder}' holds only a variant of the weights ('{variants[0]}'); "
            "save it without: pipeline.save_pretrained(FOLDER)"
        )
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        raise SourceError(
            f"'{folder / pickles[0]}' is pickled and loading it can run code hidden in it; give a pipeline with "
            "safetensors: pipeline.save_pretrained(FOLDER) writes them"
        )
    return ()


def _choose_dtype(name: str, device: torch.device, elements: Mapping[str, Counter[str]]) -> tuple[torch.dtype, str]:
    import torch

    if name != "auto":
        return getattr(torch, DTYPES[name]), "asked for"
    if device.type == "cpu":
        return torch.float32, "a CPU computes a pipeline in float32 unless asked otherwise"
    denoiser: Counter[str] = sum((elements[part] for part in _DENOISERS if part in elements), Counter())
    stored = stored_dtype(denoiser)
    if stored is None:
        return torch.float32, "the denoiser's weights name no floating-point type"
    own = getattr(torch, stored)
    if own in native_dtypes(device):
        return own, f"the denoiser is stored in {stored} and {device.type} computes in it natively"
    return torch.float32, f"the denoiser is stored in {stored}, in which {device.type} does not compute natively"


def _check_room(spec: str, device: torch.device, elements: Iterable[Counter[str]], dtype: torch.dtype) -> None:
    from profilers.device import memory_available_bytes

    if device.type not in ("cpu", "cuda"):
        return  # torch's own out-of-memory error is all there is
    needed = sum(bytes_when_loaded(counted, dtype.itemsize) for counted in elements)
    free = memory_available_bytes(device)
    if needed > free:
        raise NoRoomError(
            f"the weights of '{spec}' need {data_size(needed)} and {data_size(free)} are free on {device}; "
            "use a smaller --dtype or another --device"
        )


def _load(
    spec: str,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    parts: Mapping[str, tuple[str, tuple[Path, ...]]],
    *,
    trust_remote_code: bool,
) -> tuple[Any, dict[str, quantized.QuantizedComponent]]:
    """Load a pipeline; ``parts`` are its quantized components: class and files."""
    import torch
    from diffusers import DiffusionPipeline

    with _one_line_errors(spec):
        low_bit = {
            name: quantized.load(folder / name, kind, files, device, dtype) for name, (kind, files) in parts.items()
        }
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **{name: part.module for name, part in low_bit.items()},
        )
        for name, component in pipeline.components.items():
            if not isinstance(component, torch.nn.Module):
                continue
            # diffusers only warns about weights that a file lacks, and leaves them without storage.
            missing = [weight for weight, tensor in component.named_parameters() if tensor.device.type == "meta"]
            if missing:
                raise SourceError(
                    f"the weights of '{folder / name}' lack {len(missing)} tensors, first '{missing[0]}'; "
                    "fetch the pipeline again"
                )
            component.eval()
        return pipeline.to(device), low_bit


@contextlib.contextmanager
def _one_line_errors(spec: str) -> Iterator[None]:
    """Turn what diffusers, transformers and torch raise about a folder into one line."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        detail = next(iter(str(error).strip().splitlines()), "")
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise NoRoomError(f"memory ran out while loading '{spec}' ({detail}); use a smaller --dtype") from error
        raise SourceError(f"diffusers cannot load '{spec}': {type(error).__name__}: {detail}") from error


def _synchronize(device: torch.device) -> None:
    from profilers.device import synchronize

    synchronize(device)
