"""What a product-quantized cache holds, and everything that transformers does to a cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from passes.base import PassError
from passes.kv_pq import attention
from passes.kv_pq import layer as layer_module
from passes.kv_pq.cache import PQCache, attach
from passes.kv_pq.cache_files import FILE
from passes.kv_pq.codebooks import Codebooks
from passes.kv_pq.layer import SLOTS, PQLayer
from passes.kv_pq.layer_views import Rows, dequantized
from profilers.cache_contents import cache_bytes, cache_layers
from tests import tiny_models
from tests.passes.kv_pq.small import coded_slots, quantized, random_codebooks, with_other

KEPT, RECENT = 3, 8


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties may fall otherwise in a kernel; kernels have their own tests."""
    monkeypatch.setattr(attention, "kernels", lambda device: "asked for")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def codebooks(llama: PreTrainedModel) -> Codebooks:
    return random_codebooks(llama, parts=(3, 4), gains=True, rope=True, kept=KEPT, recent=RECENT)


def states(length: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    keys, values = 0.1 * torch.randn(2, batch, 2, length, 8, generator=random)
    return keys, values


def feed(cache: PQCache, keys: torch.Tensor, values: torch.Tensor, chunks: tuple[int, ...]) -> PQLayer:
    """Give layer 0 tokens in chunks, as a model with its own attention does."""
    begin = 0
    for size in chunks:
        cache.layers[0].update(keys[:, :, begin : begin + size], values[:, :, begin : begin + size])
        begin += size
    layer = cache.layers[0]
    assert isinstance(layer, PQLayer)
    return layer


def expected(
    codebooks: Codebooks, keys: torch.Tensor, values: torch.Tensor, coded: int, padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a layer must give back when the first ``coded`` slots are codes."""
    said = quantized(codebooks.layers[0], keys, values, padding)
    slots = torch.arange(keys.shape[2])
    is_code = ((slots < coded) & ~((slots >= padding[:, None]) & (slots < padding[:, None] + KEPT)))[:, None, :, None]
    return torch.where(is_code, said[0], keys.double()), torch.where(is_code, said[1], values.double())


def same(layer: PQLayer, wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    for found, item in zip(dequantized(layer), wanted, strict=True):
        torch.testing.assert_close(found.double(), item, rtol=1e-5, atol=1e-6)


# --- what is held ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(45,), (1,) * 45, (7, 1, 1, 20, 16), (2, 6, 8, 29)], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (0, 11)], ids=str)
def test_contents_do_not_depend_on_how_tokens_came(
    llama: PreTrainedModel, codebooks: Codebooks, chunks: tuple[int, ...], padding: tuple[int, int]
) -> None:
    cache = PQCache(llama.config, codebooks)
    mask = torch.arange(45) >= torch.tensor(padding)[:, None]
    cache.see_mask(mask.long())
    keys, values = states(45)
    layer = feed(cache, keys, values, chunks)
    assert (layer.length, layer.coded) == (45, coded_slots(45, RECENT)) == (45, 40)
    same(layer, expected(codebooks, keys, values, 40, torch.tensor(padding)))


def test_the_first_real_tokens_of_each_row_are_kept_to_the_bit(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks)
    cache.see_mask(torch.tensor([[1] * 30, [0] * 13 + [1] * 17]))
    keys, values = states(30)
    layer = feed(cache, keys, values, (14, 1, 15))
    assert torch.equal(layer.exact_keys[0, :, :KEPT], keys[0, :, :KEPT])
    assert torch.equal(layer.exact_values[1, :, :KEPT], values[1, :, 13 : 13 + KEPT])


def test_an_update_gives_back_history_and_new_tokens(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    keys, values = states(30)
    cache = PQCache(llama.config, codebooks)
    feed(cache, keys, values, (25,))
    found = cache.layers[0].update(keys[:, :, 25:], values[:, :, 25:])
    wanted = expected(codebooks, keys, values, coded_slots(25, RECENT), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-6)


def test_instruments_count_what_is_held_to_the_byte(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    attach(tiny_models.build("llama"), codebooks)
    cache = PQCache(llama.config, codebooks)
    assert cache_bytes(cache) == 0
    keys, values = states(300)
    for index in (0, 1):
        cache.update(keys, values, index)
    exact = 2 * 2 * 2 * (KEPT + RECENT) * 8 * 4  # keys and values, rows, heads, tokens, channels, float32
    coded = 2 * 320 * (4 + 3 + 5 + 4)  # rows, slots (296 rounded up to a multiple of 64), bytes a token of each head
    assert cache_bytes(cache) == 2 * (exact + coded)
    assert {(layer.kind, layer.cache_class) for layer in cache_layers(cache)} == {("quantized", "PQLayer")}


def test_storage_grows_in_steps_and_not_within_its_capacity(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    keys, values = states(1)
    grown = {}
    for capacity in (None, 200):
        cache = PQCache(llama.config, codebooks, capacity=capacity)
        places = set()
        for _ in range(200):
            layer = feed(cache, keys, values, (1,))
            places.add(layer.key_codes.shape[1])
        grown[capacity] = len(places)
        assert layer.key_codes.shape[1] - layer.coded <= 2 * SLOTS
    assert grown == {None: 1 + 200 // SLOTS + 1, 200: 1 + 1}  # nothing at first


def test_a_longer_context_than_preallocated_is_held_as_any_other(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks, capacity=64)
    keys, values = states(200)
    layer = feed(cache, keys, values, (30, *[1] * 170))
    assert layer.key_codes.shape[1] >= layer.coded == 196
    same(layer, expected(codebooks, keys, values, 196, torch.zeros(2, dtype=torch.int64)))


def test_kept_and_recent_tokens_may_have_another_dtype(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks, device="cpu", dtype=torch.bfloat16)
    keys, values = states(20)
    layer = feed(cache, keys, values, (20,))
    assert layer.exact_keys.dtype == layer.exact_values.dtype == torch.bfloat16
    assert cache.layers[0].update(keys, values)[0].dtype == torch.float32


# --- what is done to it ---------------------------------------------------------------------------------------------


def test_cropping_leaves_codes_codes_and_recent_tokens_exact(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    keys, values = states(45)
    none = torch.zeros(2, dtype=torch.int64)
    for remove, length, coded in ((-2, 43, 40), (-5, 40, 40), (-15, 30, 30), (30, 30, 30), (-44, 1, 1), (-99, 0, 0)):
        cache = PQCache(llama.config, codebooks)
        layer = feed(cache, keys, values, (45,))
        cache.crop(remove)
        assert (cache.get_seq_length(), layer.coded) == (length, coded)
        wanted = expected(codebooks, keys, values, 40, none)
        same(layer, tuple(item[:, :, :length] for item in wanted))
        fresh_keys, fresh_values = states(20, seed=1)
        feed(cache, fresh_keys, fresh_values, (3, 1, 1, 15))
        after = coded + (20 + length - coded - RECENT // 2) // (RECENT - RECENT // 2) * (RECENT - RECENT // 2)
        assert (layer.length, layer.coded) == (length + 20, after)
        joined = [torch.cat([a[:, :, :length], b], 2) for a, b in ((keys, fresh_keys), (values, fresh_values))]
        wanted = expected(codebooks, *joined, after, none)
        if coded >= KEPT:  # otherwise the kept tokens are partly those that were codes already
            same(layer, wanted)


def test_cropping_nothing_changes_nothing(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks)
    layer = feed(cache, *states(45), (45,))
    before = dequantized(layer)
    cache.crop(0)
    cache.crop(45)
    cache.crop(1000)
    assert layer.length == 45 and all(torch.equal(a, b) for a, b in zip(before, dequantized(layer), strict=True))


def test_rows_are_reordered_repeated_and_selected(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    keys, values = states(45, batch=3)
    padding = torch.tensor([0, 4, 20])
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([1]), [1]),
    }
    for method, (argument, rows) in changes.items():
        cache = PQCache(llama.config, codebooks)
        cache.see_mask((torch.arange(45) >= padding[:, None]).long())
        layer = feed(cache, keys, values, (45,))
        getattr(cache, method)(argument)
        assert layer.batch_size == len(rows) and cache.layers[1].get_seq_length() == 0
        same(layer, expected(codebooks, keys[rows], values[rows], 40, padding[rows]))
        more = states(4, batch=len(rows), seed=1)
        feed(cache, *more, (4,))
        joined = [torch.cat([item[rows], new], 2) for item, new in zip((keys, values), more, strict=True)]
        same(layer, expected(codebooks, *joined, 44, padding[rows]))


def test_a_reset_cache_takes_another_batch(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks)
    cache.see_mask(torch.tensor([[0] * 5 + [1] * 40, [1] * 45]))
    feed(cache, *states(45), (45,))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0
    keys, values = states(45, batch=3)
    cache.see_mask(None)
    same(
        feed(cache, keys, values, (45,)),
        expected(codebooks, keys, values, 40, torch.zeros(3, dtype=torch.int64)),
    )


def test_transformers_may_ask_it_everything(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks)
    assert cache.batch_size == -1 and not cache.is_initialized and cache.get_max_length() == -1
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.batch_size == 2 and cache.get_seq_length() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0) and cache.is_croppable and not cache.is_compileable
    assert cache.is_sliding == [False, False] and cache.is_linear == [False, False]
    cache.activate_past_recording()
    assert len(cache) == 2


class Later:
    """Work that is done at the last moment: what a stream of a GPU may do, so that a missing wait shows."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.work: Callable[[], None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Later:
        return Later(self.device)

    def run(self, work: Callable[[], None]) -> None:
        self.wait()  # one after the other
        self.work = work

    def wait(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work()


@pytest.mark.parametrize(
    "then", ["nothing", "crop", "crop-into-it", "reorder", "repeat", "copy", "prompt", "grow", "reset"]
)
def test_encoding_beside_generation_gives_the_same(
    llama: PreTrainedModel, codebooks: Codebooks, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are begun when the recent block is three quarters full, and are there when it is full."""
    keys, values = states(90)
    found = {}
    for where in ("now", "later"):
        if where == "later":
            monkeypatch.setattr(layer_module, "aside", Later)
        cache = PQCache(llama.config, codebooks, capacity=64 if then == "grow" else 600)
        feed(cache, keys, values, (30, *[1] * 4))  # 28 are codes, and two more than half a block are not
        layer = cache.compressed[0]
        assert (layer.coded, layer._ahead) == (28, 0 if where == "now" else 4)
        assert where == "now" or layer._aside.work is not None
        if then.startswith("crop"):
            cache.crop(-1 if then == "crop" else -3)
        elif then == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif then == "repeat":
            cache.batch_repeat_interleave(2)
        elif then == "copy":
            cache = copy.deepcopy(cache)
        elif then == "prompt":
            feed(cache, *states(19, seed=1), (19,))
        elif then == "reset":
            cache.reset()
            feed(cache, *states(34, seed=1), (30, *[1] * 4))
        layer = cache.compressed[0]
        rows = layer.batch_size
        feed(cache, *(item.repeat(rows // 2, 1, 1, 1) for item in states(45, seed=2)), (1,) * 45)
        found[where] = dequantized(layer)
        assert layer.length > 64
    for now, later in zip(found["now"], found["later"], strict=True):
        assert torch.equal(now, later)


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "jamba"])
@pytest.mark.parametrize("length", [0, 6, 40])
def test_a_restored_cache_goes_on_as_the_saved_one(name: str, length: int, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    codebooks = random_codebooks(model, parts=3, gains=True, rope=True, recent=RECENT)
    attach(model, codebooks)
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 44), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = PQCache(model.config, codebooks)
    with torch.no_grad():
        if length:
            model(ids[:, :length], attention_mask=mask[:, :length], past_key_values=cache)
        path = cache.save(tmp_path / "saved")
        assert path.name == FILE
        restored = PQCache.restore(tmp_path / "saved", model.config, codebooks)
        assert restored.get_seq_length() == length
        for end in (41, 42, 44):
            given = {"attention_mask": mask[:, :end]}
            begin = cache.get_seq_length()
            wanted = model(ids[:, begin:end], past_key_values=cache, **given).logits
            got = model(ids[:, begin:end], past_key_values=restored, **given).logits
            assert torch.equal(got, wanted)


def test_a_saved_cache_is_refused_where_it_does_not_belong(
    llama: PreTrainedModel, codebooks: Codebooks, tmp_path: Path
) -> None:
    cache = PQCache(llama.config, codebooks)
    for index in (0, 1):
        cache.update(*states(20), index)
    path = cache.save(tmp_path)
    other = random_codebooks(llama, parts=(3, 4), gains=True, rope=True, kept=KEPT, recent=RECENT, seed=1)
    with pytest.raises(PassError, match="made with other codebooks; give those"):
        PQCache.restore(tmp_path, llama.config, other)
    with pytest.raises(PassError, match="made with other codebooks"):
        PQCache.restore(tmp_path, llama.config, replace(codebooks, recent_tokens=16))
    with pytest.raises(PassError, match="has no kv_cache.safetensors"):
        PQCache.restore(tmp_path / "nowhere", llama.config, codebooks)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(PassError, match="damaged"):
        PQCache.restore(tmp_path, llama.config, codebooks)
    path.write_bytes(whole.replace(b"effcli.kv_cache/1", b"effcli.kv_cache/9"))
    with pytest.raises(PassError, match="format 'effcli.kv_cache/9'"):
        PQCache.restore(tmp_path, llama.config, codebooks)


def test_codebooks_come_from_a_folder(llama: PreTrainedModel, codebooks: Codebooks, tmp_path: Path) -> None:
    codebooks.save(tmp_path)
    keys, values = states(45)
    layer = feed(PQCache.from_pretrained(tmp_path, llama.config), keys, values, (45,))
    same(layer, expected(codebooks, keys, values, 40, torch.zeros(2, dtype=torch.int64)))


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_codebooks_of_another_model_are_refused(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    for field, value in (("model_type", "qwen3"), ("layers", 3), ("kv_heads", 4), ("head_dim", 16)):
        with pytest.raises(PassError, match=f"{field} {value}"):
            PQCache(llama.config, with_other(codebooks, **{field: value}))
    gemma = tiny_models.build("gemma3")
    books = random_codebooks(gemma, parts=3)
    sliding = replace(books, layers={0: books.layers[1]})
    with pytest.raises(PassError, match="have layer 0, where this model keeps DynamicSlidingWindowLayer"):
        PQCache(gemma.config, sliding)
    with pytest.raises(PassError, match="layer 9, where this model keeps no cache"):
        PQCache(gemma.config, replace(books, layers={9: books.layers[1]}))
    t5 = tiny_models.build("t5")
    with pytest.raises(PassError, match="decoder-only"):
        PQCache(t5.config, codebooks)
    with pytest.raises(PassError, match="capacity=0"):
        PQCache(llama.config, codebooks, capacity=0)


def test_keys_of_another_shape_are_refused(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks)
    with pytest.raises(PassError, match="layer 0: the codebooks are for 2 heads of 8 channels, and the model's keys"):
        cache.update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), 0)
    with pytest.raises(PassError, match="model's values have 2 of 6"):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 6), 0)
    feed(cache, *states(3), (3,))
    with pytest.raises(PassError, match="holds 2 sequences and is given 1"):
        cache.layers[0].update(*states(1, batch=1))


def test_a_model_with_more_or_fewer_layers_is_refused(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks)
    with pytest.raises(PassError, match="has a layer 2, and this cache was made for a model with 2 layers"):
        cache.update(*states(3), 2)
    cache.update(*states(3), 0)
    with pytest.raises(PassError, match="layer 1 of the cache holds 0 tokens and layer 0 3"):
        cache.update(*states(1), 0)


def test_a_cache_of_another_model_is_refused_by_an_attached_one(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    model = tiny_models.build("llama")
    attach(model, codebooks)
    with pytest.raises(PassError, match="made for another model; make it with"):
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=PQCache(llama.config, codebooks))
    bigger = LlamaConfig(**(llama.config.to_dict() | {"num_hidden_layers": 3}))
    with pytest.raises(PassError, match="layers 2"):
        PQCache(bigger, codebooks)


def test_padding_cannot_come_back(llama: PreTrainedModel, codebooks: Codebooks) -> None:
    cache = PQCache(llama.config, codebooks)
    cache.see_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    feed(cache, *states(4), (4,))
    with pytest.raises(PassError, match="hidden as padding when the cache was filled"):
        cache.see_mask(torch.ones(2, 5))
    with pytest.raises(PassError, match="holds 2 sequences and the attention mask 3"):
        cache.see_mask(torch.ones(3, 5))


def test_a_saved_file_says_what_it_is(llama: PreTrainedModel, codebooks: Codebooks, tmp_path: Path) -> None:
    from safetensors import safe_open

    cache = PQCache(llama.config, codebooks)
    for index in (0, 1):
        cache.update(*states(45), index)
    with safe_open(cache.save(tmp_path), framework="pt") as opened:
        said = json.loads(opened.metadata()["effcli"])
        assert opened.get_slice("layers.0.key_codes").get_shape() == [2, 40, 4 + 3]
        assert opened.get_slice("layers.1.exact_values").get_shape() == [2, 2, KEPT + 5, 8]
    assert [layer["coded"] for layer in said["layers"]] == [40, 40]


def test_rows_without_padding_need_no_mask() -> None:
    rows = Rows.of(torch.tensor([0, 3]), KEPT)
    assert (rows.most, rows.start.tolist(), rows.plain) == (3, [3, 6], True)


def test_other_layers_are_transformers_own() -> None:
    model = tiny_models.build("gemma3")
    cache = PQCache(model.config, random_codebooks(model, parts=3))
    own = [type(layer).__name__ for layer in DynamicCache(config=model.config).layers]
    assert [type(layer).__name__ for layer in cache.layers] == [own[0], "PQLayer", own[2], "PQLayer"]
    assert [layer.index for layer in cache.compressed] == [1, 3]
