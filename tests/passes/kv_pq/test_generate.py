"""``generate()`` with a product-quantized cache, by whatever way it gets one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from passes.base import PassError
from passes.kv_pq.cache import PQCache, attach, describe, detach, fallback_reason
from passes.kv_pq.codebooks import Codebooks
from profilers.attention_capture import AttentionCall, observe_attention
from tests import tiny_models
from tests.passes.kv_pq.small import brute_force, fine_codebooks, random_codebooks
from tests.passes.kv_pq.test_attention import run, sharp

NEW = 20
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}


@pytest.fixture
def llama() -> PreTrainedModel:
    return sharp(tiny_models.build("llama"))


@pytest.fixture
def codebooks(llama: PreTrainedModel) -> Codebooks:
    return random_codebooks(llama, parts=(3, 4), gains=True, rope=True, kept=3, spread=0.3)


def prompt(batch: int, length: int = 20, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return prompts of which each has more left padding than the one before."""
    ids = torch.randint(3, tiny_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, : 4 * row] = 0
        mask[row, : 4 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compared(
    model: PreTrainedModel, codebooks: Codebooks, inputs: dict[str, torch.Tensor], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the model generates in full precision and product-quantized, the latter as brute force has it."""
    texts = []
    for context in (None, brute_force(model, codebooks), "attached"):
        torch.manual_seed(3)
        if context == "attached":
            attach(model, codebooks)
            texts.append(model.generate(**inputs, **options))
            detach(model)
        elif context is None:
            texts.append(model.generate(**inputs, **options))
        else:
            with context:
                texts.append(model.generate(**inputs, **options))
    exact, wanted, got = texts
    assert torch.equal(got, wanted)
    return exact, got


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        GREEDY | {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 2},
        GREEDY | {"num_beams": 3},
        GREEDY | {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        GREEDY | {"prefill_chunk_size": 7},
        GREEDY | {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=["greedy", "sampling", "beams", "beams-returned", "chunked", "penalties"],
)
def test_it_generates_what_the_codes_say(llama: PreTrainedModel, codebooks: Codebooks, options: dict[str, Any]) -> None:
    exact, got = compared(llama, codebooks, prompt(3), **options)
    assert not torch.equal(exact, got)  # these codebooks are coarse: the cache really was used


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "jamba"])
def test_windowed_and_hybrid_models_generate_in_beams(name: str) -> None:
    model = sharp(tiny_models.build(name))
    compared(model, random_codebooks(model, parts=2, rope=True, kept=3, spread=0.3), prompt(2), **GREEDY, num_beams=2)


@pytest.mark.parametrize("name", ["llama", "gemma3", "jamba", "falcon", "diffllama", "deepseek_v3"])
def test_eight_bits_a_channel_are_next_to_full_precision(name: str) -> None:
    model = sharp(tiny_models.build(name))
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    chunks = (30, 1, 1, 8)
    exact, _ = run(model, ids, None, chunks)
    errors = {}
    for label, books in (("fine", fine_codebooks(model)), ("coarse", random_codebooks(model, parts=2, spread=0.3))):
        attach(model, books)
        got, cache = run(model, ids, None, chunks)
        assert type(cache) is PQCache and cache.compressed[0].coded == 36
        errors[label] = float((got - exact).norm() / exact.norm())
    assert errors["fine"] < 0.05 and errors["fine"] < errors["coarse"] / 4


def test_models_with_another_attention_read_what_is_decoded() -> None:
    """Falcon has attention of its own; diffllama hands the interface other values, deepseek other keys too."""
    falcon = tiny_models.build("falcon")
    attach(falcon, random_codebooks(falcon, parts=2))
    assert describe(falcon) == (
        "keys and values are decoded a layer at a time for the model's own attention: FalconForCausalLM does not use "
        "transformers' attention interface",
    )
    for name in ("diffllama", "deepseek_v3"):
        model = tiny_models.build(name)
        attach(model, random_codebooks(model, parts=2))
        _, cache = run(model, torch.ones(1, 20, dtype=torch.int64), None, (18, 1, 1))
        assert all(layer.decodes for layer in cache.compressed)


def test_a_prefix_is_read_once_and_used_again(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    first, second = prompt(1, 18), prompt(1, 7, seed=1)["input_ids"]
    joined = torch.cat([first["input_ids"], second], 1)

    def both(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            llama(**first, past_key_values=cache, use_cache=True)
        kept = copy.deepcopy(cache)
        texts = [llama.generate(joined, past_key_values=each, **GREEDY) for each in (cache, kept)]
        assert torch.equal(*texts) and cache.get_seq_length() == joined.shape[1] + NEW - 1
        return texts[0]

    with brute_force(llama, codebooks):
        wanted = both(DynamicCache(config=llama.config))
    attach(llama, codebooks)
    assert torch.equal(both(PQCache(llama.config, codebooks)), wanted)


def test_rejected_candidates_leave_no_trace_in_full_precision_settings(llama: PreTrainedModel) -> None:
    assistant = sharp(tiny_models.build("llama", seed=1))
    inputs = prompt(1)
    exact = llama.generate(**inputs, **GREEDY)
    attach(llama, fine_codebooks(llama, rope=True))
    output = llama.generate(**inputs, **GREEDY, assistant_model=assistant, return_dict_in_generate=True)
    assert torch.equal(output.sequences, exact)
    assert type(output.past_key_values) is PQCache


def test_a_cache_from_the_folder_serves_a_model_that_knows_nothing_of_it(
    llama: PreTrainedModel, codebooks: Codebooks, tmp_path: Path
) -> None:
    books = Codebooks({i: type(b)(b.keys, b.values) for i, b in codebooks.layers.items()}, codebooks.model, 3, 8)
    books.save(tmp_path)
    inputs = prompt(1)
    cache = PQCache.from_pretrained(tmp_path, llama.config)
    got = llama.generate(**inputs, past_key_values=cache, **GREEDY)
    assert cache.compressed[0].coded > 30
    exact, wanted = compared(llama, books, inputs, **GREEDY)
    assert torch.equal(got, wanted) and not torch.equal(got, exact)


def test_a_cache_that_is_given_is_used_and_none_where_none_is_wanted(
    llama: PreTrainedModel, codebooks: Codebooks
) -> None:
    inputs = prompt(2)
    exact = llama.generate(**inputs, **GREEDY)
    attach(llama, codebooks)
    own = DynamicCache(config=llama.config)
    assert torch.equal(llama.generate(**inputs, past_key_values=own, **GREEDY), exact)
    assert own.get_seq_length() == 20 + NEW - 1
    assert torch.equal(llama.generate(**inputs, use_cache=False, **GREEDY), exact)
    given = PQCache(llama.config, codebooks, capacity=64)
    assert not torch.equal(llama.generate(**inputs, past_key_values=given, **GREEDY), exact)
    assert given.get_seq_length() == 20 + NEW - 1
    assert llama(**inputs, use_cache=False).past_key_values is None
    assert type(llama.get_decoder()(**inputs, use_cache=True).past_key_values) is PQCache
    assert type(llama(**inputs).past_key_values) is PQCache
    llama.train()
    assert type(llama(**inputs).past_key_values) is DynamicCache


def test_detaching_leaves_the_model_as_it_was(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    inputs = prompt(2)
    before = dict(vars(llama))
    exact = llama.generate(**inputs, **GREEDY)
    attach(llama, codebooks)
    attach(llama, codebooks)
    assert fallback_reason(llama) is None and len(describe(llama)) == 1
    assert llama.config._attn_implementation == "effcli_pq"
    detach(llama)
    detach(llama)
    assert llama.config._attn_implementation == "sdpa" and vars(llama).keys() == before.keys()
    assert not llama.get_decoder()._forward_pre_hooks
    assert torch.equal(llama.generate(**inputs, **GREEDY), exact)


def test_a_copy_of_an_attached_model_works_alone(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    inputs = prompt(2)
    attach(llama, codebooks)
    wanted = llama.generate(**inputs, **GREEDY)
    other = copy.deepcopy(llama)
    detach(llama)
    assert torch.equal(other.generate(**inputs, **GREEDY), wanted)
    assert fallback_reason(other) is None
    detach(other)
    assert torch.equal(other.generate(**inputs, **GREEDY), llama.generate(**inputs, **GREEDY))


def test_attention_can_be_observed_while_it_decodes(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    ids = prompt(1, 30)["input_ids"]
    attach(llama, codebooks)
    wanted, _ = run(llama, ids, None, (20, 1, 1, 1))
    seen: list[int] = []

    def note(call: AttentionCall) -> None:
        seen.append(call.key.shape[2])

    with observe_attention(llama, note):
        got, _ = run(llama, ids, None, (20, 1, 1, 1))
    assert seen == [20, 20, 21, 21, 22, 22, 23, 23]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_codebooks_of_another_model_cannot_be_attached(llama: PreTrainedModel) -> None:
    with pytest.raises(PassError, match="model_type gemma3_text, and this one has llama"):
        attach(llama, random_codebooks(tiny_models.build("gemma3"), parts=2))
    assert llama.config._attn_implementation == "sdpa"
