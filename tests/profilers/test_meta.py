from __future__ import annotations

import pytest
import torch

from profilers.meta import meta_compatible, meta_model
from profilers.phases import decode_step, prefill
from tests.tiny_models import CONFIGS, VOCABULARY, build

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _storages(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_runs_both_phases_without_storage(name, dtype):
    model = meta_model(CONFIGS[name](), dtype)
    assert not model.training
    assert all(tensor.device.type == "meta" for tensor in _storages(model))
    assert {parameter.dtype for parameter in model.parameters()} <= {dtype, torch.float32}
    state = decode_step(model, prefill(model, batch=2, context=40))
    assert state.cache is not None
    assert state.logits.device.type == "meta"
    assert state.logits.shape == (2, 1, VOCABULARY)


def test_parameters_are_those_of_the_real_model():
    real, twin = build("qwen3_moe"), meta_model(CONFIGS["qwen3_moe"](), torch.float32)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}


def test_grouped_products_have_the_real_kernels_shape():
    offsets = torch.tensor([3, 5], dtype=torch.int32)
    a, b = torch.randn(5, 16), torch.randn(2, 16, 8)
    real = torch.nn.functional.grouped_mm(a, b, offs=offsets)
    with meta_compatible():
        shape = torch.nn.functional.grouped_mm(a.to("meta"), b.to("meta"), offs=offsets.to("meta")).shape
        inside = torch.nn.functional.grouped_mm(a, b, offs=offsets)
    assert shape == real.shape
    torch.testing.assert_close(inside, real)
