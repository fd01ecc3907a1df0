"""From a live torch model to ONNX graphs with the inputs and outputs that ONNX runtimes for language models expect.

::

    PreTrainedModel ──TextGraph / EncoderGraph (flat tensors in and out)──> transformers' OnnxExporter ──> onnx_ir.Model
                                                                                      │
                               names, dynamic batch and lengths, weights kept under their own names

Attention is traced through one function of ours: the cache keeps its own heads (no copies for grouped queries), and
masks are finite numbers, so that a row of padding cannot become NaN.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effcli.errors import BadInputError
from effcli.quiet import quiet_transformers

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from transformers import PreTrainedModel

ATTENTION = "effcli_onnx"
HIGHEST_OPSET = 23
"""The highest that torch's exporter writes (torch.onnx, 2.13) and onnxruntime runs; from it on attention is one op."""
PLAIN_ATTENTION_OPSET = 22
"""Up to it, attention is made of plain products: for models whose own attention cannot be replaced in a trace."""
LOWEST_OPSET = 18
"""What torch's exporter has implementations for; lower ones would be converted, which can fail."""
PREFIX = "model."
"""Of the names that a wrapped model's weights have."""
LAST_LOGITS = "num_logits_to_keep"
"""Optional input of the decode graph: of how many last positions logits are computed; 0, its default: of all."""
_SAMPLE = {"batch": 2, "sequence": 3, "past": 5}
_AFTER_HEAD = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity")
"""Ops that may follow the head, element by element: biases, scales, soft caps."""
_NOISY_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch.onnx._internal.exporter._registration")


class NotExportableError(BadInputError):
    """The model has a part that ONNX, or the exporter, has nothing for."""


@dataclass(frozen=True)
class CacheShape:
    """Shape of the cache of one layer.

    Attributes
    ----------
    heads : int
    key_size, value_size : int
        Of one head.
    """

    heads: int
    key_size: int
    value_size: int


def text_graphs(
    model: PreTrainedModel, *, opset: int, caches: tuple[CacheShape, ...]
) -> Iterator[tuple[str, onnx_ir.Model]]:
    """Lower a causal language model: ``prefill`` (no cache in) and ``decode`` (any cache in, any number of tokens).

    ``decode`` also takes :data:`LAST_LOGITS`, where its head can be told from the rest.

    Parameters
    ----------
    model : PreTrainedModel
    opset : int
    caches : tuple of CacheShape
        By layer, from :func:`cache_shapes`.

    Yields
    ------
    name, graph

    Raises
    ------
    NotExportableError
        Naming the module that cannot be lowered.
    """
    import torch

    graph = _text_graph(model)
    batch, sequence = _SAMPLE["batch"], _SAMPLE["sequence"]
    for name, past in (("prefill", 0), ("decode", _SAMPLE["past"])):
        inputs: dict[str, Any] = {
            "input_ids": torch.ones(batch, sequence, dtype=torch.long),
            "attention_mask": torch.ones(batch, past + sequence, dtype=torch.long),
            "position_ids": torch.arange(past, past + sequence).repeat(batch, 1),
        }
        axes: dict[str, Any] = {
            "input_ids": {0: "batch", 1: "sequence"},
            "attention_mask": {0: "batch", 1: "total" if past else "sequence"},
            "position_ids": {0: "batch", 1: "sequence"},
        }
        if past:
            inputs["past_key_values"] = [
                {
                    "key": torch.zeros(batch, shape.heads, past, shape.key_size, dtype=model.dtype),
                    "value": torch.zeros(batch, shape.heads, past, shape.value_size, dtype=model.dtype),
                }
                for shape in caches
            ]
            axes["past_key_values"] = [{part: {0: "batch", 2: "past"} for part in ("key", "value")} for _ in caches]
        lowered = _lower(graph, inputs, axes, opset)
        if past:
            _keep_last_logits(lowered)
        yield name, lowered


