"""Open a folder that ``effcli export`` wrote and run it with ONNX Runtime: on its CUDA provider, else on the CPU's."""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.checkpoint_files import CONFIG, ONNX_EXPORT, fingerprint, read_json, verify_files
from effcli.errors import BadInputError, NoRoomError, SourceError
from effcli.formatting import data_size
from effcli.reports.model import REPORT_FILE
from effcli.sources import Source

if TYPE_CHECKING:
    from effcli.export.generating import OnnxModel
    from effcli.loading import LoadedModel
    from profilers.weights import WeightSize

FORMAT = "effcli.onnx/1"
TEXT_GENERATION = "text-generation"


@dataclass(frozen=True)
class Description:
    """What ``effcli-onnx.json`` says of an export.

    Attributes
    ----------
    task : str
        ``text-generation``, ``feature-extraction``, …
    architecture : str
        Class of the model that was exported.
    graphs : dict of str to str
        File by name: ``prefill`` and ``decode``, or ``model``.
    weights : str
        The file that holds the weights of every graph.
    opset : int
    dtype : str
        Of activations and of weights that are not quantized.
    quantization : str or None
    source : dict
        What was exported.
    files : dict of str to str
        sha256 by name.
    """

    task: str
    architecture: str
    graphs: dict[str, str]
    weights: str
    opset: int
    dtype: str
    quantization: str | None
    source: dict[str, Any]
    files: dict[str, str]


