"""Compiled decode: the same tokens as without, and figures or a reason."""

from __future__ import annotations

import pytest
import torch

from profilers.base import ProfilerError
from profilers.compiled import CompiledDecode, compile_decode, time_compiled_decode, why_not_compiled
from profilers.phases import decode_step, prefill, token_ids
from tests.tiny_models import build

CONTEXT = 12


@pytest.mark.slow
@pytest.mark.thorough
def test_compiled_steps_give_the_eager_logits_and_are_timed_beside_them() -> None:
    model = build("llama")
    ids = token_ids(model, 1, CONTEXT)
    compiled = CompiledDecode(model, ids, 6)
    state = prefill(model, 1, CONTEXT, input_ids=ids)
    for _ in range(6):
        token = state.logits[:, -1].argmax(dim=-1, keepdim=True)
        assert torch.equal(token, compiled.tokens)
        state = decode_step(model, state, input_ids=token)
        torch.testing.assert_close(compiled.step(), state.logits[:, -1], rtol=1e-4, atol=1e-4)
    timing = time_compiled_decode(model, CONTEXT)
    assert timing.reason is None and timing.context == CONTEXT
    assert timing.compiled_seconds is not None and timing.compiled_seconds > 0
    assert timing.compile_seconds is not None and timing.compile_seconds > timing.compiled_seconds
    assert timing.eager_seconds > 0

    # generate: the same greedy tokens, from the compiled graph
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    compile_decode(model)
    torch._dynamo.utils.counters.clear()
    found = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, disable_compile=True)
    assert torch.equal(plain, expected)


def test_a_model_that_cannot_be_compiled_says_so() -> None:
    model = build("t5")
    assert "encoder-decoder" in str(why_not_compiled(model))
    with pytest.raises(ProfilerError, match="encoder-decoder.*compile=False"):
        compile_decode(model)
    assert model.generation_config.cache_implementation is None


def test_without_compiling_the_eager_time_stands_beside_the_reason() -> None:
    model = build("mamba")
    timing = time_compiled_decode(model, CONTEXT)
    assert timing.eager_seconds > 0
    assert timing.compiled_seconds is None and timing.compile_seconds is None
    assert timing.reason is not None and type(model).__name__ in timing.reason


def test_what_the_compiler_raises_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", fail)
    timing = time_compiled_decode(build("llama"), CONTEXT)
    assert timing.reason == "torch.compile failed: RuntimeError: no C++ compiler"
    assert timing.compiled_seconds is None and timing.eager_seconds > 0


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ProfilerError, match="no room for 35 steps within 1024 positions"):
        time_compiled_decode(build("llama"), 1000)
