"""Load a resolved source onto a device, and refuse what is incomplete or does not fit."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effcli import builtin_models, gguf_files, pass_models, provenance
from effcli.checkpoint_files import (
    CONFIG,
    WeightFiles,
    bytes_when_loaded,
    check_safetensors,
    check_trust,
    find_weights,
    fingerprint,
    read_json,
    stored_dtype,
)
from effcli.devices import DTYPES, check_dtype_name, choose_device, choose_dtype, native_dtypes
from effcli.errors import NoRoomError, SourceError
from effcli.formatting import data_size
from effcli.quiet import quiet_transformers
from effcli.sources import PIPELINE_NOTE, Source, export_refused
from passes.base import KernelUse, LoadOptions, LoadRecord

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from profilers.base import Progress

__all__ = [
    "DTYPES",
    "LoadedModel",
    "check_dtype_name",
    "choose_device",
    "choose_dtype",
    "load",
    "native_dtypes",
]

# Share of a GPU's free memory that weights may take before they are spread: kernels and activations need the rest.
GPU_SHARE_FOR_WEIGHTS = 0.95
COMPRESSED_TENSORS = "compressed-tensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# What transformers and tokenizers raise about tokenizer files that are damaged or of an unknown kind.
_TOKENIZER_ERRORS = (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError)


@dataclass
class LoadedModel:
    """A model ready to be measured, with everything a report says about where it came from.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode; on the meta device with ``config_only``.
    config : PreTrainedConfig
    tokenizer : PreTrainedTokenizerBase or None
        None, with a note that says why, where there is none.
    source : Source
    device : torch.device
        The device to profile, also with ``config_only``.
    device_reason, dtype_reason : str
        Why these were chosen.
    dtype : torch.dtype
        Of the weights.
    load_seconds : float or None
        Reading the weights onto the device; None with ``config_only``.
    notes : tuple of str
        What the user should know, one line each.
    fingerprint : str or None
        sha256 over the weight files (:func:`effcli.checkpoint_files.fingerprint`); None without weights.
    revision : str or None
    record : LoadRecord
        Which kernel runs each class of quantized layers; empty for a model that is not quantized.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    source: Source
    device: torch.device
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str
    load_seconds: float | None
    notes: tuple[str, ...]
    fingerprint: str | None
    revision: str | None
    record: LoadRecord = LoadRecord()


