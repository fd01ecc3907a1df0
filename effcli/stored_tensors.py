"""Tensors as they lie in safetensors files: names, types and shapes from the headers, values a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
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
    weights = find_weights(folder)
    if weights is None:
        raise AuditError(f"'{folder}' holds no weights")
    stored: dict[str, Stored] = {}
    for path in weights.files:
        for name, tensor in read_header(path).items():
            if name in stored:
                raise AuditError(f"'{name}' is stored twice, in '{stored[name].file.name}' and '{path.name}'")
            stored[name] = tensor
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        said = read_json(index)["weight_map"]
        for name in sorted({*said, *stored}):
            if name not in stored or said.get(name) != stored[name].file.name:
                raise AuditError(f"'{index.name}' and the files disagree on where '{name}' is")
    return stored, sum(path.stat().st_size for path in weights.files)


def read_header(path: Path) -> dict[str, Stored]:
    """Return every tensor that one safetensors file names.

    Raises
    ------
    AuditError
        If the file is damaged, or a type is not known.
    """
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Stored] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                view = opened.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise AuditError(f"'{name}' has the unknown type {view.get_dtype()}")
                stored[name] = Stored(name, path, view.get_dtype(), tuple(view.get_shape()))
    except SafetensorError as error:
        raise AuditError(f"'{path}' is truncated or damaged ({error})") from None
    return stored


def check_finite(tensors: Iterable[Stored]) -> None:
    """Look for NaN and infinity in every tensor that can hold one, a block at a time.

    Raises
    ------
    AuditError
        Naming the first tensor that holds one.
    """
    for tensor, opened in _opened(item for item in tensors if _can_hold_nan(item)):
        for block in _blocks(tensor, opened):
            bad = _count_bad(tensor, block)
            if bad:
                raise AuditError(f"'{tensor.name}' holds NaN or infinity on disk ({bad} in the first block that does)")


def read_shapes(tensors: Iterable[Stored]) -> dict[str, tuple[int, ...]]:
    """Return the values of tensors that hold a shape, by name."""
    return {
        tensor.name: tuple(int(value) for value in opened.get_tensor(tensor.name).tolist())
        for tensor, opened in _opened(tensors)
    }


def _opened(tensors: Iterable[Stored]) -> Iterator[tuple[Stored, Any]]:
    """Yield tensors with their opened file, which is opened once where its tensors are neighbours."""
    from safetensors import safe_open

    for path, members in groupby(tensors, key=attrgetter("file")):
        with safe_open(path, framework="pt") as opened:
            for tensor in members:
                yield tensor, opened


def _can_hold_nan(tensor: Stored) -> bool:
    return tensor.dtype.startswith(("F", "BF")) or _is_e8m0(tensor)


def _is_e8m0(tensor: Stored) -> bool:
    return tensor.dtype == "F8_E8M0" or (tensor.dtype == "U8" and tensor.name.endswith("weight_scale"))


def _count_bad(tensor: Stored, block: Any) -> int:
    import torch

    if _is_e8m0(tensor):
        return int((block.view(torch.uint8) == _E8M0_NAN).sum())
    values = block.to(torch.float32) if block.dtype.itemsize == 1 else block
    return int((~torch.isfinite(values)).sum())


def _blocks(tensor: Stored, opened: Any) -> Iterable[Any]:
    """Yield a tensor's values in blocks of whole rows."""
    if not tensor.shape or 0 in tensor.shape:
        yield opened.get_tensor(tensor.name)
        return
    view = opened.get_slice(tensor.name)
    rows = max(1, BLOCK_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], rows):
        yield view[start : start + rows]
