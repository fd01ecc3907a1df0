from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Gemma2Config

from profilers.attention_capture import AttentionCall, decoder_layers, observe_attention
from profilers.attention_kernels import attention_with_lse
from profilers.base import ProfilerError
from tests import tiny_models
from tests.profilers.tensor_sizes import LargestTensor

TOKENS = 40
SAME_KERNEL = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "mixtral", "diffllama", "jamba", "t5")


def ids(model, batch=2, length=TOKENS):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, tiny_models.VOCABULARY, (batch, length), generator=generator).to(model.device)


@torch.no_grad()
def logits(model, tokens):
    if model.config.is_encoder_decoder:
        return model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False).logits
    return model(tokens, use_cache=False).logits


def calls_of(model, tokens):
    calls = []
    with observe_attention(model, calls.append):
        logits(model, tokens)
    return calls


@pytest.mark.parametrize("name", list(tiny_models.CONFIGS))
def test_observing_changes_no_result(name):
    model = tiny_models.build(name)
    tokens = ids(model)
    plain = logits(model, tokens)
    calls = []
    with observe_attention(model, calls.append):
        watched = logits(model, tokens)
    if name in SAME_KERNEL:
        assert torch.equal(watched, plain)
    else:  # another kernel: equal head sizes by padding (deepseek_v3), learned sinks (gpt_oss), ...
        torch.testing.assert_close(watched, plain, atol=2e-5, rtol=1e-4)
    assert bool(calls) == (name != "mamba")
    assert torch.equal(logits(model, tokens), plain)


