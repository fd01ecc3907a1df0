"""Attention over codes against float64 softmax over what the codes say."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedModel

from passes.kv_pq import attention
from passes.kv_pq.cache import PQCache, attach, detach, fallback_reason
from passes.kv_pq.codebooks import Codebooks, LayerCodebooks
from passes.kv_pq.rope import Rope
from tests import tiny_models
from tests.passes.kv_pq.small import brute_force, dense_attention, random_codebooks, random_quantizer

INTERFACE = ("llama", "qwen3", "gemma3", "gpt2", "mixtral", "jamba", "bamba", "qwen3_next", "gpt_oss")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is what is tested here; kernels have their own tests."""
    monkeypatch.setattr(attention, "kernels", lambda device: "asked for")


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    """Make random weights larger, so that what is attended to shows in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(4)
    return model


def layer_books(heads: int, size: int, *, rope: bool, gains: bool, basis: bool) -> LayerCodebooks:
    return LayerCodebooks(
        random_quantizer(heads, size, parts=3, gains=gains, basis=basis and not rope, spread=1.0, seed=1),
        random_quantizer(heads, size, parts=5, gains=gains, basis=basis, spread=1.0, seed=2),
        Rope(10000.0 ** -torch.linspace(0, 1, size // 4)) if rope else None,  # partial: half of the channels turn
    )


def said_by(books: LayerCodebooks, codes: tuple[torch.Tensor, torch.Tensor], offset: torch.Tensor) -> Any:
    keys, values = (side.decode(of, torch.float64) for side, of in zip((books.keys, books.values), codes, strict=True))
    if books.rope is not None:
        positions = torch.arange(keys.shape[2]) - offset[:, None]
        angle = positions.double()[:, None, :, None] * books.rope.frequencies.double()
        half = angle.shape[-1]
        a, b = keys[..., :half].clone(), keys[..., half : 2 * half].clone()
        keys[..., :half] = a * angle.cos() - b * angle.sin()
        keys[..., half : 2 * half] = b * angle.cos() + a * angle.sin()
    return keys, values


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize(
    "stored",
    [{}, {"rope": True, "gains": True}, {"basis": True, "gains": True}, {"rope": True, "basis": True}],
    ids=str,
)
def test_history_is_attended_to_as_its_codes_say(
    stored: dict[str, bool], heads: tuple[int, int], queries: int, softcap: float | None
) -> None:
    query_heads, kv_heads = heads
    size, capacity, stop = 16, 200, 150
    books = layer_books(kv_heads, size, **({"rope": False, "gains": False, "basis": False} | stored))
    random = torch.Generator().manual_seed(0)
    codes = tuple(
        torch.randint(256, (3, capacity, side.codes), dtype=torch.uint8, generator=random)
        for side in (books.keys, books.values)
    )
    query = torch.randn(3, query_heads, queries, size, generator=random)
    offset = torch.tensor([0, 7, 40])
    start = torch.tensor([4, 11, stop])  # the last row has no history
    out, lse = attention.attend_reference(
        query, *codes, books, start=start, stop=stop, offset=offset, scale=0.3, softcap=softcap
    )
    keys, values = said_by(books, codes, offset)
    visible = ((torch.arange(capacity) < stop) & (torch.arange(capacity) >= start[:, None]))[:, None, None]
    wanted, wanted_lse = dense_attention(query, keys, values, visible, 0.3, softcap)
    torch.testing.assert_close(out.double(), wanted, **CLOSE)
    torch.testing.assert_close(lse.double(), wanted_lse, **CLOSE)
    assert (lse[2] == -torch.inf).all() and (out[2] == 0).all()


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_a_mask_over_the_history_and_blocks_of_any_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    books = layer_books(2, 8, rope=True, gains=True, basis=True)
    random = torch.Generator().manual_seed(0)
    codes = tuple(
        torch.randint(256, (2, 90, side.codes), dtype=torch.uint8, generator=random)
        for side in (books.keys, books.values)
    )
    query = torch.randn(2, 4, 3, 8, generator=random)
    seen = torch.rand(2, 1, 3, 90, generator=random) > 0.4
    mask = seen if kind == "boolean" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    offset = torch.zeros(2, dtype=torch.int64)
    wanted = dense_attention(query, *said_by(books, codes, offset), seen, 0.3)
    for block in (1, 7, 64, 4096):
        monkeypatch.setattr(attention, "MINIMUM_BLOCK", block)
        monkeypatch.setattr(attention, "BLOCK_ELEMENTS", 1)
        out, lse = attention.attend_reference(
            query, *codes, books, start=offset, stop=90, offset=offset, scale=0.3, mask=mask
        )
        torch.testing.assert_close(out.double(), wanted[0], **CLOSE)
        torch.testing.assert_close(lse.double(), wanted[1], **CLOSE)


class _Largest(TorchDispatchMode):
    """Notes the most elements of a new floating-point tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                self.elements = max(self.elements, item.numel())
        return out


