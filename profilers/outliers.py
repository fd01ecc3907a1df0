"""Outliers in weights, keys, values and hidden states, and the quantization granularity that suits them.

Every tensor is looked at as a table of channels x tokens::

                 tokens (B·T)                     what is a channel        what is a token
               ┌─────────────┐        key, value  head x head dimension    position in the cache
      channels │             │        hidden      hidden dimension         position
               └─────────────┘        weight      output feature (row)     input feature (column)

See ``docs/profilers/outliers.md``.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from profilers.base import ProfileContext, Profiler
from profilers.phases import check_context, context_limit, prefill
from profilers.text import token_stream
from profilers.weights import PACKED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = 4
TOKENS = 512
"""Tokens of text run through the model, at most."""
NOISE_MARGIN = 10**0.1
"""A granularity suits a tensor when the other one makes more noise by more than this factor (1 dB)."""
MAXIMUM_ELEMENTS = 1 << 22
"""Larger tensors are represented by evenly spaced channels, in all figures but the maximum."""
CACHES = (("self_attention_cache", "self "), ("cross_attention_cache", "cross "))


@dataclass(frozen=True)
class OutlierRow:
    """Statistics of one tensor.

    ``channel_entropy_bits_*`` is the entropy of the codes in a channel, averaged over channels, under uniform
    quantization at ``OutliersResult.bits`` with a scale for each channel or each token (MILLION, Fig. 2).

    Attributes
    ----------
    kind : str
        ``"weight"``, ``"key"``, ``"value"`` or ``"hidden"``.
    name : str
        Of the parameter, of the layer, or of the cache layer.
    layer : int or None
        First number in the name.
    max_over_median : float or None
        Largest absolute value over the (lower) median absolute value.
    kurtosis : float or None
        Pearson's: 3 for a normal distribution.
    channel_entropy_bits_per_channel_scale, channel_entropy_bits_per_token_scale : float or None
        Bits; at most ``bits``.
    suits : str or None
        ``"per-channel"``, ``"per-token"`` or ``"either"``: the granularity with the lower noise-to-signal ratio, by
        more than 1 dB. (Entropy alone cannot decide: see ``docs/profilers/outliers.md``.)
    noise_to_signal_per_channel_scale, noise_to_signal_per_token_scale : float or None
        Quantization error of a channel over the channel's variance, averaged over channels.
    channels, tokens : int
        Size of the table of which these are the statistics.
    total_channels : int
        Channels of the tensor; more than ``channels`` where those were sampled.
    reason : str or None
        Why figures are None.
    """

    kind: str
    name: str
    layer: int | None
    max_over_median: float | None
    kurtosis: float | None
    channel_entropy_bits_per_channel_scale: float | None
    channel_entropy_bits_per_token_scale: float | None
    suits: str | None
    noise_to_signal_per_channel_scale: float | None = None
    noise_to_signal_per_token_scale: float | None = None
    channels: int = 0
    tokens: int = 0
    total_channels: int = 0
    reason: str | None = None


@dataclass(frozen=True)
class OutliersResult:
    """All rows.

    Attributes
    ----------
    bits : int
        Of the uniform quantization behind the entropies.
    tokens : int
        Tokens run through the model.
    text : str
        What the tokens were.
    rows : tuple of OutlierRow
    notes : tuple of str
        What was left out, and why.
    """

    bits: int
    tokens: int
    text: str
    rows: tuple[OutlierRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScaleQuality:
    """How well one granularity of scales suits a tensor.

    Attributes
    ----------
    channel_entropy_bits : float
        Shannon entropy of the codes in a channel, averaged over channels (MILLION, Fig. 2).
    channel_noise_to_signal : float or None
        Mean squared error of a channel over its variance, averaged over channels. ``None`` if all are constant.
    """

    channel_entropy_bits: float
    channel_noise_to_signal: float | None


def scale_quality(table: torch.Tensor, bits: int, scale_per: str) -> ScaleQuality:
    """Quantize uniformly with an offset and one scale per channel or per token, and say what is left of each channel.

    A code is ``round((x - min) / (max - min) * (2**bits - 1))`` with the minimum and maximum of the channel or of the
    token.

    Parameters
    ----------
    table : torch.Tensor
        Shape (channels, tokens), float32.
    bits : int
        1 to 8.
    scale_per : {"channel", "token"}
        What shares a minimum and maximum.
    """
    levels = 1 << bits
    channels, tokens = table.shape
    low, high = torch.aminmax(table, dim={"channel": 1, "token": 0}[scale_per], keepdim=True)
    step = (high - low) / (levels - 1)
    codes = ((table - low) / torch.where(step > 0, step, 1.0)).round_()

    error = torch.addcmul(low, codes, step).sub_(table).square_().mean(dim=1)
    variance = table.var(dim=1, correction=0)
    varies = variance > 0
    noise = float((error[varies] / variance[varies]).double().mean()) if bool(varies.any()) else None

    bins = codes.int()
    bins += torch.arange(channels, dtype=torch.int32, device=table.device)[:, None] * levels
    counts = torch.bincount(bins.flatten(), minlength=channels * levels).view(channels, levels)
    nats = torch.special.entr(counts.double() / tokens).sum(dim=1)
    return ScaleQuality(float(nats.mean()) / math.log(2), noise)


def tensor_statistics(table: torch.Tensor, kind: str, name: str, bits: int = BITS) -> OutlierRow:
    """Return the outlier statistics of one tensor.

    Parameters
    ----------
    table : torch.Tensor
        Shape (channels, tokens), any floating-point type. Above ``MAXIMUM_ELEMENTS`` evenly spaced channels stand for
        all of them, except in the maximum.
    kind, name : str
        Copied to the row.
    bits : int
        Of the uniform quantization.
    """
    channels, tokens = table.shape
    low, high = (float(bound) for bound in torch.aminmax(table))
    kept = max(1, min(channels, MAXIMUM_ELEMENTS // tokens))
    row = replace(_empty_row(kind, name), channels=kept, tokens=tokens, total_channels=channels)
    if not (math.isfinite(low) and math.isfinite(high)):
        return replace(row, reason="it holds NaN or infinity")
    if low == high:
        return replace(row, reason=f"all its values are {low:g}")
    if kept < channels:
        table = table[torch.linspace(0, channels - 1, kept, device=table.device).long()]
    table = table.float()
    median = _lower_median(table.abs().flatten())
    kurtosis = _kurtosis(table)
    by_channel, by_token = scale_quality(table, bits, "channel"), scale_quality(table, bits, "token")
    return replace(
        row,
        max_over_median=max(-low, high) / median if median > 0 else None,
        kurtosis=kurtosis,
        channel_entropy_bits_per_channel_scale=by_channel.channel_entropy_bits,
        channel_entropy_bits_per_token_scale=by_token.channel_entropy_bits,
        noise_to_signal_per_channel_scale=by_channel.channel_noise_to_signal,
        noise_to_signal_per_token_scale=by_token.channel_noise_to_signal,
        suits=_suits(by_channel.channel_noise_to_signal, by_token.channel_noise_to_signal),
        reason=None if median > 0 else "the median of its absolute values is 0",
    )


def _empty_row(kind: str, name: str) -> OutlierRow:
    number = re.search(r"\d+", name)
    return OutlierRow(kind, name, int(number.group()) if number else None, None, None, None, None, None)


def _suits(by_channel: float | None, by_token: float | None) -> str | None:
    if by_channel is None or by_token is None:
        return None
    if by_channel * NOISE_MARGIN < by_token:
        return "per-channel"
    return "per-token" if by_token * NOISE_MARGIN < by_channel else "either"


def _kurtosis(values: torch.Tensor) -> float | None:
    """Return Pearson's kurtosis, summed in float64; None for a constant."""
    centred = values - values.mean(dtype=torch.float64).float()
    variance = float(centred.square().mean(dtype=torch.float64))
    if variance == 0:
        return None
    standard = centred.div_(math.sqrt(variance))  # at most sqrt(N), so that its fourth power cannot overflow
    return float(standard.square_().square_().mean(dtype=torch.float64))


