from __future__ import annotations

import math

import pytest
import torch

from profilers import attention_kernels
from profilers.attention_kernels import attention_with_lse
from tests.profilers.tensor_sizes import LargestTensor


def reference(query, key, value, mask=None, is_causal=False, scale=None, softcap=None):
    """Softmax attention spelled out in float64."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ value, scores.logsumexp(-1), scores.softmax(-1)


def tensors(queries=33, keys=33, heads=4, kv_heads=4, size=16, value_size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, queries, heads, size, generator=generator).to(dtype).transpose(1, 2)
    key = torch.randn(2, keys, kv_heads, size, generator=generator).to(dtype).transpose(1, 2)
    value = torch.randn(2, keys, kv_heads, value_size, generator=generator).to(dtype).transpose(1, 2)
    return query, key, value


def window_mask(length=33, window=5):
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masking", ["none", "causal", "bool", "additive", "causal+additive"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 1, "size": 7, "value_size": 7},
        {"size": 24, "value_size": 16},
        {"size": 16, "value_size": 32, "kv_heads": 2},
        {"queries": 9},
    ],
    ids=str,
)
def test_output_and_lse_equal_float64_attention(dtype, masking, shape):
    query, key, value = tensors(dtype=dtype, **shape)
    mask = None
    if masking == "bool":
        mask = window_mask()[:, :, : query.shape[2]]
    elif "additive" in masking:
        mask = torch.randn(1, 4, query.shape[2], 33, generator=torch.Generator().manual_seed(3))
        mask = mask.to(torch.float32 if dtype == torch.float64 else dtype)
    arguments = {"mask": mask, "is_causal": "causal" in masking, "scale": 0.7}
    output, lse = attention_with_lse(query, key, value, **arguments)
    expected, expected_lse, _ = reference(query, key, value, **arguments)
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert output.shape == expected.shape and lse.shape == query.shape[:3]
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5 if dtype != torch.bfloat16 else 1e-3, rtol=0)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


def test_default_scale_is_inverse_root_of_head_size():
    query, key, value = tensors()
    _, lse = attention_with_lse(query, key, value, is_causal=True)
    torch.testing.assert_close(lse.double(), reference(query, key, value, is_causal=True)[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("elements", [attention_kernels.BLOCK_ELEMENTS, 700])
def test_softcap_is_computed_in_bounded_blocks(monkeypatch, elements):
    monkeypatch.setattr(attention_kernels, "BLOCK_ELEMENTS", elements)
    query, key, value = tensors(kv_heads=2)
    arguments = {"is_causal": True, "softcap": 2.0}
    with LargestTensor() as largest:
        output, lse = attention_with_lse(query, key, value, **arguments)
    expected, expected_lse, _ = reference(query, key, value, **arguments)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)
    if elements == 700:
        assert (33, 33) not in largest.tails


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["fused", "blockwise"])
@pytest.mark.parametrize("masking", ["bool", "additive", "by row", "by head"])
def test_query_that_sees_nothing_gets_zero_output_and_no_sum(masking, softcap, dtype):
    query, key, value = tensors(dtype=dtype, kv_heads=2)
    mask = window_mask().repeat(2 if masking == "by row" else 1, 4 if masking == "by head" else 1, 1, 1)
    mask[-1, -1, 4] = False
    blind = torch.zeros(2, 4, 33, dtype=torch.bool)
    blind[1 if masking == "by row" else slice(None), 3 if masking == "by head" else slice(None), 4] = True
    given = attention_kernels.additive_mask(mask, dtype) if masking == "additive" else mask
    output, lse = attention_with_lse(query, key, value, mask=given, softcap=softcap)
    assert torch.equal(lse == -math.inf, blind)
    assert (output[blind] == 0).all() and (output[~blind] != 0).any(-1).all()
    _, expected, _ = reference(query, key, value, mask=mask, softcap=softcap)
    torch.testing.assert_close(lse.double(), expected, atol=1e-5 if dtype != torch.bfloat16 else 1e-3, rtol=0)


def test_a_batch_of_which_no_query_sees_anything():
    query, key, value = tensors()
    output, lse = attention_with_lse(query, key, value, mask=torch.zeros(1, 1, 1, 33, dtype=torch.bool))
    assert (output == 0).all() and (lse == -math.inf).all() and lse.shape == query.shape[:3]
