"""Uniform (round-to-nearest) quantization in groups that share a scale and a zero, both in 16 bits.

KIVI (Liu et al., ICML 2024, section 3): keys by channel, a group being one channel of successive tokens; values by
token, a group being successive channels of one token. ``scale = (max - min) / (2^b - 1)``, ``zero = min``. Departures:
no recent block in full precision, so the last, shorter group of tokens is quantized too; scales and zeros in float16.

What transformers' quanto cache computes is grouped by token for keys and values both, in the same arithmetic. Its HQQ
cache moves the zero of each group (Badri & Shaji 2023, "Half-quadratic quantization"): with the
shrinkage ``shrink(e) = sign(e) · max(0, |e| - |e|^(p - 1) / beta)`` of the errors ``e = x - x̂``, the zero becomes the
mean of ``codes - (x - shrink(e)) / scale``, round after round while the mean absolute error falls.
"""

from __future__ import annotations

import torch

from tests.benchmarks.kv_baselines.base import SCALE_BITS, Baseline

HQQ_ROUNDS, HQQ_NORM, HQQ_BETA, HQQ_GROWTH = 20, 0.7, 10.0, 1.01
"""The published settings."""


def rounded(x: torch.Tensor, bits: float, group: int) -> torch.Tensor:
    """Quantize groups of successive elements of the last dimension and return what they stand for, float32."""
    return torch.cat([_one_group_each(part, bits) for part in _groups(x.float(), group)], -1)


def _groups(x: torch.Tensor, group: int) -> list[torch.Tensor]:
    """Return x (..., N) as (..., N // group * group) in whole groups, and the rest."""
    whole = x.shape[-1] // group * group
    parts = [x[..., :whole].unflatten(-1, (-1, group))] if whole else []
    return parts + ([x[..., whole:].unsqueeze(-2)] if whole < x.shape[-1] else [])


def _one_group_each(x: torch.Tensor, bits: float) -> torch.Tensor:
    half = torch.finfo(torch.float16)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(half.tiny, half.max).half().float()
    zero = low.half().float()
    codes = ((x - zero) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + zero).flatten(-2)


def half_quadratic(x: torch.Tensor, bits: float, group: int) -> torch.Tensor:
    """Quantize groups of successive elements of the last dimension as HQQ does; float32."""
    half = torch.finfo(torch.float16)
    x = x.float().unflatten(-1, (-1, group))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(half.tiny, half.max).half().float()
    zero = -low / scale
    best, error, beta = zero, torch.inf, HQQ_BETA
    for _ in range(HQQ_ROUNDS):
        codes = (x / scale + zero).round().clamp(0, 2**bits - 1)
        residual = x - (codes - zero) * scale
        found = residual.abs().mean().item()
        if found >= error:
            break
        best, error = zero, found
        size = residual.abs().clamp_min(half.tiny)
        shrunk = residual.sign() * (size - size ** (HQQ_NORM - 1) / beta).clamp_min(0)
        zero = (codes - (x - shrunk) / scale).mean(-1, keepdim=True)
        beta *= HQQ_GROWTH
    best = best.clamp(-half.max, half.max).half().float()
    codes = (x / scale + best).round().clamp(0, 2**bits - 1)
    return ((codes - best) * scale).flatten(-2)


class KIVI(Baseline):
    """Keys by channel, values by token."""

    name = "KIVI-style uniform"

    def __init__(self, bits: int, group: int) -> None:
        self.bits = bits
        self.group = group
        self.name = f"{type(self).name}, groups of {group}"

    def effective_bits(self, head_dim: int) -> float:
        keys = self.bits + 2 * SCALE_BITS / self.group
        values = self.bits + 2 * SCALE_BITS / min(self.group, head_dim)
        return (keys + values) / 2

    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            rounded(keys.transpose(-1, -2), self.bits, self.group).transpose(-1, -2),
            rounded(values, self.bits, self.group),
        )


class PerToken(Baseline):
    """Keys and values by token: the arithmetic of transformers' quanto cache, which groups 64 channels of a token."""

    name = "int by token (arithmetic of transformers' quanto cache)"

    def __init__(self, bits: int, group: int = 64) -> None:
        self.bits = bits
        self.group = group

    def effective_bits(self, head_dim: int) -> float:
        return self.bits + 2 * SCALE_BITS / min(self.group, head_dim)

    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rounded(keys, self.bits, self.group), rounded(values, self.bits, self.group)


class HalfQuadratic(PerToken):
    """As :class:`PerToken`, with HQQ's choice of zeros."""

    name = "int by token (arithmetic of transformers' HQQ cache)"

    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = [min(self.group, x.shape[-1]) for x in (keys, values)]
        return half_quadratic(keys, self.bits, groups[0]), half_quadratic(values, self.bits, groups[1])