def _lower_median(values: torch.Tensor) -> float:
    """Return the median, of an even number the smaller middle one; numpy's partition is 8 times faster on a CPU."""
    if values.device.type == "cpu":
        middle = (values.numel() - 1) // 2
        return float(np.partition(values.numpy(), middle)[middle])
    return float(values.median())


def measure_outliers(
    model: PreTrainedModel, input_ids: torch.Tensor, bits: int = BITS, *, text: str = "given tokens"
) -> OutliersResult:
    """Profile the outliers of a live model.

    One forward; hooks come off afterwards. Tensors are reduced to a row each as they appear, so memory does not grow
    with the number of layers.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    input_ids : torch.Tensor
        Shape (batch, tokens), on the model's device.
    bits : int
        Of the uniform quantization behind the channel entropies.
    text : str
        What the tokens were.

    Returns
    -------
    OutliersResult
        Rows of weights, then keys and values, then hidden states, each in layer order.

    Raises
    ------
    ProfilerError
        If there are more tokens than the model has positions.
    """
    check_context(model.config, input_ids.shape[1])
    weights = [_weight_row(name, weight, bits) for name, weight in _linear_weights(model)]
    hidden: list[OutlierRow] = []
    notes = ["embeddings, convolutions, norms and biases have no rows: they are not weights of a matrix product"]
    packed = sum(hasattr(module, PACKED) for module in model.modules())
    if packed:
        notes.append(f"{packed} layers have no rows: their weights are quantized and packed for a kernel")
    handles = [
        module.register_forward_hook(functools.partial(_hidden_hook, hidden, name, bits))
        for name, module in _layers(model)
    ]
    try:
        state = prefill(model, *input_ids.shape, input_ids=input_ids)
    finally:
        for handle in handles:
            handle.remove()
    if not handles:
        notes.append(f"hidden states: {type(model).__name__} has no layers of transformers' common layer class")
    caches, cache_notes = _cache_rows(model.config, state.cache, bits)
    return OutliersResult(bits, input_ids.numel(), text, (*weights, *caches, *hidden), (*notes, *cache_notes))


