"""What codebooks say of the model that they are for."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconConfig, GPTBigCodeConfig, PreTrainedConfig

from passes.kv_pq.codebooks import ModelShape
from profilers.cache_prediction import measure_cache
from profilers.meta import meta_model
from tests.tiny_models import CONFIGS

TOKENS = 3
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (CONFIGS["llama"](), 2),
        (CONFIGS["gpt2"](), 4),
        (FalconConfig(**SMALL, multi_query=True), 1),
        (FalconConfig(**SMALL, multi_query=False), 4),
        (FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2), 4),  # repeated before they are cached
        (FalconConfig(**SMALL, new_decoder_architecture=True, multi_query=True, num_kv_heads=2), 4),
        (GPTBigCodeConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, multi_query=True), 1),
        (GPTBigCodeConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, multi_query=False), 4),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else str(value),
)
def test_the_shape_is_that_of_the_cache(config: PreTrainedConfig, heads: int) -> None:
    shape = ModelShape.of(config)
    assert shape.kv_heads == heads
    found = measure_cache(meta_model(config, torch.bfloat16), 1, TOKENS).layers
    assert shape.layers == len(found)
    for layer in found:
        assert (layer.kv_heads, layer.bytes) == (heads, 2 * TOKENS * heads * shape.head_dim * 2)
