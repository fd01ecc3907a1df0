import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from profilers import quality
from profilers.base import NotApplicableError, ProfilerError
from profilers.quality import compare_logits, measure_quality, record_reference
from profilers.reference import LOGITS_AT_ONCE
from tests.tiny_models import VOCABULARY, build

TEXT = "test"


def windows(count=4, length=65, vocabulary=VOCABULARY):
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def disturbed(name="llama", size=0.5, **options):
    """Return the tiny model with noise on its weights, so that it says something else than the original."""
    model = build(name, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (size * parameter.double().std() * noise).to(parameter.dtype)
    return model


def sharpened(name="llama", factor=20.0, **options):
    """Return the tiny model with its logits scaled up: random weights alone say next to nothing."""
    model = disturbed(name, 0.0, **options)
    with torch.no_grad():
        model.lm_head.weight *= factor
    return model


def constant(logits, dtype=torch.float32):
    """Return a model that gives the same logits at every position: one layer, hidden state 1, a head of those logits.

    The final norm's weight is 0 except for dimension 0 of constant states, so the head's first column is the answer.
    """
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(logits),
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            rms_norm_eps=0.0,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        dtype=dtype,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[:, 0] = torch.as_tensor(logits)
    return model


def brute_force(model, ids):
    """Return log-probabilities of every position, float64, from the model's own full logits."""
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)[:, :-1]