def encoder_graph(model: PreTrainedModel, inputs: dict[str, torch.Tensor], *, opset: int) -> onnx_ir.Model:
    """Lower a model that keeps no cache: encoders, embedding models, classifiers.

    Parameters
    ----------
    model : PreTrainedModel
    inputs : dict of str to torch.Tensor
        Dummy inputs of shape (batch, sequence).
    opset : int

    Raises
    ------
    NotExportableError
        Naming the module that cannot be lowered.
    """
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    return _lower(_encoder_graph(model), dict(inputs), axes, opset)


def cache_shapes(model: PreTrainedModel) -> tuple[CacheShape, ...]:
    """Return the shape of each layer's cache, as the model itself fills it on a few tokens.

    Raises
    ------
    NotExportableError
        If a layer keeps something else than keys and values (a recurrent state, codes), or the model no cache at all.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    try:
        with torch.inference_mode():
            model(
                input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True
            )
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, NotImplementedError) as error:
        raise _own_cache(model, "it does not run on a plain key-value cache") from error
    shapes = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != 2:
            raise _own_cache(model, f"layer {index} keeps no keys and values ({type(layer).__name__})")
        shapes.append(CacheShape(keys.shape[1], keys.shape[3], values.shape[3]))
    if not shapes:
        raise _own_cache(model, "it fills no key-value cache")
    return tuple(shapes)


def _own_cache(model: PreTrainedModel, reason: str) -> NotExportableError:
    return NotExportableError(
        f"{type(model).__name__} cannot be exported to ONNX: {reason}; only layers with a plain key-value cache can, "
        "so export a model without recurrent layers, or the checkpoint before such a pass"
    )


def _text_graph(model: PreTrainedModel) -> torch.nn.Module:
    import torch
    from transformers import DynamicCache

    class TextGraph(torch.nn.Module):
        """A language model over flat tensors.

        Every layer keeps its whole cache: a sliding window is left to the mask, so all layers have one length.
        """

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.config = model.config

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor,
            past_key_values: list[dict[str, torch.Tensor]] | None = None,
        ) -> dict[str, Any]:
            cache = DynamicCache()
            for index, layer in enumerate(past_key_values or ()):
                cache.update(layer["key"], layer["value"], index)
            found = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **extra(position_ids),
            )
            present = [{"key": layer.keys, "value": layer.values} for layer in cache.layers]
            return {"logits": found.logits, "present": present}

    takes_positions = "position_ids" in _parameters(model)

    def extra(position_ids: torch.Tensor) -> dict[str, Any]:
        return {"position_ids": position_ids} if takes_positions else {}

    return TextGraph().eval()


def _encoder_graph(model: PreTrainedModel) -> torch.nn.Module:
    import torch

    class EncoderGraph(torch.nn.Module):
        """An encoder over flat tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.config = model.config

        def forward(self, **inputs: torch.Tensor) -> dict[str, Any]:
            found = self.model(**inputs, return_dict=True)
            return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}

    return EncoderGraph().eval()


def _parameters(model: PreTrainedModel) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(model.forward).parameters)


