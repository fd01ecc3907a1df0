"""A file of codebooks that is not what the model needs is refused, by the tensor's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from passes.base import PassError
from passes.kv_pq.codebooks import FILE, Codebooks
from passes.kv_pq.saved import check
from passes.kv_pq.targets import Targets, find
from profilers.meta import meta_model
from tests.passes.kv_pq import random_codebooks as made
from tests.passes.kv_pq.small import random_codebooks
from tests.tiny_models import CONFIGS, build

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def targets() -> Targets:
    return find(meta_model(CONFIGS["llama"](), torch.float32))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return random_codebooks(build("llama"), rope=True, basis=True, gains=True, parts=(4, 3)).save(tmp_path)


def test_a_good_file_says_what_it_holds(file: Path, targets: Targets) -> None:
    (line,) = check(file, targets)
    size = sum(tensor.nbytes for tensor in load_file(file).values())
    # keys 4 and 3 parts and a gain each, values 3 and 2 and a gain each, over two heads of 8 channels
    assert line.startswith(f"{FILE}: codebooks of 2 layers, {size / 1e6:.3g} MB, {8 * (5 + 4 + 4 + 3) / 32:.4g} bits")


def _without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def _with(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return change


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("layers.1.values.centroids"), "'layers.1.values.centroids' .* is missing"),
        (_without("layers.0.values.inverse"), "'layers.0.values.inverse' .* is missing"),
        (_with("layers.0.keys.centroids", _nan), "'layers.0.keys.centroids' .* holds NaN or infinity"),
        (_with("layers.0.rope", _nan), "'layers.0.rope' .* holds NaN"),
        (_with("layers.0.rope", lambda t: torch.ones(5)), r"'layers.0.rope' .* not at most 4 float32 frequencies"),
        (
            _with("layers.0.keys.centroids", lambda t: t[:, :16]),
            r"has shape \[2, 16, 8\], .* needs \[2, 256, 8\]",
        ),
        (_with("layers.0.keys.centroids", torch.Tensor.half), "is torch.float16, not torch.float32"),
        (_with("layers.0.keys.part", lambda t: t + 1), "does not number the parts of every head"),
        (_with("layers.0.keys.part", lambda t: t.clamp(max=2) * 2), "does not number the parts of every head"),
        (_with("layers.0.values.weight", torch.neg), "has a negative entry"),
        (_with("layers.0.values.weight", torch.zeros_like), "or a head of zeros"),
        (_with("layers.1.keys.gains", lambda t: t.flip(1)), "are not positive and ascending"),
        (_with("layers.1.values.inverse", lambda t: 2 * t), "is not the inverse of the basis"),
        (lambda tensors: tensors.update({"layers.2.keys.mean": torch.ones(2, 8)}), "belongs to no compressed layer"),
        (lambda tensors: tensors.update({"layers.1.keys.colour": torch.ones(2, 8)}), "is no part of a codebook"),
    ],
)
def test_anything_wrong_is_named(file: Path, targets: Targets, change: Callable[[Tensors], None], message: str) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(PassError, match=message):
        check(file, targets)


def test_residual_parts_are_counted_and_checked(tmp_path: Path, targets: Targets) -> None:
    books = random_codebooks(build("llama"), parts=8, rope=True)
    refined = made.quantizer(2, 8, 8, residual=2)
    books.layers[1] = replace(books.layers[1], keys=refined)
    file = books.save(tmp_path)
    (line,) = check(file, targets)
    assert f"{8 * (4 * 16 + 3 - 2) / 64:.4g} bits" in line
    again = Codebooks.load(tmp_path).layers[1].keys
    assert again.residual_parts == (2, 1) and again.codes == refined.codes
    name = "layers.1.keys.residual_"
    for change, message in (
        (_without(f"{name}centroids"), "'layers.1.keys.residual_centroids' .* is missing"),
        (_without(f"{name}part"), "'layers.1.keys.residual_part' .* is missing"),
        (_with(f"{name}part", lambda t: 2 * t), "does not number the residual parts"),
        (_with(f"{name}part", lambda t: t - 1), "does not number the residual parts"),
        (_with(f"{name}centroids", _nan), "holds NaN"),
        (_with(f"{name}centroids", lambda t: t + 1), "adds to channels that no residual part refines"),
    ):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, tmp_path / "changed.safetensors")
        with pytest.raises(PassError, match=message):
            check(tmp_path / "changed.safetensors", targets)


def test_a_file_cut_short_is_named(file: Path, targets: Targets) -> None:
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(PassError, match=f"'{FILE}' cannot be read"):
        check(file, targets)
