"""One file of weights: each distinct tensor once, at aligned places, small ones in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from effcli.export.weights import ALIGNMENT, PAGE, WeightFile, save


def graph(**arrays: np.ndarray) -> ir.Model:
    """Return a graph that gives its tensors out."""
    made = {name: ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in arrays.items()}
    for value in made.values():
        value.shape, value.type = value.const_value.shape, ir.TensorType(ir.DataType.FLOAT)
    nodes = [ir.node("Identity", [value]) for value in made.values()]
    for node, name in zip(nodes, arrays, strict=True):
        node.outputs[0].name = f"{name}_out"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    outputs = [node.outputs[0] for node in nodes]
    found = ir.Graph([], outputs, nodes=nodes, initializers=list(made.values()), opset_imports={"": 18}, name="g")
    return ir.Model(found, ir_version=10)


def test_equal_tensors_share_a_place_over_graphs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    large = rng.standard_normal((600, 500), dtype=np.float32)
    other = rng.standard_normal((40, 25), dtype=np.float32)
    tiny = np.arange(4, dtype=np.float32)
    file = WeightFile(tmp_path / "weights.bin")
    for name, model in (("a", graph(x=other, w=large, t=tiny)), ("b", graph(tied=large.copy(), y=other.copy()))):
        file.move(model)
        save(model, tmp_path / f"{name}.onnx")
    assert file.tensor_bytes == large.nbytes + other.nbytes
    assert file.path.stat().st_size <= file.tensor_bytes + PAGE
    places = {}
    for name in ("a", "b"):
        for item in onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph.initializer:
            places[item.name] = {entry.key: entry.value for entry in item.external_data}
    assert places["t"] == {}
    assert places["w"] == places["tied"]
    assert places["x"] == places["y"]
    assert int(places["x"]["offset"]) % ALIGNMENT == 0
    assert int(places["w"]["offset"]) % PAGE == 0
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["tied_out"], {})[0], large)


def test_the_same_bytes_of_another_type_are_kept_apart(tmp_path: Path) -> None:
    zeros = np.zeros((30, 30), np.float32)
    file = WeightFile(tmp_path / "weights.bin")
    file.move(graph(a=zeros, b=zeros.view(np.int32)))
    assert file.tensor_bytes == 2 * zeros.nbytes
