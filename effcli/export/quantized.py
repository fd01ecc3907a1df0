"""Quantized weights in ONNX graphs: the integers, scales and zero points of the checkpoint, not rounded again.

::

    y = MatMul(x, Transpose(W))  ──>  y = MatMulNBits(x, codes, scales, zero points)     blocks of 16 … 256 columns
    anything else that reads W   ──>  W = DequantizeLinear(codes, scales, zero points)

Graphs are traced with plain weights; then each weight that the checkpoint has in integers is put back into them. A
scale that belongs to a whole row is repeated for each block, as MatMulNBits has none for rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.checkpoint_files import CONFIG, find_weights, read_json
from effcli.errors import BadInputError
from effcli.export.graphs import PREFIX
from effcli.export.report import QuantizedLayers

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir
    import torch

    from passes.quantize.packing import Integers

BLOCKS = (256, 128, 64, 32, 16)
"""Columns that MatMulNBits lets share a scale."""
CONTRIB = "com.microsoft"
SUPPORTED = "schemes with integer weights and plain activations (w4a16, w8a16, auto)"
_DEQUANTIZE_BLOCKS_OPSET = 21


@dataclass(frozen=True)
class QuantizedWeights:
    """The integer weights of a checkpoint.

    Attributes
    ----------
    layers : mapping of str to Integers
        By the layer's name.
    name : str
        ``int4``, ``int8``, or both as ``int4+int8``.
    plain : tuple of str
        Names of others that are quantized in the checkpoint, and written dequantized.
    """

    layers: Mapping[str, Integers]
    name: str
    plain: tuple[str, ...] = ()


def read_quantized(folder: Path) -> QuantizedWeights | None:
    """Read the integer weights of a compressed-tensors checkpoint; None where it is not quantized.

    Raises
    ------
    BadInputError
        For a scheme that ONNX graphs here cannot hold, by name.
    """
    raw = read_json(folder / CONFIG).get("quantization_config")
    if raw is None:
        return None
    method = raw.get("quant_method")
    if method != "compressed-tensors":
        raise _refused(folder, f"is quantized by '{method}'")
    if raw.get("kv_cache_scheme") is not None:
        raise _refused(folder, "has a quantized KV cache")
    from types import SimpleNamespace

    from effcli.expected_tensors import Expected
    from effcli.quantization_claims import Claims
    from passes.quantize.packing import read_integers

    for group in raw.get("config_groups", {}).values():
        _check_group(folder, group, str(group.get("format") or raw.get("format")))
    claims = Claims.from_config({"quantization_config": raw})
    layers = {}
    plain: list[str] = []
    for name, state in _states(folder):
        claim = claims.of(name, Expected(shape=(), linear=True))
        if claim is None:
            plain.append(name)
            continue
        scheme: Any = SimpleNamespace(weights=SimpleNamespace(num_bits=claim.bits, symmetric=claim.symmetric))
        layers[name] = read_integers(state, scheme)
    if not layers:
        return None
    stored = sorted({"int4" if weight.bits <= 4 else "int8" for weight in layers.values()})
    return QuantizedWeights(layers, "+".join(stored), tuple(plain))


def _check_group(folder: Path, group: Mapping[str, Any], format_: str) -> None:
    weights = group.get("weights")
    if weights is None:
        return
    if weights.get("type") != "int":
        raise _refused(folder, f"has {weights.get('num_bits')}-bit {weights.get('type')} weights ({format_})")
    for key, what in (("input_activations", "activations"), ("output_activations", "outputs")):
        if group.get(key) is not None:
            raise _refused(folder, f"quantizes {what} too ({format_}, as w8a8 does)")
    if weights.get("strategy") not in ("group", "channel", "tensor") or weights.get("actorder") == "group":
        raise _refused(folder, f"has scales by {weights.get('strategy')}, columns out of order")


def _refused(folder: Path, what: str) -> BadInputError:
    return BadInputError(
        f"'{folder}' {what}, which an ONNX export cannot keep; it keeps {SUPPORTED}: quantize with one of these, or "
        "export the original"
    )


def _states(folder: Path) -> Iterable[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each compressed layer's name and tensors."""
    from safetensors import safe_open

    found = find_weights(folder)
    files = found.files if found is not None else ()
    where: dict[str, dict[str, Path]] = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                layer, _, part = name.rpartition(".")
                where.setdefault(layer, {})[part] = path
    for layer, parts in where.items():
        if "weight_scale" not in parts:
            continue
        state = {}
        for part, path in parts.items():
            with safe_open(path, framework="pt") as opened:
                state[part] = opened.get_tensor(f"{layer}.{part}")
        yield layer, state


