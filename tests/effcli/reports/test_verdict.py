from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from effcli.reports.verdict import verdict

from . import samples


def with_decode(**changes: Any) -> dict[str, Any]:
    """A report whose only intensity point is decode at batch 1, context 512, changed as given."""
    point = replace(samples.intensity_point("decode", 512), **changes)
    report = samples.full()
    return replace(report, profiles={"intensity": replace(samples.intensity(), points=(point,))}).to_dict()


def test_memory_bound_is_said_first_with_its_figures() -> None:
    report = with_decode(time_seconds=0.0375, bytes=202_500_000, mbu=202.5e6 / 0.0375 / 19.2e9)
    assert verdict(report)[0] == (
        "Decode is memory-bound: 28 % of this device's bandwidth reached (5.4 of 19.2 GB/s), "
        "26.7 tokens/s at batch 1, context 512."
    )


def test_tokens_per_second_comes_from_the_latency_section_where_it_has_the_point() -> None:
    report = samples.full().to_dict()
    report["profiles"]["latency"]["points"][0]["tokens_per_second"] = 33.25
    assert "33.2 tokens/s" in verdict(report)[0] or "33.3 tokens/s" in verdict(report)[0]
    report["profiles"]["latency"]["points"][0]["context"] = 513
    assert "33." not in verdict(report)[0]


def test_a_shaky_timing_says_so_beside_the_figure() -> None:
    report = samples.full().to_dict()
    report["profiles"]["latency"]["points"][0]["warnings"] = ["one sample", "spread of 78%"]
    assert verdict(report)[2] == "Shaky timing at batch 1, context 512: one sample; spread of 78%."
    report["profiles"]["latency"]["points"][0]["context"] = 513
    assert not any("Shaky" in sentence for sentence in verdict(report))


def test_batches_count_in_the_rate() -> None:
    assert "80 tokens/s at batch 8" in verdict(with_decode(batch=8, time_seconds=0.1))[0]


def test_overhead_bound_says_what_the_roofline_explains() -> None:
    sentences = verdict(with_decode(bound="overhead", time_seconds=0.1, attainable_seconds=0.012))
    assert sentences[0].startswith(
        "Decode is overhead-bound: the roofline explains only 12 % of the measured time; the rest goes to "
    )
    assert any("larger batch" in sentence for sentence in sentences[1:])
    assert not any("weights in fewer bits" in sentence for sentence in sentences)


def test_compute_bound_prefill_names_the_dtype_and_the_share() -> None:
    sentences = verdict(samples.full().to_dict())
    assert sentences[0].startswith("Decode is memory-bound")
    assert sentences[1].startswith("Prefill is compute-bound: 41 % of peak bfloat16 (0.492 of 1.2 TFLOP/s)")


def test_config_only_never_claims_a_measured_speed() -> None:
    sentences = verdict(samples.config_only().to_dict())
    assert sentences[0].startswith("Decode would be memory-bound: it takes at least 14.6 ms")
    assert "counted, not timed" in sentences[0]
    text = " ".join(sentences)
    assert "tokens/s" not in text and "reached" not in text and "Sinks" not in text


def test_without_peaks_the_work_is_still_said() -> None:
    first = verdict(samples.bare().to_dict())[0]
    assert first.startswith("Decode moves 281 MB and 304 MFLOP at batch 1, context 512 (counted, not timed")
    assert "bound" not in first and "at least" not in first


def test_other_points_with_another_bound_are_named() -> None:
    points = (
        samples.intensity_point("decode", 512),
        replace(samples.intensity_point("decode", 512, batch=64), bound="compute"),
    )
    report = replace(samples.full(), profiles={"intensity": replace(samples.intensity(), points=points)})
    assert "Decode is compute-bound at batch 64, context 512." in verdict(report.to_dict())


@pytest.mark.parametrize(("copied", "said"), [(47_000_000, True), (1_000_000, False), (0, False)])
def test_cache_copies_are_said_when_they_matter(copied: int, said: bool) -> None:
    sentences = verdict(with_decode(cache_copy_bytes=copied))
    assert any("re-copies 47.0 MB of history a step: 17 %" in sentence for sentence in sentences) is said
    assert any("re-copies" in sentence for sentence in sentences) is said


