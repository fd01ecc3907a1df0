"""Tiny checkpoints on disk, written without the code under test."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests import tiny_models

GGUF_CONFIG = LlamaConfig(
    vocab_size=288,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
# token ids in the GGUF below; distinct, so that a mix-up shows
SPECIAL_TOKENS = {"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}


def word_tokenizer(vocabulary: int = tiny_models.VOCABULARY) -> PreTrainedTokenizerFast:
    """Build a tokenizer that maps ``w5`` to 5."""
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2")


def save(
    folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, **options: object
) -> PreTrainedModel:
    """Save the tiny model called ``name`` with a tokenizer and return it."""
    model = tiny_models.build(name, dtype=dtype)
    model.save_pretrained(folder, **options)
    word_tokenizer().save_pretrained(folder)
    return model


def byte_tokens() -> list[str]:
    """Return GPT-2's visible stand-ins for the 256 bytes, in byte order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def write_gguf(path: Path, quantized: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0) -> PreTrainedModel:
    """Write a tiny llama as GGUF, matrices in ``quantized``, and return the model that its values stand for.

    Rotary pairs lie side by side in GGUF and half a head apart in transformers, so the rows of q and k are moved.
    Quantization runs along rows, so it does not matter whether it happens before or after.
    """
    config = GGUF_CONFIG
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    special = list(SPECIAL_TOKENS.values())
    tokens = [*special, *byte_tokens(), "Ġa", "ab"]
    tokens += [f"<unused{index}>" for index in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(tokens) - 4))
    writer.add_token_merges(["Ġ a", "a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.numpy()
            if values.ndim == 2:
                packed = gguf.quants.quantize(values, quantized)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, quantized)))
                values = parameter.numpy()
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if part in name:
                    halves = values.reshape(heads, 2, config.head_dim // 2, config.hidden_size)
                    values = halves.swapaxes(1, 2).reshape(values.shape)
            stored = np.ascontiguousarray(values)
            target = names.get_name(name, try_suffixes=(".weight",))
            if values.ndim == 2:
                packed = gguf.quants.quantize(stored, quantized)
                writer.add_tensor(target, packed, raw_shape=packed.shape, raw_dtype=quantized)
            else:
                writer.add_tensor(target, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
