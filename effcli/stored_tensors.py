"""Tensors as they lie in safetensors files: names, types and shapes from the headers, values a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcli.checkpoint_files import find_weights, read_json
from effcli.errors import EffcliError

BLOCK_ELEMENTS = 1 << 24
"""Elements of a tensor that are looked at together."""
DTYPES = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "F8_E4M3": ("fp8_e4m3", 8), "F8_E5M2": ("fp8_e5m2", 8), "F8_E8M0": ("fp8_e8m0", 8),
    "I64": ("int64", 64), "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8), "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}  # fmt: skip
_E8M0_NAN = 0xFF


class AuditError(EffcliError):
    """What was written is not what it should be."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, from its header."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype][1] // 8


def read_headers(folder: Path) -> tuple[dict[str, Stored], int]:
    """Return every tensor that the safetensors files name, and the files' bytes.

    Raises
    ------
    AuditError
        If a tensor is in two files, or the index says otherwise than the files.
    """
    from safetensors import SafetensorError, safe_open

    weights = find_weights(folder)
    if weights is None:
        raise AuditError(f"'{folder}' holds no weights")
    stored: dict[str, Stored] = {}
    for path in weights.files:
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name in stored:
                        raise AuditError(f"'{name}' is stored twice, in '{stored[name].file.name}' and '{path.name}'")
                    view = opened.get_slice(name)
                    if view.get_dtype() not in DTYPES:
                        raise AuditError(f"'{name}' has the unknown type {view.get_dtype()}")
                    stored[name] = Stored(name, path, view.get_dtype(), tuple(view.get_shape()))
        except SafetensorError as error:
            raise AuditError(f"'{path}' is truncated or damaged ({error})") from None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        said = read_json(index)["weight_map"]
        for name in sorted({*said, *stored}):
            if name not in stored or said.get(name) != stored[name].file.name:
                raise AuditError(f"'{index.name}' and the files disagree on where '{name}' is")
    return stored, sum(path.stat().st_size for path in weights.files)


def check_finite(tensors: Iterable[Stored]) -> None:
    """Look for NaN and infinity in every floating-point tensor, a block at a time.

    Raises
    ------
    AuditError
        Naming the first tensor that holds one.
    """
    for tensor in tensors:
        for block in _blocks(tensor):
            bad = _count_bad(tensor, block)
            if bad:
                raise AuditError(f"'{tensor.name}' holds NaN or infinity on disk ({bad} in the first block that does)")


def _count_bad(tensor: Stored, block: Any) -> int:
    import torch

    if tensor.dtype == "F8_E8M0" or (tensor.dtype == "U8" and tensor.name.endswith("weight_scale")):
        return int((block.view(torch.uint8) == _E8M0_NAN).sum())
    if not block.dtype.is_floating_point:
        return 0
    values = block.to(torch.float32) if block.dtype.itemsize == 1 else block
    return int((~torch.isfinite(values)).sum())


def _blocks(tensor: Stored) -> Iterable[Any]:
    """Yield a tensor's values in blocks of whole rows."""
    from safetensors import safe_open

    if not tensor.shape or 0 in tensor.shape:
        yield read(tensor)
        return
    rows = max(1, BLOCK_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    with safe_open(tensor.file, framework="pt") as opened:
        view = opened.get_slice(tensor.name)
        for start in range(0, tensor.shape[0], rows):
            yield view[start : start + rows]


def read(tensor: Stored) -> Any:
    """Return a tensor's values."""
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as opened:
        return opened.get_tensor(tensor.name)
