"""Tiny compressed-tensors checkpoints, made with that library's own functions and no calibration."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

HIDDEN, INNER, VOCABULARY = 64, 96, 97


def tiny_llama(*, tied: bool = True, bias: bool = False, seed: int = 0) -> PreTrainedModel:
    """Build a llama whose layers are wide enough for groups of 32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        attention_bias=bias,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save_compressed(
    model: PreTrainedModel,
    folder: Path,
    weights: dict[str, Any] | None = None,
    inputs: dict[str, Any] | None = None,
    *,
    preset: str | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Round a model's linear layers to a scheme by their largest values, and save it as transformers does."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = model.to(dtype)
    if preset is not None:
        scheme = preset_name_to_scheme(preset, ["Linear"])
    else:
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**(weights or {})),
            input_activations=None if inputs is None else QuantizationArgs(**inputs),
        )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        apply_quantization_config(model, config)
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                _set_scales(module)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        compressor.remove_decompression_hook(model)
        model.save_pretrained(folder)
        compressor.update_config(str(folder))
    return folder


def _set_scales(module: Any) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight, arguments = module.weight.data.float(), module.quantization_scheme.weights
    rows, columns = weight.shape
    global_scale = None
    if arguments.strategy == "tensor_group":
        global_scale = generate_gparam(weight.amin(), weight.amax()).reshape(1)
        module.weight_global_scale.data.copy_(global_scale)
    if arguments.strategy == "tensor":
        parts = weight.reshape(1, -1)
    elif arguments.strategy == "block":
        parts = None
    else:
        size = arguments.group_size or columns
        parts = weight.reshape(rows, columns // size, size)
    if parts is None:
        high, wide = arguments.block_structure
        down, across = -(-rows // high), -(-columns // wide)
        padded = torch.nn.functional.pad(weight, (0, across * wide - columns, 0, down * high - rows))
        parts = padded.view(down, high, across, wide).transpose(1, 2).reshape(down, across, -1)
    scale, zero_point = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments, global_scale=global_scale)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    module.weight_zero_point.data.copy_(zero_point.reshape(module.weight_scale.shape))
