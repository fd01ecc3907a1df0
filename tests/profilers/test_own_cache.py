"""A model that makes a KV cache of its own is measured with it, and asked for what is not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer

from profilers import own_cache
from profilers.base import NotApplicableError
from profilers.cache_contents import cache_bytes, cache_layers
from profilers.cache_watch import held_by
from profilers.compiled import compile_decode, why_not_compiled
from profilers.kv_cache import measure_kv
from profilers.own_cache import LayerGrowth
from profilers.quality import measure_quality, record_reference
from tests.tiny_models import VOCABULARY, build


class HalfLayer(DynamicLayer):
    """Keeps keys and values in bfloat16, whatever the model's dtype."""

    cache_kind: ClassVar = "half"
    cache_shared: ClassVar = ("tables",)

    def __init__(self) -> None:
        super().__init__()
        self.tables = torch.zeros(1000)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = super().update(keys.bfloat16(), values.bfloat16())
        return tuple(item.to(keys.dtype) for item in found)


class HalfCache(Cache):
    cache_kind: ClassVar = "half"

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[HalfLayer() for _ in range(layers)])


class Claims:
    """What a model with such a cache says of it."""

    shared_bytes = 8000

    def __init__(self) -> None:
        self.inside = 0

    @property
    def layers(self) -> dict[int, LayerGrowth]:
        return {index: LayerGrowth("HalfLayer", "half", 2 * 2 * 8 * 2, 0, 2 * 2 * 8 * 2) for index in range(2)}

    def layer_bytes(self, layer: int, batch: int, prompt: int, decoded: int) -> int:
        return batch * (prompt + decoded) * 2 * 2 * 8 * 2

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        self.inside += 1
        yield


@pytest.fixture
def model() -> Any:
    """Return a tiny llama in float32 that makes a cache in bfloat16."""
    made = build("llama")

    def before_forward(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("use_cache") and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = HalfCache(2)
        return args, kwargs

    made.get_decoder().register_forward_pre_hook(before_forward, with_kwargs=True)
    setattr(made, own_cache.ATTRIBUTE, Claims())
    return made


def test_predicted_and_measured_are_those_of_its_own_cache(model: Any) -> None:
    found = measure_kv(model, batches=(1, 2), contexts=(1, 5, 40))
    assert [point.measured_bytes for point in found.points] == [128 * n * b for b in (1, 2) for n in (1, 5, 40)]
    assert all(point.difference_bytes == 0 for point in found.points)
    assert all(point.predicted_prefill_bytes == point.measured_prefill_bytes for point in found.points)
    assert found.bytes_per_token == 128  # float32 would be 256
    assert {layer.kind for layer in found.layers} == {"half"}
    assert found.shared_bytes == 8000
    # Widths of cached values are the model's own affair here.
    assert len(set(found.max_context.values())) == 1


def test_what_all_caches_share_is_not_cache(model: Any) -> None:
    cache = model(torch.full((1, 6), 5), use_cache=True).past_key_values
    assert cache_bytes(cache) == 6 * 128
    assert [layer.kind for layer in cache_layers(cache)] == ["half", "half"]
    assert sum(tensor.nbytes for tensor in held_by(cache)) == 6 * 128


def test_a_class_that_says_nothing_is_still_refused() -> None:
    class Unknown(DynamicLayer):
        pass

    with pytest.raises(NotApplicableError, match="unknown cache layer class 'Unknown'"):
        cache_bytes(Cache(layers=[Unknown()]))


def test_quality_is_measured_as_the_cache_would_have_it(model: Any) -> None:
    windows = torch.randint(3, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    plain = build("llama")
    reference = record_reference(plain, windows)
    measure_quality(model, windows, reference, text_name="random")
    assert model.own_cache.inside >= 2  # the check of the head, and the windows


def test_models_without_one_are_as_before() -> None:
    plain = build("llama")
    assert own_cache.of(plain) is None
    with own_cache.applied(plain):
        pass
    assert measure_kv(plain, contexts=(4,)).shared_bytes is None


def test_a_static_cache_does_not_replace_it(model: Any) -> None:
    from profilers.base import ProfilerError

    assert "a KV cache of its own" in str(why_not_compiled(model))
    with pytest.raises(ProfilerError, match="a KV cache of its own"):
        compile_decode(model)
