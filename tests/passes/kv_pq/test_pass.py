"""The pass on a tiny model: what it records, writes and reads back, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from passes.base import LoadOptions, PassContext, PassError, PassRecord
from passes.kv_pq import KVPQPass, PQCache
from passes.kv_pq.cache import fallback_reason
from passes.kv_pq.codebooks import FILE, Codebooks
from profilers import own_cache
from profilers.cache_contents import cache_bytes
from profilers.text import TokenStream
from tests.tiny_models import VOCABULARY, build

CPU = torch.device("cpu")
SMALL = {"bits": 4, "samples": 24, "length": 64, "recent": 16, "iterations": 4}


def text(tokens: int = 4000) -> TokenStream:
    ids = torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))
    return TokenStream(ids, "random tokens")


def applied(folder: Path, name: str = "llama", **values: Any) -> tuple[KVPQPass, Any, PassRecord]:
    item = KVPQPass.from_mapping(SMALL | values)
    assert isinstance(item, KVPQPass)
    model = build(name)
    item.check(model)
    record = item.apply(model, PassContext(None, CPU, text(), folder / "work", seed=3))
    return item, model, record


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, PassRecord]:
    folder = tmp_path_factory.mktemp("kv-pq")
    item, model, record = applied(folder)
    item.save(model, folder)
    return folder, model, record


def test_the_record_says_what_was_done(made: tuple[Path, Any, PassRecord]) -> None:
    folder, _, record = made
    books = Codebooks.load(folder)
    assert record.name == "kv-pq"
    assert (record.seed, record.parameters["bits"], record.parameters["recent"]) == (3, 4.0, 16)
    assert {(layer.name, layer.kind) for layer in record.layers} == {
        (f"layers.{index}.{kind}", kind) for index in range(2) for kind in ("keys", "values")
    }
    assert all(layer.error is not None and 0 < layer.error < 1 for layer in record.layers)
    of_values = [layer.bits for layer in record.layers]
    assert sum(of_values) / len(of_values) == pytest.approx(books.bits_per_value)
    assert books.bits_per_value <= 4.25
    details = record.details
    assert details["calibration"] == {
        "text": "random tokens",
        "samples": 24,
        "length": 64,
        "tokens": 24 * 64,
        "random_share": 0.25,
    }
    assert (details["codebook_bytes"], details["bits_per_value"]) == (books.bytes, books.bits_per_value)
    assert (details["kept_tokens"], details["recent_tokens"]) == (4, 16)
    assert "bits a value" in record.summary
    assert any("stricter than generation" in note for note in record.notes)


def test_what_was_written_is_read_back_and_used_by_generate(made: tuple[Path, Any, PassRecord]) -> None:
    folder, trained, _ = made
    item = KVPQPass.from_mapping(SMALL)
    fresh = build("llama")
    (line,) = item.check_files(folder, build("llama", device="meta"))
    assert line.startswith(f"{FILE}: codebooks of 2 layers")
    loaded = item.load(folder, fresh, LoadOptions(CPU, torch.float32))
    assert any("product quantization" in note for note in loaded.notes)
    assert fallback_reason(fresh) is None
    claims = own_cache.of(fresh)
    assert claims is not None
    assert claims.shared_bytes == Codebooks.load(folder).bytes
    ids = torch.randint(3, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    found, expected = (model.generate(ids, **options) for model in (fresh, trained))
    assert type(found.past_key_values) is PQCache
    assert torch.equal(found.sequences, expected.sequences)
    assert cache_bytes(found.past_key_values) == sum(claims.layer_bytes(layer, 2, 50, 23) for layer in claims.layers)
    given = PQCache.from_pretrained(folder, fresh.config)
    assert torch.equal(fresh.generate(ids, past_key_values=given, **options).sequences, found.sequences)


def test_the_same_recipe_gives_the_same_bytes(made: tuple[Path, Any, PassRecord], tmp_path: Path) -> None:
    item, model, _ = applied(tmp_path)
    item.save(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == (made[0] / FILE).read_bytes()


def test_layers_without_a_growing_cache_are_skipped_and_said(tmp_path: Path) -> None:
    item, model, record = applied(tmp_path, "gemma3")
    item.save(model, tmp_path)
    assert {layer.name.split(".")[1] for layer in record.layers} == {"1", "3"}
    assert [entry.name for entry in record.skipped] == ["layers.0", "layers.2"]
    assert any("2 layers is as transformers makes it" in note for note in record.notes)
    item.check_files(tmp_path, build("gemma3", device="meta"))


def test_codebooks_of_another_model_are_refused(made: tuple[Path, Any, PassRecord]) -> None:
    item = KVPQPass.from_mapping(SMALL)
    for name, message in (("gpt2", "model_type llama, and this one has gpt2"), ("qwen3", "this one has qwen3")):
        with pytest.raises(PassError, match=message):
            item.load(made[0], build(name), LoadOptions(CPU, torch.float32))


def test_a_folder_without_codebooks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=f"has no {FILE}; make one with: effcli optimize"):
        KVPQPass.from_mapping(SMALL).load(tmp_path, build("llama"), LoadOptions(CPU, torch.float32))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (None, "kv-pq trains on text"),
        (text(600), "has 600 tokens, and samples=24 of length=64 need 1536; give a longer text, or samples=9"),
    ],
)
def test_text_that_is_missing_or_too_short_is_refused(tmp_path: Path, stream: TokenStream | None, message: str) -> None:
    item = KVPQPass.from_mapping(SMALL)
    with pytest.raises(PassError, match=message):
        item.apply(build("llama"), PassContext(None, CPU, stream, tmp_path))