def _linear_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each matrix that multiplies activations once, output features first."""
    from transformers.pytorch_utils import Conv1D

    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Embedding, *convolutions)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            is_matrix = parameter.dim() == 2 and own == "weight"
            is_experts = parameter.dim() == 3 and not own.endswith("bias")
            if not (is_matrix or is_experts) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            inputs_first = isinstance(module, Conv1D) or (is_experts and getattr(module, "is_transposed", False))
            yield f"{path}.{own}", parameter.detach().mT if inputs_first else parameter.detach()


def _weight_row(name: str, weight: torch.Tensor, bits: int) -> OutlierRow:
    table = weight.flatten(0, -2)
    if table.is_meta or not table.is_floating_point() or table.itemsize < 2:
        reason = "its weights are not on this device" if table.is_meta else f"it is stored as {table.dtype}"
        return replace(_empty_row("weight", name), total_channels=table.shape[0], reason=reason)
    return tensor_statistics(table, "weight", name, bits)


def _layers(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    from transformers.modeling_layers import GradientCheckpointingLayer  # what every stacked layer derives from

    return [(name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]


def _hidden_hook(
    rows: list[OutlierRow], name: str, bits: int, _module: torch.nn.Module, _inputs: Any, output: Any
) -> None:
    states = output if isinstance(output, torch.Tensor) else output[0]
    rows.append(tensor_statistics(states.flatten(0, -2).T.contiguous(), "hidden", name, bits))


def _cache_rows(config: Any, cache: Any, bits: int) -> tuple[list[OutlierRow], list[str]]:
    """Return rows of the keys and values that the cache holds, and notes on layers that hold something else."""
    parts = [(prefix, getattr(cache, key)) for key, prefix in CACHES if hasattr(cache, key)] or [("", cache)]
    rows: list[OutlierRow] = []
    latent, other, windowed = [], [], []
    for prefix, part in parts:
        for index, layer in enumerate(getattr(part, "layers", ())):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.numel() == 0:
                other.append(f"{prefix}{index}")
            elif _is_latent(config, keys, values):
                latent.append(f"{prefix}{index}")
            else:
                if getattr(layer, "is_sliding", False):
                    windowed.append(f"{prefix}{index}")
                for kind, states in (("key", keys), ("value", values)):
                    table = states.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)  # (heads · d, batch · tokens)
                    rows.append(tensor_statistics(table, kind, f"{prefix}layer {index}", bits))
    notes = []
    if latent:
        notes.append(f"layers {', '.join(latent)}: the cache holds latents of MLA, not keys and values")
    if other:
        notes.append(f"layers {', '.join(other)}: no keys and values (linear attention or state space)")
    if windowed:
        notes.append(f"layers {', '.join(windowed)}: keys and values of the sliding window only")
    return rows, notes


def _is_latent(config: Any, keys: torch.Tensor, values: torch.Tensor) -> bool:
    text = config.get_text_config(decoder=True)
    sizes = {getattr(text, "kv_lora_rank", None), getattr(text, "qk_rope_head_dim", None)}
    return None not in sizes and keys.shape[1] == 1 and {keys.shape[-1], values.shape[-1]} == sizes


def run(context: ProfileContext) -> OutliersResult:
    """Profile the outliers of a live model on text."""
    vocabulary = context.config.get_text_config(decoder=True).vocab_size
    stream = token_stream(context.tokenizer, vocabulary, context.request.text, context.request.seed)
    length = min(TOKENS, context_limit(context.config) or TOKENS, stream.ids.numel())
    ids = stream.windows(1, length).to(context.model.device)
    return measure_outliers(context.model, ids, text=stream.name)


PROFILER = Profiler(
    name="outliers",
    title="Outliers",
    run=run,
    result_type=OutliersResult,
    paper="MILLION (DAC 2025), Fig. 2",
)
