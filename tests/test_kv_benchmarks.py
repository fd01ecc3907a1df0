"""The KV-cache benchmarks run on a tiny model, and judge what they find."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks import bench_kv_decode, bench_kv_quality
from tests.benchmarks.bench_kv_quality import Row
from tests.benchmarks.kv_baselines.architectures import ARCHITECTURES, mha, sliding
from tests.benchmarks.kv_baselines.kv_pq import through_cache
from tests.passes.kv_pq.small import random_codebooks
from tests.tiny_models import build


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that the tiny model's character tokenizer knows, different from place to place."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (3_000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(map(chr, letters)), encoding="utf-8")
    return path


@pytest.fixture
def short_default_text(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for half a million characters that a character tokenizer is slow on."""
    monkeypatch.setattr("profilers.text.default_text", lambda: text.read_text(encoding="utf-8"))


def printed(captured: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in captured.splitlines()]


def test_the_quality_table_has_the_original_and_every_method_asked_for(
    tiny_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", tiny_folder, "--text", text, "--calibration", text, "--windows", 3, "--context", 64]
    arguments += ["--samples", 4, "--length", 64, "--only", "FP8", "KIVI", "TurboQuant", "quanto"]
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    assert bench_kv_quality.main() == 0  # nothing of kv-pq is judged
    rows = {(row["method"], row["bits"]): row for row in printed(capsys.readouterr().out)}
    original = rows["original, float32", None]
    assert original["ratio"] == 1.0 and original["kl"] == 0.0
    assert sum("KIVI" in method for method, _ in rows) == 6
    assert sum("TurboQuant" in method for method, _ in rows) == 3
    fp8, two_bits = rows["FP8 e4m3, scale by tensor", 8.0], rows["TurboQuant-style", 2]
    assert 0 < fp8["kl"] < two_bits["kl"]
    assert two_bits["effective_bits"] == 4  # head_dim 8: a norm of 16 bits is 2 a value
    for row in rows.values():
        assert row["text"] == "letters.txt, last 25%" and row["windows"] == [3, 64] and row["kept_tokens"] == 4
        if row["reason"] is None:
            low, high = row["ratio_interval"]
            assert low <= row["ratio"] <= high
            assert math.isclose(row["perplexity"], row["ratio"] * original["perplexity"], rel_tol=1e-9)
        else:
            assert row["perplexity"] is None and row["reason"].startswith("not installed: ")


def test_codebooks_are_measured_alike_with_and_without_the_real_cache(
    tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    random_codebooks(model, parts=2, gains=True, rope=True, kept=4, recent=1, spread=0.2).save(tmp_path)
    arguments = ["--model", tiny_folder, "--text", text, "--calibration", text, "--windows", 2, "--context", 64]
    arguments += ["--samples", 4, "--length", 64, "--only", "kv-pq", "--bits", "--codebooks", tmp_path]
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    assert bench_kv_quality.main() > 0
    found = printed(capsys.readouterr().out)
    all_coded, real = (row for row in found if str(row.get("method", "")).startswith("kv-pq"))
    assert all_coded["effective_bits"] == real["effective_bits"] == 8 * (3 + 2) / 16
    assert 0 < real["kl"] < 1.5 * all_coded["kl"]
    *_, rivals = found
    assert rivals["rivals"] == 0 and not rivals["reached"]  # beating nobody is not a win


def test_a_window_goes_through_a_real_cache_chunk_by_chunk(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(4))
    codebooks = random_codebooks(model, parts=8, rope=True, kept=2, recent=4, spread=0.2)
    lengths = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with through_cache(model, codebooks):
            found = model(ids, use_cache=False).logits
        again = model(ids, use_cache=False).logits
    assert lengths == [50, 16, 16, 16, 2, 50]
    assert torch.equal(plain, again)
    assert 0 < (found - plain).abs().max() < 0.05 * plain.abs().max()  # grids of 256 levels a channel
    assert (found - plain)[:, :16].abs().max() < 1e-5  # the first chunk saw nothing but itself


def test_a_head_for_every_query_head_is_the_same_function() -> None:
    model = build("llama", dtype=torch.float64)
    made = mha(model)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain, found = model(ids), made(ids)
    assert torch.allclose(plain.logits, found.logits, rtol=0, atol=1e-12 * plain.logits.abs().max().item())
    for before, after in zip(plain.past_key_values.layers, found.past_key_values.layers, strict=True):
        assert before.keys.shape[1] == 2 and after.keys.shape[1] == 4
        assert torch.allclose(before.keys.repeat_interleave(2, 1), after.keys, rtol=0, atol=1e-12)
        assert torch.allclose(before.values.repeat_interleave(2, 1), after.values, rtol=0, atol=1e-12)
    assert model.config.num_key_value_heads == 2


def test_sliding_windows_are_the_same_function_up_to_their_length() -> None:
    model = build("llama", dtype=torch.float64)
    made = sliding(model, window=16)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        plain, found = model(ids).logits, made(ids).logits
    error = (plain - found).abs().amax((0, 2)) / plain.abs().max()
    assert error[:16].max() < 1e-12  # token 15 is the last that sees token 0 in every layer
    assert error[16:].min() > 1e-9
    assert made.config.layer_types == ["sliding_attention", "full_attention"]


def test_only_llama_without_biases_takes_another_architecture() -> None:
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is not LlamaForCausalLM: leave --architecture out"):
        mha(build("qwen3"))
    model = build("llama")
    model.config.attention_bias = True
    with pytest.raises(ValueError, match="biases"):
        sliding(model)


@pytest.mark.parametrize(("architecture", "layers"), [("mha", 2), ("sliding", 1)])
def test_codebooks_are_trained_and_measured_in_every_architecture(
    architecture: str,
    layers: int,
    tiny_folder: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "sliding", functools.partial(sliding, window=16))
    arguments = ["--model", tiny_folder, "--text", text, "--calibration", text, "--windows", 2, "--context", 64]
    arguments += ["--samples", 24, "--length", 64, "--only", "kv-pq", "--bits", 4]
    arguments += ["--architecture", architecture]
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    bench_kv_quality.main()
    rows = [row for row in printed(capsys.readouterr().out) if row["benchmark"] == "kv_quality"]
    assert {(row["architecture"], row["layers_quantized"]) for row in rows} == {(architecture, layers)}
    all_coded, real = (row for row in rows if str(row["method"]).startswith("kv-pq"))
    assert all_coded["effective_bits"] == real["effective_bits"] and 0 < all_coded["kl"] < 0.1
    assert 0 <= real["kl"] < 1.5 * all_coded["kl"] + 1e-6


def test_the_table_is_drawn_with_rows_that_have_no_measurement() -> None:
    rows = [
        Row(
            "original, float32", None, perplexity=20.0, ratio=1.0, ratio_interval=(1.0, 1.0), kl=0.0, top1_agreement=1.0
        ),
        Row("a", 4, 4.5, 10, perplexity=21.0, ratio=1.05, kl=0.1, top1_agreement=0.9),
        Row("b", 4, reason="not installed: pip install b"),
    ]
    assert bench_kv_quality.table(rows, "title").row_count == 3


def test_verdicts_hold_kv_pq_against_limits_and_rivals() -> None:
    rows = [
        Row("kv-pq", 4.0, 4.25, ratio=1.025),
        Row("kv-pq", 4.25, 4.5, ratio=1.021),
        Row("kv-pq", 3.0, 3.25, ratio=1.10),
        Row("cheaper", 4, 4.0, ratio=1.001),  # fewer bits than ours: not a rival
        Row("same", 4, 4.5, ratio=1.022),
        Row("better", 3, 3.5, ratio=1.09),
        Row("absent", 4, reason="not installed"),
    ]
    limits, rivals = [], []
    for line in bench_kv_quality.verdicts(rows):
        (limits if line["benchmark"] == "kv_quality_limit" else rivals).append(line)
    assert [(line["effective_bits"], line["reached"]) for line in limits] == [(4.25, True), (4.5, False)]
    found = [(line["bits"], line["rivals"], line["not_below"], line["reached"]) for line in rivals]
    assert found == [
        (4.0, 1, ["same, 4.5 bits"], False),
        (4.25, 1, [], True),
        (3.0, 1, ["better, 3.5 bits"], False),
    ]


def test_decoding_takes_turns_and_counts_bytes(
    tiny_folder: Path,
    tmp_path: Path,
    short_default_text: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    codebooks = random_codebooks(model, parts=4, gains=True, rope=True, kept=4, recent=32)
    codebooks.save(tmp_path)
    arguments = ["--model", tiny_folder, "--codebooks", tmp_path, "--contexts", 200, 5000, "--bytes-context", 1024]
    arguments += ["--rounds", 2, "--steps", 2, "--prefills", 1, "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    bench_kv_decode.main()
    held, decode = printed(capsys.readouterr().out)  # 5,000 is past the model's limit
    assert held["held_bytes"]["dynamic"] == 2 * 2 * 2 * 8 * 1024 * 2
    codes = 2 * 2 * 2 * 5 * (1024 - 16)
    assert codes <= held["held_bytes"]["kv-pq"] <= 1.2 * codes + 2 * 2 * 2 * 8 * 36 * 2
    assert decode["context"] == 200 and decode["held_bytes"]["dynamic"] == 2 * 2 * 2 * 8 * 4 * 200
    assert set(decode["milliseconds"]) >= {"dynamic", "static", "kv-pq"}
    assert min(decode["milliseconds"].values()) > 0
    assert 0 < decode["encoding_seconds"][0] < decode["prefill_seconds"]["kv-pq"][0]


def test_agreement_finds_the_first_token_that_differs(
    tiny_folder: Path,
    tmp_path: Path,
    short_default_text: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    arguments = ["--model", tiny_folder, "--codebooks", tmp_path, "--agreement"]
    arguments += ["--prompts", 3, "--prompt-tokens", 40, "--tokens", 12]
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
    random_codebooks(model, parts=8, rope=True, kept=4, recent=8, spread=0.2).save(tmp_path)
    assert bench_kv_decode.main() == 0
    (fine,) = printed(capsys.readouterr().out)
    assert fine["effective_bits"] == 8 and (fine["prompts"], fine["prompt_tokens"]) == (3, [40])
    assert fine["new_tokens"] == [12] * 3
    assert fine["first_difference"] == [None] * 3 and fine["share_of_prompts_that_match"] == 1.0
    random_codebooks(model, parts=1, kept=0, recent=8, spread=50.0).save(tmp_path)
    assert bench_kv_decode.main() == 1
    (coarse,) = printed(capsys.readouterr().out)
    assert all(isinstance(place, int) and 0 < place < 12 for place in coarse["first_difference"] if place is not None)
    assert coarse["share_of_prompts_that_match"] < 0.9
    asked = tmp_path / "questions.jsonl"
    asked.write_text('{"question": "One and one?"}\n{"question": "And then two more?"}\n{"question": "never read"}\n')
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    monkeypatch.setattr(bench_kv_decode.AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments), "--prompts", "2", "--questions", str(asked)])
    random_codebooks(model, parts=8, rope=True, kept=4, recent=8, spread=0.2).save(tmp_path)
    assert bench_kv_decode.main() == 0
    (answered,) = printed(capsys.readouterr().out)
    lengths = sorted({len(tokenizer("One and one?").input_ids), len(tokenizer("And then two more?").input_ids)})
    assert (answered["prompts"], answered["prompt_tokens"]) == (2, lengths)
    assert all(1 <= count <= 12 for count in answered["new_tokens"])
