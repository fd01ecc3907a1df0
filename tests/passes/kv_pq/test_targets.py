"""Which layers are compressed is read from the cache that a model makes; what does not suit is refused by name."""

from __future__ import annotations

import pytest
import torch

from passes.base import PassError
from passes.kv_pq.targets import find
from profilers.meta import meta_model
from tests.tiny_models import CONFIGS


@pytest.mark.parametrize(
    ("name", "layers", "skipped"),
    [
        ("llama", (0, 1), {}),
        ("gpt2", (0, 1), {}),
        ("mixtral", (0, 1), {}),
        ("gemma3", (1, 3), {"layers.0": "sliding window", "layers.2": "sliding window"}),
        ("gpt_oss", (1,), {"layers.0": "sliding window"}),
        ("jamba", (1, 3), {"layers.0": "linear attention", "layers.2": "linear attention"}),
        ("qwen3_next", (3,), {f"layers.{index}": "linear attention" for index in range(3)}),
    ],
)
def test_only_layers_with_a_growing_cache_of_keys_and_values(
    name: str, layers: tuple[int, ...], skipped: dict[str, str]
) -> None:
    found = find(meta_model(CONFIGS[name](), torch.bfloat16))
    assert found.layers == layers
    assert {item.name for item in found.skipped} == set(skipped)
    assert all(skipped[item.name] in item.reason for item in found.skipped)
    config = CONFIGS[name]().get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert found.bytes_per_token(2) == 2 * len(layers) * heads * size * 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral", "no layer whose cache could be product-quantized: keeps a sliding window"),
        ("falcon", "does not use transformers' attention interface"),
        ("deepseek_v3", "keeps 48 bytes a token, which are not keys and values of its heads"),
        ("mamba", "does not use transformers' attention interface"),
        ("t5", "is an encoder-decoder"),
    ],
)
def test_models_without_such_a_layer_are_refused(name: str, why: str) -> None:
    with pytest.raises(PassError, match=why):
        find(meta_model(CONFIGS[name](), torch.bfloat16))


def test_an_odd_head_size_is_refused() -> None:
    config = CONFIGS["gpt2"]()
    config.n_embd = 36  # 4 heads of 9
    with pytest.raises(PassError, match="head_dim 9, and kv-pq needs an even one"):
        find(meta_model(config, torch.float32))
