from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config

from profilers import sinks
from profilers.base import ProfileContext, ProfileRequest, ProfilerError
from profilers.sinks import PROFILER, measure_sinks, sink_alphas
from profilers.text import token_stream
from tests import tiny_models
from tests.profilers.tiny_inputs import BOS, SHARPENED, sharp, tiny_tokenizer, words
from tests.tiny_models import VOCABULARY

WITH_EAGER = [name for name in tiny_models.CONFIGS if name != "mamba"]


def eager_attentions(model, tokens, encoder_tokens=None):
    """Return the full attention matrices by attention layer from transformers' own eager attention."""
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    eager = auto.from_config(model.config, attn_implementation="eager", dtype=model.dtype)
    eager.load_state_dict(model.state_dict())
    eager.eval()
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            encoder_tokens = tokens if encoder_tokens is None else encoder_tokens
            return eager(
                input_ids=encoder_tokens, decoder_input_ids=tokens, output_attentions=True, use_cache=False
            ).decoder_attentions
        return [
            weights
            for weights in eager(tokens, output_attentions=True, use_cache=False).attentions
            if weights is not None
        ]


def brute_force_alphas(weights):
    """alpha_k of every key from a full matrix (B, H, T, T), in float64 loops over keys."""
    weights = weights.double().numpy()
    length = weights.shape[-1]
    return np.stack([weights[:, :, k:, k].sum(axis=-1) / (length - k) for k in range(length)], axis=-1)


def random_tokens(batch, length):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "deepseek_v3"])
def test_uniform_attention_gives_harmonic_mean(name):
    model = tiny_models.build(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in SHARPENED):
                parameter.zero_()
    result = measure_sinks(model, sequences=3)
    expected = sum(1 / i for i in range(1, 65)) / 64
    assert expected == pytest.approx(0.0741, abs=5e-5)
    for point in result.points:
        assert point.uniform_alpha == pytest.approx(expected)
        assert point.sink_rate == 0.0
        for layer in point.alpha:
            assert layer == pytest.approx([expected] * 4, abs=1e-6)


