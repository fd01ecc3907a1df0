"""What a model says of its product-quantized cache is what the cache holds, to the byte."""

from __future__ import annotations

import pytest
import torch

from passes.kv_pq.cache import PQCache, attach
from passes.kv_pq.footprint import Footprint, capacity
from profilers import own_cache
from profilers.cache_contents import cache_bytes
from profilers.kv_cache import measure_kv
from tests.passes.kv_pq.small import random_codebooks
from tests.tiny_models import build


@pytest.mark.parametrize("name", ["llama", "gemma3", "jamba"])
def test_predicted_is_measured(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    books = random_codebooks(model, parts=(4, 3), gains=True, rope=True, recent=8)
    attach(model, books)
    setattr(model, own_cache.ATTRIBUTE, Footprint(model, books))
    found = measure_kv(model, batches=(1, 3), contexts=(1, 2, 8, 9, 13, 100, 300))
    for point in found.points:
        assert point.difference_bytes == 0, point
        assert point.predicted_prefill_bytes == point.measured_prefill_bytes, point
    kinds = {layer.index: layer.kind for layer in found.layers}
    assert {index for index, kind in kinds.items() if kind == "quantized"} == set(books.layers)
    per_token = sum(side.codes for layer in books.layers.values() for side in (layer.keys, layer.values))
    assert found.bytes_per_token == per_token
    assert found.shared_bytes == books.bytes
    assert set(found.max_context) == {"16", "8", "4"}


@pytest.mark.parametrize(("prompt", "steps", "recent"), [(1, 90, 8), (7, 200, 8), (65, 130, 16), (300, 70, 1)])
@torch.no_grad()
def test_capacity_follows_the_cache_step_by_step(prompt: int, steps: int, recent: int) -> None:
    model = build("llama")
    books = random_codebooks(model, recent=recent)
    cache = PQCache(model.config, books)
    attach(model, books)
    claims = Footprint(model, books)
    model(torch.full((2, prompt), 5), past_key_values=cache, use_cache=True)
    for step in range(steps + 1):
        expected = sum(claims.layer_bytes(layer, 2, prompt, step) for layer in books.layers)
        assert cache_bytes(cache) == expected, step
        model(torch.full((2, 1), 5), past_key_values=cache, use_cache=True)


def test_storage_reserved_ahead_is_never_less() -> None:
    for prompt in (1, 50, 129, 1000):
        for steps in (0, 10, 200):
            now, ahead = (capacity(prompt, steps, 64, ahead=flag) for flag in (False, True))
            assert now <= ahead <= now + 64 + now // 8


def test_a_dropped_model_is_freed() -> None:
    import gc
    import weakref

    model = build("llama")
    books = random_codebooks(model)
    attach(model, books)
    claims = Footprint(model, books)
    setattr(model, own_cache.ATTRIBUTE, claims)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