def snapshot(model):
    """Everything that observing touches."""
    hooks = {
        name: (dict(module._forward_hooks), dict(module._forward_pre_hooks), module._forward_hooks_always_called.copy())
        for name, module in model.named_modules()
    }
    configs = {
        name: (id(module.config), module.config.to_dict(), module.config._attn_implementation)
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    return (
        hooks,
        configs,
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        {name: (type(module), set(vars(module))) for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon", "t5", "gemma3"])
@pytest.mark.parametrize("implementation", ["as built", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_as_it_was(name, implementation, fails):
    model = tiny_models.build(name)
    if implementation == "eager":
        model = with_eager_attention(model)
    tokens = ids(model)
    plain, before = logits(model, tokens), snapshot(model)

    def callback(call):
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt), observe_attention(model, callback):
            logits(model, tokens)
    else:
        with observe_attention(model, callback):
            during = logits(model, tokens)
        torch.testing.assert_close(during, plain, atol=2e-5, rtol=1e-4)
    assert snapshot(model) == before
    assert torch.equal(logits(model, tokens), plain)


def with_eager_attention(model):
    """Build the same model with ``attn_implementation="eager"``."""
    auto = tiny_models.AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    eager = auto.from_config(copy.deepcopy(model.config), attn_implementation="eager", dtype=model.dtype)
    eager.load_state_dict(model.state_dict())
    return eager.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "deepseek_v3", "diffllama", "gpt_oss"])
def test_calls_describe_each_layer(name):
    model = tiny_models.build(name)
    tokens = ids(model)
    calls = calls_of(model, tokens)
    per_layer = 2 if name == "diffllama" else 1
    assert [call.layer for call in calls] == [layer for layer in range(2) for _ in range(per_layer)]
    modules = dict(model.named_modules())
    for call in calls:
        assert "Attention" in type(modules[call.name]).__name__
        assert not call.is_cross
        assert call.query.shape[:3] == (2, 4, TOKENS)
        assert call.log_sum_exp.shape == (2, 4, TOKENS) and call.log_sum_exp.dtype == torch.float32


def test_calls_carry_grouped_keys_and_causality():
    (call, _) = calls_of(tiny_models.build("llama"), ids(tiny_models.build("llama")))
    assert call.key.shape[1] == 2 and call.is_causal and call.mask is None
    assert call.scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2", "falcon", "deepseek_v3", "gpt_oss", "t5"])
@pytest.mark.parametrize("implementation", ["as built", "eager"])
def test_probabilities_equal_eager_attention(name, implementation):
    model = tiny_models.build(name)
    eager = with_eager_attention(model)
    tokens = ids(model)
    with torch.no_grad():
        if name == "t5":
            expected = eager(input_ids=tokens, decoder_input_ids=tokens, output_attentions=True).decoder_attentions
        else:
            expected = eager(tokens, use_cache=False, output_attentions=True).attentions
    seen = {}

    def read(call):
        if not call.is_cross and not call.name.startswith("encoder"):
            everything = call.probabilities(slice(0, TOKENS), slice(0, TOKENS))
            torch.testing.assert_close(call.probabilities(slice(5, 17), slice(2, 9)), everything[:, :, 5:17, 2:9])
            torch.testing.assert_close(call.first_key_probabilities(), everything[..., 0])
            seen[call.layer] = everything

    observed = model if implementation == "as built" else eager
    with observe_attention(observed, read):
        logits(observed, tokens)
    assert sorted(seen) == list(range(len(expected)))
    for layer, weights in enumerate(expected):
        torch.testing.assert_close(seen[layer], weights, atol=1e-5, rtol=1e-4)


def test_learned_sink_takes_its_share():
    model = tiny_models.build("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(3.0)
    shares = []
    with observe_attention(model, lambda call: shares.append(call.probabilities(slice(0, 8), slice(0, 8)).sum(-1))):
        logits(model, ids(model, length=8))
    assert all(share.max() < 0.9 for share in shares)


def test_soft_cap_of_an_eager_model_is_kept():
    config = Gemma2Config(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        attn_logit_softcapping=0.05,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = ids(model)
    with torch.no_grad():
        expected = model(tokens, use_cache=False, output_attentions=True).attentions
    seen = []
    with observe_attention(model, lambda call: seen.append(call.probabilities(slice(0, TOKENS), slice(0, TOKENS)))):
        logits(model, tokens)
    for weights, reference_weights in zip(seen, expected, strict=True):
        torch.testing.assert_close(weights, reference_weights, atol=1e-5, rtol=1e-4)


def test_cross_attention_is_marked():
    calls = calls_of(tiny_models.build("t5"), ids(tiny_models.build("t5")))
    cross = [call.name for call in calls if call.is_cross]
    assert cross == [f"decoder.block.{layer}.layer.1.EncDecAttention" for layer in range(2)]
    assert len(calls) == 6


class OwnAttention(torch.nn.Module):
    """Attention that goes past every interface."""

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Linear(32, 32)

    def forward(self, hidden_states, **_unused):
        scores = (hidden_states @ hidden_states.transpose(-1, -2))[:, None]
        return (scores.softmax(-1)[:, 0] @ self.value(hidden_states)), None


def test_attention_that_cannot_be_observed_is_an_error():
    model = tiny_models.build("llama")
    model.model.layers[1].self_attn = OwnAttention()
    with (
        pytest.raises(ProfilerError, match=r"LlamaForCausalLM.*model\.layers\.1\.self_attn.*softmax itself"),
        observe_attention(model, lambda call: None),
    ):
        logits(model, ids(model))


def test_router_softmax_is_no_attention():
    model = tiny_models.build("mixtral")
    assert len(calls_of(model, ids(model, batch=1, length=4))) == 2  # as many tokens as experts


def test_training_mode_is_refused():
    model = tiny_models.build("llama").train()
    with pytest.raises(ProfilerError, match=r"model\.eval\(\)"), observe_attention(model, lambda call: None):
        pass


def test_the_square_matrix_is_never_formed():
    model = tiny_models.build("llama")
    length = 600
    with LargestTensor() as largest, observe_attention(model, lambda call: call.first_key_probabilities()):
        logits(model, ids(model, batch=1, length=length))
    assert (length, length) not in largest.tails
    assert largest.elements < 4 * length * length  # heads x T x T


@pytest.mark.parametrize(
    ("name", "prefix", "count"),
    [
        ("llama", "model.layers", 2),
        ("gpt2", "transformer.h", 2),
        ("t5", "decoder.block", 2),
        ("mamba", "backbone.layers", 2),
    ],
)
def test_decoder_layers(name, prefix, count):
    found, layers = decoder_layers(tiny_models.build(name))
    assert (found, len(layers)) == (prefix, count)


def test_a_query_that_sees_no_key_has_no_weights():
    query, key, value = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask[..., 2, :] = False
    _, lse = attention_with_lse(query, key, value, mask=mask)
    call = AttentionCall(0, "attention", query, key, value, mask, False, 8**-0.5, None, lse, False)
    sums = call.probabilities(slice(0, 6), slice(0, 6)).sum(-1)
    expected = torch.ones(1, 2, 6)
    expected[..., 2] = 0
    torch.testing.assert_close(sums, expected)