def hard_sink_model(length=64):
    """A GPT-2 in which every query's score for the first key is far above all others."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=length, bos_token_id=BOS)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        transformer = model.transformer
        transformer.wpe.weight[0, 0] = 1.0  # the first position points along one axis, the others along another
        transformer.wpe.weight[1:, 1] = 1.0
        for block in transformer.h:
            block.ln_1.weight.fill_(1.0)
            block.attn.c_attn.bias[:32] = 10.0  # queries are constant
            block.attn.c_attn.weight[0, 32:64] = 10.0  # keys read the first axis
    return model


def test_hard_sink_gives_one():
    result = measure_sinks(hard_sink_model(), sequences=3, epsilons=(0.3, 0.999))
    for point in result.points:
        assert [alpha for layer in point.alpha for alpha in layer] == pytest.approx([1.0] * 8, abs=1e-6)
        assert point.sink_rate_by_epsilon == {"0.3": 1.0, "0.999": 1.0}
        assert all(position.mean_alpha < 1e-6 for position in point.positions)


def test_repeated_token_without_positions_gives_one_over_t():
    model = tiny_models.build("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    length = 40
    result = measure_sinks(
        model, tiny_tokenizer(bos=False), contexts=(length,), sequences=2, text=" ".join(["w7"] * length)
    )
    (point,) = result.points
    alpha = [sum(1 / i for i in range(k, length + 1)) / (length - k + 1) for k in range(1, length + 1)]
    assert [value for layer in point.alpha for value in layer] == pytest.approx([alpha[0]] * 8, abs=1e-6)
    assert [position.position for position in point.positions] == [2, 3, 4, 5, 6]
    assert [position.mean_alpha for position in point.positions] == pytest.approx(alpha[1:6], abs=1e-6)


# --- against the full matrix ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_EAGER)
def test_alpha_equals_output_attentions_at_512(name):
    model = sharp(name)
    tokens = random_tokens(1, 512)
    expected = [brute_force_alphas(weights)[..., 0] for weights in eager_attentions(model, tokens)]
    measured = [alpha for alpha in sink_alphas(model, tokens) if alpha is not None]
    assert len(measured) == len(expected)
    for alpha, reference in zip(measured, expected, strict=True):
        assert np.abs(alpha.numpy() - reference).max() <= 1e-6
    assert max(np.ptp(reference) for reference in expected) > 1e-4  # heads differ by far more than that


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon", "gpt_oss", "diffllama", "jamba", "t5"])
def test_points_equal_brute_force(name):
    model = sharp(name)
    tokenizer, text = tiny_tokenizer(), words(300)
    epsilons, length, count = (0.0467, 0.0933), 40, 6  # no multiple of 1/40, where saturated heads lie
    result = measure_sinks(model, tokenizer, contexts=(length,), sequences=count, epsilons=epsilons, text=text)
    windows = token_stream(tokenizer, VOCABULARY, text).windows(count, length)
    start = 0 if name == "t5" else BOS  # an encoder-decoder starts with its decoder start token
    inputs = {True: torch.cat([torch.full((count, 1), start), windows[:, :-1]], dim=1), False: windows}
    assert [point.bos for point in result.points] == [True, False]
    for point in result.points:
        matrices = eager_attentions(model, inputs[point.bos], windows)
        alphas = np.concatenate([brute_force_alphas(weights) for weights in matrices], axis=1)  # (count, heads, T)
        assert point.sequences == count
        for epsilon in epsilons:
            rate = (alphas[:, :, 0] > epsilon).mean(axis=1).mean()
            assert point.sink_rate_by_epsilon[f"{epsilon:g}"] == pytest.approx(rate, abs=1e-9)
        assert point.sink_rate == point.sink_rate_by_epsilon["0.0467"]
        flat = [value for layer in point.alpha if layer is not None for value in layer]
        assert flat == pytest.approx(alphas[:, :, 0].mean(axis=0), abs=1e-5)

        means, rates = alphas.mean(axis=(0, 1)), (alphas > epsilons[0]).mean(axis=(0, 1))
        ranked = sorted(range(1, length - 7), key=lambda k: (-round(rates[k], 9), -means[k]))[:5]
        assert [position.position - 1 for position in point.positions] == ranked
        for position in point.positions:
            assert position.mean_alpha == pytest.approx(means[position.position - 1], abs=1e-5)
            assert position.sink_rate == pytest.approx(rates[position.position - 1], abs=1e-9)


def test_threshold_is_strict_and_each_sequence_counts_once():
    alpha = torch.tensor([[0.5, 0.5, 0.75, 0.25], [0.75, 0.75, 0.75, 0.25]])
    tally = sinks._Tally(64, 1, (0.5,))
    tally.add(sinks._Measured((sinks._LayerSinks(alpha, torch.ones(2), None),)))
    assert tally.point(True, False).sink_rate == (0.25 + 0.75) / 2


def test_query_outside_the_window_counts_as_zero():
    model = tiny_models.build("mistral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    window, length = tiny_models.WINDOW, 64
    expected = sum(1 / i for i in range(1, window + 1)) / length  # uniform over what is visible, nothing afterwards
    (first, _) = sink_alphas(model, random_tokens(2, length))
    assert first.numpy() == pytest.approx(np.full((2, 4), expected), abs=1e-6)


def test_value_norm_ratio_equals_cached_values():
    model = tiny_models.build("llama")
    tokenizer, text = tiny_tokenizer(bos=False), words(300)
    (point,) = measure_sinks(model, tokenizer, contexts=(40,), sequences=5, text=text).points
    windows = token_stream(tokenizer, VOCABULARY, text).windows(5, 40)
    with torch.no_grad():
        cache = model(windows, use_cache=True).past_key_values
    for layer, ratio in enumerate(point.value_norm_ratio):
        norms = np.linalg.norm(cache.layers[layer].values.double().numpy(), axis=-1)
        assert ratio == pytest.approx((norms[..., 0] / np.median(norms, axis=-1)).mean(), rel=1e-5)


# --- BOS, sequences, contexts ---------------------------------------------------------------------------------------


def test_without_a_bos_token_there_is_one_point_and_a_reason():
    result = measure_sinks(tiny_models.build("llama"), tiny_tokenizer(bos=False), sequences=2, text=words(200))
    assert [point.bos for point in result.points] == [False]
    assert result.bos_reason == "the tokenizer has no BOS token"
    assert [spread.bos for spread in result.perturbation] == [False]


def test_every_context_is_a_point_with_and_without_bos():
    result = measure_sinks(tiny_models.build("llama"), contexts=(16, 256), sequences=100)
    assert [(point.context, point.bos) for point in result.points] == [
        (16, True),
        (16, False),
        (256, True),
        (256, False),
    ]
    assert [point.sequences for point in result.points] == [100, 100, 64, 64]
    assert result.text.startswith("random tokens")


@pytest.mark.parametrize(
    ("sequences", "length", "expected"),
    [(100, 64, 100), (100, 512, 32), (100, 8192, 2), (100, 65536, 1), (1000, 64, 1000), (1000, 512, 125), (3, 64, 3)],
)
def test_long_contexts_have_fewer_sequences(sequences, length, expected):
    assert sinks._sequence_count(sequences, length) == expected


def test_batches_cover_every_sequence_once_within_the_token_budget():
    batches = sinks._batches(150, 64)
    assert [index for batch in batches for index in range(150)[batch]] == list(range(150))
    assert all((batch.stop - batch.start) * 64 <= sinks.FORWARD_TOKENS for batch in batches)


def test_positions_need_a_short_context_or_a_wish(monkeypatch):
    monkeypatch.setattr(sinks, "POSITIONS_CONTEXT_LIMIT", 32)
    model = tiny_models.build("llama")
    long = measure_sinks(model, contexts=(33,), sequences=1).points[0]
    assert long.positions == () and "context of 32" in long.positions_reason
    wished = measure_sinks(model, contexts=(33,), sequences=1, positions=True).points[0]
    assert len(wished.positions) == 5 and wished.positions_reason is None
    short = measure_sinks(model, contexts=(8,), sequences=1).points[0]
    assert short.positions == () and "8 queries" in short.positions_reason


# --- what cannot be measured ----------------------------------------------------------------------------------------


def test_layers_without_softmax_attention_are_not_applicable():
    result = measure_sinks(tiny_models.build("jamba"), sequences=2)
    assert sorted(result.not_applicable) == ["0", "2"]
    assert "JambaMambaMixer" in result.not_applicable["0"]
    for point in result.points:
        assert [layer is None for layer in point.alpha] == [True, False, True, False]
        assert [ratio is None for ratio in point.value_norm_ratio] == [True, False, True, False]


def test_model_without_attention_has_no_rate():
    result = measure_sinks(tiny_models.build("mamba"), sequences=2)
    assert set(result.not_applicable) == {"0", "1"}
    for point in result.points:
        assert point.sink_rate is None and point.sequences == 0
        assert point.sink_rate_by_epsilon == {} and point.positions == ()
        assert point.positions_reason == "no layer has softmax attention"


def test_attention_that_left_no_trace_is_an_error():
    model = tiny_models.build("llama")

    class SilentAttention(torch.nn.Module):
        def forward(self, hidden_states, **_unused):
            return hidden_states, None

    model.model.layers[1].self_attn = SilentAttention()
    with pytest.raises(ProfilerError, match="layer 1 of LlamaForCausalLM has a 'SilentAttention'"):
        measure_sinks(model, sequences=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contexts": (2048,)}, "context 2048 is past the model's limit of 1024"),
        ({"contexts": (1,)}, "context of 1 "),
        ({"contexts": ()}, "at least one context"),
        ({"epsilons": (1.5,)}, "epsilon 1.5"),
        ({"epsilons": (0.3, 0.0)}, "epsilon 0 "),
        ({"sequences": 0}, "0 sequences"),
        ({"contexts": (16, 512), "text": "w5 " * 100}, "the text has 100 tokens but 512"),
        ({"text": ""}, "no tokens"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(ProfilerError, match=message) as error:
        measure_sinks(tiny_models.build("llama"), tiny_tokenizer(), **({"text": words(2000)} | arguments))
    assert "\n" not in str(error.value)


def test_not_a_number_is_an_error():
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(math.nan)
    with pytest.raises(ProfilerError, match="layer 1 is not finite in torch.float32"):
        measure_sinks(model, sequences=1)


# --- the whole instrument -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "t5", "mamba"])
def test_run_returns_plain_numbers_and_leaves_the_model_alone(name):
    model = tiny_models.build(name)
    before = (
        model.config.to_dict(),
        model.config._attn_implementation,
        {key: tensor.clone() for key, tensor in model.state_dict().items()},
    )
    context = ProfileContext(
        model=model,
        config=model.config,
        tokenizer=tiny_tokenizer(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        request=ProfileRequest(contexts=None, epsilons=(0.2, 0.3), sequences=3, text=words(500)),
        peaks=None,
        timings=None,
    )
    result = PROFILER.run(context)
    assert isinstance(result, PROFILER.result_type)
    assert (result.epsilon, result.epsilons, result.sequences) == (0.2, (0.2, 0.3), 3)
    assert [point.context for point in result.points] == [64, 64]
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert model.config.to_dict() == before[0] and model.config._attn_implementation == before[1]
    assert all(torch.equal(tensor, before[2][key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_progress_counts_every_forward():
    steps, totals = [], []

    class Counting:
        def task(self, description, total=None):
            totals.append(total)

            class Line:
                def advance(self, count=1.0):
                    steps.append(count)

            return contextlib.nullcontext(Line())

    measure_sinks(tiny_models.build("llama"), contexts=(16, 64), sequences=70, progress=Counting())
    assert sum(steps) == totals[0] == 2 * (1 + 2 + 1)


def test_bfloat16_agrees_with_float32():
    model = sharp("llama")
    tokens = random_tokens(2, 128)
    single = sink_alphas(model, tokens)
    half = sink_alphas(model.to(torch.bfloat16), tokens)
    for alpha, rounded in zip(single, half, strict=True):
        torch.testing.assert_close(rounded, alpha, atol=0.02, rtol=0)
