"""The memory of a job: what it holds while it runs, and, before that, what it will take at most.

An estimate reads names and shapes, never a weight:

::

    process                imported libraries, measured on Linux with torch 2.13
  + weights                headers of the safetensors or GGUF files, in the dtype that they are loaded in
  + cache and activations  config.json: layers, heads and vocabulary at the job's longest context and largest batch
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from effcli.batch.model import Job
from effcli.formatting import data_size

SAMPLE_SECONDS = 0.5
PROCESS_BYTES = 800 * 10**6
"""A process that has imported torch and transformers and runs a small model."""
PEAKS_BYTES = {False: 1100 * 10**6, True: 4300 * 10**6}
"""Buffers that the device's ceilings are measured with, in the memory of a CPU or a GPU (True)."""
TIMES_WEIGHTS = {"profile": 1.0, "optimize": 2.0, "export": 3.0}
"""Times the weights that a job holds at its peak: an optimize also the shard or the layer that it works on, an export
also what it writes and what ONNX Runtime reads back."""
DEFAULT_CONTEXT = 4096
"""Longest context of a profile that names none."""
OPTIMIZE_CONTEXT = 512
LOGITS_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """What a job takes at most.

    Attributes
    ----------
    ram_bytes : int
        Of the machine's memory.
    gpu_bytes : int
        Of its GPU's memory; 0 for a job on the CPU.
    how : str
        How the figures were arrived at.
    """

    ram_bytes: int
    gpu_bytes: int
    how: str

    def __str__(self) -> str:
        """Return the figures as people read them."""
        gpu = f" + {data_size(self.gpu_bytes)} of the GPU's" if self.gpu_bytes else ""
        return f"{data_size(self.ram_bytes)}{gpu}"


def estimate(job: Job, output: Path | None, *, on_gpu: bool) -> Estimate | None:
    """Return what a job takes at most, None where its model is not on this machine yet.

    Parameters
    ----------
    job : Job
    output : Path or None
        The batch's folder, for a model that is the output of another job.
    on_gpu : bool
        Whether the model runs on a GPU.
    """
    said = job.limits.memory_bytes
    if said is not None:
        how = "limits.memory"
        return Estimate(PROCESS_BYTES, said, how) if on_gpu else Estimate(said, 0, how)
    if job.kind == "call":
        return Estimate(PROCESS_BYTES, 0, "a process; what its function takes is not known")
    model = _Model.of(job, output)
    if model is None:
        return None
    weights = round(model.weight_bytes(job, on_gpu=on_gpu) * TIMES_WEIGHTS[job.kind])
    working = model.working_bytes(job)
    how = f"weights {data_size(weights)} from {model.described} + cache and activations {data_size(working)}"
    processes = PROCESS_BYTES * (2 if job.kind == "optimize" else 1)
    buffers = PEAKS_BYTES[on_gpu]
    if on_gpu:
        return Estimate(processes, weights + working + buffers, f"{how} + {data_size(buffers)} to measure the GPU")
    rest = processes + buffers
    return Estimate(rest + weights + working, 0, f"{how} + {data_size(rest)} of the process")


@dataclass(frozen=True)
class _Model:
    """What the headers of a model's files and its config say.

    Attributes
    ----------
    elements : mapping of str to int
        Count by stored type.
    described : str
        Where that was read.
    """

    elements: Mapping[str, int]
    config: Mapping[str, Any]
    described: str

    @staticmethod
    def of(job: Job, output: Path | None) -> _Model | None:
        """Return the facts about a job's model, None where its files are not here."""
        from effcli.errors import EffcliError

        path = _local(job, output)
        if path is None:
            return None
        with contextlib.suppress(EffcliError, OSError, ValueError):  # what is wrong with it, the job itself says
            if path.is_file():
                return _file(path)
            return _folder(path)
        return _Model({}, {}, "files that cannot be read")

    def weight_bytes(self, job: Job, *, on_gpu: bool) -> int:
        """Return the bytes of the weights in the dtype that they are loaded in."""
        from collections import Counter

        from effcli.checkpoint_files import bytes_when_loaded

        elements = Counter(self.elements)
        quantized = bool(self.config.get("quantization_config"))
        return bytes_when_loaded(elements, _itemsize(job, elements, on_gpu=on_gpu), keep_stored=quantized)

    def working_bytes(self, job: Job) -> int:
        """Return the bytes of the cache, the activations and the logits at the largest point of the job."""
        text = {**self.config, **(self.config.get("text_config") or {})}
        hidden = _number(text, "hidden_size", "n_embd", "d_model")
        layers = _number(text, "num_hidden_layers", "n_layer", "num_layers")
        heads = _number(text, "num_attention_heads", "n_head", "num_heads") or 1
        kv_heads = _number(text, "num_key_value_heads") or heads
        head = _number(text, "head_dim") or hidden // heads
        tokens = _tokens(job, _number(text, "max_position_embeddings", "n_positions"))
        cache = 2 * layers * kv_heads * head
        # Of one layer at a time: the residual stream, the MLP's two products, and attention's rows in blocks.
        wide = max(4 * hidden, _number(text, "intermediate_size"))
        logits = _number(text, "vocab_size") * (1 if job.kind == "profile" else OPTIMIZE_CONTEXT)
        return 4 * tokens * (cache + 6 * hidden + 2 * wide) + 4 * logits * LOGITS_BYTES


