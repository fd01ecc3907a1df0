"""k-means of every part of every head at once, in the terms of a :class:`~passes.kv_pq.quantizer.VectorQuantizer`.

The assignment step is the quantizer's own encoding (in C++ where a compiler is found), so training and use agree on
what "nearest" means; the update is one scatter over all channels.
"""

from __future__ import annotations

import torch

from passes.kv_pq import attention
from passes.kv_pq.quantizer import CENTROIDS, VectorQuantizer

STALL = 2e-6
"""Gain of a round, as a share of what the vectors hold, below which the search ends."""
COARSE_VECTORS = 4096
"""Of each head that the first rounds see, at most: enough to find where centroids belong."""
FINE_ROUNDS = 2
"""Over all vectors, which then only have to move centroids a little: fewer vectors would leave them where chance put
those, and text that was not seen pays for that."""


def train_centroids(
    y: torch.Tensor,
    part: torch.Tensor,
    weight: torch.Tensor,
    sample_weight: torch.Tensor,
    *,
    iterations: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, int]:
    """Return centroids that minimize the weighted squared error.

    Centroids start on vectors drawn in proportion to the weighted square of their length (the first step of k-means++,
    Arthur and Vassilvitskii 2007, for all at once), those of a single channel where the best scalar quantizer has its
    levels. A centroid that no vector chooses goes to a vector whose error is among the largest.

    Parameters
    ----------
    y : torch.Tensor
        Shape (H, N, D), float32; N at least 256.
    part : torch.Tensor
        Shape (H, D), int64.
    weight : torch.Tensor
        Shape (H, D): of channels.
    sample_weight : torch.Tensor
        Shape (H, N): of vectors.
    iterations : int
        Rounds at most over a sample of the vectors, and where there are more, ``FINE_ROUNDS`` at most over all.
    generator : torch.Generator
        Of the CPU.

    Returns
    -------
    centroids : torch.Tensor
        Shape (H, 256, D), float32.
    rounds : int
        Done.
    """
    step = -(-y.shape[1] // COARSE_VECTORS)
    coarse, coarse_weight = y[:, ::step], sample_weight[:, ::step]
    centroids = _spread_singles(_drawn(coarse, part, weight, coarse_weight, generator), coarse, part)
    centroids, done = _lloyd(centroids, coarse, part, weight, coarse_weight, iterations)
    if step > 1:
        centroids = _spread_singles(centroids, y, part)
        centroids, more = _lloyd(centroids, y, part, weight, sample_weight, min(iterations, FINE_ROUNDS))
        done += more
    return centroids, done


def _lloyd(
    centroids: torch.Tensor,
    y: torch.Tensor,
    part: torch.Tensor,
    weight: torch.Tensor,
    sample_weight: torch.Tensor,
    iterations: int,
) -> tuple[torch.Tensor, int]:
    """Return centroids after so many rounds at most, and the rounds done."""
    blank = torch.zeros_like(weight)
    weighed = y * sample_weight[..., None]
    energy = float((weighed * y * weight[:, None]).sum(dtype=torch.float64))
    done = 0
    while done < iterations:
        done += 1
        quantizer = VectorQuantizer(centroids, part, weight, blank)
        codes = attention.encode(y[None], quantizer)[0].long()
        moved, counted = torch.zeros_like(centroids), torch.empty_like(centroids)
        chosen = []
        for head, (begin, parts) in enumerate(zip(quantizer.offsets, quantizer.parts, strict=False)):
            own = codes[:, begin : begin + parts]
            chosen.append(own.index_select(1, part[head]))
            moved[head].scatter_add_(0, chosen[-1], weighed[head])
            mass = y.new_zeros(CENTROIDS, parts).scatter_add_(0, own, sample_weight[head, :, None].expand_as(own))
            counted[head] = mass.index_select(1, part[head])
        moved /= counted.clamp_min(1e-30)
        gain = float(((moved - centroids).square() * counted * weight[:, None]).sum(dtype=torch.float64))
        empty = counted <= 0
        if bool(empty.any()):
            lost = (y - centroids.gather(1, torch.stack(chosen))).square() * weight[:, None]
            moved = torch.where(empty, _worst(y, lost, part, sample_weight), moved)
        elif gain <= STALL * energy:
            centroids = moved
            break
        centroids = moved
    return centroids, done


def _part_sums(values: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return sums over the channels of each part: (H, N, D) to (H, N, M)."""
    heads, count, _ = values.shape
    out = values.new_zeros(heads, count, int(part.max()) + 1)
    return out.scatter_add_(2, part[:, None, :].expand_as(values), values)


def _rows(y: torch.Tensor, rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return for each part the vectors that ``rows`` (H, 256, M) names: (H, 256, D)."""
    return y.gather(1, rows.gather(2, part[:, None, :].expand(-1, rows.shape[1], -1)))


def _drawn(
    y: torch.Tensor,
    part: torch.Tensor,
    weight: torch.Tensor,
    sample_weight: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    energy = _part_sums(y.square() * weight[:, None], part) * sample_weight[..., None]
    # Half by error, half evenly, so that a few long vectors do not take all.
    chance = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    chance = chance + (sample_weight / sample_weight.sum(1, keepdim=True))[..., None]
    # Gumbel's trick draws without replacement for all parts at once.
    noise = torch.rand(chance.shape, generator=generator).to(y.device).clamp_min(1e-20).log().neg()
    rows = (noise / chance.clamp_min(1e-30)).topk(CENTROIDS, dim=1, largest=False).indices
    return _rows(y, rows, part)


def _spread_singles(centroids: torch.Tensor, y: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return centroids in which those of parts of one channel are spread as dense as the cube root of its density.

    That is the best density for many levels (Panter and Dite, 1951). With gaps g between sorted values the density is
    about 1 / (N g), so its integral's cube root adds g^(2/3) a gap.
    """
    sizes = torch.zeros_like(part).scatter_add_(1, part, torch.ones_like(part)).gather(1, part)
    head, channel = (sizes == 1).nonzero(as_tuple=True)
    if not head.numel():
        return centroids
    ordered = y[head, :, channel].sort(-1).values
    reached = (ordered[:, 1:] - ordered[:, :-1]).clamp_min(0).pow(2 / 3).cumsum(-1)
    wanted = (torch.arange(CENTROIDS, device=y.device) + 0.5) / CENTROIDS * reached[:, -1:]
    levels = ordered.gather(-1, torch.searchsorted(reached, wanted))
    return centroids.index_put((head[:, None], torch.arange(CENTROIDS, device=y.device), channel[:, None]), levels)


def _worst(y: torch.Tensor, error: torch.Tensor, part: torch.Tensor, sample_weight: torch.Tensor) -> torch.Tensor:
    lost = _part_sums(error, part) * sample_weight[..., None]
    return _rows(y, lost.topk(CENTROIDS, dim=1).indices, part)