def by_hand(original, changed, ids):
    theirs, own = brute_force(original, ids), brute_force(changed, ids)
    targets = ids[:, 1:, None]
    return {
        "before": math.exp(-theirs.gather(-1, targets).mean()),
        "after": math.exp(-own.gather(-1, targets).mean()),
        "kl": (theirs.exp() * (theirs - own)).sum(-1),
        "agreement": (theirs.argmax(-1) == own.argmax(-1)).double().mean().item(),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mamba", "qwen3_next", "gemma3"])
def test_figures_are_those_of_full_float64_log_probabilities(name):
    original, changed, ids = build(name), disturbed(name), windows()
    expected = by_hand(original, changed, ids)
    result = measure_quality(changed, ids, record_reference(original, ids), text_name=TEXT)
    assert result.perplexity.before == pytest.approx(expected["before"], rel=1e-6)
    assert result.perplexity.after == pytest.approx(expected["after"], rel=1e-6)
    assert result.perplexity.ratio == pytest.approx(expected["after"] / expected["before"], rel=1e-6)
    assert result.kl.mean == pytest.approx(expected["kl"].mean().item(), rel=1e-4)
    assert result.kl.p99 == pytest.approx(expected["kl"].quantile(0.99).item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx(expected["agreement"])
    assert (result.tokens, result.context, result.text, result.confidence) == (4 * 64, 65, TEXT, 0.95)


def test_float64_models_are_measured_in_float64():
    original, changed, ids = sharpened(dtype=torch.float64), disturbed(dtype=torch.float64), windows()
    expected = by_hand(original, changed, ids)
    result = measure_quality(changed, ids, record_reference(original, ids), text_name=TEXT)
    assert result.perplexity.after == pytest.approx(expected["after"], rel=1e-13)
    assert result.kl.mean == pytest.approx(expected["kl"].mean().item(), rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_perplexity_is_that_of_transformers_own_loss(name):
    model, ids = build(name), windows()
    with torch.no_grad():
        loss = sum(model(row[None], labels=row[None]).loss.item() for row in ids) / len(ids)
    result = measure_quality(model, ids, text_name=TEXT)
    assert result.perplexity.after == pytest.approx(math.exp(loss), rel=1e-6)
    assert (result.perplexity.before, result.perplexity.ratio, result.kl, result.top1_agreement) == (None,) * 4
    assert result.perplexity.interval[0] < result.perplexity.after < result.perplexity.interval[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_differ_from_itself(dtype):
    model, ids = sharpened(dtype=dtype), windows()
    result = measure_quality(model, ids, record_reference(model, ids), text_name=TEXT)
    assert result.perplexity.ratio == 1.0 and result.perplexity.ratio_interval == (1.0, 1.0)
    assert (result.kl.mean, result.kl.p99, result.top1_agreement) == (0.0, 0.0, 1.0)
    # No disagreement in 256 tokens is no proof that there is none: Wilson's lower bound for 256 of 256.
    assert result.top1_interval == (pytest.approx(256 / (256 + 1.959964**2)), 1.0)


def test_divergence_of_known_distributions():
    ids = torch.zeros(2, 40, dtype=torch.long)
    p, q = [0.5, 0.25, 0.25], [0.2, 0.4, 0.4]
    original, changed = (constant(np.log(share).tolist()) for share in (p, q))
    result = measure_quality(changed, ids, record_reference(original, ids), text_name=TEXT)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert result.kl.mean == pytest.approx(expected, rel=1e-5)
    assert result.kl.p99 == pytest.approx(expected, rel=1e-5)
    assert result.perplexity.before == pytest.approx(1 / p[0], rel=1e-5)
    assert result.perplexity.after == pytest.approx(1 / q[0], rel=1e-5)
    assert result.top1_agreement == 0.0


def test_tokens_that_the_original_rules_out_add_nothing():
    ids = torch.zeros(1, 40, dtype=torch.long)
    original, changed = constant([0.0, -math.inf, 0.0]), constant([0.0, 0.0, 0.0])
    for model in (original, changed):
        model.lm_head.weight.data[:, 1:] = 0.0
    # -inf * 1 + 0 * 0 in the head is -inf: a vocabulary entry that is never produced.
    result = measure_quality(changed, ids, record_reference(original, ids), text_name=TEXT)
    assert result.kl.mean == pytest.approx(math.log(3 / 2), rel=1e-6)
    with pytest.raises(ProfilerError, match="divergence from the reference are not finite at window 1, token 2"):
        measure_quality(original, ids, record_reference(changed, ids), text_name=TEXT)


def test_nan_weights_are_an_error_that_says_where():
    model, ids = build("llama"), windows()
    model.lm_head.weight.data[3, 3] = math.nan
    with pytest.raises(ProfilerError, match="not finite at window 1, token 2.*float32"):
        measure_quality(model, ids, text_name=TEXT)


def test_logits_exist_for_some_positions_at_a_time():
    vocabulary = 60_000
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=512,
        )
    ).eval()
    ids = windows(2, 200, vocabulary)
    largest = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: largest.append(output.numel()))
    with torch.no_grad():
        expected = math.exp(sum(model(row[None], labels=row[None]).loss.item() for row in ids) / 2)
    assert max(largest) > LOGITS_AT_ONCE
    largest.clear()
    assert measure_quality(model, ids, text_name=TEXT).perplexity.after == pytest.approx(expected, rel=1e-5)
    assert max(largest) <= LOGITS_AT_ONCE


def test_blocks_are_windows_or_equal_parts_of_few_windows():
    model = build("llama")
    found = {
        (count, length): measure_quality(model, windows(count, length), text_name=TEXT).blocks
        for count, length in ((20, 33), (16, 65), (4, 129), (1, 513), (1, 33), (2, 33))
    }
    assert found == {(20, 33): 20, (16, 65): 16, (4, 129): 16, (1, 513): 16, (1, 33): 1, (2, 33): 2}


def test_one_block_has_no_interval_and_says_why():
    model, ids = build("llama"), windows(1, 33)
    result = measure_quality(model, ids, record_reference(model, ids), text_name=TEXT)
    intervals = dataclasses.astuple(result.perplexity)[2:4], result.perplexity.ratio_interval, result.kl.interval
    assert intervals == ((None, None), None, None) and result.kl.p99_interval is None and result.top1_interval is None
    assert "one block" in result.interval_reason


def test_the_paired_interval_is_narrower_than_the_unpaired_ones():
    ids = windows(16, 65)
    result = measure_quality(disturbed(size=0.02), ids, record_reference(disturbed(size=0.0), ids), text_name=TEXT)
    perplexity = result.perplexity
    assert perplexity.ratio_interval[0] <= perplexity.ratio <= perplexity.ratio_interval[1]
    width = math.log(perplexity.ratio_interval[1] / perplexity.ratio_interval[0])
    assert width < 0.5 * math.log(perplexity.interval[1] / perplexity.interval[0])
    assert result.kl.interval[0] <= result.kl.mean <= result.kl.interval[1]
    assert result.kl.p99_interval[0] <= result.kl.p99 <= result.kl.p99_interval[1]
    again = measure_quality(disturbed(size=0.02), ids, record_reference(disturbed(size=0.0), ids), text_name=TEXT)
    assert again == result


def test_percentile_intervals_cover():
    """Bootstrap over blocks: tokens of an exponential, whose 99th percentile is ln 100."""
    generator = np.random.default_rng(3)
    blocks = quality._Blocks(16, 512)
    covered = sum(
        low <= math.log(100) <= high
        for low, high in (blocks.bootstrap_quantile(generator.exponential(size=(16, 512)), 0.99) for _ in range(60))
    )
    assert covered >= 52


def test_comparing_logits():
    original, changed, ids = sharpened(), disturbed(size=0.05), windows()
    with torch.no_grad():
        theirs, own = original(ids).logits.double(), changed(ids).logits.double()
    found = compare_logits(changed, ids, record_reference(original, ids))
    assert found.tokens == 4 * 65
    assert found.relative_error == pytest.approx(((own - theirs).norm() / theirs.norm()).item(), rel=1e-5)
    assert found.max_absolute_error == pytest.approx((own - theirs).abs().max().item(), rel=1e-5)
    assert found.top1_agreement == pytest.approx((own.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    same = compare_logits(original, ids, record_reference(original, ids))
    assert (same.relative_error, same.max_absolute_error, same.top1_agreement) == (0.0, 0.0, 1.0)


def test_references_of_other_text_or_vocabulary_are_refused():
    model, ids = build("llama"), windows()
    with pytest.raises(ProfilerError, match="other windows"):
        measure_quality(model, ids, record_reference(model, ids.flip(0)), text_name=TEXT)
    small = torch.zeros(1, 40, dtype=torch.long)
    with pytest.raises(ProfilerError, match=f"{VOCABULARY} logits and the reference 3;"):
        measure_quality(model, small, record_reference(constant([0.0, 1.0, 2.0]), small), text_name=TEXT)
    with pytest.raises(NotApplicableError, match="encoder-decoder"):
        measure_quality(build("t5"), ids, text_name=TEXT)