def _local(job: Job, output: Path | None) -> Path | None:
    """Return where a job's model lies on this machine, None where it does not."""
    from effcli import builtin_models

    if job.model_from is not None:
        path = None if output is None else output / job.model_from
        return path if path is not None and path.exists() else None
    path = Path(job.model).expanduser()
    if path.exists():
        return path
    if job.model in builtin_models.CATALOGUE:
        return builtin_models.model_folder(job.model) if builtin_models.cached(job.model) else None
    return _snapshot(job)


def _snapshot(job: Job) -> Path | None:
    """Return the folder of a hub model in the local cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        found = try_to_load_from_cache(job.model, "config.json", revision=job.revision)
    except (ImportError, HFValidationError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _folder(path: Path) -> _Model:
    from effcli.checkpoint_files import CONFIG, check_safetensors

    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*/*.safetensors"))  # a pipeline's parts
    config = path / CONFIG
    facts = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if files:
        return _Model(check_safetensors(files), facts, "the headers of its files")
    stored = sum(file.stat().st_size for pattern in ("*.bin", "*.onnx", "*.data") for file in path.glob(pattern))
    return _Model({"F32": stored // 4}, facts, "the size of its files")


def _file(path: Path) -> _Model:
    if path.suffix.lower() != ".gguf":
        return _Model({}, json.loads(path.read_text(encoding="utf-8")), "a config, which has none")
    from effcli.gguf_files import read_facts

    facts = read_facts(path)
    return _Model({"F32": sum(facts.elements.values())}, {}, "the header of its file")


def _itemsize(job: Job, elements: Mapping[str, int], *, on_gpu: bool) -> int:
    """Return the bytes of a weight as loaded."""
    from effcli.checkpoint_files import stored_dtype
    from effcli.devices import DTYPES

    half = ("bfloat16", "float16")
    if job.dtype != "auto":
        return 2 if DTYPES.get(job.dtype) in half else 4
    from collections import Counter

    stored = stored_dtype(Counter(elements))
    if stored not in half:
        return 4
    if on_gpu:
        return 2
    import torch

    from effcli.devices import native_dtypes

    return 2 if getattr(torch, stored) in native_dtypes(torch.device("cpu")) else 4


def _tokens(job: Job, limit: int) -> int:
    """Return the tokens of the largest point that a job measures."""
    default = DEFAULT_CONTEXT if job.kind == "profile" else OPTIMIZE_CONTEXT
    context = _largest(job.settings.get("context")) or min(default, limit or default)
    return context * (_largest(job.settings.get("batch")) or 1)


def _largest(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return max((int(item) for item in value), default=0)
    return int(value or 0)


def _number(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)


class MemoryWatch:
    """Samples the memory of this process twice a second, in a thread of its own; use it as a context manager.

    Parameters
    ----------
    on_sample : callable, optional
        Called after each sample, in the thread.
    """

    def __init__(self, on_sample: Callable[[], None] | None = None) -> None:
        self._on_sample = on_sample
        self._own = psutil.Process()
        self._children = False
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="effcli-memory")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def restart(self, *, children: bool) -> None:
        """Forget the peak; ``children`` counts the processes that this one starts, which costs a little more."""
        self._children, self._peak = children, 0
        self.held_bytes()

    def held_bytes(self) -> int:
        """Return the resident bytes now, of what children share with others nothing."""
        held = int(self._own.memory_info().rss)
        if self._children:
            with contextlib.suppress(psutil.Error):
                for child in self._own.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        found = child.memory_info()
                        held += found.rss - getattr(found, "shared", 0)
        self._peak = max(self._peak, held)
        return held

    def peak_bytes(self) -> int:
        """Return the most that was seen since the last restart."""
        self.held_bytes()
        return self._peak

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.held_bytes()
            if self._on_sample is not None:
                self._on_sample()


def gpu_memory_bytes() -> int | None:
    """Return the bytes of this process's GPU that are in use, by whomever; None where it uses none."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
