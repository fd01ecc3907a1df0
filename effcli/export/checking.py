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

from effcli.errors import EffcliError
from effcli.export.graphs import NotExportableError
from effcli.export.report import Agreement, Speed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from effcli.export.session import Graph

DECODE_STEPS = 16
CHUNK = 4
"""Tokens that one call of the decode graph also gets at once."""
PADDED_LENGTH = 64
TIMED_CONTEXT = 256
ROUNDS = 5
STEPS_A_ROUND = 4
COMPARED_POSITIONS = 64
"""Positions whose distributions are in memory at a time."""


def choose_device(device: torch.device) -> tuple[torch.device, str]:
    """Return where onnxruntime runs the check and is timed, and why."""
    import onnxruntime
    import torch

    if device.type != "cuda":
        return torch.device("cpu"), f"the model is on {device}"
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return device, f"the model is on {device}"
    return torch.device("cpu"), "this onnxruntime has no CUDA provider: pip install onnxruntime-gpu"


def open_graph(path: Path, device: torch.device) -> Graph:
    """Open a written graph with as many threads as torch uses."""
    import torch

    from effcli.export.session import Graph

    return Graph(path, device, torch.get_num_threads())


@contextlib.contextmanager
def run_errors() -> Iterator[None]:
    """Turn what onnxruntime raises about a graph that it has opened into one line.

    Raises
    ------
    NotExportableError
    """
    try:
        yield
    except EffcliError:
        raise
    except Exception as error:  # noqa: BLE001 - onnxruntime has a dozen types of its own, below Exception
        raise NotExportableError(
            f"onnxruntime cannot run the exported graph ({' '.join(str(error).split())[:300]}); nothing was published"
        ) from error


Cache = dict[str, Any]
"""Keys and values by the name of the input that takes them."""


