import math
from collections import Counter

import numpy as np
import pytest
import torch

from profilers import outliers
from profilers.base import ProfileContext, ProfileRequest, ProfilerError
from profilers.outliers import measure_outliers, scale_quality, tensor_statistics
from profilers.timing import PhaseTimings
from tests.tiny_models import VOCABULARY, WINDOW, build

IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force_quality(table, bits, scale_per):
    """One value at a time, in float64: entropy and noise-to-signal, averaged over channels."""
    channels = np.asarray(table, dtype=np.float64)
    top = 2**bits - 1
    entropies, noises = [], []
    for c in range(channels.shape[0]):
        codes, errors = [], []
        for t in range(channels.shape[1]):
            group = channels[c] if scale_per == "channel" else channels[:, t]
            step = (group.max() - group.min()) / top
            codes.append(round((channels[c, t] - group.min()) / step) if step else 0)
            errors.append(group.min() + codes[-1] * step - channels[c, t])
        shares = [count / len(codes) for count in Counter(codes).values()]
        entropies.append(-sum(p * math.log2(p) for p in shares))
        if channels[c].var():
            noises.append(np.mean(np.square(errors)) / channels[c].var())
    return np.mean(entropies), np.mean(noises)


@pytest.mark.parametrize("scale_per", ["channel", "token"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_scale_quality_equals_brute_force(bits, scale_per):
    table = normal(7, 33)
    table[3] *= 40
    table[5] = 2.5  # a constant channel
    quality = scale_quality(table, bits, scale_per)
    entropy, noise = brute_force_quality(table, bits, scale_per)
    assert quality.channel_entropy_bits == pytest.approx(entropy, abs=1e-3)
    assert quality.channel_noise_to_signal == pytest.approx(noise, rel=1e-3)


def test_entropy_of_evenly_spread_codes_is_the_number_of_bits():
    quality = scale_quality(torch.arange(16.0).repeat(3, 4), 4, "channel")  # each of the 16 levels four times
    assert quality.channel_entropy_bits == pytest.approx(4.0, abs=1e-12)
    assert quality.channel_noise_to_signal == pytest.approx(0.0, abs=1e-12)


def test_noise_of_uniform_values_is_one_over_levels_squared():
    # Error of rounding to steps of w/15 is (w/15)²/12 and the variance of a uniform value is w²/12.
    table = torch.rand(8, 20_000, generator=torch.Generator().manual_seed(0))
    assert scale_quality(table, 4, "channel").channel_noise_to_signal == pytest.approx(1 / 15**2, rel=0.02)


def test_statistics_equal_float64_formulas():
    table = normal(40, 25) * 3 + 1
    row = tensor_statistics(table, "weight", "layers.7.q.weight")
    values = table.numpy().astype(np.float64).ravel()
    deviation = values - values.mean()
    assert row.kurtosis == pytest.approx((deviation**4).mean() / (deviation**2).mean() ** 2, rel=1e-6)
    magnitudes = np.sort(np.abs(values))
    assert row.max_over_median == pytest.approx(magnitudes[-1] / magnitudes[len(magnitudes) // 2 - 1], rel=1e-6)
    assert (row.layer, row.channels, row.tokens, row.total_channels) == (7, 40, 25, 40)


def test_kurtosis_of_known_distributions():
    gaussian = tensor_statistics(normal(500, 500), "weight", "w")
    uniform = tensor_statistics(torch.linspace(-1, 1, 250_000).view(500, 500), "weight", "w")
    assert gaussian.kurtosis == pytest.approx(3.0, abs=0.05)
    assert uniform.kurtosis == pytest.approx(1.8, abs=1e-4)
    assert uniform.max_over_median == pytest.approx(2.0, abs=1e-4)
    # median |x| of a standard normal is 0.6745
    assert gaussian.max_over_median == pytest.approx(float(normal(500, 500).abs().max()) / 0.6745, rel=0.01)


def test_outlier_channels_suit_per_channel_and_outlier_tokens_per_token():
    table = normal(64, 256)
    table[5] += 100
    row = tensor_statistics(table, "key", "layer 0")
    assert row.suits == "per-channel"
    assert row.channel_entropy_bits_per_channel_scale > row.channel_entropy_bits_per_token_scale + 1
    assert row.noise_to_signal_per_token_scale > 10 * row.noise_to_signal_per_channel_scale
    # The same outliers the other way around: tokens, of which one is large.
    row = tensor_statistics(table.T.contiguous(), "value", "layer 0")
    assert row.suits == "per-token"


def test_either_when_neither_scale_has_an_advantage():
    row = tensor_statistics(normal(256, 256), "value", "layer 0")
    assert row.suits == "either"
    # The entropy alone would have said per-token, for values that have no structure at all.
    assert row.channel_entropy_bits_per_token_scale > row.channel_entropy_bits_per_channel_scale + 0.05


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (torch.tensor([[1.0, math.nan], [0.0, 2.0]]), "NaN"),
        (torch.tensor([[1.0, math.inf], [0.0, 2.0]]), "infinity"),
        (torch.zeros(3, 4), "all its values are 0"),
    ],
)
def test_what_has_no_statistics_says_why(table, reason):
    row = tensor_statistics(table, "weight", "w")
    assert reason in row.reason
    assert row.kurtosis is None and row.max_over_median is None and row.suits is None


def test_mostly_zero_tensor_has_no_ratio_but_the_rest():
    table = torch.zeros(4, 8)
    table[0, 0] = 1.0
    row = tensor_statistics(table, "weight", "w")
    assert row.max_over_median is None and "median" in row.reason
    assert row.kurtosis is not None and row.suits is not None


def test_large_tensors_are_sampled_by_channel_and_keep_their_maximum(monkeypatch):
    monkeypatch.setattr(outliers, "MAXIMUM_ELEMENTS", 10 * 64)
    table = normal(100, 64)
    table[1, 1] = 1000.0  # channel 1 is not among the 10 that are kept
    row = tensor_statistics(table, "weight", "w")
    assert (row.channels, row.total_channels) == (10, 100)
    assert row.max_over_median > 1000
    assert row.kurtosis < 5


def test_rows_of_a_llama_equal_statistics_of_its_own_tensors():
    model = build("llama")
    result = measure_outliers(model, IDS)
    rows = {(row.kind, row.name): row for row in result.rows}
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True, use_cache=True)

    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for kind, name in rows if kind == "weight"} == linears

    keys = output.past_key_values.layers[1].keys
    table = torch.stack([keys[:, head, :, i].flatten() for head in range(2) for i in range(8)])
    assert rows["key", "layer 1"] == tensor_statistics(table, "key", "layer 1")

    hidden = output.hidden_states[1].reshape(-1, 32).T
    expected = tensor_statistics(hidden, "hidden", "model.layers.0")
    assert rows["hidden", "model.layers.0"].kurtosis == pytest.approx(expected.kurtosis, rel=1e-6)
    assert (rows["hidden", "model.layers.0"].channels, rows["hidden", "model.layers.0"].tokens) == (32, 48)
    assert result.tokens == 48


