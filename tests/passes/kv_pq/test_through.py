"""Forward passes through codes see decoded keys and values of all but the kept tokens, and change nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from passes.kv_pq.cache import attach
from passes.kv_pq.through import NAME, decoded, through_codes
from tests.benchmarks.kv_baselines.fake import fake_quantized
from tests.passes.kv_pq.small import quantized, random_codebooks, random_quantizer
from tests.tiny_models import VOCABULARY, build


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_next"])
@pytest.mark.parametrize("attached", [False, True])
@torch.no_grad()
def test_it_is_attention_over_what_the_codes_say(name: str, attached: bool) -> None:
    model = build(name)
    books = random_codebooks(model, rope=True, basis=True, gains=True, kept=3)
    tokens = ids(2, 40)

    def transform(
        layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # ``quantized`` counts positions from 0, and these begin after the kept tokens.
        padding = -positions[:1].expand(keys.shape[0])
        k, v = quantized(books.layers[layer], keys, values, padding)
        return k.float(), v.float()

    plain = model(tokens, use_cache=False).logits
    with fake_quantized(model, transform, kept=3, layers=books.layers):
        expected = model(tokens, use_cache=False).logits
    if attached:
        attach(model, books)
    with through_codes(model, books):
        found = model(tokens, use_cache=False).logits
        with_cache = model(tokens, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(with_cache, expected, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 100 * (found - expected).abs().max()
    torch.testing.assert_close(model(tokens, use_cache=False).logits, plain, rtol=1e-5, atol=1e-6)
    assert NAME not in AttentionInterface._global_mapping


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    model = build("llama")
    books = random_codebooks(model, rope=True, kept=3)
    tokens = ids(1, 30)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), tokens], 1)
    batch = torch.cat([padded, ids(1, 36)])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as generation counts them
    with through_codes(model, books):
        alone = model(tokens, use_cache=False).logits[0]
        together = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, 6:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_kept_tokens_of_each_row_are_exact() -> None:
    from passes.kv_pq.codebooks import LayerCodebooks

    side = random_quantizer(2, 8, parts=4)
    books = LayerCodebooks(side, side)
    keys, values = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    k, v = decoded(books, keys, values, 3, torch.tensor([0, 5]))
    for found, given in ((k, keys), (v, values)):
        same = (found == given).all(-1).all(1)
        assert same[0].nonzero().flatten().tolist() == [0, 1, 2]
        assert same[1].nonzero().flatten().tolist() == list(range(8))  # padding, and three tokens


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), through_codes(model, random_codebooks(model)):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
