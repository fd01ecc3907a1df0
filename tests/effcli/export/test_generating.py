"""Exports generate what torch generates: token for token, in the ways that transformers' ``generate`` knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, set_seed
from transformers.generation.streamers import BaseStreamer

from effcli.errors import BadInputError
from effcli.export import generating, opening
from effcli.export.generating import OnnxCausalLM
from tests.tiny_models import VOCABULARY

if TYPE_CHECKING:
    from tests.effcli.export.conftest import Exported

PROMPTS = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def opened(text_export: Exported) -> OnnxCausalLM:
    """Return the exported llama, opened."""
    found = opening.open(text_export.folder, device="cpu")
    assert isinstance(found, OnnxCausalLM)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "repetition_penalty": 1.3, "eos_token_id": list(range(40, 60))},
    ],
    ids=["greedy", "sampled", "nucleus", "beams", "no-cache", "stops"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_generates_what_torch_generates(
    text_export: Exported, opened: OnnxCausalLM, options: dict[str, Any], padded: bool
) -> None:
    mask = torch.ones_like(PROMPTS)
    mask[0, : 4 * padded] = 0
    found = []
    for model in (text_export.model, opened):
        set_seed(5)
        found.append(model.generate(PROMPTS, attention_mask=mask, max_new_tokens=12, **options))
    assert torch.equal(*found)


def test_a_prompt_in_chunks_gives_the_logits_of_one_pass(
    text_export: Exported, opened: OnnxCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(4, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # longer than a chunk: one chunk is all padding
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = text_export.model(ids, attention_mask=mask, position_ids=position_ids).logits
    for chunk in (512, 5):
        monkeypatch.setattr(generating, "CHUNK", chunk)
        found = opened(ids, attention_mask=mask, logits_to_keep=1)
        assert found.logits.shape == (2, 1, VOCABULARY)
        torch.testing.assert_close(found.logits, expected[:, -1:], rtol=0, atol=1e-4)
        assert found.past_key_values.get_seq_length() == 23
    torch.testing.assert_close(opened(ids, mask).logits[1, 7:], expected[1, 7:], rtol=0, atol=1e-4)


def test_a_cache_goes_on_where_it_ended(text_export: Exported, opened: OnnxCausalLM) -> None:
    expected = text_export.model(PROMPTS).logits
    first = opened(PROMPTS[:, :4])
    pointer = first.past_key_values.layers[0].keys.data_ptr()
    second = opened(PROMPTS[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), expected, rtol=0, atol=1e-4)
    assert second.past_key_values is first.past_key_values
    assert second.past_key_values.layers[0].keys.data_ptr() != pointer


def test_outputs_stay_as_they_were_when_the_model_runs_again(opened: OnnxCausalLM) -> None:
    first = opened(PROMPTS[:1])
    kept = first.logits.clone()
    for _ in range(3):
        opened(PROMPTS[1:].flip(1))
    assert torch.equal(first.logits, kept)


def test_tokens_are_streamed_as_they_come(opened: OnnxCausalLM) -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value.reshape(-1))

        def end(self) -> None:
            self.parts.append(torch.tensor([-1]))

    streamer = Kept()
    found = opened.generate(PROMPTS[:1], max_new_tokens=5, do_sample=False, eos_token_id=-2, streamer=streamer)
    assert len(streamer.parts) == 1 + 5 + 1
    assert torch.cat(streamer.parts).tolist() == [*found[0].tolist(), -1]


def test_refuses_a_cache_that_it_would_get_wrong(text_export: Exported, opened: OnnxCausalLM) -> None:
    static = StaticCache(config=text_export.model.config, max_cache_len=32)
    with pytest.raises(BadInputError, match="StaticCache"):
        opened(PROMPTS, past_key_values=static)
    prefill = opening.open(text_export.folder, device="cpu", graph="prefill")
    first = prefill(PROMPTS)
    torch.testing.assert_close(first.logits, opened(PROMPTS).logits, rtol=0, atol=1e-5)
    assert type(first.past_key_values) is DynamicCache
    with pytest.raises(BadInputError, match="prefill"):
        prefill(PROMPTS[:, :1], past_key_values=first.past_key_values)


def test_an_encoder_gives_what_torch_gives_and_does_not_generate(encoder_export: Exported) -> None:
    opened = opening.open(encoder_export.folder, device="cpu")
    mask = torch.ones_like(PROMPTS)
    mask[0, 5:] = 0
    expected = encoder_export.model(PROMPTS, attention_mask=mask).last_hidden_state
    found = opened(PROMPTS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)
    with pytest.raises(BadInputError, match="does not generate"):
        opened.generate(PROMPTS)
