import gc

import pytest
import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer

from profilers.base import NotApplicableError, ProfilerError
from profilers.cache_prediction import Predictor, fit_law, measure_cache, predict_cache_bytes
from profilers.meta import meta_model
from tests.tiny_models import CONFIGS, WINDOW, build

BF16 = torch.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_equals_measured_to_the_byte(name):
    model = build(name)
    predict = Predictor(meta_model(model.config, torch.float32))
    for batch, context in [(1, 1), (2, 2), (3, WINDOW - 1), (1, WINDOW), (2, WINDOW + 1), (2, 3 * WINDOW + 5)]:
        predicted, measured = predict(batch, context), measure_cache(model, batch, context)
        assert measured.bytes > 0
        assert (predicted.bytes, predicted.prefill_bytes) == (measured.bytes, measured.prefill_bytes), (batch, context)
        assert predicted.layers == measured.layers


@pytest.mark.parametrize("name", CONFIGS)
def test_the_law_agrees_with_running_the_size_itself(name):
    model = meta_model(CONFIGS[name](), BF16)
    predict = Predictor(model)
    law = fit_law(predict)
    assert law.covers(211)
    exact = Predictor(model)(3, 211)
    assert 3 * law.bytes(211) == exact.bytes
    assert 3 * law.prefill_bytes(211) == exact.prefill_bytes


@pytest.mark.parametrize("name", ["llama", "gemma3", "jamba", "deepseek_v3", "t5"])
def test_remembered_shapes_change_nothing(name):
    model = meta_model(CONFIGS[name](), BF16)
    assert Predictor(model)(2, 21) == measure_cache(model, 2, 21)


class HomeMadeCache(DynamicCache):
    pass


def test_model_whose_cache_is_unknown_is_refused(monkeypatch):
    model = build("llama")

    def forward(*args, past_key_values=None, _original=model.forward, **kwargs):
        return _original(*args, past_key_values=past_key_values or HomeMadeCache(), **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(NotApplicableError, match="HomeMadeCache"):
        measure_cache(model, 1, 4)


def test_model_without_a_visible_cache_is_refused(monkeypatch):
    model = build("llama")
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.past_key_values = None
        return output

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(NotApplicableError, match="LlamaForCausalLM.*no cache"):
        measure_cache(model, 1, 4)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (lambda batch, tokens: batch * tokens**2, r"with the context: layer 0 \(Odd\) holds"),
        (lambda batch, tokens: batch**2 * tokens, "with the batch"),
    ],
    ids=["context", "batch"],
)
def test_cache_that_is_not_linear_is_refused(monkeypatch, size, message):
    class Odd(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            self.extra = torch.empty(size(keys.shape[0], keys.shape[-2]), device=keys.device)
            return keys, values

    Odd.__module__ = "transformers.testing"  # as if it were shipped
    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Odd)
    with pytest.raises(ProfilerError, match=f"does not grow linearly {message}"):
        fit_law(Predictor(meta_model(CONFIGS["llama"](), BF16)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_allocator_on_cuda(name):
    model = build(name, dtype=BF16).to("cuda")
    gc.collect()
    measured = measure_cache(model, 2, 64)
    assert measured.bytes == predict_cache_bytes(model.config, 2, 64, BF16)
    blocks = 2 * len(measured.layers)
    assert 0 <= measured.allocator_bytes - measured.bytes <= blocks * 512
