import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    FalconConfig,
    GlmMoeDsaConfig,
    LlamaConfig,
    MixtralConfig,
)

from profilers.base import DoesNotFitError, ProfileContext, ProfileRequest, ProfilerError
from profilers.cache_prediction import Predictor
from profilers.kv_cache import PROFILER, measure_kv, predict_cache_bytes
from profilers.meta import meta_model
from tests.tiny_models import CONFIGS, WINDOW, build

BF16 = torch.bfloat16
FP32_BYTES = 4
CPU = torch.device("cpu")


def config_only(config, **options):
    return measure_kv(meta_model(config, BF16), device=CPU, **options)


# --- every architecture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_result_of_every_architecture(name):
    result = measure_kv(build(name, dtype=BF16), batches=(1, 2), contexts=(5, 33))
    assert [(point.batch, point.context) for point in result.points] == [(1, 5), (1, 33), (2, 5), (2, 33)]
    for point in result.points:
        assert point.difference_bytes == 0
        assert point.measured_bytes == point.predicted_bytes > 0
        assert point.measured_prefill_bytes == point.predicted_prefill_bytes
        assert point.allocator_bytes is None
        assert "cpu" in point.allocator_reason
    slope = result.bytes_per_token + (result.cross_attention_bytes_per_token or 0)
    assert result.points[1].predicted_bytes == result.fixed_bytes + slope * 33
    own = [layer for layer in result.layers if layer.kind != "cross"]
    assert sum(layer.bytes_per_token for layer in own) == result.bytes_per_token
    assert sum(layer.fixed_bytes for layer in own) == result.fixed_bytes


def test_a_live_model_is_left_as_it_was():
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_kv(model, contexts=(8,))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training


# --- values from formulas of the architectures ----------------------------------------------------------------------

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "attention", "bytes_per_token"),
    [
        (LlamaConfig(**LLAMA_3_8B), "GQA", 131_072),
        (LlamaConfig(**SMOLLM2_135M), "GQA", 23_040),
        (LlamaConfig(), "MHA", 524_288),  # the defaults are LLaMA-2-7B's shape
        (FalconConfig(), "MQA", 8_192),
        (MixtralConfig(), "GQA", 131_072),
        (DeepseekV3Config(), "MLA", 70_272),
    ],
    ids=["llama-3-8b", "smollm2-135m", "llama-2-7b", "falcon-7b", "mixtral", "deepseek-v3"],
)
def test_published_shapes(config, attention, bytes_per_token):
    result = config_only(config, contexts=(100, 2048))
    assert result.dtype == "bfloat16"
    assert result.attention == attention
    assert result.bytes_per_token == result.bytes_per_token_growing == bytes_per_token
    assert result.fixed_bytes == 0
    assert [point.predicted_bytes for point in result.points] == [100 * bytes_per_token, 2048 * bytes_per_token]
    assert {point.measured_bytes for point in result.points} == {None}
    assert "config only" in result.points[0].measured_reason
    if attention == "MLA":  # transformers caches the latent, as a serving engine does
        assert result.latent_bytes_per_token == (512 + 64) * 61 * 2
        assert result.latent_reason is None
        assert {layer.kind for layer in result.layers} == {"latent"}
    else:
        assert result.latent_bytes_per_token is None
        assert "kv_lora_rank" in result.latent_reason


def test_latent_beside_what_transformers_caches():
    config = GlmMoeDsaConfig(num_hidden_layers=2)
    result = config_only(config, contexts=(64,))
    heads = config.num_attention_heads
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    expanded = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    layers, element = 2, 2
    # Older transformers caches the expanded heads, newer the latent; the indexer's keys come on top of either.
    assert result.bytes_per_token / (layers * element) - config.index_head_dim in (expanded, latent)
    assert result.latent_bytes_per_token == layers * element * latent
    assert {layer.kind for layer in result.layers} == {"indexed"}


def kv_bytes(config, layers, tokens):
    """2 (keys and values) x KV heads x head size x tokens x element size, summed over layers; fp32."""
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return layers * 2 * heads * size * tokens * FP32_BYTES


