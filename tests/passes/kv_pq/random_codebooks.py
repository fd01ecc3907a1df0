"""Codebooks with random centroids and uneven parts, and attention over them in float64."""

from __future__ import annotations

import torch

from passes.kv_pq.codebooks import LayerCodebooks
from passes.kv_pq.quantizer import CENTROIDS, VectorQuantizer
from passes.kv_pq.rope import Rope


def quantizer(
    heads: int,
    dim: int,
    parts: int,
    *,
    gains: bool = False,
    basis: bool = False,
    residual: int = 0,
    seed: int = 0,
    steps: int | None = 64,
) -> VectorQuantizer:
    """Return codebooks whose parts are random sets of channels, as uneven as chance makes them, fewer in later heads.

    The first head has ``residual`` residual parts, which refine half of its channels, each later head one part less.
    Centroids and means are multiples of ``1 / steps``, so that tables of 16 significant bits hold them and their sums;
    None: any float32.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def stepped(values: torch.Tensor) -> torch.Tensor:
        return values if steps is None else (values * steps).round() / steps

    part = torch.stack(
        [
            torch.cat([torch.arange(count), torch.randint(count, (dim - count,), generator=generator)])[
                torch.randperm(dim, generator=generator)
            ]
            for count in (max(1, parts - head * (parts // 4)) for head in range(heads))
        ]
    )
    given = {}
    if gains:
        given["gains"] = torch.linspace(0.25, 4, CENTROIDS).expand(heads, -1).contiguous()
    if basis:
        given["basis"] = normal(heads, dim, dim) / dim**0.5 + torch.eye(dim)
        given["inverse"] = torch.linalg.inv(given["basis"].double()).float()
    if residual:
        refined = torch.full((heads, dim), -1)
        for head in range(heads):
            count = max(0, residual - head)
            some = torch.randperm(dim, generator=generator)[: dim // 2 if count else 0]
            refined[head, some] = torch.arange(len(some)) % max(1, count)
        given["residual_part"] = refined
        given["residual_centroids"] = stepped(normal(heads, CENTROIDS, dim) / 4) * (refined >= 0)[:, None]
    return VectorQuantizer(
        centroids=stepped(normal(heads, CENTROIDS, dim)),
        part=part,
        weight=normal(heads, dim).abs() + 0.1,
        mean=stepped(normal(heads, dim)),
        **given,
    )


def random_codes(side: VectorQuantizer, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return codes of ``length`` slots."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, side.codes)
    return torch.randint(CENTROIDS, shape, generator=generator, dtype=torch.uint8)


def rope(width: int, *, interleaved: bool = False) -> Rope:
    """Return the usual frequencies."""
    return Rope(10_000.0 ** (-torch.arange(0, width, 2) / width), interleaved)


def attend64(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    layer: LayerCodebooks,
    *,
    start: torch.Tensor,
    stop: int,
    offset: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention over the decoded vectors and the log-sum-exp of its scores, all in float64."""
    group = query.shape[1] // layer.keys.heads
    slots = torch.arange(key_codes.shape[1])
    keys = layer.keys.decode(key_codes, torch.float64)
    values = layer.values.decode(value_codes, torch.float64).repeat_interleave(group, 1)
    if layer.rope is not None:
        keys = turned64(layer.rope, keys, slots[None] - offset[:, None])
    scores = scale * query.double() @ keys.repeat_interleave(group, 1).mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    seen = (slots >= start[:, None]) & (slots < stop)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return weights @ values, lse


def turned64(rope: Rope, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return vectors (B, H, T, D) turned to positions (B, T) as complex numbers."""
    pairs = rope.pairs()
    numbers = torch.complex(x[..., pairs[:, 0]], x[..., pairs[:, 1]])
    numbers = numbers * torch.exp(1j * positions[:, None, :, None] * rope.frequencies.double())
    out = x.clone()
    out[..., pairs[:, 0]], out[..., pairs[:, 1]] = numbers.real, numbers.imag
    return out