def _lower(graph: torch.nn.Module, inputs: dict[str, Any], axes: dict[str, Any], opset: int) -> onnx_ir.Model:
    """Trace and translate one graph, then name what goes in and out and its dynamic sizes."""
    import torch
    from onnx_ir.passes import common
    from onnxscript import optimizer
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model: Any = graph.model
    device = model.device
    inputs = torch.utils._pytree.tree_map(lambda tensor: tensor.to(device), inputs)
    config = OnnxConfig(
        dynamic_shapes=_dims(axes), opset_version=opset, optimize=False, external_data=True,
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip
    with _attention(model), _trail(graph) as trail, _quiet():
        try:
            program = OnnxExporter().export(graph, inputs, config=config)
        except (MemoryError, torch.OutOfMemoryError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - torch raises dozens of types; whatever it is, this model stays torch
            raise _explain(model, graph, error, trail) from error
        lowered: onnx_ir.Model = program.model
        # Transposed weights stay ops (onnxruntime folds them when it loads): so they keep their name and one copy.
        optimizer.optimize_ir(lowered, should_fold=lambda node: False if node.op_type == "Transpose" else None)
        _divide_by_roots(lowered)
        common.ClearMetadataAndDocStringPass()(lowered)  # stack traces of this machine
    _name_sizes(model, lowered, axes)
    return lowered


def _divide_by_roots(lowered: onnx_ir.Model) -> None:
    """Write ``x * (1 / sqrt(y))``, which is how RMS norms are traced, as ``x / sqrt(y)``: onnxruntime fuses only that.

    The fused norm is one op instead of six, each of which costs as much as its launch when one token is decoded.
    """
    import onnx_ir as ir

    for node in list(lowered.graph):
        if node.op_type != "Mul" or node.domain:
            continue
        for x, factor in (node.inputs, node.inputs[::-1]):
            if factor is None or (inverse := factor.producer()) is None or inverse.op_type != "Reciprocal":
                continue
            root = inverse.inputs[0]
            if root is None or (producer := root.producer()) is None or producer.op_type != "Sqrt":
                continue
            quotient = ir.node("Div", [x, root])
            lowered.graph.insert_before(node, quotient)
            ir.convenience.replace_all_uses_with(node.outputs, quotient.outputs, replace_graph_outputs=True)
            lowered.graph.remove(node, safe=True)
            if not factor.uses():
                lowered.graph.remove(inverse, safe=True)
            break


def _keep_last_logits(lowered: onnx_ir.Model) -> bool:
    """Let a graph compute the logits of the last positions only: cut the states before they reach the head.

    The head is the product by a weight that only elementwise ops follow. A graph that ends otherwise stays as it is.

    Returns
    -------
    bool
        Whether the graph has the input now.
    """
    import numpy as np
    import onnx_ir as ir

    logits = next(value for value in lowered.graph.outputs if value.name == "logits")
    head, between = logits.producer(), []  # what is between head and logits
    while head is not None and head.op_type in _AFTER_HEAD:
        between.append(head)
        computed = [value for value in head.inputs if value is not None and not _is_constant(value)]
        head = computed[0].producer() if len(computed) == 1 else None
    if head is None or head.op_type != "MatMul" or not _is_constant(head.inputs[1]):
        return False
    chain = [*between, head]
    states = head.inputs[0]
    alone = not logits.uses() and all(len(node.outputs[0].uses()) == 1 for node in chain[1:])
    if not alone or states is None or states.shape is None or len(states.shape) != 3:
        return False
    kept = ir.Value(
        name=LAST_LOGITS,
        shape=ir.Shape([]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array(0, np.int64), name=LAST_LOGITS),
    )
    lowered.graph.inputs.append(kept)
    lowered.graph.register_initializer(kept)
    one, end = (ir.node("Constant", [], {"value_ints": [number]}) for number in (1, np.iinfo(np.int64).max))
    negative = ir.node("Neg", [kept])
    start = ir.node("Reshape", [negative.outputs[0], one.outputs[0]])  # -0 is the first position
    cut = ir.node("Slice", [states, start.outputs[0], end.outputs[0], one.outputs[0]])
    cut.outputs[0].type = states.type
    lowered.graph.insert_before(head, [one, end, negative, start, cut])
    head.replace_input_with(0, cut.outputs[0])
    for node in chain[1:]:
        node.outputs[0].shape = None  # it was that of all positions
    if logits.shape is not None:
        logits.shape = ir.Shape(["kept" if axis == 1 else size for axis, size in enumerate(logits.shape)])
    return True


def _is_constant(value: onnx_ir.Value | None) -> bool:
    """Say whether a value is a weight, a constant, or one of these turned or cast."""
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None:
            return False
        if producer.op_type == "Constant":
            return True
        if producer.op_type not in ("Transpose", "Cast", "Identity"):
            return False
        value = producer.inputs[0]
    return value is not None


def _dims(axes: Any) -> Any:
    """Turn names of sizes into sizes that torch keeps open within the model's limits, such as its positions."""
    from torch.export import Dim

    if isinstance(axes, list):
        return [_dims(entry) for entry in axes]
    return {key: Dim.AUTO if isinstance(key, int) else _dims(value) for key, value in axes.items()}


def _name_sizes(model: Any, lowered: onnx_ir.Model, axes: dict[str, Any]) -> None:
    """Give dynamic sizes of inputs and outputs the names that readers expect, instead of torch's ``s17``.

    Raises
    ------
    NotExportableError
        If the model's own code has fixed one of them.
    """
    import onnx_ir as ir

    flat: dict[str, dict[int, str]] = {}
    for name, item in axes.items():
        if isinstance(item, list):
            flat |= {f"{name}.{index}.{part}": entry[part] for index, entry in enumerate(item) for part in entry}
        else:
            flat[name] = item
    total = "total" if any(name == "total" for item in flat.values() for name in item.values()) else "sequence"
    for value in lowered.graph.inputs:
        names = flat[str(value.name)]
        assert value.shape is not None
        fixed = next((axis for axis in names if isinstance(value.shape[axis], int)), None)
        if fixed is not None:
            raise NotExportableError(
                f"{type(model).__name__} cannot be exported to ONNX: its code fixes the size '{names[fixed]}' of "
                f"{value.name} to {value.shape[fixed]}"
            )
        value.shape = ir.Shape([names.get(axis, size) for axis, size in enumerate(value.shape)])
    for value in lowered.graph.outputs:
        if value.shape is None:
            continue
        second = {2: total} if str(value.name).startswith("present.") else {1: "sequence"}
        sizes = [
            size if isinstance(size, int) else {0: "batch", **second}.get(axis, str(size))
            for axis, size in enumerate(value.shape)
        ]
        value.shape = ir.Shape(sizes)


def traced_attention(model: Any) -> str | None:
    """Return the attention that a model is traced with, None where its own cannot be replaced.

    It is ours in place of torch's fused one, and the eager one where the model runs another (sinks, soft caps).
    """
    if not model._can_set_attn_implementation():
        return None
    return ATTENTION if model.config._attn_implementation == "sdpa" else "eager"


@contextlib.contextmanager
def _attention(model: Any) -> Iterator[None]:
    """Trace with :func:`traced_attention`; the model is as before after the block."""
    import torch.nn.functional as F
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def attention(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        position_bias: Any = None,
        **_: Any,
    ) -> tuple[Any, None]:
        if position_bias is not None:
            attention_mask = position_bias if attention_mask is None else position_bias + attention_mask
        grouped = query.shape[1] != key.shape[1]
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped
        )
        return found.transpose(1, 2).contiguous(), None

    chosen, before = traced_attention(model), model.config._attn_implementation
    if chosen is None:
        yield
        return
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    try:
        model.set_attn_implementation(chosen)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(ATTENTION, None)
        AttentionMaskInterface._global_mapping.pop(ATTENTION, None)


@contextlib.contextmanager
def _trail(graph: torch.nn.Module) -> Iterator[list[str]]:
    """Follow which module runs: where tracing stops with an error, the list ends with the module that caused it."""
    running: list[str] = []

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in graph.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _explain(model: Any, graph: torch.nn.Module, error: Exception, trail: list[str]) -> NotExportableError:
    """Return an error that names the module whose op cannot be traced or translated."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    module = trail[-1] if trail else _module_of(chain)
    op = re.search(r"op='([\w.]+)'", str(chain[-1]))
    reason = next((line.strip() for line in str(chain[-1]).splitlines() if line.strip()), "")
    what = f"the exporter has nothing for {op.group(1)}" if op else f"{type(chain[-1]).__name__}: {reason}"
    where = ""
    if module:
        where = f" at module {module.removeprefix(PREFIX)}"
        with contextlib.suppress(AttributeError):
            where += f" ({type(graph.get_submodule(module)).__name__})"
    return NotExportableError(f"{type(model).__name__} cannot be exported to ONNX{where}: {what[:300]}")


def _module_of(chain: list[BaseException]) -> str | None:
    """Return the module that a node comes from which could not be translated: torch's error only has the node."""
    import torch

    found = None
    for error in chain:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node) and node.meta.get("nn_module_stack"):
                found = str(list(node.meta["nn_module_stack"].values())[-1][0])
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries: what the user should know of an export is in its report."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    with quiet_transformers(), warnings.catch_warnings(), io.StringIO() as sink:
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            with contextlib.redirect_stdout(sink):
                yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