class Replacer:
    """Puts integer weights into graphs, the same tensors into each."""

    def __init__(self, weights: QuantizedWeights) -> None:
        self._weights = weights
        self._packed: dict[tuple[str, str], tuple[Any, ...]] = {}

    def replace(self, model: onnx_ir.Model) -> tuple[QuantizedLayers, ...]:
        """Put every integer weight of the checkpoint in place of its plain tensor.

        Raises
        ------
        BadInputError
            If a layer of the checkpoint is not in the graph, so that it would be left out silently.
        """
        from passes.quantize.kernels import layer_class

        uses: Counter[tuple[str, str, int, int | None]] = Counter()
        initializers = model.graph.initializers
        names = {name: f"{PREFIX}{name}.weight" for name in self._weights.layers}
        missing = [layer for layer, name in names.items() if name not in initializers]
        if missing:
            raise BadInputError(
                f"{len(missing)} quantized layers of the checkpoint are not in the traced graph under their names, "
                f"first '{missing[0]}'; export the original instead"
            )
        for layer, name in names.items():
            weight = self._weights.layers[layer]
            bits = 4 if weight.bits <= 4 else 8
            operator = self._replace_one(model, layer, initializers[name], weight, bits)
            block = block_size(weight) if operator == "MatMulNBits" else None
            uses[layer_class(layer), operator, bits, block] += 1
        return tuple(QuantizedLayers(*key, layers) for key, layers in uses.items())

    def _replace_one(self, model: onnx_ir.Model, layer: str, value: onnx_ir.Value, weight: Integers, bits: int) -> str:
        import onnx_ir as ir

        block = block_size(weight)
        products = _products(value)
        whole = all(products.values()) and block is not None
        if whole:
            tensors = self._tensors(layer, "blocks", value, weight, bits)
            inputs = [_initializer(model, tensor) for tensor in tensors]
            rows, columns = weight.values.shape
            for transpose, users in products.items():
                for node in users:
                    new = ir.node(
                        "MatMulNBits",
                        [node.inputs[0], *inputs],
                        {"K": columns, "N": rows, "bits": bits, "block_size": block},
                        domain=CONTRIB,
                        outputs=[ir.Value(name=None, shape=node.outputs[0].shape, type=node.outputs[0].type)],
                        name=f"{layer}.MatMulNBits.{node.name}",
                    )
                    _put(model, node, new)
                if transpose is not None:
                    model.graph.remove(transpose, safe=True)
            model.opset_imports[CONTRIB] = 1
        else:
            if (model.opset_imports.get("") or 0) < _DEQUANTIZE_BLOCKS_OPSET:
                raise BadInputError(
                    f"layer '{layer}' needs DequantizeLinear in blocks, which came with opset "
                    f"{_DEQUANTIZE_BLOCKS_OPSET}; leave --opset out or give a higher one"
                )
            self._dequantize(model, layer, value, weight, bits)
        model.graph.initializers.pop(str(value.name))
        return "MatMulNBits" if whole else "DequantizeLinear"

    def _dequantize(self, model: onnx_ir.Model, layer: str, value: onnx_ir.Value, weight: Integers, bits: int) -> None:
        import onnx_ir as ir

        columns = weight.values.shape[1] // weight.scales.shape[1]
        inputs = [_initializer(model, item) for item in self._tensors(layer, "plain", value, weight, bits)]
        by_row = weight.scales.shape[1] == 1
        node = ir.node(
            "DequantizeLinear",
            inputs,
            {"axis": 0} if by_row else {"axis": 1, "block_size": columns},
            outputs=[ir.Value(name=f"{layer}.dequantized", shape=value.shape, type=value.type)],
            name=f"{layer}.DequantizeLinear",
        )
        model.graph.insert_before(model.graph[0], node)
        value.replace_all_uses_with(node.outputs[0])

    def _tensors(self, layer: str, layout: str, value: onnx_ir.Value, weight: Integers, bits: int) -> tuple[Any, ...]:
        import onnx_ir as ir

        if (layer, layout) in self._packed:
            return self._packed[layer, layout]
        assert value.dtype is not None
        float_type = value.dtype
        arrays = pack_blocks(weight, bits) if layout == "blocks" else plain_codes(weight, bits)
        tensors = []
        for part, array in arrays.items():
            name = f"{layer}.weight_{part}"
            if part == "scale":
                tensors.append(ir.Tensor(_as(array, float_type), dtype=float_type, name=name))
            elif layout == "plain" and bits == 4:
                tensors.append(ir.Tensor(_four_bit(array), dtype=ir.DataType.INT4, name=name))
            else:
                tensors.append(ir.Tensor(array, name=name))
        self._packed[layer, layout] = tuple(tensors)
        return self._packed[layer, layout]