def test_the_whole_history_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", 1 << 14)
    books = layer_books(2, 16, rope=True, gains=True, basis=False)
    stop = 20_000
    codes = [torch.zeros(1, stop, side.codes, dtype=torch.uint8) for side in (books.keys, books.values)]
    zero = torch.zeros(1, dtype=torch.int64)
    with _Largest() as seen:
        attention.attend_reference(
            torch.randn(1, 4, 1, 16), *codes, books, start=zero, stop=stop, offset=zero, scale=1.0
        )
    assert 0 < seen.elements <= 2 * (1 << 14) < stop * 2 * 16 / 10


def test_parts_merge_into_attention_over_their_union() -> None:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=random)
    keys, values = torch.randn(2, 2, 2, 30, 8, generator=random)
    hidden = torch.zeros(1, 1, 1, 30, dtype=torch.bool)
    cut = [slice(0, 5), slice(5, 6), slice(6, 30)]
    parts = [
        tuple(item.float() for item in dense_attention(query, keys[:, :, at], values[:, :, at], ~hidden[..., at], 0.4))
        for at in cut
    ]
    nothing = (torch.zeros(2, 4, 3, 8), torch.full((2, 4, 3), -torch.inf))
    out, lse = attention.merge([nothing, *parts, nothing])
    wanted = dense_attention(query, keys, values, ~hidden, 0.4)
    torch.testing.assert_close(out.double(), wanted[0], **CLOSE)
    torch.testing.assert_close(lse.double(), wanted[1], **CLOSE)
    out, lse = attention.merge([nothing, nothing])
    assert (out == 0).all() and (lse == -torch.inf).all()


def run(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, chunks: tuple[int, ...]
) -> tuple[torch.Tensor, Any]:
    """Feed tokens in chunks; return the logits of real tokens and the cache."""
    cache, logits, begin = None, [], 0
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    for size in chunks:
        end = begin + size
        given = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        with torch.no_grad():
            output = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **given)
        cache, begin = output.past_key_values, end
        logits.append(output.logits)
    whole = torch.cat(logits, 1)
    return whole if mask is None else whole[mask[:, :begin].bool()], cache


PADDED = torch.tensor([[0] * pad + [1] * (40 - pad) for pad in (0, 6, 17)])
CHUNKS = (13, 6, 1, 1, 3, 7, *[1] * 9)  # the first of them is nothing but padding for the last row