def test_conv1d_weights_have_output_features_as_channels():
    model = build("gpt2")
    rows = {row.name: row for row in measure_outliers(model, IDS).rows if row.kind == "weight"}
    row = rows["transformer.h.0.attn.c_attn.weight"]
    assert (row.channels, row.tokens) == (96, 32)  # stored as (32, 96)
    assert "transformer.wte.weight" not in rows or "lm_head.weight" not in rows


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_have_output_features_as_channels(name):
    rows = {row.name: row for row in measure_outliers(build(name), IDS).rows if row.kind == "weight"}
    gate_up = next(row for key, row in rows.items() if "layers.0." in key and key.endswith("gate_up_proj"))
    assert (gate_up.channels, gate_up.tokens) == (4 * 2 * 48, 32)
    assert not any(key.endswith("bias") for key in rows)


def test_mla_latents_are_left_out_and_named():
    result = measure_outliers(build("deepseek_v3"), IDS)
    assert not [row for row in result.rows if row.kind in ("key", "value")]
    assert any("MLA" in note and "0, 1" in note for note in result.notes)


def test_linear_attention_layers_are_left_out_and_named():
    result = measure_outliers(build("jamba"), IDS)
    assert [row.layer for row in result.rows if row.kind == "key"] == [1, 3]
    assert any("0, 2" in note and "state space" in note for note in result.notes)


def test_sliding_layers_are_named():
    result = measure_outliers(build("gemma3"), IDS)
    tokens = {row.layer: row.tokens for row in result.rows if row.kind == "key"}
    assert tokens == {0: 2 * (WINDOW - 1), 1: 48, 2: 2 * (WINDOW - 1), 3: 48}
    assert any("0, 2" in note and "window" in note for note in result.notes)


def test_encoder_decoder_has_self_and_cross_keys():
    result = measure_outliers(build("t5"), IDS)
    assert {row.name for row in result.rows if row.kind == "key"} == {
        f"{side} layer {i}" for side in ("self", "cross") for i in (0, 1)
    }
    assert len([row for row in result.rows if row.kind == "hidden"]) == 4


@pytest.mark.parametrize("name", ["falcon", "qwen3_next", "bamba", "mamba", "diffllama"])
def test_every_linear_and_layer_has_a_row(name):
    model = build(name)
    result = measure_outliers(model, IDS)
    found = {row.name for row in result.rows}
    # A tied output head shares the embedding's parameter and has one row under its own name.
    assert {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)} <= found
    assert len([row for row in result.rows if row.kind == "hidden"]) == model.config.num_hidden_layers


def test_weights_that_cannot_be_read_have_a_row_with_the_reason():
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    row = outliers._weight_row("model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight, 4)
    assert row.kurtosis is None and "int8" in row.reason and row.layer == 0


def hooks(model):
    return {name: len(module._forward_hooks) for name, module in model.named_modules()}


def test_model_is_as_it_was():
    model = build("llama")
    before = hooks(model), {key: value.clone() for key, value in model.state_dict().items()}
    measure_outliers(model, IDS)
    assert hooks(model) == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in model.state_dict().items())


def test_hooks_come_off_after_a_failure():
    model = build("llama")
    before = hooks(model)
    with pytest.raises(IndexError):
        measure_outliers(model, torch.full((1, 4), VOCABULARY + 5))
    assert hooks(model) == before


def test_tokens_past_the_limit_are_refused():
    with pytest.raises(ProfilerError, match="1024"):
        measure_outliers(build("llama"), torch.zeros(1, 1025, dtype=torch.long))


def test_run_reads_text_and_says_which():
    model = build("llama")
    context = ProfileContext(
        model, model.config, None, torch.device("cpu"), torch.float32, ProfileRequest(), None, PhaseTimings(model)
    )
    result = outliers.run(context)
    assert result.tokens == outliers.TOKENS and "random" in result.text and result.bits == 4
