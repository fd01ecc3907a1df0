"""A Llama model's weights in other architectures, for tables of quality where no other weights are at hand.

::

    original   K, V: H heads, each read by G query heads       every layer sees everything
    mha        K, V: H · G heads, G equal ones side by side    every layer sees everything
    sliding    K, V: as in the original                        even layers see the last W tokens, odd ones everything

**mha** (``LlamaForCausalLM`` with as many KV heads as query heads) is the same function, to rounding: the rows of the K
and V projections are repeated for each query head, as grouped-query attention repeats keys and values when it runs. It
shows that methods handle a cache of that shape, with G times as many bytes and codebooks, and it lets a method that
weighs errors by head (kv-pq) learn from each query head's own gradients what grouped heads must share. It is not a
model trained with multi-head attention. Its heads are not independent: G at a time they hold equal vectors, so a method
that quantizes every vector, or every head, by itself makes the same errors as in the original, and its row is the
original's; nothing here says how methods cope with more, and more varied, heads.

**sliding** (``Qwen2ForCausalLM``, query, key and value biases zero) is the same function for texts of at most W tokens
and another beyond: layers trained to see everything, the first token where attention sinks among it, lose what is older
than W tokens. So perplexity rises before anything is quantized, and rows compare with this model's own original, never
with the other architectures'. Only the full layers are quantized, by every method. It shows that methods work in a
model that mixes both kinds, through another modeling file, and what they cost where half of the layers carry the whole
error. It is not a model trained with sliding windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SLIDING_WINDOW = 256
"""W, tokens, the query's own included."""

_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What Llama's and Qwen2's configs call alike and mean alike."""


def mha(model: PreTrainedModel) -> PreTrainedModel:
    """Return a Llama model that keeps keys and values for every query head; the same function."""
    source = _llama(model)
    groups = source.config.num_attention_heads // source.config.num_key_value_heads
    config = LlamaConfig(**source.config.to_dict() | {"num_key_value_heads": source.config.num_attention_heads})
    weights = source.state_dict()
    for name, tensor in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = tensor.unflatten(0, (source.config.num_key_value_heads, -1))
            weights[name] = heads.repeat_interleave(groups, dim=0).flatten(0, 1)
    return _made(LlamaForCausalLM, config, weights, source)


def sliding(model: PreTrainedModel, window: int = SLIDING_WINDOW) -> PreTrainedModel:
    """Return a Qwen2 model whose layers 0, 2, 4, … see the last ``window`` tokens; the same function up to there."""
    source = _llama(model)
    if source.config.attention_bias or source.config.mlp_bias:
        raise ValueError("a Llama model with biases is no Qwen2 model: leave --architecture sliding out")
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(source.config.num_hidden_layers)]
    config = Qwen2Config(
        **{name: getattr(source.config, name) for name in _SHARED},
        use_sliding_window=True,
        sliding_window=window,
        layer_types=kinds,
    )
    weights = source.state_dict()
    for name, tensor in list(weights.items()):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name.removesuffix("weight") + "bias"] = tensor.new_zeros(tensor.shape[0])
    return _made(Qwen2ForCausalLM, config, weights, source)


ARCHITECTURES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {"mha": mha, "sliding": sliding}


def _llama(model: PreTrainedModel) -> LlamaForCausalLM:
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"{type(model).__name__} is not LlamaForCausalLM: leave --architecture out")
    return model


def _made(
    kind: Any, config: PreTrainedConfig, weights: dict[str, torch.Tensor], source: PreTrainedModel
) -> PreTrainedModel:
    made: PreTrainedModel = kind._from_config(
        config, dtype=source.dtype, attn_implementation=source.config._attn_implementation
    )
    made.load_state_dict(weights)
    return made.to(source.device).eval()