def read(folder: str | Path) -> Description:
    """Read what an export says of itself, and check that its files are there.

    Raises
    ------
    SourceError
        If the folder is no export, of another version, or lacks a file.
    """
    path = Path(folder) / ONNX_EXPORT
    if not path.is_file():
        raise SourceError(
            f"'{folder}' has no {ONNX_EXPORT}, so it is no export; make one with: effcli export MODEL -o {folder}"
        )
    data = read_json(path)
    form = data.get("format")
    if form != FORMAT:
        newer = isinstance(form, str) and form.startswith(FORMAT.rpartition("/")[0])
        raise SourceError(
            f"'{path}' has format {form!r} and this effcli reads '{FORMAT}'; "
            + ("update effcli, or export the model again" if newer else "export the model again")
        )
    try:
        found = Description(
            task=str(data["task"]),
            architecture=str(data["architecture"]),
            graphs={str(name): str(file) for name, file in data["graphs"].items()},
            weights=str(data["weights"]),
            opset=int(data["opset"]),
            dtype=str(data["dtype"]),
            quantization=data.get("quantization"),
            source=dict(data.get("source") or {}),
            files=dict(data.get("files") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"'{path}' is damaged ({type(error).__name__}: {error}); export the model again") from None
    needed = "decode" if found.task == TEXT_GENERATION else "model"
    if needed not in found.graphs:
        raise SourceError(f"'{path}' names no graph '{needed}' for task '{found.task}'; export the model again")
    for name in (CONFIG, found.weights, *found.graphs.values()):
        if Path(name).name != name:
            raise SourceError(f"'{path}' names '{name}', which is not in its folder; export the model again")
        if not (path.parent / name).is_file():
            raise SourceError(
                f"'{folder}' lacks '{name}', which its {ONNX_EXPORT} names; copy it again, or export again"
            )
    return found


def open(  # noqa: A001 - it opens
    folder: str | Path, device: str = "auto", threads: int | None = None, verify: bool = False, graph: str | None = None
) -> OnnxModel:
    """Open an export to run it.

    Parameters
    ----------
    folder : str or Path
        What ``effcli export`` wrote.
    device : str
        ``auto``: a CUDA GPU where there is one and ONNX Runtime has its provider for it; ``cpu``, ``cuda``, ``cuda:N``.
    threads : int or None
        CPU threads of one op; None: as many as torch uses.
    verify : bool
        Compare every file with its sha256 first.
    graph : str or None
        Graph to run, ``prefill`` (prompts only: it takes no cache) for one; None: ``decode``, which runs prompts as
        well, or ``model``.

    Returns
    -------
    OnnxModel
        One that generates (:class:`effcli.export.generating.OnnxCausalLM`) where the task is text generation.

    Raises
    ------
    SourceError
        If the folder is no export, damaged, or ONNX Runtime cannot run it.
    BadInputError
        If ONNX Runtime is not installed, or for a device that is not here.
    NoRoomError
        If the weights do not fit the memory there is.
    """
    described = read(folder)
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        raise BadInputError(f"'{folder}' runs on ONNX Runtime, which is not installed: pip install 'effcli[onnx]'")
    import torch
    from transformers import AutoConfig, GenerationConfig

    from effcli.export.generating import OnnxCausalLM, OnnxModel
    from effcli.export.session import Graph
    from effcli.quiet import quiet_transformers
    from profilers.device import memory_available_bytes

    path = Path(folder)
    if verify:
        verify_files(path, described.files, ONNX_EXPORT)
    chosen, reason = choose_device(device)
    name = graph or ("decode" if described.task == TEXT_GENERATION else "model")
    if name not in described.graphs:
        raise BadInputError(f"'{folder}' has no graph '{name}'; give one of: {', '.join(described.graphs)}")
    weights, fold = _inspect(path / described.graphs[name])
    free = memory_available_bytes(chosen)
    if weights.bytes > free:
        raise NoRoomError(
            f"the weights of '{folder}' need {data_size(weights.bytes)} and {chosen} has {data_size(free)} free; "
            "run it where there is more, or export it quantized"
        )
    opened = Graph(path / described.graphs[name], chosen, threads or torch.get_num_threads(), fold=fold)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        facts: dict[str, Any] = {
            "architecture": described.architecture, "task": described.task, "dtype": getattr(torch, described.dtype),
            "weights": weights,
        }  # fmt: skip
        model: OnnxModel
        if described.task == TEXT_GENERATION:
            generation = (
                GenerationConfig.from_pretrained(path, local_files_only=True)
                if (path / "generation_config.json").is_file()
                else GenerationConfig.from_model_config(config)
            )
            model = OnnxCausalLM(opened, config, generation, **facts)
        else:
            model = OnnxModel(opened, config, **facts)
    model.notes = (f"runs on ONNX Runtime {version_of()}, {opened.provider}: {reason}",)
    # What reports say computes attention.
    config._attn_implementation_internal = "onnxruntime"
    return model


def load(source: Source, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Open an export for the commands: as :func:`open`, with its tokenizer and all that a report says of a model.

    Parameters
    ----------
    source : Source
        Of kind ``onnx``.
    device : str
    dtype : str
        ``auto``, or the one it was exported in.

    Raises
    ------
    BadInputError
        For another dtype.
    """
    from effcli.devices import DTYPES, check_dtype_name
    from effcli.loading import LoadedModel, load_tokenizer

    assert source.path is not None
    check_dtype_name(dtype)
    described = read(source.path)
    if dtype != "auto" and DTYPES[dtype] != described.dtype:
        raise BadInputError(
            f"'{source.spec}' was exported in {described.dtype}, not {DTYPES[dtype]}; "
            "leave --dtype out, or export again"
        )
    started = time.perf_counter()
    model = open(source.path, device)
    seconds = time.perf_counter() - started
    tokenizer, missing = load_tokenizer(source.path, model.config)
    spec = described.source.get("spec")
    made_from = (f"exported from {spec}, opset {described.opset}",) if spec else ()
    quantized = f", weights quantized to {described.quantization}" if described.quantization else ""
    return LoadedModel(
        model=model,
        config=model.config,
        tokenizer=tokenizer,
        source=source,
        device=model.device,
        device_reason=choose_device(device)[1],
        dtype=model.dtype,
        dtype_reason=f"as exported{quantized}",
        load_seconds=seconds,
        notes=(*source.notes, *model.notes, *made_from, *([missing] if missing else [])),
        fingerprint=fingerprint([source.path / described.weights]),
        revision=source.revision,
    )


def version_of() -> str:
    """Return the version of ONNX Runtime that is installed."""
    import onnxruntime

    return str(onnxruntime.__version__)


def choose_device(name: str) -> tuple[Any, str]:
    """Return where to run, and why: ``auto`` falls back to the CPU where ONNX Runtime is built without CUDA.

    Raises
    ------
    BadInputError
        For a device that was named and is not here, or that ONNX Runtime cannot use.
    """
    import onnxruntime
    import torch

    from effcli import devices

    chosen, reason = devices.choose_device(name)
    if chosen.type == "cpu":
        return chosen, reason
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if chosen.type == "cuda" and has_cuda:
        return chosen, reason
    lacks = f"ONNX Runtime {onnxruntime.__version__} has no provider for {chosen.type} here"
    if name == "auto":
        return torch.device("cpu"), lacks
    raise BadInputError(f"device '{name}': {lacks}; give --device cpu, or pip install 'effcli[onnx]' for CUDA")


def _inspect(path: Path) -> tuple[WeightSize, bool]:
    """Return the size of a graph's weights, each shared tensor once, and whether constants have to be folded.

    They have not where all that is there to fold are transposes before products: ONNX Runtime makes those part of the
    product, and would else keep a transposed copy, of tied embeddings for one. What integers are packed into counts as
    so many parameters where the report does not say how many there were.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from profilers.weights import WeightSize

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise SourceError(f"'{path}' is no ONNX graph ({error}); copy it again, or export again") from None
    tensors: dict[int, tuple[int, int]] = {}  # bytes and elements, by place in the file of weights
    for number, tensor in enumerate(graph.initializer, start=1):
        place = {item.key: item.value for item in tensor.external_data}
        size = int(place.get("length", len(tensor.raw_data)))
        tensors[int(place.get("offset", -number))] = size, math.prod(tensor.dims)
    report = path.parent / REPORT_FILE
    counted = (read_json(report).get("model") or {}).get("parameters") if report.is_file() else None
    constant = {tensor.name for tensor in graph.initializer}
    turned = {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in constant}
    users = {node.op_type for node in graph.node if turned & {*node.input}}
    held, elements = (sum(column) for column in zip(*tensors.values(), strict=True))
    return WeightSize(held, counted or elements), not users <= {"MatMul"}
