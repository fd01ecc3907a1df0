"""The first lines of optimize, plan and evaluation reports: what they claim, and what they must not."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from effcli.reports.model import EVAL_SCHEMA
from effcli.reports.verdict import verdict
from passes.base import Figures, KernelUse

from . import optimize_samples, samples
from .optimize_samples import AFTER, BEFORE


def lines(report: Any) -> tuple[str, str, str]:
    gained, cost, following = verdict(report.to_dict())
    assert gained.startswith("Gained: ") and cost.startswith("Cost: ") and following.startswith("Next: ")
    return gained, cost, following


def test_what_was_gained_and_what_it_cost() -> None:
    gained, cost, following = lines(optimize_samples.optimized())
    assert gained == (
        "Gained: decode 2.14× as fast (26.7 → 57.1 tokens/s at batch 1, context 512), weights 269 MB → 98.4 MB "
        "(−63 %, 5.85 bits a parameter), peak memory 700 MB → 510 MB; no gain outside noise in first token "
        "(800 ms → 790 ms)."
    )
    assert cost == (
        "Cost: perplexity 15.24 → 17.05 (+12 %, 95 % interval +9.1 % to +15 %), KL 0.110 nats a token, p99 1.31, same "
        "top token at 85 % of positions."
    )
    assert "weigh the loss before serving" in following
    assert 'effcli.load("out") runs it with aten._weight_int4pack_mm_for_cpu' in following
    assert "aten.linear" not in following  # a fallback is not what makes it fast


def test_one_sentence_says_what_the_export_brings() -> None:
    plain, with_export = (
        verdict(build().to_dict()) for build in (optimize_samples.optimized, optimize_samples.exported)
    )
    assert [line for line in with_export if line not in plain] == [
        "ONNX Runtime (CPU): decode 2× as fast as torch (57.1 → 114 tokens/s), first token slower than torch (790 ms → "
        "1.19 s), perplexity 17.07 (torch 17.05), KL 0.110 nats a token, logits within 0.000120 of torch's; 103 MB in "
        "out/onnx."
    ]
    assert plain == [line for line in with_export if not line.startswith("ONNX")]


def test_slower_is_said_in_words() -> None:
    gained, cost, following = lines(optimize_samples.slower())
    assert "as fast" not in gained and "−63 %" in gained
    assert cost.startswith("Cost: slower than before: decode 26.7 → 12.3 tokens/s; perplexity")
    assert "for speed keep the original" in following


def test_a_change_inside_the_noise_is_no_gain() -> None:
    gained, cost, _ = lines(optimize_samples.no_gain())
    assert gained == (
        "Gained: nothing; no gain outside noise in decode (26.7 → 27.2 tokens/s), first token (800 ms → 790 ms); "
        "weights 269 MB → 269 MB, no smaller."
    )
    assert cost.startswith("Cost: no loss outside noise: perplexity 15.24 → 15.26")
    assert "faster" not in gained and "as fast" not in gained


def test_the_same_change_is_a_gain_when_the_timing_is_quiet() -> None:
    after = replace(AFTER, tpot_seconds=BEFORE.tpot_seconds / 1.1)  # type: ignore[operator]
    for relative, claimed in ((0.02, True), (0.3, False)):
        report = replace(
            optimize_samples.optimized(),
            before=optimize_samples.profiled(BEFORE, relative=relative).to_dict(),
            after=optimize_samples.profiled(after, relative=relative).to_dict(),
        )
        gained = lines(report)[0]
        assert ("decode 1.1× as fast" in gained) is claimed
        assert ("no gain outside noise in decode" in gained) is not claimed


def test_one_sample_is_no_gain() -> None:
    report = replace(
        optimize_samples.optimized(),
        after=optimize_samples.profiled(AFTER, count=1).to_dict(),
    )
    assert "decode: noise not known, so no gain is claimed (26.7 → 57.1 tokens/s)" in lines(report)[0]


def test_a_failed_gate_says_that_nothing_was_published() -> None:
    _, _, following = lines(optimize_samples.failed())
    assert following.startswith(
        "Next: nothing was published, a gate failed (ppl<=+3%: perplexity rose by 11.9 %, at most 3 % allowed)"
    )
    assert "effcli.load" not in following


def test_a_quantized_source_is_said() -> None:
    _, cost, _ = lines(optimize_samples.from_gguf())
    assert "The source was already quantized at 5.85 bits a parameter (GGUF types Q4_1, Q6_K)." in cost
    assert "already quantized" not in lines(optimize_samples.optimized())[1]


def test_a_ruined_model_is_not_to_be_served() -> None:
    report = replace(optimize_samples.optimized(), quality=optimize_samples.quality(60.0, (3.5, 4.4)))
    assert lines(report)[2].startswith("Next: do not serve this, it lost too much")


def test_a_model_that_strays_is_not_called_without_loss_where_it_predicts_better() -> None:
    better = optimize_samples.quality(14.0, (0.89, 0.95))  # KL 0.110
    _, cost, following = lines(replace(optimize_samples.optimized(), quality=better))
    assert "better on this text, but another model: perplexity 15.24 → 14.00 (−8.1 %" in cost
    assert "no loss" not in cost
    assert "measure it on other text before serving: effcli eval out --against ORIGINAL --eval-text FILE" in following
    assert 'effcli.load("out")' in following
    assert better.kl is not None
    near = replace(better, kl=replace(better.kl, mean=0.01))
    _, cost, following = lines(replace(optimize_samples.optimized(), quality=near))
    assert "no loss: perplexity" in cost
    assert "other text" not in following


def test_what_was_not_measured_is_not_claimed() -> None:
    gained, cost, following = lines(optimize_samples.partial())
    assert "decode was not timed on both sides" in gained and "as fast" not in gained
    assert cost == "Cost: quality was not measured (the model has no tokenizer)."
    assert "vLLM" not in following  # no pass is recorded


def test_without_a_fast_kernel_the_reason_is_said() -> None:
    kernels = (
        KernelUse("q_proj", "aten.linear", 30, "the kernel is slow in float32"),
        KernelUse("lm_head", "aten.linear", 1, "it is not quantized in the file"),
    )
    following = lines(replace(optimize_samples.optimized(), kernels=kernels))[2]
    assert (
        'effcli.load("out") runs it, on this device without a fast kernel (the kernel is slow in float32);' in following
    )


def test_the_folder_is_called_as_the_user_called_it() -> None:
    report = replace(optimize_samples.optimized(), output="results/small")
    assert 'effcli.load("results/small")' in lines(report)[2]


def test_the_plan_names_the_best_choice_and_why() -> None:
    first, *others = verdict(optimize_samples.plan().to_dict())
    assert first.startswith(
        "Try quantize:scheme=w4a16 first: decode 2.14× as fast (37.5 ms → 17.5 ms a token), weights 269 MB → 98.4 MB"
    )
    assert "Quality is not predicted" in first
    assert others == [
        "Slower on this device than the model as it is: quantize:scheme=fp8.",
        "The pass itself does not fit this device: quantize:scheme=nvfp4.",
        "Does not apply to this model, for reasons below the table: quantize:scheme=mxfp4.",
    ]


def test_a_plan_never_recommends_what_does_not_fit_or_is_slower() -> None:
    # nvfp4 has the fastest predicted decode of all, and does not fit; fp8 would be slower.
    first = verdict(optimize_samples.plan().to_dict())[0]
    assert "nvfp4" not in first and "fp8" not in first
    first = verdict(optimize_samples.all_slower().to_dict())[0]
    assert first.startswith("No pass is predicted to make decode faster on this device: keep the model as it is")


def test_a_chain_is_judged_at_its_end() -> None:
    assert verdict(optimize_samples.chain().to_dict())[0].startswith("The recipe would make decode 2.14× as fast")
    slow = replace(optimize_samples.all_slower(), alternatives=False)
    assert verdict(slow.to_dict())[0].startswith("Slower on this device: the recipe would take decode from 37.5 ms")
    missing = replace(optimize_samples.plan(), alternatives=False)
    assert verdict(missing.to_dict())[0] == "This recipe cannot run as it is."


def test_a_plan_without_figures_promises_nothing() -> None:
    sentences = verdict(optimize_samples.bare_plan().to_dict())
    assert "size not predicted" in sentences[0] and "decode time is not predicted" in sentences[0]
    assert verdict({"schema": "effcli.plan/1"}) == ["The plan holds no pass."]
    unchanged = optimize_samples.planned("quantize:scheme=w8a16", BEFORE, 16.0)
    report = replace(optimize_samples.plan(), passes=(unchanged,))
    assert verdict(report.to_dict())[0].startswith("No pass is predicted to gain speed or size")
    smaller = optimize_samples.planned("quantize:scheme=w8a16", replace(BEFORE, weight_bytes=150_000_000), 8.9)
    report = replace(optimize_samples.plan(), passes=(unchanged, smaller))
    assert "saves most at no cost in time (weights 269 MB → 150 MB" in verdict(report.to_dict())[0]


@pytest.mark.parametrize("alternatives", [True, False])
def test_a_prediction_without_times_still_gives_sizes(alternatives: bool) -> None:
    one = optimize_samples.planned("quantize", Figures(weight_bytes=98_400_000), 5.85)
    report = replace(optimize_samples.plan(), passes=(one,), alternatives=alternatives)
    first = verdict(report.to_dict())[0]
    assert "269 MB → 98.4 MB" in first and "decode time is not predicted" in first


def evaluation(**changes: Any) -> dict[str, Any]:
    return {
        "schema": EVAL_SCHEMA,
        "model": asdict(samples.model_info()),
        "quality": {**asdict(optimize_samples.quality()), **changes},
    }


def test_an_evaluation_says_perplexity_with_its_interval() -> None:
    sentences = verdict(evaluation())
    assert sentences[0] == "Perplexity 17.05 (95 % interval 16.0 to 18.1)."
    assert sentences[1] == "The reference has 15.24: a change of +12 % (95 % interval +9.1 % to +15 %)."
    assert sentences[2].startswith("KL divergence from the reference: 0.110 nats a token, p99 1.31")
    alone = {"after": 17.05, "interval": [16.0, 18.1], "before": None}
    sentences = verdict(evaluation(perplexity=alone, kl=None, top1_agreement=None, tasks=[]))
    assert len(sentences) == 2 and "reference" not in sentences[0]
    assert verdict({"schema": EVAL_SCHEMA}) == ["Quality was not measured."]


def smaller_cache(**after: Any) -> Any:
    """A run that stored keys and values in few bits and left the weights alone."""
    base = optimize_samples.no_gain()
    record = replace(base.passes[0], name="kv-pq")
    profiled = dict(base.after)
    profiled["profiles"] = {
        **profiled["profiles"],
        "kv": {**profiled["profiles"]["kv"], "bytes_per_token": 6120.0, **after},
    }
    return replace(
        base, after=profiled, figures_after=replace(base.figures_after, kv_bytes_per_token=6120.0), passes=(record,)
    )


def test_a_smaller_cache_is_a_gain_and_read_by_us_alone() -> None:
    gained, _, following = lines(smaller_cache())
    assert "KV cache 23.0 kB → 6.12 kB a token (−73 %)" in gained
    assert "nothing" not in gained
    assert "plain transformers, with a cache of its own, reads the same folder" in following


def test_more_bits_are_advised_of_the_pass_that_ran() -> None:
    report = replace(smaller_cache(), quality=optimize_samples.quality(17.05, (1.09, 1.15)))
    following = lines(report)[2]
    assert "try a gentler recipe (kv-pq:bits=8)" in following
    assert "scheme" not in following


def test_what_a_pass_changes_is_asked_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class CachePass:
        changes = frozenset({"kv-cache"})
        gentler: str | None = "rank=64"

    report = replace(smaller_cache(), quality=optimize_samples.quality(17.05, (1.09, 1.15)))
    report = replace(report, passes=(replace(report.passes[0], name="low-rank-cache"),))
    following = lines(report)[2]  # no pass of this name is installed here
    assert "try a gentler recipe (scheme=w8a16" in following and "of its own" not in following
    monkeypatch.setattr("passes.registry.load", lambda name: CachePass)
    following = lines(report)[2]
    assert "try a gentler recipe (low-rank-cache:rank=64)" in following
    assert "plain transformers, with a cache of its own, reads the same folder" in following
    CachePass.gentler = None
    assert "try a gentler recipe (scheme=w8a16" in lines(report)[2]


def test_a_plan_says_what_becomes_of_the_cache_and_not_of_weights_that_stay() -> None:
    planned = optimize_samples.planned
    figures = replace(BEFORE, kv_bytes_per_token=6120.0, tpot_seconds=BEFORE.tpot_seconds / 2)  # type: ignore[operator]
    alone = replace(optimize_samples.plan(), alternatives=False, passes=(planned("kv-pq", figures, 16.0),))
    (first, *_) = verdict(alone.to_dict())
    assert "decode 2× as fast" in first
    assert first.endswith("KV cache 23.0 kB → 6.12 kB a token.")
    assert "weights" not in first
    both = replace(alone, passes=(planned("kv-pq", replace(figures, weight_bytes=98_400_000), 5.85),))
    assert "weights 269 MB → 98.4 MB at 5.85 bits a parameter, KV cache 23.0 kB" in verdict(both.to_dict())[0]