def block_size(weight: Integers) -> int | None:
    """Return the block that MatMulNBits runs a weight with: its own group, or for whole rows the largest that fits."""
    columns = weight.values.shape[1]
    group = columns // weight.scales.shape[1]
    if weight.scales.shape[1] > 1:
        return group if group in BLOCKS else next((size for size in BLOCKS if group % size == 0), None)
    return next((size for size in BLOCKS if columns % size == 0), None)


def pack_blocks(weight: Integers, bits: int) -> dict[str, np.ndarray]:
    """Lay a weight out as MatMulNBits reads it.

    Returns
    -------
    dict of str to numpy.ndarray
        ``packed``, shape (rows, blocks, block * bits / 8), the lower half of a byte first; ``scale``, shape
        (rows, blocks), float32; ``zero_point``, only where they are not the middle, shape (rows, bytes a row).
    """
    import numpy as np

    size = block_size(weight)
    assert size is not None, "replace() has chosen another operator"
    rows, columns = weight.values.shape
    middle = 1 << (bits - 1)
    repeats = columns // size // weight.scales.shape[1]
    unsigned = (weight.values.to(int_type()) + middle).numpy().astype(np.uint8).reshape(rows, columns // size, size)
    found = {
        "packed": _nibbles(unsigned) if bits == 4 else unsigned,
        "scale": weight.scales.float().repeat_interleave(repeats, dim=1).numpy(),
    }
    if weight.zero_points is not None:
        zeros = (weight.zero_points.to(int_type()) + middle).repeat_interleave(repeats, dim=1).numpy().astype(np.uint8)
        found["zero_point"] = _nibbles(zeros) if bits == 4 else zeros
    return found


def plain_codes(weight: Integers, bits: int) -> dict[str, np.ndarray]:
    """Lay a weight out as DequantizeLinear reads it: int8 codes, float32 scales, int8 zero points."""
    import numpy as np

    by_row = weight.scales.shape[1] == 1
    zeros = weight.zero_points
    zeros_array = np.zeros(tuple(weight.scales.shape), np.int8) if zeros is None else zeros.numpy().astype(np.int8)
    scales = weight.scales.float().numpy()
    return {
        "codes": weight.values.numpy().astype(np.int8),
        "scale": scales[:, 0] if by_row else scales,
        "zero_point": zeros_array[:, 0] if by_row else zeros_array,
    }


def int_type() -> torch.dtype:
    """Return a type that holds sums of int8 and an offset."""
    import torch

    return torch.int16


def _nibbles(values: np.ndarray) -> np.ndarray:
    """Pack pairs of four-bit values along the last axis, the first in the lower half; an odd one out gets 8 (zero)."""
    import numpy as np

    if values.shape[-1] % 2:
        values = np.concatenate([values, np.full((*values.shape[:-1], 1), 8, np.uint8)], axis=-1)
    packed: np.ndarray = np.bitwise_or(values[..., ::2], np.left_shift(values[..., 1::2], 4), dtype=np.uint8)
    return packed


def _four_bit(values: np.ndarray) -> Any:
    import ml_dtypes

    return values.astype(ml_dtypes.int4)


def _as(array: np.ndarray, dtype: onnx_ir.DataType) -> Any:
    return array.astype(dtype.numpy())


def _products(value: onnx_ir.Value) -> dict[Any, list[Any]]:
    """Return what reads a weight: each transpose of it and the products behind it; an empty list for anything else."""
    found: dict[Any, list[Any]] = {}
    for node in value.consumers():
        users = list(node.outputs[0].consumers()) if node.op_type == "Transpose" else []
        plain = bool(users) and all(user.op_type == "MatMul" and user.inputs[1] is node.outputs[0] for user in users)
        found[node] = users if plain else []
    return found


def _initializer(model: onnx_ir.Model, tensor: Any) -> onnx_ir.Value:
    import onnx_ir as ir

    known = model.graph.initializers.get(tensor.name)
    if known is not None:
        return known
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _put(model: onnx_ir.Model, old: Any, new: Any) -> None:
    """Put a node in another's place; outputs keep their name."""
    name = old.outputs[0].name
    outputs = model.graph.outputs
    model.graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=old.outputs[0] in outputs)
    model.graph.remove(old, safe=True)
    new.outputs[0].name = name
