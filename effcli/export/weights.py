"""One file of weights for all graphs of an export.

::

    prefill.onnx ─┐                      ┌──────────────────────────────────────────┐
                  ├─ offset, length ──>  │ weights.bin: each distinct tensor once   │
    decode.onnx  ─┘                      └──────────────────────────────────────────┘

Tensors are written one after another and never held as a whole; two with the same bytes (tied embeddings, the same
weight in two graphs) share one place. So an export may be larger than protobuf's limit of 2 GB.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph's own file: onnxruntime needs some to know shapes."""
ALIGNMENT = 64
PAGE = 4096
PAGE_FROM = 1 << 20
"""Tensors from this size on start at a page, so that they can be mapped."""


@dataclass
class WeightFile:
    """The one file that graphs put their tensors into.

    Attributes
    ----------
    path : Path
    tensor_bytes : int
        Of the distinct tensors in it, without padding.
    """

    path: Path

    def __post_init__(self) -> None:
        self.tensor_bytes = 0
        self._end = 0
        self._by_content: dict[tuple[Any, ...], int] = {}
        self._by_memory: dict[tuple[Any, ...], int] = {}
        self._held: list[Any] = []
        self.path.write_bytes(b"")

    def move(self, model: onnx_ir.Model) -> None:
        """Move the tensors of a graph here; the graph keeps where they are."""
        import onnx_ir as ir

        for value in model.graph.initializers.values():
            tensor: Any = value.const_value
            if tensor.nbytes <= INLINE_BYTES:
                continue
            offset = self._place(tensor)
            value.const_value = ir.ExternalTensor(
                self.path.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=str(value.name),
                base_dir=self.path.parent,
            )  # fmt: skip

    def _place(self, tensor: Any) -> int:
        """Return the offset of a tensor's bytes, written now if they are not there yet."""
        memory = _memory(tensor)
        if memory is not None and memory in self._by_memory:
            return self._by_memory[memory]
        data = memoryview(tensor.tobytes())
        content = (str(tensor.dtype), data.nbytes, hashlib.sha256(data).digest())
        offset = self._by_content.get(content)
        if offset is None:
            unit = PAGE if data.nbytes >= PAGE_FROM else ALIGNMENT
            offset = math.ceil(self._end / unit) * unit
            with self.path.open("ab") as stream:
                stream.write(bytes(offset - self._end))
                stream.write(data)
            self._end = offset + data.nbytes
            self.tensor_bytes += data.nbytes
            self._by_content[content] = offset
        if memory is not None:
            self._by_memory[memory] = offset
            self._held.append(tensor)  # so that no other tensor gets its address
        return offset


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write a graph whose tensors were moved to a :class:`WeightFile`."""
    import onnx_ir as ir

    ir.save(model, path)


def _memory(tensor: Any) -> tuple[Any, ...] | None:
    """Return what tells a live torch tensor apart without reading it, None for other tensors."""
    raw = getattr(tensor, "raw", None)
    if raw is None or not hasattr(raw, "data_ptr") or not raw.is_contiguous():
        return None
    return (raw.data_ptr(), str(tensor.dtype), tuple(raw.shape))
