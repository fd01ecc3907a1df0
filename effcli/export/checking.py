"""Hold written ONNX files against torch: what onnxruntime computes from them, on real text, and how fast.

::

    windows of text ──┬── torch, the loaded model ─────────────── logits ──┐
                      └── prefill.onnx, decode.onnx from disk ─── logits ──┴──> Agreement by kind of run

Decoding is fed the text, so that both sides see the same tokens whatever they would have chosen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import BadInputError
from effcli.export.report import Agreement, Speed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from onnxruntime import InferenceSession
    from transformers import PreTrainedModel

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DECODE_STEPS = 16
CHUNK = 4
"""Tokens that one call of the decode graph also gets at once."""
TIMED_CONTEXT = 256
ROUNDS = 5
STEPS_A_ROUND = 4
_QUIET = 4
"""onnxruntime's log level: only what ends the process."""


def choose_provider(device: torch.device) -> tuple[str, str]:
    """Return the provider that runs the check and is timed, and why."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_QUIET)
    if device.type != "cuda":
        return CPU, "the model is on the CPU"
    if CUDA in onnxruntime.get_available_providers():
        return CUDA, "the model is on a GPU"
    return CPU, "this onnxruntime has no CUDA provider: pip install onnxruntime-gpu"


def provider_of(graph: InferenceSession) -> str:
    """Return the provider that a graph really runs on: where CUDA's libraries are missing, it is the CPU's."""
    return str(graph.get_providers()[0])


def open_graph(path: Path, provider: str) -> InferenceSession:
    """Open a written graph with as many threads as torch uses.

    Raises
    ------
    BadInputError
        If onnxruntime cannot load it.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _QUIET
    providers = [provider] if provider == CPU else [provider, CPU]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # noqa: BLE001 - onnxruntime has a dozen types of its own, below Exception
        raise BadInputError(
            f"onnxruntime {onnxruntime.__version__} cannot load the graph '{path.name}' it was given: "
            f"{' '.join(str(error).split())[:300]}; try another --opset or --dtype"
        ) from None


@contextlib.contextmanager
def run_errors() -> Iterator[None]:
    """Turn what onnxruntime raises about a written graph into one line.

    Raises
    ------
    BadInputError
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - onnxruntime has a dozen types of its own, below Exception
        raise BadInputError(
            f"onnxruntime cannot run the exported graph ({' '.join(str(error).split())[:300]}); nothing was published"
        ) from error


class TextSessions:
    """The two graphs of a language model as functions of numpy arrays and onnxruntime values."""

    def __init__(self, folder: Path, provider: str) -> None:
        self.prefill_graph = open_graph(folder / "prefill.onnx", provider)
        self.decode_graph = open_graph(folder / "decode.onnx", provider)
        self._names = [output.name for output in self.prefill_graph.get_outputs()]

    def prefill(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, list[Any]]:
        """Run tokens without a cache; return logits and the cache, as onnxruntime's own values."""
        return self._run(self.prefill_graph, ids, mask, [])

    def decode(self, ids: np.ndarray, mask: np.ndarray, cache: list[Any]) -> tuple[np.ndarray, list[Any]]:
        """Run tokens after what is in the cache; ``mask`` covers both."""
        return self._run(self.decode_graph, ids, mask, cache)

    def _run(self, graph: Any, ids: Any, mask: Any, cache: list[Any]) -> tuple[np.ndarray, list[Any]]:
        import onnxruntime

        known = {item.name for item in graph.get_inputs()}
        positions = (mask.cumsum(axis=1) - 1).clip(min=0)[:, -ids.shape[1] :]
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items() if name in known
        }
        pasts = [name.replace("present", "past_key_values", 1) for name in self._names[1:]]
        feed |= dict(zip(pasts, cache, strict=False))
        with run_errors():
            logits, *present = graph.run_with_ort_values(self._names, feed)
        return logits.numpy(), present


