"""The smallest models that still have every part an export must handle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig, BertModel, PreTrainedModel

from tests.conftest import save_tiny
from tests.tiny_models import CONFIGS, VOCABULARY

LAYERS = {"gemma3": 2, "jamba": 4}
"""Of models with several kinds of layers; the others get one."""


def build(name: str, **values: Any) -> PreTrainedModel:
    """Build a model of ``tests.tiny_models`` with as few layers as it needs."""
    config = CONFIGS[name]()
    layers = LAYERS.get(name, 1)
    config.num_hidden_layers = layers
    if "layer_types" in vars(config):
        config.layer_types = config.layer_types[:layers]
    for key, value in values.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32).eval()


def build_encoder() -> PreTrainedModel:
    """Build an encoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return BertModel(config).eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with the character tokenizer of the other tests."""
    save_tiny("llama", folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder
