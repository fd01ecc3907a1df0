"""The Triton kernels against float64 attention over decoded vectors: on a GPU, or in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so where there is no GPU this file runs itself once more in a
process that has chosen it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from passes.base import PassError
from passes.kv_pq import kernels
from passes.kv_pq.codebooks import LayerCodebooks
from tests.passes.kv_pq import random_codebooks as made

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
HERE = INTERPRETED or DEVICE.type == "cuda"

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

kernel_test = pytest.mark.skipif(not HERE, reason="runs in the interpreter's process")


@pytest.fixture(autouse=True)
def ranges_of_arrays_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's ranges take its numbers, arrays of one, which NumPy 2.4 no longer turns into an int."""
    if INTERPRETED:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def layer_of(dim: int, *, gains: bool = False, rope: int | None = None, interleaved: bool = False,
             key_basis: bool = False, value_basis: bool = True, residual: int = 0) -> LayerCodebooks:  # fmt: skip
    return LayerCodebooks(
        made.quantizer(2, dim, dim // 2, gains=gains, basis=key_basis, residual=residual, seed=1),
        made.quantizer(2, dim, dim // 2 + 3, gains=gains, basis=value_basis, residual=2 * residual, seed=2),
        None if rope is None else made.rope(rope, interleaved=interleaved),
    )


def compare(layer: LayerCodebooks, *, query_heads: int = 4, length: int = 1, slots: int = 400, start: list[int],
            stop: int | None = None, offset: list[int] | None = None, softcap: float | None = None, exact: int = 0,
            hidden: list[int] | None = None, dtype: torch.dtype = torch.float32, tolerance: float = 2e-5,
            ) -> None:  # fmt: skip
    """Compare; each row does not see its first ``hidden`` exact tokens."""
    generator = torch.Generator().manual_seed(0)
    batch, dim = len(start), layer.keys.head_dim
    query = torch.randn(batch, query_heads, length, dim, generator=generator).to(dtype)
    codes = made.random_codes(layer.keys, batch, slots), made.random_codes(layer.values, batch, slots, seed=2)
    options: dict[str, Any] = {
        "start": torch.tensor(start),
        "stop": slots if stop is None else stop,
        "offset": torch.tensor(offset or [0] * batch),
        "scale": dim**-0.5,
        "softcap": softcap,
    }
    out64, lse64 = made.attend64(query, *codes, layer, **options)
    if exact:
        keys, values = (
            torch.randn(2, batch, exact, layer.keys.heads, dim, generator=generator).to(dtype).transpose(2, 3)
        )
        seen = torch.arange(exact) >= torch.tensor(hidden or [0] * batch)[:, None]
        group = query_heads // layer.keys.heads
        scores = options["scale"] * query.double() @ keys.double().repeat_interleave(group, 1).mT
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        both = torch.logaddexp(lse64, scores.logsumexp(-1))
        other = (scores - both[..., None]).exp() @ values.double().repeat_interleave(group, 1)
        out64, lse64 = out64 * (lse64 - both).exp()[..., None] + other, both
        options |= {"exact_keys": keys, "exact_values": values, "visible": seen if hidden else None}
    options = {name: item.to(DEVICE) if torch.is_tensor(item) else item for name, item in options.items()}
    moved = layer.to(DEVICE)
    run = kernels.attend_all if exact else kernels.attend
    out, lse = run(query.to(DEVICE), *(item.to(DEVICE) for item in codes), moved, **options)
    assert out.shape == query.shape and out.dtype == torch.float32
    torch.testing.assert_close(lse.cpu(), lse64.float(), rtol=tolerance, atol=tolerance)
    largest = out64.abs().max().item()
    torch.testing.assert_close(out.cpu(), out64.float(), rtol=tolerance, atol=2 * tolerance * largest)


@kernel_test
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("rope", [None, 64, 32])
def test_attention_matches_float64(rope: int | None, gains: bool) -> None:
    compare(layer_of(64, gains=gains, rope=rope), start=[4, 200], offset=[0, 190], stop=370)


@kernel_test
def test_a_head_size_that_is_no_power_of_two() -> None:
    compare(layer_of(80, rope=32, gains=True), start=[4])


@kernel_test
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("rope", [None, 32])
def test_residual_centroids_are_added(rope: int | None, gains: bool) -> None:
    layer = layer_of(32, gains=gains, rope=rope, residual=2)
    assert layer.keys.residual_parts == (2, 1)
    compare(layer, query_heads=6, start=[4], stop=270)
    one_side = dataclasses.replace(layer, values=layer_of(32).values)
    compare(one_side, query_heads=2, start=[4])


@kernel_test
def test_rotation_that_pairs_neighbours() -> None:
    compare(layer_of(32, rope=32, interleaved=True, value_basis=False), start=[4])


@kernel_test
def test_keys_with_a_basis() -> None:
    compare(layer_of(32, key_basis=True, gains=True), start=[4])


@kernel_test
def test_query_heads_that_share_a_kv_head_and_several_queries() -> None:
    compare(layer_of(32, rope=32), query_heads=2, start=[1])
    compare(layer_of(32, rope=32), query_heads=16, length=9, slots=100, start=[1])


@kernel_test
def test_empty_rows_and_edges_of_blocks() -> None:
    for stop in (63, 64, 65, 321):
        compare(layer_of(32, rope=32), start=[4, 61, 330], offset=[0, 57, 0], stop=stop)


@kernel_test
def test_softcap() -> None:
    compare(layer_of(32, rope=32), start=[4], softcap=5.0, exact=70)


@kernel_test
def test_half_precision_products() -> None:
    compare(layer_of(64, rope=64), start=[4], dtype=torch.float16, exact=50, tolerance=5e-3)


@kernel_test
@pytest.mark.parametrize("exact", [1, 64, 132, 700])
def test_exact_tokens_are_further_splits(exact: int) -> None:
    compare(layer_of(64, rope=64, gains=True), start=[4], exact=exact)


@kernel_test
def test_exact_tokens_that_a_row_does_not_see_and_no_history() -> None:
    compare(layer_of(32, rope=32), start=[4, 390], offset=[0, 386], exact=40, hidden=[0, 17])
    compare(layer_of(32, rope=32), start=[4], stop=0, exact=40)


@kernel_test
def test_neither_history_nor_exact_tokens() -> None:
    compare(layer_of(32, rope=32), start=[4], stop=0)


@kernel_test
@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("parts", [16, 5])
def test_encoding_finds_nearest_centroids(parts: int, gains: bool) -> None:
    side = made.quantizer(2, 16, parts, gains=gains, basis=True, steps=None)
    x = 2 * torch.randn(2, 2, 35, 16, generator=torch.Generator().manual_seed(3))
    codes = kernels.encode(x.to(DEVICE), side.to(DEVICE))
    assert codes.dtype == torch.uint8
    assert (codes.cpu() == side.encode(x)).float().mean() > 0.999
    refined = made.quantizer(2, 16, parts, gains=gains, basis=True, residual=1, steps=None)
    assert (kernels.encode(x.to(DEVICE), refined.to(DEVICE)).cpu() == refined.encode(x)).float().mean() > 0.999
    assert kernels.encode(x[:, :, :0].to(DEVICE), side.to(DEVICE)).shape == (2, 0, side.codes)


@pytest.mark.skipif(HERE, reason="the kernels run in this process")
def test_without_a_gpu_it_says_so() -> None:
    assert kernels.available(torch.device("cpu")) == "Triton has no kernels for cpu"
    with pytest.raises(PassError, match="Triton has no kernels for cpu; use passes.kv_pq.attention"):
        compare(layer_of(32), start=[0])


@kernel_test
def test_turned_keys_with_a_basis_are_refused() -> None:
    with pytest.raises(PassError, match="both a rotary embedding to put back and a basis"):
        compare(layer_of(32, rope=32, key_basis=True), start=[0])