def check_text(model: PreTrainedModel, sessions: TextSessions, windows: torch.Tensor) -> tuple[Agreement, ...]:
    """Compare logits over windows of text: prefilled, decoded with a cache, and in a batch padded on the left.

    Parameters
    ----------
    model : PreTrainedModel
    sessions : TextSessions
        Of the written files.
    windows : torch.Tensor
        Shape (n, context).
    """
    import numpy as np
    import torch

    def reference(ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        extra: dict[str, Any] = {}
        if mask is not None:
            extra["attention_mask"] = mask.to(model.device)
            if "position_ids" in _forward_names(model):
                extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(model.device)
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids.to(model.device), **extra, use_cache=False).logits
        return logits.float().cpu()

    prefill, decode, padded = _Sums("prefill"), _Sums("decode"), _Sums("padded batch")
    for window in windows.unsqueeze(1):
        ids = window.numpy()
        prefill.add(reference(window), sessions.prefill(ids, np.ones_like(ids))[0])
    window = windows[:1]
    expected, ids = reference(window), window.numpy()
    length = ids.shape[1]
    start = max(1, length - DECODE_STEPS - CHUNK)
    _, cache = sessions.prefill(ids[:, :start], np.ones_like(ids[:, :start]))
    for first, last in _spans(start, length):
        logits, cache = sessions.decode(ids[:, first:last], np.ones_like(ids[:, :last]), cache)
        decode.add(expected[:, first:last], logits)
    batch, mask = _left_padded(windows)
    keep = mask.bool()
    expected = reference(batch, mask)
    split = batch.shape[1] - 1
    logits, cache = sessions.prefill(batch[:, :split].numpy(), mask[:, :split].numpy())
    padded.add(expected[:, :split][keep[:, :split]], logits[keep[:, :split].numpy()])
    logits, _ = sessions.decode(batch[:, split:].numpy(), mask.numpy(), cache)
    padded.add(expected[:, split:], logits)
    return tuple(sums.result("logits", distribution=True) for sums in (prefill, decode, padded))


def check_encoder(model: PreTrainedModel, graph: InferenceSession, windows: torch.Tensor) -> tuple[Agreement, ...]:
    """Compare every output of an encoder over windows of text, and over a batch padded on the right."""
    import torch

    batch, mask = _left_padded(windows)
    turned = (batch.flip(1), mask.flip(1))
    runs = [(window, torch.ones_like(window)) for window in windows.unsqueeze(1)] + [turned]
    names = [output.name for output in graph.get_outputs()]
    known = {item.name for item in graph.get_inputs()}
    sums = {name: _Sums("encode") for name in names}
    for ids, kept in runs:
        feed = {"input_ids": ids, "attention_mask": kept, "token_type_ids": torch.zeros_like(ids)}
        feed = {name: value for name, value in feed.items() if name in known}
        with torch.inference_mode():
            expected = model(**{name: value.to(model.device) for name, value in feed.items()}, return_dict=True)
        with run_errors():
            found = graph.run(names, {name: value.numpy() for name, value in feed.items()})
        for name, value in zip(names, found, strict=True):
            wanted = expected[name].float().cpu()
            by_token = wanted.dim() > 2 and wanted.shape[:2] == kept.shape
            keep = kept.bool() if by_token else torch.ones(wanted.shape[0], dtype=torch.bool)
            sums[name].add(wanted[keep], value[keep.numpy()])
    return tuple(item.result(name, distribution=name == "logits") for name, item in sums.items())