def test_sliding_windows_fill_and_stop():
    config = CONFIGS["gemma3"]()
    result = measure_kv(build("gemma3"), contexts=(WINDOW - 2, WINDOW, 5 * WINDOW))
    sliding, full = 2, 2
    for point in result.points:
        held = kv_bytes(config, full, point.context) + kv_bytes(config, sliding, min(point.context, WINDOW))
        assert point.measured_bytes == held
        # Before the first decode step transformers still holds the storage of the whole prompt.
        assert point.measured_prefill_bytes == kv_bytes(config, full + sliding, point.context - 1)
    assert result.bytes_per_token == kv_bytes(config, full, 1)
    assert result.bytes_per_token_growing == kv_bytes(config, full + sliding, 1)
    assert result.fixed_bytes == kv_bytes(config, sliding, WINDOW)
    assert [(layer.kind, layer.window) for layer in result.layers] == [("sliding", WINDOW), ("full", None)] * 2
    only_sliding = measure_kv(build("mistral"), contexts=(40,))
    assert only_sliding.bytes_per_token == 0
    assert only_sliding.max_context == {"16": None, "8": None, "4": None}


def mamba_state(config):
    intermediate = config.expand * config.hidden_size
    return intermediate * (config.conv_kernel + config.state_size) * FP32_BYTES


def jamba_state(config):
    return config.mamba_expand * config.hidden_size * (config.mamba_d_conv + config.mamba_d_state) * FP32_BYTES


def bamba_state(config):
    inner = config.mamba_n_heads * config.mamba_d_head
    convolution = (inner + 2 * config.mamba_n_groups * config.mamba_d_state) * config.mamba_d_conv
    return (convolution + inner * config.mamba_d_state) * FP32_BYTES


def qwen3_next_state(config):
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    recurrent = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    return ((2 * keys + values) * config.linear_conv_kernel_dim + recurrent) * FP32_BYTES


@pytest.mark.parametrize(
    ("name", "state", "linear_layers", "attention_layers"),
    [("mamba", mamba_state, 2, 0), ("jamba", jamba_state, 2, 2), ("bamba", bamba_state, 2, 2)]
    + [("qwen3_next", qwen3_next_state, 3, 1)],
)
def test_states_of_linear_attention(name, state, linear_layers, attention_layers):
    config = CONFIGS[name]()
    result = measure_kv(build(name), contexts=(6, 40))
    assert result.fixed_bytes == linear_layers * state(config)
    assert sum(layer.state_bytes for layer in result.layers) == result.fixed_bytes
    assert [layer.kind for layer in result.layers].count("linear") == linear_layers
    attention_bytes = kv_bytes(config, attention_layers, 1) if attention_layers else 0
    assert result.bytes_per_token == attention_bytes
    assert [point.measured_bytes for point in result.points] == [
        result.fixed_bytes + context * attention_bytes for context in (6, 40)
    ]
    assert result.attention == ("GQA" if attention_layers else "none")


def test_encoder_decoder_counts_cross_attention_by_encoder_tokens():
    config = CONFIGS["t5"]()
    result = measure_kv(build("t5"), contexts=(12,))
    one = config.num_decoder_layers * 2 * config.num_heads * config.d_kv * FP32_BYTES
    assert result.bytes_per_token == result.cross_attention_bytes_per_token == one
    assert result.points[0].measured_bytes == 2 * 12 * one
    assert result.points[0].measured_prefill_bytes == (12 + 11) * one
    assert [layer.kind for layer in result.layers] == ["full", "full", "cross", "cross"]
    assert result.model_context_limit is None


def test_cache_that_grows_in_chunks():
    config = DeepseekV4Config(num_hidden_layers=2)
    model = meta_model(config, BF16)
    result = measure_kv(model, contexts=(777, 4096), device=CPU)
    assert {layer.kind for layer in result.layers} == {"compressed"}
    assert [point.predicted_bytes for point in result.points] == [
        Predictor(model)(1, context).bytes for context in (777, 4096)
    ]


# --- points, memory and what fits -----------------------------------------------------------------------------------


def test_default_contexts_stop_at_the_models_limit_and_only_cheap_ones_run():
    result = measure_kv(build("falcon"))  # 2,048 positions
    assert result.model_context_limit == 2048
    assert [point.context for point in result.points] == [512, 2048]
    assert result.points[0].difference_bytes == 0
    assert result.points[1].measured_bytes is None
    assert "--context 2048" in result.points[1].measured_reason


def test_context_past_the_limit_and_bad_sizes():
    model = build("llama")
    with pytest.raises(ProfilerError, match=r"1025.*1024"):
        measure_kv(model, contexts=(1025,))
    with pytest.raises(ProfilerError, match="1025"):
        predict_cache_bytes(model.config, 1, 1025, BF16)
    with pytest.raises(ProfilerError, match="batch 0"):
        measure_kv(model, batches=(0,))


