"""A tokenizer, text and models whose attention is not uniform, for the instruments that read attention."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny_models
from tests.tiny_models import VOCABULARY

BOS = 1
SHARPENED = ("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "query_key_value", "c_attn", ".q.", ".k.", "q_norm", "k_norm")


def sharp(name, factor=8.0):
    """Build a tiny model whose heads do not attend uniformly, unlike a freshly initialized one's."""
    model = tiny_models.build(name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in SHARPENED):
                parameter.mul_(factor).add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(5)))
    return model


def tiny_tokenizer(*, bos=True):
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "w1"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", **special)


def words(count, seed=0):
    generator = np.random.default_rng(seed)
    return " ".join(f"w{index}" for index in generator.integers(3, VOCABULARY, count))
