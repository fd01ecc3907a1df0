"""Graphs are written the way ONNX Runtime fuses them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from effcli.export import graphs
from effcli.export.opening import open as open_export

if TYPE_CHECKING:
    from tests.effcli.export.conftest import Exported


@pytest.mark.parametrize("graph", ["prefill.onnx", "decode.onnx"])
def test_norms_are_one_op_each(text_export: Exported, tmp_path: Path, graph: str) -> None:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # that the file is for this machine
    onnxruntime.InferenceSession(text_export.folder / graph, options, providers=["CPUExecutionProvider"])
    fused = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    count = Counter(node.op_type for node in fused)
    assert (
        count["SimplifiedLayerNormalization"] + count["SkipSimplifiedLayerNormalization"] == 3
    )  # 2 a layer, 1 at the end
    assert not count["Reciprocal"] and not count["Sqrt"]


@pytest.mark.parametrize("keep", [None, 0, 1, 4])
def test_the_decode_graph_computes_the_last_logits_alone_where_that_is_asked_for(
    text_export: Exported, keep: int | None
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(text_export.folder / "decode.onnx", providers=["CPUExecutionProvider"])
    (optional,) = session.get_overridable_initializers()
    assert (optional.name, optional.shape, optional.type) == ("num_logits_to_keep", [], "tensor(int64)")
    ids = torch.randint(4, 90, (2, 7), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(7).expand(2, -1)
    feed: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    for item in session.get_inputs()[3:]:
        feed[item.name] = torch.zeros(2, item.shape[1], 0, item.shape[3])
    arrays = {name: value.numpy() for name, value in feed.items()}
    arrays |= {} if keep is None else {"num_logits_to_keep": np.array(keep, np.int64)}
    logits, key = session.run(["logits", "present.0.key"], arrays)
    with torch.inference_mode():
        expected = text_export.model(ids).logits[:, -keep if keep else 0 :]
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5)
    assert key.shape[2] == 7  # the cache is of all positions


def test_an_export_written_before_that_input_was_there_still_runs(text_export: Exported, tmp_path: Path) -> None:
    import onnx

    shutil.copytree(text_export.folder, tmp_path / "old")
    model = onnx.load(tmp_path / "old" / "decode.onnx", load_external_data=False)
    graph = model.graph
    (negative,) = (node for node in graph.node if "num_logits_to_keep" in node.input)
    (start,) = (node for node in graph.node if negative.output[0] in node.input)
    (cut,) = (node for node in graph.node if start.output[0] in node.input)
    (head,) = (node for node in graph.node if cut.output[0] in node.input)
    head.input[0] = cut.input[0]
    for kept, gone in (
        (graph.node, [cut, start, negative]),
        (graph.input, [item for item in graph.input if item.name == "num_logits_to_keep"]),
        (graph.initializer, [item for item in graph.initializer if item.name == "num_logits_to_keep"]),
    ):
        for item in gone:
            kept.remove(item)
    onnx.save(model, tmp_path / "old" / "decode.onnx")
    old, new = open_export(tmp_path / "old", device="cpu"), open_export(text_export.folder, device="cpu")
    assert not old.graph.optional and "num_logits_to_keep" in new.graph.optional
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(4))
    for options in ({}, {"logits_to_keep": 1}, {"logits_to_keep": 3}):
        torch.testing.assert_close(old(ids, **options).logits, new(ids, **options).logits, rtol=0, atol=1e-5)
    assert torch.equal(old.generate(ids, max_new_tokens=4), new.generate(ids, max_new_tokens=4))


def head_graph(last: str) -> Any:
    """Return ids -> rows of a table -> product by a weight -> 3 tanh(x / 3), which is called ``last``."""
    import onnx_ir as ir

    generator = np.random.default_rng(0)
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array.astype(np.float32), name=name)
        return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))

    table, weight = (
        constant("table", generator.normal(size=(11, 8))),
        constant("weight", generator.normal(size=(8, 11))),
    )
    cap = constant("cap", np.array(3.0))
    rows = ir.node("Gather", [table, ids])
    rows.outputs[0].shape = ir.Shape(["batch", "sequence", 8])
    rows.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    product = ir.node("MatMul", [rows.outputs[0], weight])
    divided = ir.node("Div", [product.outputs[0], cap])
    squashed = ir.node(last, [divided.outputs[0]])
    capped = ir.node("Mul", [squashed.outputs[0], cap])
    logits = capped.outputs[0]
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "sequence", 11])
    nodes = [rows, product, divided, squashed, capped]
    made = ir.Graph(
        [ids], [logits], nodes=nodes, initializers=[table, weight, cap], opset_imports={"": 21}, name="head"
    )
    return ir.Model(made, ir_version=10)


def test_soft_caps_may_follow_the_head_but_nothing_that_looks_at_other_positions(tmp_path: Path) -> None:
    import onnx_ir as ir
    import onnxruntime

    other = head_graph("Softmax")
    assert not graphs._keep_last_logits(other)
    assert [value.name for value in other.graph.inputs] == ["input_ids"]
    capped = head_graph("Tanh")
    assert graphs._keep_last_logits(capped)
    ir.save(capped, tmp_path / "capped.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "capped.onnx", providers=["CPUExecutionProvider"])
    ids = np.arange(10).reshape(2, 5)
    table, weight = (capped.graph.initializers[name].const_value.numpy() for name in ("table", "weight"))
    expected = 3 * np.tanh(table[ids] @ weight / 3)
    for keep in (0, 1, 2):
        (found,) = session.run(None, {"input_ids": ids, "num_logits_to_keep": np.array(keep)})
        np.testing.assert_allclose(found, expected[:, -keep if keep else 0 :], rtol=1e-5)
