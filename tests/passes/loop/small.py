"""Tiny models of four to six layers, one for every kind of linear and attention that looping must handle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from passes.base import PassContext, PassRecord
from passes.loop import LoopPass
from profilers.text import TokenStream

VOCABULARY = 97
CPU = torch.device("cpu")
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "tied": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SHAPE),  # biases on q, k and v
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=256, pad_token_id=0, **_SPECIAL
    ),
    "neox": lambda: GPTNeoXConfig(**{key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        **_SPECIAL,
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, **_SPECIAL
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "llama6": lambda: LlamaConfig(**_SHAPE | {"num_hidden_layers": 6}),
    "llama1": lambda: LlamaConfig(**_SHAPE | {"num_hidden_layers": 1}),
}
DENSE = ("llama", "tied", "qwen2", "gpt2", "neox", "opt", "falcon")


def build(name: str, *, dtype: torch.dtype = torch.float32, spread: float = 0.15, seed: int = 0) -> PreTrainedModel:
    """Build a model with seeded random weights large enough that every layer matters."""
    config = CONFIGS[name]()
    config.initializer_range = spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()


def ids(batch: int = 2, length: int = 12, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(tokens: int = 4000) -> TokenStream:
    return TokenStream(ids(1, tokens, seed=1)[0], "random tokens")


def applied(
    folder: Path, name: str = "llama", model: PreTrainedModel | None = None, **values: Any
) -> tuple[LoopPass, Any, PassRecord]:
    """Run the pass as the pipeline does; return it, the looped model and the record."""
    item = LoopPass.from_mapping({"samples": 8, "length": 32, "rank": 4} | values)
    assert isinstance(item, LoopPass)
    model = build(name) if model is None else model
    item.check_complete()
    item.check(model)
    record = item.apply(model, PassContext(None, CPU, text(), folder / "work", seed=3))
    return item, model, record