def load(
    source: Source,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernels: Literal["auto", "plain"] = "auto",
    config_only: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    auto_class: Any = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the model, its config and its tokenizer; no flag is ever taken from the checkpoint's own config.

    Parameters
    ----------
    source : Source
        From :func:`effcli.sources.resolve`.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    dtype : str
        ``auto`` or a key of ``DTYPES``.
    kernels : str
        For quantized weights: ``auto``, the fastest kernels that the device has; ``plain``, decompressed to ``dtype``.
    config_only : bool
        Build the model on the meta device: shapes without storage. A source of kind ``config`` implies it.
    allow_pickle, trust_remote_code : bool
        As in :func:`effcli.sources.resolve`.
    auto_class : type, optional
        What builds the model: a class of transformers, also for encoders. Default: the language model's, by its config.
    progress : Progress or None

    Raises
    ------
    SourceError
        If the checkpoint is damaged, not trusted, incomplete or no language model.
    BadInputError
        For an unknown device or dtype.
    NoRoomError
        If the weights do not fit the memory there is.
    """
    from profilers.device import return_freed_memory

    check_dtype_name(dtype)
    if source.kind == "diffusers" or source.path is None:
        raise SourceError(f"'{source.spec}' is {PIPELINE_NOTE}")
    if source.kind == "onnx":
        raise export_refused(source.spec, source.path)
    chosen, device_reason = choose_device(device)
    config_only = config_only or source.kind == "config"
    with quiet_transformers(progress), _one_line_errors(source.spec):
        opened = (
            _Gguf(source) if source.kind == "gguf" else _Folder(source, config_only, allow_pickle, trust_remote_code)
        )
        auto = auto_class or _auto_class(opened.config, source.spec, trust_remote_code=trust_remote_code)
        torch_dtype, dtype_reason = choose_dtype(
            dtype, opened.config, chosen, stored=opened.stored, dequantized_from=opened.dequantized_from
        )
        notes = [*source.notes, *opened.notes]
        load_seconds, record = None, LoadRecord()
        if config_only:
            model = _on_meta(auto, opened.config, torch_dtype, trust_remote_code=trust_remote_code)
            if getattr(opened.config, "quantization_config", None) is not None:
                notes.append(f"the checkpoint is quantized; without weights it is counted in {torch_dtype}")
        else:
            placement, note = _placement(source.spec, opened.needed_bytes(torch_dtype), chosen)
            start = time.perf_counter()
            model, info = opened.load_model(auto, torch_dtype, placement)
            record = _prepare(source, model, LoadOptions(chosen, torch_dtype, kernels))
            _synchronize(chosen)
            load_seconds = time.perf_counter() - start
            return_freed_memory()
            notes += [note] if note else []
            notes += _check_complete(source.spec, info)
            notes += describe(record)
        model.eval()
        tokenizer, note = opened.load_tokenizer()
        notes += [note] if note else []
    return LoadedModel(
        model=model,
        config=model.config,
        tokenizer=tokenizer,
        source=source,
        device=chosen,
        device_reason=device_reason,
        dtype=torch_dtype,
        dtype_reason=dtype_reason,
        load_seconds=load_seconds,
        notes=tuple(notes),
        fingerprint=None if config_only else fingerprint(opened.weight_files),
        revision=source.revision,
        record=record,
    )


def _prepare(source: Source, model: PreTrainedModel, options: LoadOptions) -> LoadRecord:
    """Let each pass that made a checkpoint prepare the model to run, and repack weights that are still compressed."""
    from passes import registry

    assert source.path is not None
    made = provenance.read(source.path) if source.path.is_dir() else None
    records = []
    for done in made.passes if made else ():
        records.append(registry.load(done.name).from_mapping(done.parameters).load(source.path, model, options))
    if hasattr(model, "ct_decompress_hook") and not any(
        record.kernels for record in records
    ):  # a checkpoint of another tool, or one whose last pass left it
        from passes.quantize.kernels import repack

        records.append(repack(model, options))
    return LoadRecord(
        kernels=tuple(use for record in records for use in record.kernels),
        notes=tuple(note for record in records for note in record.notes),
    )


def describe(record: LoadRecord) -> list[str]:
    """Say which kernels run which layers, one line each."""
    by_kernel: dict[tuple[str, str | None], list[KernelUse]] = {}
    for use in record.kernels:
        by_kernel.setdefault((use.kernel, use.fallback_reason), []).append(use)
    lines = []
    for (kernel, reason), uses in by_kernel.items():
        layers = sum(use.layers for use in uses)
        names = ", ".join(use.layer_class for use in uses)
        because = f": {reason}" if reason else ""
        lines.append(f"{kernel} runs {layers} layer{'s' if layers > 1 else ''} ({names}){because}")
    return [*lines, *record.notes]


def load_tokenizer(
    folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """Return a folder's tokenizer, or None and why there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None, "no tokenizer: none of its files is there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except _TOKENIZER_ERRORS as error:
        return None, f"no tokenizer: its files cannot be loaded ({_first_line(error)})"
    return tokenizer, None


class _Folder:
    """A transformers folder, or only its config."""

    def __init__(self, source: Source, config_only: bool, allow_pickle: bool, trust_remote_code: bool) -> None:
        from transformers import AutoConfig

        assert source.path is not None
        config_file = source.path if source.kind == "config" else source.path / CONFIG
        self._folder = config_file.parent
        self._trust = trust_remote_code
        raw = read_json(config_file)
        pass_models.register(self._folder)
        note = check_trust(raw, f"'{config_file}'", trust_remote_code=trust_remote_code)
        self.notes = [note] if note else []
        self.config = AutoConfig.from_pretrained(
            config_file, trust_remote_code=trust_remote_code, local_files_only=True
        )
        quantization = raw.get("quantization_config") or {}
        self._compressed = quantization.get("quant_method") == COMPRESSED_TENSORS
        if self._compressed and not config_only and importlib.util.find_spec("compressed_tensors") is None:
            raise SourceError(
                f"the weights in '{self._folder}' are compressed; reading them needs: pip install 'effcli[quantize]'"
            )
        self._weights: WeightFiles | None = None
        self._elements: Counter[str] = Counter()
        if not config_only:
            self._weights = find_weights(self._folder, allow_pickle=allow_pickle)
            if self._weights is None:
                raise SourceError(f"folder '{self._folder}' has no weights; add --config-only to count without them")
            if not self._weights.pickled:
                self._elements = check_safetensors(self._weights.files)
        self.stored = stored_dtype(self._elements)
        self.dequantized_from = ""
        if source.kind == "builtin":
            self.dequantized_from = builtin_models.read_record(source.path).quantized
            self.notes.append(_dequantized(self.dequantized_from))

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return self._weights.files if self._weights else ()

    def needed_bytes(self, dtype: torch.dtype) -> int:
        assert self._weights is not None
        if self._weights.pickled:
            own = getattr(self.config, "dtype", None)
            stored_bytes = own.itemsize if own is not None else dtype.itemsize
            return sum(path.stat().st_size for path in self._weights.files) * dtype.itemsize // stored_bytes
        quantized = getattr(self.config, "quantization_config", None) is not None
        return bytes_when_loaded(self._elements, dtype.itemsize, keep_stored=quantized)

    def load_model(self, auto: type[Any], dtype: torch.dtype, placement: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        assert self._weights is not None
        with contextlib.ExitStack() as stack:
            if self._compressed:
                from passes.quantize.quiet import quiet_libraries

                stack.enter_context(quiet_libraries())
            model, info = auto.from_pretrained(
                self._folder,
                config=self.config,
                dtype=dtype,
                device_map=placement,
                use_safetensors=not self._weights.pickled,
                trust_remote_code=self._trust,
                local_files_only=True,
                output_loading_info=True,
            )
        return model, info

    def load_tokenizer(self) -> tuple[PreTrainedTokenizerBase | None, str | None]:
        return load_tokenizer(self._folder, self.config, trust_remote_code=self._trust)


class _Gguf:
    """A GGUF file."""

    def __init__(self, source: Source) -> None:
        assert source.path is not None
        self._path = source.path.absolute()
        self._facts = gguf_files.read_facts(self._path)
        self.config = gguf_files.load_config(self._path)
        self.weight_files = (self._path,)
        self.stored = self._facts.stored_dtype
        self.dequantized_from = self._facts.quantized
        self.notes = []
        if self.dequantized_from:
            self.notes.append(_dequantized(self.dequantized_from))

    def needed_bytes(self, dtype: torch.dtype) -> int:
        return sum(self._facts.elements.values()) * dtype.itemsize

    def load_model(self, auto: type[Any], dtype: torch.dtype, placement: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return gguf_files.load_model(self._path, auto, self.config, dtype, device_map=placement)

    def load_tokenizer(self) -> tuple[PreTrainedTokenizerBase | None, str | None]:
        try:
            return gguf_files.load_tokenizer(self._path, self._facts), None
        except _TOKENIZER_ERRORS as error:
            return None, f"no tokenizer: the one in the GGUF file cannot be loaded ({_first_line(error)})"


def _dequantized(types: str) -> str:
    return f"weights were dequantized from {types} GGUF types"


def _auto_class(config: PreTrainedConfig, spec: str, *, trust_remote_code: bool) -> Any:
    """Return the auto class that builds this config's language model."""
    import transformers
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    seq2seq = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    own_code = getattr(config, "auto_map", None) or {}
    for auto in (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM):
        if trust_remote_code and auto.__name__ in own_code:
            return auto
    model_type = config.model_type
    architectures = list(config.architectures or ())
    texts = {*causal.values(), *seq2seq.values()}
    # A name that transformers does not have (an old fork's) says nothing; one it has for another task does.
    other_task = [name for name in architectures if name not in texts and hasattr(transformers, name)]
    encoder = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not architectures
    if not other_task:
        if config.is_encoder_decoder and model_type in seq2seq:
            return transformers.AutoModelForSeq2SeqLM
        if type(config) in transformers.AutoModelForCausalLM._model_mapping._extra_content:
            return transformers.AutoModelForCausalLM  # registered by a pass
        if model_type in causal and (not encoder or getattr(config, "is_decoder", False)):
            return transformers.AutoModelForCausalLM
    named = other_task[0] if other_task else (architectures[0] if architectures else model_type)
    raise SourceError(
        f"'{spec}' has architecture {named} (model_type '{model_type}'), which does not generate text; "
        "give a causal or an encoder-decoder language model"
    )


def _on_meta(auto: type[Any], config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    import torch

    with torch.device("meta"):
        if not hasattr(auto, "from_config"):  # a model's own class
            return auto._from_config(config, dtype=dtype)
        return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _placement(spec: str, needed: int, device: torch.device) -> tuple[Any, str | None]:
    """Return transformers' ``device_map`` for weights of ``needed`` bytes, and a note where they are spread."""
    import torch

    from profilers.device import memory_available_bytes

    cpu_free = memory_available_bytes(torch.device("cpu"))
    if device.type == "cpu":
        if needed > cpu_free:
            raise _no_room(spec, needed, f"{data_size(cpu_free)} of memory are free")
        return None, None
    if device.type != "cuda":
        return {"": device}, None
    free = memory_available_bytes(device)
    if needed <= free * GPU_SHARE_FOR_WEIGHTS:
        return {"": device}, None
    gpus_free = sum(memory_available_bytes(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    if needed > gpus_free * GPU_SHARE_FOR_WEIGHTS + cpu_free:
        raise _no_room(spec, needed, f"{data_size(gpus_free)} are free on GPUs and {data_size(cpu_free)} beside them")
    return "auto", (
        f"weights of {data_size(needed)} do not fit {device} ({data_size(free)} free): accelerate spread them over "
        "the devices there are, so times include moving data between them"
    )


def _no_room(spec: str, needed: int, free: str) -> NoRoomError:
    return NoRoomError(
        f"the weights of '{spec}' need {data_size(needed)} and {free}; use a smaller --dtype, or --config-only"
    )


def _check_complete(spec: str, info: dict[str, Any]) -> list[str]:
    """Refuse a model of which transformers made up a part; note weights that it left unread."""
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise SourceError(
            f"the weights of '{spec}' lack {len(missing)} tensors, first '{missing[0]}', which would be random; "
            f"fetch the checkpoint again or correct its {CONFIG}"
        )
    mismatched = sorted(str(item[0]) for item in info.get("mismatched_keys", ()))
    if mismatched:
        raise SourceError(f"the weights of '{spec}' have another shape than its {CONFIG} says, first '{mismatched[0]}'")
    unread = sorted(info.get("unexpected_keys", ()))
    return (
        [f"{len(unread)} tensors of the checkpoint belong to no layer and were left, first '{unread[0]}'"]
        if unread
        else []
    )


def _synchronize(device: torch.device) -> None:
    from profilers.device import synchronize

    synchronize(device)


@contextlib.contextmanager
def _one_line_errors(spec: str) -> Iterator[None]:
    """Turn what transformers and torch raise about a checkpoint into one line."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, StrictDataclassError, OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise NoRoomError(
                f"memory ran out while loading '{spec}' ({_first_line(error)}); use a smaller --dtype, or --config-only"
            ) from error
        raise SourceError(f"transformers cannot load '{spec}': {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
