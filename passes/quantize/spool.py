"""Activations between layers, on disk: memory does not grow with the number of calibration samples.

::

    folder/hidden_states/00000.safetensors    the value called hidden_states of sample 0
    folder/hidden_states/00007.safetensors    of sample 7; a sample without a file has the value of sample 0

Values that are the same for every sample (masks, rotary angles) are stored once. Files are read through a memory map,
so what the operating system still holds costs no second copy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import PassError

if TYPE_CHECKING:
    import torch

_PLAIN = (bool, int, float, str, type(None))


class Spool:
    """Named values of each sample, kept in a folder.

    Parameters
    ----------
    folder : Path
        Created where it does not exist; values found there are read as if just written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, sample: int, values: Mapping[str, Any]) -> None:
        """Store values of a sample: tensors, plain values, and lists, tuples and dicts of them.

        Sample 0 comes first: what equals its value is not stored again.

        Raises
        ------
        PassError
            For a value of another kind.
        """
        from safetensors.torch import save_file

        for name, value in values.items():
            tensors: list[torch.Tensor] = []
            structure = json.dumps(_take_apart(value, tensors))
            path = self._path(name, sample)
            path.parent.mkdir(exist_ok=True)
            if sample and self._equals_first(name, structure, tensors):
                path.unlink(missing_ok=True)
                continue
            save_file(
                {str(index): tensor for index, tensor in enumerate(tensors)}, path, metadata={"structure": structure}
            )

    def read(self, sample: int, names: Iterable[str], device: torch.device) -> dict[str, Any]:
        """Return the values of a sample by name, tensors on ``device``."""
        return {name: self._read(name, sample, device) for name in names}

    def delete(self, names: Iterable[str]) -> None:
        """Remove values of all samples."""
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _path(self, name: str, sample: int) -> Path:
        return self.folder / name / f"{sample:05d}.safetensors"

    def _read(self, name: str, sample: int, device: torch.device) -> Any:
        path = self._path(name, sample)
        structure, tensors = _load(path if path.is_file() else self._path(name, 0))
        return _put_together(structure, [tensor.to(device) for tensor in tensors])

    def _equals_first(self, name: str, structure: str, tensors: list[torch.Tensor]) -> bool:
        import torch

        first_structure, first = _load(self._path(name, 0))
        return first_structure == json.loads(structure) and all(
            a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, tensors, strict=True)
        )


def _load(path: Path) -> tuple[Any, list[torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()["structure"])
        return structure, [file.get_tensor(str(index)) for index in range(len(file.keys()))]


def _take_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, _PLAIN):
        return {"plain": value}
    if isinstance(value, (torch.dtype, torch.device)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    for kind in (torch.Size, tuple, list):
        if type(value) is kind:
            return {kind.__name__: [_take_apart(item, tensors) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _take_apart(item, tensors) for key, item in value.items()}}
    raise PassError(
        f"a {type(value).__name__} passes between the layers of this model, which cannot be kept on disk; "
        "use method=rtn, which needs no calibration"
    )


def _put_together(structure: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    import torch

    ((kind, value),) = structure.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "plain":
        return value
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "device":
        return torch.device(value)
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in value.items()}
    items = [_put_together(item, tensors) for item in value]
    return items if kind == "list" else torch.Size(items) if kind == "Size" else tuple(items)