def check(model: PreTrainedModel, codebooks: Codebooks, mask: torch.Tensor | None, chunks: tuple[int, ...]) -> None:
    """Hold an attached model against the brute force; the codes must make a difference for that to mean anything."""
    ids = torch.randint(3, tiny_models.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
    exact, _ = run(model, ids, mask, chunks)
    with brute_force(model, codebooks):
        wanted, _ = run(model, ids, mask, chunks)
    attach(model, codebooks)
    got, cache = run(model, ids, mask, chunks)
    detach(model)
    assert type(cache) is PQCache and cache.compressed
    spread = (exact - wanted).abs().max()
    assert spread > 0.02
    torch.testing.assert_close(got, wanted, rtol=0, atol=float(spread) / 1000)


@pytest.mark.parametrize("name", INTERFACE)
def test_models_compute_what_their_codes_say(name: str) -> None:
    model = sharp(tiny_models.build(name))
    check(model, random_codebooks(model, parts=(3, 4), kept=3, gains=True, rope=True, spread=0.3), PADDED, CHUNKS)
    assert fallback_reason(model) == "the model is not attached"


def test_kernels_that_take_everything_get_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for codes, kept and recent tokens, where there are kernels for it and a single query a row."""
    calls = []

    def attend_all(query: Any, *codes: Any, exact_keys: Any, exact_values: Any, visible: Any, **given: Any) -> Any:
        calls.append(visible)
        seen = torch.ones(1, dtype=torch.bool) if visible is None else visible[:, None, None]
        exact = dense_attention(query, exact_keys, exact_values, seen, given["scale"])
        return attention.merge([attention.attend_reference(query, *codes, **given), tuple(x.float() for x in exact)])

    fake = SimpleNamespace(
        attend=attention.attend_reference, attend_all=attend_all, encode=lambda x, side: side.encode(x),
        unsupported=lambda layer: None,
    )  # fmt: skip
    monkeypatch.setattr(attention, "kernels", lambda device: fake)
    model = sharp(tiny_models.build("llama"))
    check(model, random_codebooks(model, parts=3, kept=3, rope=True, spread=0.3), PADDED, CHUNKS)
    assert len(calls) == 2 * CHUNKS.count(1)
    assert calls[0] is not None and calls[-1] is None  # later on nothing is hidden


@pytest.mark.parametrize("kv_heads", [1, 4], ids=["MQA", "MHA"])
def test_few_and_many_heads(kv_heads: int) -> None:
    config = tiny_models.CONFIGS["llama"]()
    config = LlamaConfig(**(config.to_dict() | {"num_key_value_heads": kv_heads}))
    torch.manual_seed(0)
    model = sharp(AutoModelForCausalLM.from_config(config).eval())
    check(model, random_codebooks(model, parts=2, basis=True, spread=0.3), None, CHUNKS)


def test_soft_capped_scores() -> None:
    config = Gemma2Config(
        vocab_size=tiny_models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = sharp(AutoModelForCausalLM.from_config(config).eval())
    check(model, random_codebooks(model, parts=2, rope=True, spread=0.3), PADDED, CHUNKS)


@pytest.mark.parametrize("recent", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("kept", [0, 4])
def test_any_number_of_kept_and_recent_tokens(kept: int, recent: int) -> None:
    model = sharp(tiny_models.build("llama"))
    codebooks = random_codebooks(model, parts=2, rope=True, kept=kept, recent=recent, spread=0.3)
    if recent == 64:  # nothing becomes a code
        ids = torch.randint(3, tiny_models.VOCABULARY, (3, 40))
        wanted, _ = run(model, ids, PADDED, CHUNKS)
        attach(model, codebooks)
        torch.testing.assert_close(run(model, ids, PADDED, CHUNKS)[0], wanted, rtol=0, atol=1e-4)
        detach(model)
    else:
        check(model, codebooks, PADDED, CHUNKS)


def test_a_mask_with_holes_hides_what_it_says() -> None:
    model = sharp(tiny_models.build("llama"))
    mask = PADDED.clone()
    mask[0, 5:9] = 0
    mask[1, 20:22] = 0
    check(model, random_codebooks(model, parts=2, rope=True, spread=0.3), mask, CHUNKS)


def test_a_mask_of_four_dimensions_is_taken_as_it_is() -> None:
    model = sharp(tiny_models.build("llama"))
    codebooks = random_codebooks(model, parts=2, spread=0.3)
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 30))
    seen = torch.ones(2, 1, 30, 30, dtype=torch.bool).tril()
    seen[1, :, 25:, 8:12] = False  # the latest queries look past a few tokens

    def steps() -> torch.Tensor:
        with torch.no_grad():
            first = model(ids[:, :25], attention_mask=seen[:, :, :25, :25], use_cache=True)
            return model(ids[:, 25:], attention_mask=seen[:, :, 25:], past_key_values=first.past_key_values).logits

    exact = steps()
    with brute_force(model, codebooks):
        wanted = steps()
    attach(model, codebooks)
    got = steps()
    assert (exact - wanted).abs().max() > 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_bfloat16_stays_within_its_own_rounding() -> None:
    model = sharp(tiny_models.build("llama", dtype=torch.bfloat16))
    codebooks = random_codebooks(model, parts=2, rope=True, spread=0.3)
    ids = torch.randint(3, tiny_models.VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(1))
    with brute_force(model, codebooks):
        wanted, _ = run(model, ids, None, (20, 1, 1, 1))
    attach(model, codebooks)
    got, cache = run(model, ids, None, (20, 1, 1, 1))
    assert got.dtype == torch.bfloat16 and cache.compressed[0].exact_keys.dtype == torch.bfloat16
    assert (got - wanted).float().norm() < 0.03 * wanted.float().norm()


def test_the_keys_of_a_prompt_are_freed_without_the_garbage_collector() -> None:
    model = tiny_models.build("llama")
    codebooks = random_codebooks(model, parts=2)
    seen = []
    update = PQCache.update

    def noting(self: PQCache, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = update(self, keys, values, *args, **kwargs)
        seen.extend(weakref.ref(item) for item in (keys, values, *out))
        return out

    attach(model, codebooks)
    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PQCache, "update", noting)
            _, cache = run(model, torch.ones(1, 32, dtype=torch.int64), None, (30, 1, 1))
        assert len(seen) == 3 * 2 * 4 and not any(item() is not None for item in seen)
        assert cache.get_seq_length() == 32
    finally:
        gc.enable()
