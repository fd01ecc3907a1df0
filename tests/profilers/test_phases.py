from __future__ import annotations

import pytest
import torch

from profilers.base import ProfilerError
from profilers.phases import check_context, context_limit, decode_history, decode_step, prefill, token_ids
from tests.tiny_models import CONFIGS, VOCABULARY, build


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decode_step_gives_what_the_whole_sequence_gives(name):
    model = build(name)
    ids = token_ids(model, batch=2, tokens=33)
    before, last = ids[:, :32], ids[:, 32:]
    inputs = {"input_ids": before, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    with torch.inference_mode():
        whole = model(**inputs).logits[:, -1]
    state = decode_step(model, prefill(model, 2, 32, input_ids=before), input_ids=last)
    torch.testing.assert_close(state.logits[:, -1], whole, atol=1e-3, rtol=1e-3)


def test_random_tokens_repeat_with_the_seed():
    model = build("llama")
    assert torch.equal(token_ids(model, 2, 9, seed=3), token_ids(model, 2, 9, seed=3))
    assert not torch.equal(token_ids(model, 2, 9, seed=3), token_ids(model, 2, 9, seed=4))


def test_context_limits():
    config = CONFIGS["gpt2"]()
    assert context_limit(config) == 1024
    assert context_limit(CONFIGS["mamba"]()) is None
    assert decode_history(config, 1023) == 1023
    assert decode_history(config, 1024) == 1023
    assert decode_history(CONFIGS["mamba"](), 1 << 20) == 1 << 20
    check_context(config, 1024)
    with pytest.raises(ProfilerError, match="context 1025 is past the model's limit of 1024"):
        check_context(config, 1025)
    with pytest.raises(ProfilerError, match="context 0"):
        check_context(config, 0)


def test_the_last_position_of_learned_positions_can_be_decoded():
    model = build("gpt2")
    state = prefill(model, 1, decode_history(model.config, 1024))
    assert decode_step(model, state).logits.shape == (1, 1, VOCABULARY)
