"""Encode with residual parts: the first codes, then those of what they leave over.

::

    x ──search with the parts──> codes ──decode──> ŷ
    y − ŷ, refined channels alone ──search with the residual parts──> further codes

Either search is that of a quantizer without residual parts, so what finds nearest centroids on a device serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from passes.kv_pq.by_identity import by_identity
from passes.kv_pq.quantizer import VectorQuantizer

Search = Callable[[torch.Tensor, VectorQuantizer], torch.Tensor]
"""From vectors (B, H, T, D) and a quantizer to codes (B, T, codes)."""


class Stages(NamedTuple):
    """A quantizer with residual parts as two without.

    Attributes
    ----------
    coarse : VectorQuantizer
        Without the residual parts.
    fine : VectorQuantizer
        Of E channels: those that any head refines, each head's first, then such as say nothing.
    channels : torch.Tensor
        Shape (H, E), int64: which channels of y these are.
    order : torch.Tensor
        Shape (codes,), int64: where each code of a token stands among those of both searches, one after the other.
    """

    coarse: VectorQuantizer
    fine: VectorQuantizer
    channels: torch.Tensor
    order: torch.Tensor


def encode(x: torch.Tensor, quantizer: VectorQuantizer, search: Search) -> torch.Tensor:
    """Return the codes (B, T, codes) of vectors (B, H, T, D)."""
    stages = _stages(quantizer)
    codes = search(x, stages.coarse)
    left = left_over(x, stages.coarse, codes)
    refined = left.gather(-1, stages.channels[:, None].expand(*left.shape[:3], -1))
    return torch.cat([codes, search(refined, stages.fine)], -1)[..., stages.order]


def refine(
    quantizer: VectorQuantizer,
    part: torch.Tensor,
    y: torch.Tensor,
    sample_weight: torch.Tensor,
    *,
    iterations: int,
    generator: torch.Generator,
) -> VectorQuantizer:
    """Return a quantizer with residual parts, their centroids trained on what its own leave of vectors.

    Parameters
    ----------
    quantizer : VectorQuantizer
        Without residual parts.
    part : torch.Tensor
        Shape (H, D): the residual part of each channel, -1 for none.
    y : torch.Tensor
        Shape (H, N, D): in the space of centroids.
    sample_weight : torch.Tensor
        Shape (H, N).
    iterations : int
    generator : torch.Generator
    """
    from passes.kv_pq import attention
    from passes.kv_pq.kmeans import train_centroids

    plain = VectorQuantizer(quantizer.centroids, quantizer.part, quantizer.weight, torch.zeros_like(quantizer.mean))
    left = left_over(y[None], plain, attention.encode(y[None], plain))[0]
    blank = replace(quantizer, residual_part=part, residual_centroids=torch.zeros_like(quantizer.centroids))
    _, fine, channels, _ = _stages(blank)
    at = channels[:, None]
    found, _ = train_centroids(
        left.gather(2, at.expand(-1, left.shape[1], -1)), fine.part, fine.weight, sample_weight,
        iterations=iterations, generator=generator,
    )  # fmt: skip
    own = part.gather(1, channels) >= 0
    centroids = torch.zeros_like(quantizer.centroids)
    centroids.scatter_(2, at.expand_as(found), found * own[:, None])
    return replace(blank, residual_centroids=centroids)


def left_over(x: torch.Tensor, quantizer: VectorQuantizer, codes: torch.Tensor) -> torch.Tensor:
    """Return what codes (B, T, codes) leave of vectors (B, H, T, D) in the space of centroids: the same shape."""
    y = x.float() - quantizer.mean[:, None, :]
    if quantizer.basis is not None:
        y = y @ quantizer.basis
    left = y - quantizer.decode_centroids(codes)
    if quantizer.gains is not None:
        head = torch.arange(quantizer.heads, device=codes.device)[:, None]
        left = left / quantizer.gains[head, codes[..., quantizer.gain_places].long().transpose(1, 2)][..., None]
    return left


@by_identity
def _stages(quantizer: VectorQuantizer) -> Stages:
    part, centroids = quantizer.residual_part, quantizer.residual_centroids
    assert part is not None and centroids is not None
    coarse = replace(quantizer, residual_part=None, residual_centroids=None)
    most = max(1, int((part >= 0).sum(1).max()))
    # Refined channels first. What fills a head up is a part of its own that weighs nothing; its code is dropped.
    channels = (part < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    own = part.gather(1, channels)
    filling = own < 0
    counts = own.amax(1, keepdim=True) + 1
    at = channels[:, None].expand(-1, centroids.shape[1], -1)
    fine = VectorQuantizer(
        centroids.gather(2, at).masked_fill(filling[:, None], 0.0),
        torch.where(filling, counts, own),
        quantizer.weight.gather(1, channels).masked_fill(filling, 0.0),
        torch.zeros_like(own, dtype=quantizer.mean.dtype),
    )
    gain = int(quantizer.gains is not None)
    order: list[int] = []
    for head, (parts, refining) in enumerate(zip(quantizer.parts, quantizer.residual_parts, strict=True)):
        first, second = coarse.offsets[head], coarse.codes + fine.offsets[head]
        order += [*range(first, first + parts), *range(second, second + refining)]
        order += [first + parts] * gain
    return Stages(coarse, fine, channels, torch.tensor(order, device=part.device))
