"""Tiny real models, built offline from configs: one for every kind of layer the instruments must handle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BambaConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    T5Config,
)

VOCABULARY = 97
WINDOW = 16

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **(_COMMON | {"num_hidden_layers": 4}),
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=WINDOW),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=1024, bos_token_id=1, eos_token_id=2
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        new_decoder_architecture=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_COMMON, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **(_COMMON | {"num_key_value_heads": 4}),
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "diffllama": lambda: DiffLlamaConfig(**_COMMON),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, bos_token_id=1, eos_token_id=2
    ),
    "jamba": lambda: JambaConfig(
        **(_COMMON | {"num_hidden_layers": 4}),
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "bamba": lambda: BambaConfig(
        **(_COMMON | {"num_hidden_layers": 4}),
        attn_layer_indices=[1, 3],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_expand=2,
        mamba_n_groups=1,
        mamba_chunk_size=16,
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **(_COMMON | {"num_hidden_layers": 4}),
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    ),
}


def build(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """Build the tiny model called ``name`` with seeded random weights, in evaluation mode."""
    config = CONFIGS[name]()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype)
    return model.eval()