class TextGraphs:
    """The two graphs of a language model as functions of tokens."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.prefill_graph = open_graph(folder / "prefill.onnx", device)
        self.decode_graph = open_graph(folder / "decode.onnx", device)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """Run tokens without a cache; return logits and the cache."""
        return self._run(self.prefill_graph, ids, mask, {})

    def decode(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Run tokens after what is in the cache; ``mask`` covers both."""
        return self._run(self.decode_graph, ids, mask, cache)

    def empty_cache(self) -> Cache:
        """Return the cache of one sequence that has no tokens yet."""
        import torch

        return {
            name: torch.zeros(
                [size if isinstance(size, int) else int(axis == 0) for axis, size in enumerate(item.shape)]
            )
            for name, item in self.decode_graph.inputs.items()
            if name.startswith("past_key_values.")
        }

    def _run(self, graph: Graph, ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with run_errors():
            found = graph.run({"input_ids": ids, "attention_mask": mask, "position_ids": positions} | cache)
        logits = found.pop("logits")
        return logits, {name.replace("present", "past_key_values", 1): value for name, value in found.items()}


def check_text(model: PreTrainedModel, graphs: TextGraphs, windows: torch.Tensor) -> tuple[Agreement, ...]:
    """Compare logits over windows of text: prefilled, decoded with a cache, and in a batch padded on the left.

    Parameters
    ----------
    model : PreTrainedModel
    graphs : TextGraphs
        Of the written files.
    windows : torch.Tensor
        Shape (n, context).
    """
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
        prefill.add(reference(window), graphs.prefill(window, torch.ones_like(window))[0])
    ids = windows[:1]
    ones, length, expected = torch.ones_like(ids), ids.shape[1], reference(ids)
    start = max(1, length - DECODE_STEPS - CHUNK)
    _, cache = graphs.prefill(ids[:, :start], ones[:, :start])
    for first, last in _spans(start, length):
        logits, cache = graphs.decode(ids[:, first:last], ones[:, :last], cache)
        decode.add(expected[:, first:last], logits)
    decode.add(expected, graphs.decode(ids, ones, graphs.empty_cache())[0])  # as runtimes with one graph do
    batch, mask = _left_padded(windows)
    keep = mask.bool()
    expected = reference(batch, mask)
    split = batch.shape[1] - 1
    logits, cache = graphs.prefill(batch[:, :split], mask[:, :split])
    padded.add(expected[:, :split][keep[:, :split]], logits.cpu()[keep[:, :split]])
    logits, _ = graphs.decode(batch[:, split:], mask, cache)
    padded.add(expected[:, split:], logits)
    return tuple(sums.result("logits", distribution=True) for sums in (prefill, decode, padded))


def check_encoder(model: PreTrainedModel, graph: Graph, windows: torch.Tensor) -> tuple[Agreement, ...]:
    """Compare every output of an encoder over windows of text, and over a batch padded on the right."""
    import torch

    batch, mask = _left_padded(windows)
    turned = (batch.flip(1), mask.flip(1))
    runs = [(window, torch.ones_like(window)) for window in windows.unsqueeze(1)] + [turned]
    sums = {name: _Sums("encode") for name in graph.outputs}
    for ids, kept in runs:
        feed = _encoder_feed(graph, ids, kept)
        with torch.inference_mode():
            expected = model(**{name: value.to(model.device) for name, value in feed.items()}, return_dict=True)
        with run_errors():
            found = graph.run(feed)
        for name, value in found.items():
            wanted = expected[name].float().cpu()
            by_token = wanted.dim() > 2 and wanted.shape[:2] == kept.shape
            keep = kept.bool() if by_token else torch.ones(wanted.shape[0], dtype=torch.bool)
            sums[name].add(wanted[keep], value.cpu()[keep])
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

    length = min(windows.shape[1], PADDED_LENGTH)
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

    def add(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Compare two outputs of shape (..., values)."""
        import torch.nn.functional as F

        theirs = expected.reshape(-1, expected.shape[-1])
        ours = found.float().cpu().reshape(theirs.shape)
        difference = (ours - theirs).abs()
        worst = difference.max().item()
        self.largest = max(self.largest, worst) if worst == worst else float("inf")
        self.total += difference.double().sum().item()
        self.values += difference.numel()
        self.positions += theirs.shape[0]
        for start in range(0, theirs.shape[0], COMPARED_POSITIONS):
            a, b = (side[start : start + COMPARED_POSITIONS].double() for side in (theirs, ours))
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


def time_text(model: PreTrainedModel, graphs: TextGraphs, window: torch.Tensor) -> Speed:
    """Time prefill and decode of torch eager and onnxruntime in turns, so that both meet the same machine.

    Parameters
    ----------
    model : PreTrainedModel
    graphs : TextGraphs
    window : torch.Tensor
        Shape (1, tokens): the prompt.
    """
    import torch
    from transformers import DynamicCache

    from profilers.device import synchronize

    device = graphs.decode_graph.device
    ids, here = window.to(device), window.to(model.device)
    ones = torch.ones((1, ids.shape[1] + 1 + ROUNDS * STEPS_A_ROUND), dtype=torch.long, device=device)
    state: dict[str, Any] = {}

    def torch_prefill() -> None:
        state["torch"] = DynamicCache()
        model(input_ids=here, past_key_values=state["torch"], use_cache=True)
        synchronize(model.device)

    def torch_decode() -> None:
        model(input_ids=here[:, :1], past_key_values=state["torch"], use_cache=True)
        synchronize(model.device)

    def onnx_prefill() -> None:
        state["onnx"] = graphs.prefill(ids, ones[:, : ids.shape[1]])[1]
        state["length"] = ids.shape[1]
        synchronize(device)

    def onnx_decode() -> None:
        state["length"] += 1
        state["onnx"] = graphs.decode(ids[:, :1], ones[:, : state["length"]], state["onnx"])[1]
        synchronize(device)

    with torch.inference_mode():
        ttft = _in_turns((torch_prefill, onnx_prefill), ROUNDS, 1)
        tpot = _in_turns((torch_decode, onnx_decode), ROUNDS, STEPS_A_ROUND)
    threads = torch.get_num_threads() if model.device.type == "cpu" else None
    return Speed(ids.shape[1], threads, ttft[0], ttft[1], tpot[0], tpot[1], ROUNDS)


def time_encoder(model: PreTrainedModel, graph: Graph, window: torch.Tensor) -> Speed:
    """Time one forward of torch eager and onnxruntime in turns."""
    import torch

    from profilers.device import synchronize

    feed = _encoder_feed(graph, window, torch.ones_like(window))
    on_device = {name: value.to(model.device) for name, value in feed.items()}
    there = {name: value.to(graph.device) for name, value in feed.items()}

    def torch_forward() -> None:
        model(**on_device)
        synchronize(model.device)

    with torch.inference_mode():
        found = _in_turns((torch_forward, lambda: graph.run(there)), ROUNDS, 1)
    threads = torch.get_num_threads() if model.device.type == "cpu" else None
    return Speed(window.shape[1], threads, found[0], found[1], None, None, ROUNDS)


def _encoder_feed(graph: Graph, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs that an encoder's graph has."""
    import torch

    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: value for name, value in feed.items() if name in graph.inputs}


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
