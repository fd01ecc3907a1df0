"""Plain Lloyd k-means in batches of independent problems, as the baselines' own libraries use it."""

from __future__ import annotations

import torch

BLOCK_ELEMENTS = 1 << 20
"""Distances that are in memory at a time."""


def assign(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest centroid (P, K, S) for points (P, N, S): shape (P, N), int64."""
    rows = max(1, BLOCK_ELEMENTS // centroids.shape[1])
    # |c|^2 - 2 x c as one product, whose last column of ones takes the length
    table = torch.cat([-2 * centroids, centroids.square().sum(-1, keepdim=True)], -1).transpose(1, 2).contiguous()
    found = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    for problem in range(x.shape[0]):
        for start in range(0, x.shape[1], rows):
            block = x[problem, start : start + rows]
            distance = torch.cat([block, block.new_ones(block.shape[0], 1)], -1) @ table[problem]
            found[problem, start : start + rows] = distance.min(-1).indices
    return found


def kmeans(x: torch.Tensor, centroids: int, *, rounds: int, seed: int = 0) -> torch.Tensor:
    """Return centroids (P, K, S) of points (P, N, S), N >= K: random points first, then Lloyd's rounds.

    A centroid that no point is nearest to goes beside that of the most points, which they then share.
    """
    problems, count, dim = x.shape
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(count, generator=generator)[:centroids] for _ in range(problems)])
    found = x.gather(1, first.to(x.device)[..., None].expand(-1, -1, dim)).clone()
    for _ in range(rounds):
        nearest = assign(x, found)
        counts = torch.zeros(problems, centroids, device=x.device).scatter_add_(1, nearest, torch.ones_like(x[..., 0]))
        sums = torch.zeros_like(found).scatter_add_(1, nearest[..., None].expand_as(x), x)
        found = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp_min(1), found)
        for problem in (counts == 0).any(1).nonzero().flatten().tolist():
            empty = (counts[problem] == 0).nonzero().flatten()
            largest = counts[problem].topk(empty.numel()).indices
            nudge = torch.randn(empty.numel(), dim, generator=generator).to(x.device)
            found[problem, empty] = found[problem, largest] + 1e-3 * x[problem].std(0) * nudge
    return found
