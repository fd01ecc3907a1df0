"""Graphs are written the way ONNX Runtime fuses them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

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
