"""The C++ operator against float64 attention over decoded vectors, and against the quantizer's own encoding."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.base import PassError
from passes.kv_pq import cpu_kernels
from passes.kv_pq.codebooks import LayerCodebooks
from passes.kv_pq.quantizer import VectorQuantizer
from tests.passes.kv_pq import random_codebooks as made

if shutil.which("g++") is None or not cpu_kernels._ninja_found():
    pytest.skip("needs g++ and ninja", allow_module_level=True)


def layer_of(dim: int, *, heads: int = 2, gains: bool = False, rope: int | None = None, interleaved: bool = False,
             key_basis: bool = False, residual: int = 0) -> LayerCodebooks:  # fmt: skip
    return LayerCodebooks(
        made.quantizer(heads, dim, dim // 2, gains=gains, basis=key_basis, residual=residual, seed=1),
        made.quantizer(heads, dim, dim // 2 + 3, gains=gains, basis=True, residual=2 * residual, seed=2),
        None if rope is None else made.rope(rope, interleaved=interleaved),
    )


def compare(layer: LayerCodebooks, *, query_heads: int, length: int = 1, slots: int = 300, start: list[int],
            stop: int | None = None, offset: list[int] | None = None, softcap: float | None = None,
            dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    batch = len(start)
    query = torch.randn(batch, query_heads, length, layer.keys.head_dim, generator=generator).to(dtype)
    codes = made.random_codes(layer.keys, batch, slots), made.random_codes(layer.values, batch, slots, seed=2)
    options: dict[str, Any] = {
        "start": torch.tensor(start),
        "stop": slots if stop is None else stop,
        "offset": torch.tensor(offset or [0] * batch),
        "scale": layer.keys.head_dim**-0.5,
        "softcap": softcap,
    }
    out, lse = cpu_kernels.attend(query, *codes, layer, **options)
    expected, expected_lse = made.attend64(query, *codes, layer, **options)
    assert out.shape == query.shape and out.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("rope", [None, 64, 32])
@pytest.mark.parametrize("dim", [64, 80])
def test_attention_matches_float64(dim: int, rope: int | None, gains: bool) -> None:
    compare(layer_of(dim, gains=gains, rope=rope), query_heads=6, start=[4], stop=270)


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("rope", [None, 32])
def test_residual_centroids_are_added(rope: int | None, gains: bool) -> None:
    layer = layer_of(32, gains=gains, rope=rope, residual=2)
    assert layer.keys.residual_parts == (2, 1)
    compare(layer, query_heads=6, start=[4], stop=270)
    one_side = dataclasses.replace(layer, values=layer_of(32).values)
    compare(one_side, query_heads=2, start=[4])


def test_rotation_that_pairs_neighbours() -> None:
    compare(layer_of(64, rope=64, interleaved=True), query_heads=2, start=[4])


def test_keys_with_a_basis_with_and_without_rotation() -> None:
    compare(layer_of(32, key_basis=True, gains=True), query_heads=2, start=[4])
    compare(layer_of(32, key_basis=True, rope=32), query_heads=2, start=[4])
    compare(layer_of(32, key_basis=True, rope=16, gains=True), query_heads=2, start=[4])


@pytest.mark.parametrize("query_heads", [2, 4, 10, 18])
def test_query_heads_that_share_a_kv_head(query_heads: int) -> None:
    compare(layer_of(64, rope=64), query_heads=query_heads, start=[0])


def test_several_queries_see_the_same_history() -> None:
    compare(layer_of(64, rope=64), query_heads=4, length=7, start=[4], dtype=torch.bfloat16)


def test_left_padding_and_an_empty_row() -> None:
    layer = layer_of(64, rope=64)
    compare(layer, query_heads=4, start=[4, 41, 199, 200, 262], offset=[0, 37, 195, 130, 0], stop=200)


@pytest.mark.parametrize("stop", [5, 63, 64, 65, 128, 129])
def test_edges_of_blocks(stop: int) -> None:
    compare(layer_of(64, rope=64), query_heads=2, slots=129, start=[4, 1], offset=[0, 1], stop=stop)


def test_softcap() -> None:
    compare(layer_of(64, rope=64, gains=True), query_heads=2, start=[4], softcap=5.0)


def test_many_rows_are_not_split() -> None:
    compare(layer_of(32, heads=1), query_heads=1, slots=70, start=[2] * 20)


def test_a_long_history_keeps_positions() -> None:
    """float32 angles of position times frequency would be off by 1e-3 here."""
    layer = layer_of(32, heads=1, rope=32)
    compare(layer, query_heads=1, slots=20_100, start=[20_000])


def test_centroids_of_any_float32_keep_16_significant_bits() -> None:
    side = made.quantizer(1, 32, 16, steps=None)
    codes = made.random_codes(side, 1, 64)
    layer = LayerCodebooks(made.quantizer(1, 32, 16), side)
    for slot in range(0, 64, 7):  # attention over one slot is its value
        where = {"start": torch.tensor([slot]), "stop": slot + 1, "offset": torch.zeros(1).long()}
        out, _ = cpu_kernels.attend(torch.ones(1, 1, 1, 32), codes, codes, layer, scale=1.0, **where)
        expected = side.decode(codes[:, slot : slot + 1], torch.float32)
        largest = side.centroids.abs().max()
        torch.testing.assert_close(out, expected, rtol=0, atol=2**-16 * largest.item())


def test_fewer_than_16_codes() -> None:
    layer = LayerCodebooks(made.quantizer(1, 8, 3), made.quantizer(1, 8, 5, gains=True), made.rope(8))
    compare(layer, query_heads=3, start=[1])


def test_codes_in_a_longer_allocation() -> None:
    layer = layer_of(32, rope=32)
    codes = [made.random_codes(side, 2, 200) for side in (layer.keys, layer.values)]
    query = torch.randn(2, 4, 1, 32)
    options: dict[str, Any] = {"start": torch.tensor([4, 4]), "stop": 150, "offset": torch.zeros(2).long(), "scale": 1}
    whole = cpu_kernels.attend(query, *codes, layer, **options)
    part = cpu_kernels.attend(query, *(item[:, :150] for item in codes), layer, **options)
    torch.testing.assert_close(whole, part, rtol=0, atol=0)


def test_a_stop_past_the_codes_is_refused() -> None:
    layer = layer_of(32)
    with pytest.raises(RuntimeError, match="stop 301 is past the codes held"):
        compare(layer, query_heads=2, start=[0], stop=301)


def excess(x: torch.Tensor, side: VectorQuantizer, codes: torch.Tensor) -> float:
    """Return how far, relatively, weighted squared errors of codes are above the least, at most."""
    y = x.double() - side.mean[:, None]
    if side.basis is not None:
        y = y @ side.basis.double()
    if side.gains is not None:
        chosen = codes[..., side.gain_places].transpose(1, 2).long()
        y = y / side.gains[torch.arange(side.heads)[:, None], chosen][..., None]
    worst = 0.0
    for head in range(side.heads):
        for part in range(side.parts[head]):
            of = side.part[head] == part
            error = (y[:, head, :, None, of] - side.centroids[head][:, of].double()).square() * side.weight[head, of]
            distance = error.sum(-1)
            taken = distance.gather(-1, codes[..., side.offsets[head] + part, None].long())[..., 0]
            worst = max(worst, ((taken - distance.amin(-1)) / error.sum(-1).mean(-1)).max().item())
    return worst


def near_tie() -> float:
    """Return the excess that rounding explains: of float32, or of integers of twelve bits."""
    return 3e-3 if torch.ops.effcli_kv_pq.integers() else 1e-5


def test_vectors_too_long_for_integers_are_encoded_in_floats() -> None:
    side = made.quantizer(2, 32, 10, steps=None)
    x = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(5))
    x[:, :, ::7] *= 1e4
    assert excess(x, side, cpu_kernels.encode(x, side)) < 1e-5


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("parts", [64, 33, 20, 5])
def test_encoding_finds_nearest_centroids(parts: int, gains: bool) -> None:
    side = made.quantizer(2, 64, parts, gains=gains, basis=True, steps=None)
    x = 2 * torch.randn(2, 2, 75, 64, generator=torch.Generator().manual_seed(3))
    codes = cpu_kernels.encode(x, side)
    assert codes.shape == (2, 75, side.codes) and codes.dtype == torch.uint8
    assert excess(x, side, codes) < near_tie()
    assert (codes == side.encode(x)).float().mean() > (0.98 if torch.ops.effcli_kv_pq.integers() else 0.999)


def test_encoding_with_residual_parts() -> None:
    side = made.quantizer(3, 32, 32, gains=True, basis=True, residual=2, steps=None)
    assert side.residual_parts == (2, 1, 0)
    x = 2 * torch.randn(2, 3, 75, 32, generator=torch.Generator().manual_seed(3))
    codes = cpu_kernels.encode(x, side)
    assert codes.shape == (2, 75, side.codes)
    assert (codes == side.encode(x)).float().mean() > (0.97 if torch.ops.effcli_kv_pq.integers() else 0.999)


def test_encoding_takes_any_strides_and_types() -> None:
    side = made.quantizer(3, 32, 16, steps=None)
    x = torch.randn(2, 10, 3, 32, dtype=torch.bfloat16).transpose(1, 2)
    assert excess(x, side, cpu_kernels.encode(x, side)) < near_tie()  # either may be taken
    assert cpu_kernels.encode(x[:, :, :0], side).shape == (2, 0, side.codes)


def test_the_number_of_threads_changes_only_rounding() -> None:
    layer = layer_of(64, rope=64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            compare(layer, query_heads=6, start=[4, 80], offset=[0, 70], slots=1000)
    finally:
        torch.set_num_threads(before)


def test_tables_go_with_their_codebooks() -> None:
    layer = layer_of(32, rope=32)
    compare(layer, query_heads=2, start=[0])
    tables = weakref.ref(cpu_kernels._key_tables(layer).centroids)
    assert tables() is not None
    other = dataclasses.replace(layer, rope=None)
    compare(other, query_heads=2, start=[0])
    del layer
    gc.collect()
    assert tables() is None


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    ninja = shutil.which("ninja")
    assert ninja is not None
    code = (
        "import sys\n"
        f"sys.executable = {str(tmp_path / 'python')!r}\n"
        "from passes.kv_pq import cpu_kernels\n"
        "print(cpu_kernels.available())\n"
        "try:\n    cpu_kernels._require()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    for expected in ("ninja is not installed", "building it failed: "):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        reason, error = done.stdout.splitlines()
        assert reason.startswith(expected)
        assert error.startswith(f"{PassError.__name__} kv-pq's CPU operator cannot be used ({reason})")
        (tmp_path / "ninja").unlink(missing_ok=True)
        (tmp_path / "ninja").symlink_to(ninja)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_build_for_any_processor_of_the_family() -> None:
    """The code for processors without the instructions that this one may have."""
    code = (
        "import sys, pytest\n"
        "from passes.kv_pq import cpu_kernels\n"
        "cpu_kernels.FLAGS = tuple(flag for flag in cpu_kernels.FLAGS if flag != '-march=native')\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'not build and not compiler', {__file__!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_build_is_used_again(tmp_path: Path) -> None:
    assert cpu_kernels.available() is None  # this process has built it, so another needs neither ninja nor compiler
    code = "from passes.kv_pq import cpu_kernels\nprint(cpu_kernels.available())\n"
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
