"""Run a recipe's modifiers over a model layer by layer, so that a killed run goes on at the next layer.

::

    text ──> [embedding] ──spool──> [layer 0] ──spool──> [layer 1] ── … ──> [last layer with weights to quantize]
                                     │   1. every sample through the layer: hooks collect statistics
                                     │   2. the layer is quantized
                                     │   3. every sample through the quantized layer: inputs of the next one
                                     └─> layers/0001.safetensors, then layers/0001.json: this layer is done

Layers that run with one shared linear (a looped model's) are one part: the linear is observed in each of its loops, and
quantized once.

The graph is cut at decoder layers by llm-compressor's tracer, and its lifecycle events drive its modifiers; the loop is
ours (after ``llmcompressor/pipelines/sequential/pipeline.py``), because activations go through files
(:mod:`passes.quantize.spool`), each finished layer is kept on disk, and what no later layer needs is not computed.

Imported only where llm-compressor is known to be there (:func:`passes.quantize.quiet.require_extra`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import fake_quantize
from llmcompressor.core import LifecycleCallbacks, create_session
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modeling.offset_norm import norm_calibration_context
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx.proxy import TraceError
from transformers import PreTrainedModel

from passes.base import PassError
from passes.loop.modeling_looped import LoopedLinear
from passes.quantize.modifiers import InputsDivergedError, SharedGPTQ
from passes.quantize.smoothing import PROBE_TOKENS, SpooledAWQ, check_identity
from passes.quantize.spool import Spool
from profilers.base import Progress, Task

# Functions that llm-compressor's tracer must not look into: they build masks (its own default).
TRACING_IGNORE = [
    "_update_causal_mask",
    "create_causal_mask",
    "_update_mamba_mask",
    "make_causal_mask",
    "get_causal_mask",
    "mask_interface",
    "mask_function",
    "_prepare_4d_causal_attention_mask",
    "_prepare_fsmt_decoder_inputs",
    "_prepare_4d_causal_attention_mask_with_cache_position",
    "_update_linear_attn_mask",
    "project_per_layer_inputs",
    "_apply_attn_res",
]
# What the tracer raises about a model whose Python it cannot follow.
_TRACE_ERRORS = (
    TraceError,
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
    NameError,
    AssertionError,
    NotImplementedError,
    SyntaxError,
    OSError,
)
LAYERS = "layers"
SPOOL = "activations"
AWQ = "awq"
_FOLDER_PREFIX = "calibration-"


@dataclass(frozen=True)
class Calibrated:
    """What came out of a run.

    Attributes
    ----------
    errors : dict
        Relative squared error by layer: of outputs where GPTQ ran, else of weights.
    fallbacks : tuple of str
        Layers that were rounded to nearest because their Hessian could not be inverted.
    resumed_layers : int
        Parts of the model that an earlier run had finished.
    """

    errors: dict[str, float]
    fallbacks: tuple[str, ...]
    resumed_layers: int = 0


def fingerprint(model: PreTrainedModel, *parts: Any) -> str:
    """Return a sha256 over all weights and over whatever else decides the result.

    Raises
    ------
    PassError
        If a weight is NaN or infinite, naming the tensor.
    """
    digest = hashlib.sha256(repr(parts).encode())
    for name, tensor in scanned(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def scanned(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter once, refusing one that is not finite.

    Raises
    ------
    PassError
        Naming the first such tensor.
    """
    for name, tensor in model.named_parameters():
        # A sum is finite only where every value is, and takes a fraction of the time; it may overflow where they are.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise PassError(
                    f"weight {name} holds {bad} values that are NaN or infinite; the source is damaged: fetch it again"
                )
        yield name, tensor


