import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from profilers.base import NotApplicableError
from profilers.cache_contents import cache_bytes, cache_layers
from tests.tiny_models import build

FP32_BYTES = 4


def test_bytes_of_a_cache_by_hand():
    model = build("qwen3")
    cache = model(torch.zeros(2, 11, dtype=torch.long)).past_key_values
    assert cache_bytes(cache) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    cache.layers[0].values = cache.layers[0].keys  # shared storage is held once
    assert cache_bytes(cache) == 3 * cache.layers[0].keys.nbytes
    cache.layers[1].keys = cache.layers[1].keys[:, :, -1:]  # a view holds all of its storage
    assert cache_bytes(cache) == 3 * cache.layers[0].keys.nbytes


def test_static_cache_holds_its_full_length():
    model = build("qwen3")
    cache = StaticCache(config=model.config, max_cache_len=50)
    model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    assert cache_bytes(cache) == 2 * 2 * heads * size * 50 * FP32_BYTES  # layers, keys and values


class HomeMadeLayer(DynamicLayer):
    pass


class HomeMadeCache(DynamicCache):
    pass


def test_unknown_layer_class_is_refused_by_name():
    cache = DynamicCache()
    cache.layers.extend([DynamicLayer(), HomeMadeLayer()])
    with pytest.raises(NotApplicableError, match="layer 1 .*'HomeMadeLayer'"):
        cache_layers(cache)


def test_unknown_cache_class_is_refused_by_name():
    with pytest.raises(NotApplicableError, match="'HomeMadeCache'"):
        cache_bytes(HomeMadeCache())
    with pytest.raises(NotApplicableError, match="'tuple'"):
        cache_bytes((torch.zeros(1), torch.zeros(1)))


def test_anything_that_could_hide_bytes_is_refused():
    cache = DynamicCache()
    cache.layers.append(DynamicLayer())
    cache.layers[0].codebook = object()
    with pytest.raises(NotApplicableError, match="layer 0 .*'codebook'.*'object'"):
        cache_bytes(cache)
    outside = DynamicCache()
    outside.scales = [torch.zeros(3)]
    with pytest.raises(NotApplicableError, match="'DynamicCache'.*'scales'"):
        cache_bytes(outside)