def _spans(start: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield single tokens, then what is left at once."""
    steps = min(DECODE_STEPS, length - start)
    for position in range(start, start + steps):
        yield position, position + 1
    if start + steps < length:
        yield start + steps, length


def _left_padded(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two sequences of different lengths as one batch, the shorter filled up on its left."""
    import torch

    length = min(windows.shape[1], 64)
    batch = windows[[0, -1], :length].clone()
    mask = torch.ones_like(batch)
    missing = length // 3
    mask[1, :missing] = 0
    batch[1, missing:] = windows[-1, : length - missing]
    batch[1, :missing] = 0
    return batch, mask


class _Sums:
    """Differences of outputs, added up run after run."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.positions = 0
        self.values = 0
        self.total = self.largest = self.kl = 0.0
        self.agreeing = 0

    def add(self, expected: torch.Tensor, found: np.ndarray) -> None:
        """Compare two outputs of shape (..., values)."""
        import torch
        import torch.nn.functional as F

        theirs = expected.reshape(-1, expected.shape[-1])
        ours = torch.from_numpy(found).float().reshape(theirs.shape)
        difference = (ours - theirs).abs()
        worst = difference.max().item()
        self.largest = max(self.largest, worst) if worst == worst else float("inf")
        self.total += difference.double().sum().item()
        self.values += difference.numel()
        self.positions += theirs.shape[0]
        for start in range(0, theirs.shape[0], 64):
            a, b = theirs[start : start + 64].double(), ours[start : start + 64].double()
            self.kl += F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum").item()
            self.agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())

    def result(self, output: str, *, distribution: bool) -> Agreement:
        """Return what was found."""
        return Agreement(
            phase=self.phase,
            output=output,
            positions=self.positions,
            max_absolute_error=self.largest,
            mean_absolute_error=self.total / self.values,
            kl_mean=max(0.0, self.kl / self.positions) if distribution else None,
            top1_agreement=self.agreeing / self.positions if distribution else None,
        )


def _forward_names(model: Any) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(model.forward).parameters)


def time_text(model: PreTrainedModel, sessions: TextSessions, window: torch.Tensor) -> Speed:
    """Time prefill and decode of torch eager and onnxruntime in turns, so that both meet the same machine.

    Parameters
    ----------
    model : PreTrainedModel
    sessions : TextSessions
    window : torch.Tensor
        Shape (1, tokens): the prompt.
    """
    import numpy as np
    import torch
    from transformers import DynamicCache

    from profilers.device import synchronize

    ids = window.numpy()
    on_device = window.to(model.device)
    ones = np.ones((1, ids.shape[1] + 1 + ROUNDS * STEPS_A_ROUND), dtype=np.int64)
    state: dict[str, Any] = {}

    def torch_prefill() -> None:
        state["torch"] = DynamicCache()
        model(input_ids=on_device, past_key_values=state["torch"], use_cache=True)
        synchronize(model.device)

    def torch_decode() -> None:
        model(input_ids=on_device[:, :1], past_key_values=state["torch"], use_cache=True)
        synchronize(model.device)

    def onnx_prefill() -> None:
        state["onnx"] = sessions.prefill(ids, ones[:, : ids.shape[1]])[1]
        state["length"] = ids.shape[1]

    def onnx_decode() -> None:
        state["length"] += 1
        state["onnx"] = sessions.decode(ids[:, :1], ones[:, : state["length"]], state["onnx"])[1]

    with torch.inference_mode():
        ttft = _in_turns((torch_prefill, onnx_prefill), ROUNDS, 1)
        tpot = _in_turns((torch_decode, onnx_decode), ROUNDS, STEPS_A_ROUND)
    threads = torch.get_num_threads() if model.device.type == "cpu" else None
    return Speed(ids.shape[1], threads, ttft[0], ttft[1], tpot[0], tpot[1], ROUNDS)


def time_encoder(model: PreTrainedModel, graph: InferenceSession, window: torch.Tensor) -> Speed:
    """Time one forward of torch eager and onnxruntime in turns."""
    import torch

    from profilers.device import synchronize

    known = {item.name for item in graph.get_inputs()}
    every = {
        "input_ids": window,
        "attention_mask": torch.ones_like(window),
        "token_type_ids": torch.zeros_like(window),
    }
    feed = {name: value for name, value in every.items() if name in known}
    on_device = {name: value.to(model.device) for name, value in feed.items()}
    arrays = {name: value.numpy() for name, value in feed.items()}

    def torch_forward() -> None:
        model(**on_device)
        synchronize(model.device)

    with torch.inference_mode():
        found = _in_turns((torch_forward, lambda: graph.run(None, arrays)), ROUNDS, 1)
    threads = torch.get_num_threads() if model.device.type == "cpu" else None
    return Speed(window.shape[1], threads, found[0], found[1], None, None, ROUNDS)


def _in_turns(functions: tuple[Callable[[], Any], ...], rounds: int, repeats: int) -> tuple[float, ...]:
    """Return the median seconds of each function, warmed up once."""
    from statistics import median

    samples: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, times in zip(functions, samples, strict=True):
            for _ in range(repeats if round_ else 1):
                started = time.perf_counter()
                function()
                if round_:
                    times.append(time.perf_counter() - started)
    return tuple(median(times) for times in samples)