def folder_for(work: Path, *identity: Any) -> Path:
    """Return the folder of a run, and remove what runs of another source or recipe left beside it."""
    folder = work / f"{_FOLDER_PREFIX}{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"
    for other in work.glob(f"{_FOLDER_PREFIX}*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def without_text(model: PreTrainedModel, modifiers: Sequence[Any], progress: Progress) -> Calibrated:
    """Run modifiers that look at weights only."""
    errors: dict[str, float] = {}
    with _session(model, modifiers), torch.no_grad():
        LifecycleCallbacks.calibration_start()
        layers = [(name, module) for name, module in model.named_modules() if _has_weight_scheme(module)]
        with progress.task("rounding weights", total=len(layers)) as task:
            for name, module in layers:
                LifecycleCallbacks.sequential_epoch_end([module])
                errors[name] = weight_error(module)
                task.advance()
        LifecycleCallbacks.calibration_end()
    return Calibrated(errors, ())


def with_text(
    model: PreTrainedModel,
    modifiers: Sequence[Any],
    batches: Sequence[torch.Tensor],
    *,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> Calibrated:
    """Run modifiers over text, layer by layer.

    Parameters
    ----------
    model : PreTrainedModel
        On ``device``, or on the CPU: then each layer is moved there for as long as it is worked on.
    modifiers : sequence of Modifier
    batches : sequence of torch.Tensor
        Token ids, shape (B, T) each.
    folder : Path
        Where finished layers and activations are kept. What an interrupted run of the same work left is used.
    device : torch.device
    progress : Progress

    Raises
    ------
    PassError
        If the model cannot be cut into layers.
    """
    rewrites_norms = len(modifiers) > 1
    with contextlib.ExitStack() as stack:
        if rewrites_norms:
            stack.enter_context(norm_calibration_context(model))
        stack.enter_context(moe_calibration_context())
        stack.enter_context(_session(model, modifiers, batches))
        subgraphs = _cut(model, batches[0])
        for modifier in modifiers:
            if isinstance(modifier, SpooledAWQ):
                modifier.keep_in(folder / AWQ, device)
        LifecycleCallbacks.calibration_start()
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        if rewrites_norms:
            check_identity(model, modifiers, batches[0][:1, :PROBE_TOKENS].to(model.device))
        run = _Run(model, modifiers, subgraphs, len(batches), folder, device)
        result = run.go(batches, progress)
        LifecycleCallbacks.calibration_end()
    return result


class _Run:
    """One walk over the parts of a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        modifiers: Sequence[Any],
        subgraphs: Sequence[Subgraph],
        samples: int,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.model = model
        self.gptq = next((item for item in modifiers if isinstance(item, SharedGPTQ)), None)
        self.samples = samples
        self.device = device
        self.home = model.device
        self.names = {module: name for name, module in model.named_modules()}
        parts = _parts(subgraphs, model)
        quantized = [any(hasattr(item, "quantization_scheme") for item in _modules(part, model)) for part in parts]
        # What comes after the last part with something to quantize is not needed.
        self.count = len(parts) - quantized[::-1].index(True)
        self.parts = parts[: self.count]
        self.subgraphs = [subgraph for part in self.parts for subgraph in part]
        self.quantized = quantized[: self.count]
        self.spool = Spool(folder / SPOOL)
        self.layers = folder / LAYERS
        self.layers.mkdir(exist_ok=True)

    def go(self, batches: Sequence[torch.Tensor], progress: Progress) -> Calibrated:
        """Calibrate every part that is not finished yet."""
        finished = self._finished()
        state: dict[str, Any] = {"errors": {}, "fallbacks": []}
        for index in range(finished):
            state = self._restore(index)
        if finished == 0:
            for sample, batch in enumerate(batches):
                self.spool.write(sample, {"input_ids": batch})
        passes = sum(1 + (wanted and index < self.count - 1) for index, wanted in enumerate(self.quantized[finished:]))
        total = sum(self.quantized)
        with progress.task("calibrating", total=passes * self.samples) as task:
            for index in range(finished, self.count):
                done = sum(self.quantized[:index])
                task.describe(_description(done, total, state["errors"]))
                state = self._part(index, state, task)
        return Calibrated(state["errors"], tuple(state["fallbacks"]), finished)

    def _part(self, index: int, state: dict[str, Any], task: Task) -> dict[str, Any]:
        """Calibrate one part, and put its results on disk."""
        part = self.parts[index]
        modules = _modules(part, self.model)
        with _moved(_modules(part, self.model, recurse=False), self.device, self.home):
            if self.quantized[index]:
                self._observe(part, task)
                LifecycleCallbacks.sequential_epoch_end(modules)
                state = self._add_results(modules, state)
            if index < self.count - 1:
                with HooksMixin.disable_hooks():
                    for sample in range(self.samples):
                        for subgraph in part:
                            self.spool.write(sample, self._forward(subgraph, sample))
                        task.advance()
            self._save(index, state)
        self.spool.delete(name for subgraph in part for name in subgraph.consumed_names)
        return state

    def _observe(self, part: Sequence[Subgraph], task: Task) -> None:
        """Run every sample through a part with the modifiers' hooks on."""
        for sharing in (True, False):
            if self.gptq is not None:
                self.gptq.begin_layer(sharing=sharing)
            try:
                for sample in range(self.samples):
                    for subgraph in part:
                        if self.gptq is not None:
                            self.gptq.begin_sample()
                        outputs = self._forward(subgraph, sample)
                        if subgraph is not part[-1]:
                            self.spool.write(sample, outputs)
                    if sharing:
                        task.advance()
            except InputsDivergedError:
                continue
            return

    def _forward(self, subgraph: Subgraph, sample: int) -> dict[str, Any]:
        outputs: dict[str, Any] = subgraph.forward(
            self.model, **self.spool.read(sample, subgraph.input_names, self.device)
        )
        return outputs

    def _add_results(self, modules: Sequence[nn.Module], state: dict[str, Any]) -> dict[str, Any]:
        errors = dict(state["errors"])
        for module in modules:
            if _has_weight_scheme(module):
                name = self.names[module]
                errors[name] = self.gptq.errors[name] if self.gptq is not None else weight_error(module)
        fallbacks = list(dict.fromkeys([*state["fallbacks"], *(self.gptq.fallbacks if self.gptq is not None else ())]))
        return {"errors": errors, "fallbacks": fallbacks}

    def _finished(self) -> int:
        index = 0
        while index < self.count and (self.layers / f"{index:04d}.json").is_file():
            index += 1
        return index

    def _tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Return what calibrating a part may change: every tensor of its modules but embeddings and observers."""
        return {
            f"{self.names[module]}.{key}": tensor
            for module in _modules(self.parts[index], self.model)
            if module in self.names and not isinstance(module, nn.Embedding)
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        }

    def _save(self, index: int, state: dict[str, Any]) -> None:
        if self.quantized[index]:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors(index).items()}
            save_file(tensors, self.layers / f"{index:04d}.safetensors")
        marker = self.layers / f"{index:04d}.json"
        draft = marker.with_suffix(".part")
        draft.write_text(json.dumps(state))
        os.replace(draft, marker)

    @torch.no_grad()
    def _restore(self, index: int) -> dict[str, Any]:
        if self.quantized[index]:
            stored = load_file(self.layers / f"{index:04d}.safetensors")
            for name, tensor in self._tensors(index).items():
                tensor.copy_(stored[name])
        state: dict[str, Any] = json.loads((self.layers / f"{index:04d}.json").read_text())
        return state


@torch.no_grad()
def weight_error(module: Any) -> float:
    """Return ||W - Q||^2 / ||W||^2 of a layer whose scales are known and whose weight is not yet rounded."""
    weight = module.weight
    rounded = fake_quantize(
        weight,
        module.weight_scale,
        getattr(module, "weight_zero_point", None),
        module.quantization_scheme.weights,
        global_scale=getattr(module, "weight_global_scale", None),
    )
    whole = float(weight.float().square().sum(dtype=torch.float64))
    return float((weight.float() - rounded.float()).square().sum(dtype=torch.float64)) / whole if whole > 0 else 0.0


@contextlib.contextmanager
def _session(
    model: PreTrainedModel, modifiers: Sequence[Any], batches: Sequence[torch.Tensor] | None = None
) -> Iterator[None]:
    """Initialize llm-compressor's lifecycle for the block, and finalize it if the block succeeds."""
    with create_session() as session:
        session.initialize(model=model, start=-1, recipe=list(modifiers), calib_data=batches)
        session.state.loss_masks = None
        session.state.sequential_prefetch = False
        yield
        session.finalize()


def _cut(model: PreTrainedModel, sample: torch.Tensor) -> list[Subgraph]:
    try:
        targets = infer_sequential_targets(model)
        subgraphs: list[Subgraph] = trace_subgraphs(
            model, {"input_ids": sample.to(model.device)}, list(targets), TRACING_IGNORE
        )
    except _TRACE_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PassError(
            f"{type(model).__name__} cannot be cut into layers for calibration ({reason}); "
            "use method=rtn, which needs none"
        ) from error
    if not any(hasattr(module, "quantization_scheme") for module in _modules(subgraphs, model)):
        raise PassError(
            f"{type(model).__name__} was cut into {len(subgraphs)} parts, none of which has a layer to quantize; "
            "use method=rtn, which needs no calibration"
        )
    return subgraphs


def _modules(part: Sequence[Subgraph], model: nn.Module, *, recurse: bool = True) -> list[nn.Module]:
    """Return the modules that a part runs, shared linears included, each once; without ``recurse`` the outermost."""
    direct = [module for subgraph in part for module in subgraph.submodules(model, recurse=recurse)]
    return list(dict.fromkeys([*direct, *(linear for subgraph in part for linear in _shared(subgraph, model))]))


def _shared(subgraph: Subgraph, model: nn.Module) -> list[nn.Module]:
    """Return the linears that a subgraph's layers run with and do not hold themselves."""
    return [module.shared for module in subgraph.submodules(model) if isinstance(module, LoopedLinear)]


def _parts(subgraphs: Sequence[Subgraph], model: nn.Module) -> list[list[Subgraph]]:
    """Put subgraphs that run with one shared linear, and those between them, into one part."""
    last: dict[nn.Module, int] = {}
    for index, subgraph in enumerate(subgraphs):
        last |= dict.fromkeys(_shared(subgraph, model), index)
    parts: list[list[Subgraph]] = []
    until = -1
    for index, subgraph in enumerate(subgraphs):
        if index > until:
            parts.append([])
        parts[-1].append(subgraph)
        until = max([until, index, *(last[linear] for linear in _shared(subgraph, model))])
    return parts


def _has_weight_scheme(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return scheme is not None and scheme.weights is not None


def _description(done: int, total: int, errors: Mapping[str, float]) -> str:
    if not errors:
        return f"calibrating layer {done + 1} of {total}"
    name, error = list(errors.items())[-1]
    return f"calibrating layer {min(done + 1, total)} of {total} (error of {name.rpartition('.')[2]} {error:.1e})"


@contextlib.contextmanager
def _moved(modules: Sequence[nn.Module], device: torch.device, home: torch.device) -> Iterator[None]:
    """Hold modules on ``device`` inside the block."""
    if device == home:
        yield
        return
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module in modules:
            module.to(home)