def test_point_that_cannot_fit_is_refused_before_it_runs(monkeypatch):
    model = build("llama", dtype=BF16)
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    monkeypatch.setattr("profilers.kv_cache.memory_available_bytes", lambda device: 1_000_000)
    per_sequence = 1024 * 2 * 2 * 2 * 8 * 2  # tokens, layers, K and V, heads, head size, bytes
    need = 8 * per_sequence
    with pytest.raises(DoesNotFitError, match=f"batch 8 x context 1024 needs {need} bytes.*1000000.*--batch 7 "):
        measure_kv(model, batches=(8,), contexts=(1024,))
    with pytest.raises(DoesNotFitError, match="batch 1000 x context 512"):
        measure_kv(model, batches=(1000,))
    monkeypatch.setattr("profilers.kv_cache.memory_available_bytes", lambda device: per_sequence - 1)
    with pytest.raises(DoesNotFitError, match="LlamaForCausalLM; give a shorter --context$"):
        measure_kv(model, contexts=(1024,))


def test_what_fits_against_brute_force(monkeypatch):
    memory = 300_000
    monkeypatch.setattr("profilers.kv_cache.memory_total_bytes", lambda device: memory)
    config = CONFIGS["gemma3"]()
    model = meta_model(config, torch.float32)
    result = measure_kv(model, contexts=(4, 100), device=CPU)
    weights = sum(parameter.numel() for parameter in model.parameters()) * FP32_BYTES
    assert result.weight_bytes == weights
    assert result.memory_bytes == memory
    assert 0 < result.workspace_bytes < 100_000

    def held(tokens, bits):
        return (kv_bytes(config, 2, tokens) + kv_bytes(config, 2, min(tokens, WINDOW))) * bits / 32

    for bits in (16, 8, 4):
        room = memory - weights - result.workspace_bytes
        longest = max(tokens for tokens in range(1, 10_000) if held(tokens, bits) <= room)
        assert result.max_context[str(bits)] == longest
        for tokens in (4, 100):
            each = held(tokens, bits) + result.workspace_bytes
            assert result.max_batch[str(bits)][str(tokens)] == (memory - weights) // each
    assert result.crossover_context == min(tokens for tokens in range(1, 10_000) if held(tokens, 32) >= weights)


def test_weights_that_do_not_fit_leave_no_context(monkeypatch):
    monkeypatch.setattr("profilers.kv_cache.memory_total_bytes", lambda device: 10_000)
    result = measure_kv(meta_model(CONFIGS["llama"](), BF16), contexts=(64,), device=CPU)
    assert result.max_context == {"16": 0, "8": 0, "4": 0}
    assert result.max_batch["4"] == {"64": 0}


def test_states_are_not_quantized_with_the_cache(monkeypatch):
    monkeypatch.setattr("profilers.kv_cache.memory_total_bytes", lambda device: 1_000_000)
    result = measure_kv(meta_model(CONFIGS["jamba"](), torch.float32), contexts=(64,), device=CPU)
    room = 1_000_000 - result.weight_bytes - result.workspace_bytes - result.fixed_bytes
    assert result.max_context["4"] == int(room / (result.bytes_per_token * 4 / 32))


def test_memory_that_cannot_be_read_is_none_with_the_reason():
    result = measure_kv(meta_model(CONFIGS["llama"](), BF16), contexts=(64,), device=torch.device("meta"))
    assert result.memory_bytes is None
    assert "meta" in result.memory_reason
    assert result.max_context == {"16": None, "8": None, "4": None}


def test_run_as_an_instrument():
    model = build("llama", dtype=BF16)
    context = ProfileContext(
        model=model,
        config=model.config,
        tokenizer=None,
        device=CPU,
        dtype=BF16,
        request=ProfileRequest(batches=(2,), contexts=(16,)),
        peaks=None,
        timings=None,
    )
    result = PROFILER.run(context)
    assert isinstance(result, PROFILER.result_type)
    assert result.points[0].measured_bytes == 16 * 2 * 2 * 2 * 2 * 8 * 2


def test_405b_shape_is_counted_without_memory():
    config = LlamaConfig(
        **(LLAMA_3_8B | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126})
        | {"num_attention_heads": 128, "max_position_embeddings": 131072}
    )
    result = config_only(config, batches=(1, 8))
    assert result.bytes_per_token == 126 * 2 * 8 * 128 * 2
    assert result.points[-1].predicted_bytes == 8 * 131072 * 126 * 2 * 8 * 128 * 2
