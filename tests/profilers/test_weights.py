"""Sizes of weights: shared tensors once, packed ones as they lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from profilers.meta import meta_model
from profilers.weights import WeightSize, weight_bytes_and_parameters
from tests.tiny_models import CONFIGS, build


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba"])
def test_plain_models_count_their_parameters(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    expected = WeightSize(
        sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()), parameters
    )
    assert weight_bytes_and_parameters(model) == expected
    assert weight_bytes_and_parameters(meta_model(CONFIGS[name](), torch.bfloat16)) == expected


class _Packed(nn.Module):
    def __init__(self, data: torch.Tensor, parameters: int) -> None:
        super().__init__()
        self.packed_parameters = parameters
        self.register_buffer("data", data)
        self.register_buffer("nothing", None)


def test_packed_buffers_count_once_and_other_buffers_do_not() -> None:
    data = torch.zeros(16, dtype=torch.uint8)
    model = nn.Sequential(nn.Linear(4, 2), _Packed(data, 32), _Packed(data, 0), nn.BatchNorm1d(3))
    assert weight_bytes_and_parameters(model) == WeightSize(4 * (4 * 2 + 2) + 16 + 4 * 6, 10 + 32 + 6)


def test_views_of_one_storage_count_apart_and_shared_ones_once() -> None:
    storage = torch.zeros(10)
    model = nn.Module()
    model.first = nn.Parameter(storage[:4])
    model.second = nn.Parameter(storage[4:])
    model.again = model.first
    assert weight_bytes_and_parameters(model) == WeightSize(40, 10)
