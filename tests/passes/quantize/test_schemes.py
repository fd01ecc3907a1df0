"""Stored bits are what lies on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from passes.quantize.schemes import SCHEMES, stored_bits
from tests.passes.quantize.small import build, quantize, stored

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("given", "group"),
    [
        ({"scheme": "w4a16", "method": "rtn"}, 128),
        ({"scheme": "w4a16", "method": "rtn", "group_size": 32}, 32),
        ({"scheme": "w4a16", "method": "rtn", "symmetric": False}, 128),
        ({"scheme": "w8a16"}, None),
        ({"scheme": "w8a16", "group_size": 64}, 64),
        ({"scheme": "w8a8", "method": "rtn"}, None),
        ({"scheme": "fp8"}, None),
        ({"scheme": "fp8-block"}, None),
        ({"scheme": "nvfp4", "method": "rtn"}, 16),
        ({"scheme": "mxfp4", "method": "rtn"}, 32),
    ],
    ids=str,
)
def test_stored_bits_are_the_bytes_on_disk(given: dict[str, object], group: int | None, tmp_path: Path) -> None:
    model = build(dtype=torch.bfloat16)
    quantize(model, tmp_path / "work", tmp_path / "out", **given)
    tensors = stored(tmp_path / "out")
    for name, (rows, columns) in {DOWN: (128, 256), UP: (256, 128)}.items():
        held = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(f"{name}."))
        symmetric = bool(given.get("symmetric", True))
        assert 8 * held == stored_bits(
            str(given["scheme"]), rows, columns, bits=None, group_size=group, symmetric=symmetric
        )


def test_stored_bits_by_hand() -> None:
    assert stored_bits("w4a16", 576, 576, bits=None, group_size=64) == 4 * 576**2 + 16 * 576 * 9 + 128
    assert stored_bits("auto", 10, 64, bits=3, group_size=32) == 3 * 640 + 16 * 20 + 128
    assert stored_bits("fp8-block", 130, 256, bits=None, group_size=None) == 8 * 130 * 256 + 16 * 4
    with pytest.raises(ValueError, match="needs the bits"):
        stored_bits("auto", 10, 64, bits=None, group_size=32)


def test_the_default_method_is_allowed() -> None:
    assert all(scheme.methods and scheme.name == name for name, scheme in SCHEMES.items())
