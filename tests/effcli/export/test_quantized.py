"""Integer weights in graphs: the checkpoint's own codes, computed by onnxruntime as torch computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from effcli.errors import BadInputError
from effcli.export import graphs
from effcli.export.exporting import export
from effcli.export.quantized import QuantizedWeights, Replacer, block_size, read_quantized
from effcli.export.report import ExportReport
from effcli.export.weights import WeightFile, save

pytest.importorskip("compressed_tensors")

from passes.quantize.packing import Integers  # noqa: E402
from tests.effcli.export import small  # noqa: E402
from tests.passes.quantize.compressed import save_compressed, tiny_llama  # noqa: E402

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def integers(rows: int, columns: int, groups: int, bits: int, *, symmetric: bool) -> Integers:
    generator = torch.Generator().manual_seed(bits)
    limit = 1 << (bits - 1)
    values = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(rows, groups, generator=generator).to(torch.bfloat16) / 10
    zeros = torch.randint(-limit, limit, (rows, groups), generator=generator, dtype=torch.int8)
    return Integers(values, scales, None if symmetric else zeros, bits)


def linear_graph(rows: int, columns: int, *, lookup: bool = False) -> ir.Model:
    """Return x @ W.T, and on request rows of W as an embedding gives them."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", columns]))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"]))
    plain = ir.Tensor(np.zeros((rows, columns), np.float32), name="model.layer.weight")
    weight = ir.Value(
        name=plain.name, const_value=plain, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, columns])
    )
    turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    product.outputs[0].name = "y"
    nodes, inputs = [turned, product], [x]
    outputs = [product.outputs[0]]
    if lookup:
        gather = ir.node("Gather", [weight, ids])
        gather.outputs[0].name = "rows"
        nodes, inputs, outputs = [*nodes, gather], [x, ids], [*outputs, gather.outputs[0]]
    for value in outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    found = ir.Graph(inputs, outputs, nodes=nodes, initializers=[weight], opset_imports={"": 21}, name="g")
    return ir.Model(found, ir_version=10)


def run(model: ir.Model, folder: Path, **feed: np.ndarray) -> list[np.ndarray]:
    file = WeightFile(folder / "weights.bin")
    file.move(model)
    save(model, folder / "g.onnx")
    session = onnxruntime.InferenceSession(folder / "g.onnx", providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "groups"), [(96, 3), (80, 5), (64, 1), (48, 1)])
def test_products_in_blocks_are_those_of_the_dequantized_weight(
    tmp_path: Path, bits: int, symmetric: bool, columns: int, groups: int
) -> None:
    weight = integers(24, columns, groups, bits, symmetric=symmetric)
    model = linear_graph(24, columns)
    layers = Replacer(QuantizedWeights({"layer": weight}, "int4")).replace(model)
    assert [(layer.operator, layer.bits) for layer in layers] == [("MatMulNBits", 4 if bits <= 4 else 8)]
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    found = run(model, tmp_path, x=x.numpy())[0]
    np.testing.assert_allclose(found, (x @ weight.dequantize(torch.float32).t()).numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("bits", "columns", "groups"), [(4, 96, 3), (8, 96, 3), (8, 72, 1), (4, 72, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_uses_and_sizes_dequantize(tmp_path: Path, bits: int, columns: int, groups: int, symmetric: bool) -> None:
    weight = integers(24, columns, groups, bits, symmetric=symmetric)
    model = linear_graph(24, columns, lookup=True)
    layers = Replacer(QuantizedWeights({"layer": weight}, "int4")).replace(model)
    assert [layer.operator for layer in layers] == ["DequantizeLinear"]
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    product, rows = run(model, tmp_path, x=x.numpy(), ids=np.array([3, 0, 23, 3, 1]))
    plain = weight.dequantize(torch.float32)
    np.testing.assert_allclose(product, (x @ plain.t()).numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(rows, plain[[3, 0, 23, 3, 1]].numpy(), rtol=1e-6, atol=1e-6)


def test_whole_rows_take_the_largest_block() -> None:
    assert block_size(integers(2, 512, 1, 8, symmetric=True)) == 256
    assert block_size(integers(2, 576, 1, 8, symmetric=True)) == 64
    assert block_size(integers(2, 72, 1, 8, symmetric=True)) is None


def test_codes_are_the_checkpoints(tmp_path: Path) -> None:
    folder = save_compressed(tiny_llama(), tmp_path / "w4", INT4)
    found = read_quantized(folder)
    assert found is not None
    assert found.name == "int4"
    assert len(found.layers) == 14
    from effcli.checkpoint import load

    plain = dict(load(folder, device="cpu", dtype="float32", kernels="plain").model.named_parameters())
    for name, weight in found.layers.items():
        torch.testing.assert_close(plain[f"{name}.weight"], weight.dequantize(torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "inputs", "preset", "message"),
    [
        (
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True},
            None,
            "quantizes activations too",
        ),
        (None, None, "FP8_DYNAMIC", "8-bit float weights"),
    ],
)
def test_other_schemes_are_refused_by_name(
    tmp_path: Path, weights: Any, inputs: Any, preset: Any, message: str
) -> None:
    folder = save_compressed(tiny_llama(), tmp_path / "q", weights, inputs, preset=preset)
    with pytest.raises(BadInputError, match=f"{message}.*w4a16, w8a16"):
        export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("weights", [INT4, {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}])
def test_a_quantized_checkpoint_keeps_its_integers(tmp_path: Path, weights: dict[str, Any]) -> None:
    folder = save_compressed(tiny_llama(bias=True), tmp_path / "q", weights)
    report = export(str(folder), tmp_path / "out")
    assert isinstance(report, ExportReport)
    assert report.quantization == f"int{weights['num_bits']}"
    assert report.max_absolute_error < 1e-4
    assert sum(layer.layers for layer in report.quantized_layers) == 14
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    graph = onnx.load(tmp_path / "out" / "decode.onnx", load_external_data=False).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 14


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("density", [0.0, 0.4])
def test_blocks_that_layers_share_are_stored_once(density: float, tmp_path: Path) -> None:
    from passes.loop import targets
    from passes.loop.convert import convert
    from passes.loop.layout import LoopPlan
    from tests.tiny_models import build

    model = build("gemma3", seed=1)
    convert(model, LoopPlan.even(targets.find(model), ((0, 2), (1, 3)), 2, density))
    file = WeightFile(tmp_path / "weights.bin")
    shapes = graphs.cache_shapes(model)
    assert len(shapes) == 4
    for name, graph in graphs.text_graphs(model, opset=23, caches=shapes):
        file.move(graph)
        save(graph, tmp_path / f"{name}.onnx")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert file.tensor_bytes <= 1.02 * weights
    ids = torch.randint(3, small.VOCABULARY, (1, 20))
    session = onnxruntime.InferenceSession(tmp_path / "prefill.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(20)[None]}
    found = session.run(["logits"], {name: value.numpy() for name, value in feed.items()})[0]
    with torch.inference_mode():
        np.testing.assert_allclose(found, model(ids).logits.numpy(), atol=1e-4)