def test_intensity_stands_beside_the_papers_claim() -> None:
    claim = "the often-quoted 2 operations a byte holds at 8-bit weights; 1 at 16-bit, 4 at 4-bit"
    expected = f"Decode does 0.99 FLOP/byte ({claim})."
    assert expected in verdict(with_decode(flops_per_byte=0.990))
    assert expected not in verdict(with_decode(flops_per_byte=7.9, batch=8))


def test_kv_crossover_and_what_does_not_fit() -> None:
    sentences = verdict(samples.full().to_dict())
    assert "The KV cache passes the weights in size at 11,700 tokens, past the model's limit of 8,192." in sentences
    kv = replace(samples.kv(), model_context_limit=131_072, max_context={"16": 20_000, "8": 200_000, "4": None})
    sentences = verdict(replace(samples.full(), profiles={"kv": kv}).to_dict())
    assert sentences[0] == "The KV cache passes the weights in size at 11,700 tokens."
    assert sentences[1] == "With the cache in 16 bits, 20,000 of the model's 131,072 tokens of context fit this device."
    assert len(sentences) == 2


def test_a_model_larger_than_memory_comes_first() -> None:
    kv = replace(samples.kv(), weight_bytes=810_000_000_000, memory_bytes=24_000_000_000)
    report = replace(samples.full(), profiles={**samples.full().profiles, "kv": kv}).to_dict()
    assert verdict(report)[0] == "The model does not fit: 810 GB of weights against 24.0 GB of memory on this device."


def test_a_wrong_prediction_is_not_hidden() -> None:
    point = replace(samples.kv().points[0], difference_bytes=512)
    report = replace(samples.full(), profiles={"kv": replace(samples.kv(), points=(point,))}).to_dict()
    assert "The cache does not hold what was predicted: +512 bytes at batch 1, context 512." in verdict(report)


def test_sinks_with_and_without_bos() -> None:
    expected = "Sinks: 62 % of heads put more than 0.3 of their attention on the first token (71 % with BOS)."
    assert expected in verdict(samples.full().to_dict())
    only_bos = replace(samples.sinks(), points=samples.sinks().points[1:])
    sentences = verdict(replace(samples.full(), profiles={"sinks": only_bos}).to_dict())
    assert sentences == ["Sinks: 71 % of heads put more than 0.3 of their attention on the first token with BOS."]


def test_energy_only_when_measured() -> None:
    assert not any(" J" in sentence for sentence in verdict(samples.full().to_dict()))
    energy = replace(samples.no_energy(), joules_per_token=1.25, reason=None)
    assert verdict(replace(samples.full(), profiles={"energy": energy}).to_dict()) == ["A decoded token costs 1.25 J."]


@pytest.mark.parametrize("profiles", [{}, {"mine": {"score": 1}}])
def test_there_is_always_a_sentence(profiles: dict[str, Any]) -> None:
    sentences = verdict(replace(samples.full(), profiles=profiles).to_dict())
    assert len(sentences) == 1
    assert all(name in sentences[0] for name in profiles)


def test_times_alone_are_said_and_on_what_they_were_measured() -> None:
    latency = samples.latency()
    report = replace(samples.full(), profiles={"latency": latency})
    timed = latency.points[0]
    assert verdict(report.to_dict())[0].startswith("Timed: ")
    exported = replace(report, model=replace(report.model, kind="onnx"))
    first = replace(timed, tokens_per_second=12.5, ttft_seconds=samples.distribution(0.25))
    sentence = verdict(replace(exported, profiles={"latency": replace(latency, points=(first,))}).to_dict())[0]
    assert sentence == "Timed on ONNX Runtime: 12.5 tokens/s, 250 ms to the first token at batch 1, context 512."
    once = replace(first, tpot_seconds=None, tokens_per_second=None)
    sentence = verdict(replace(exported, profiles={"latency": replace(latency, points=(once,))}).to_dict())[0]
    assert sentence == "Timed on ONNX Runtime: 250 ms a forward pass at batch 1, context 512."
