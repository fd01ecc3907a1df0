"""Plain Lloyd k-means in batches of independent problems, as the baselines' own libraries use it."""

from __future__ import annotations

import torch

from passes.kv_pq import cpu_kernels
from passes.kv_pq.by_identity import by_identity
from passes.kv_pq.quantizer import CENTROIDS, VectorQuantizer

BLOCK_ELEMENTS = 1 << 20
"""Distances that are in memory at a time."""
BLOCK_CANDIDATES = 1 << 14
"""Nearest ones of 256 that are compared at a time: what torch does on one thread, without waiting for another."""


def assign(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest centroid (P, K, S) for points (P, N, S): shape (P, N), int64.

    Every distance is computed; of two that are nearly the same either may be taken. On a CPU where the pass's C++
    operator can be built it seeks among 256 centroids at a time, some 30 times as fast as a matrix product and a
    minimum in torch; elsewhere, and for other numbers of centroids, torch does it.
    """
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and centroids.shape[1] % CENTROIDS == 0
    if fits and cpu_kernels.available() is None:
        return _assign_by_operator(x, centroids)
    rows = max(1, BLOCK_ELEMENTS // centroids.shape[1])
    # |c|^2 - 2 x c as one product, whose last column of ones takes the length
    table = torch.cat([-2 * centroids, centroids.square().sum(-1, keepdim=True)], -1).transpose(1, 2).contiguous()
    found = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    for problem in range(x.shape[0]):
        for start in range(0, x.shape[1], rows):
            block = x[problem, start : start + rows]
            distance = torch.cat([block, block.new_ones(block.shape[0], 1)], -1) @ table[problem]
            found[problem, start : start + rows] = distance.argmin(-1)
    return found


def _assign_by_operator(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Do the same with problems as the parts of one vector: the nearest of each 256, then the nearest of those."""
    problems, count, dim = x.shape
    side = _side(centroids)
    groups = side.heads
    codes = cpu_kernels.encode(x.transpose(0, 1).flatten(1).expand(1, groups, -1, -1), side)[0]
    codes = codes.unflatten(-1, (groups, problems)).transpose(0, 1)  # (groups, N, P)
    if groups == 1:
        return codes[0].t().long()
    channels = centroids.flatten(0, 1).t().contiguous()  # (S, P K)
    first = torch.arange(problems) * centroids.shape[1]
    found = torch.empty(problems, count, dtype=torch.int64)
    rows = max(1, BLOCK_CANDIDATES // problems)
    for start in range(0, count, rows):
        points = x[:, start : start + rows].permute(2, 1, 0).contiguous()
        least, nearest = torch.full(points.shape[1:], torch.inf), torch.zeros(points.shape[1:], dtype=torch.int64)
        for group in range(groups):
            number = codes[group, start : start + rows].long() + group * CENTROIDS
            at = number + first
            distance = torch.zeros(at.shape)
            for point, channel in zip(points, channels, strict=True):
                distance += (point - channel.index_select(0, at.view(-1)).view_as(point)).square_()
            nearest = torch.where(distance < least, number, nearest)
            least = torch.minimum(distance, least)
        found[:, start : start + rows] = nearest.t()
    return found


@by_identity
def _side(centroids: torch.Tensor) -> VectorQuantizer:
    """Return what the operator seeks in, each 256 centroids as a head; kept, so that its own tables are made once."""
    problems, count, dim = centroids.shape
    groups = count // CENTROIDS
    part = torch.arange(problems).repeat_interleave(dim).expand(groups, -1)
    by_group = centroids.unflatten(1, (groups, CENTROIDS)).permute(1, 2, 0, 3).flatten(2)
    return VectorQuantizer(
        centroids=by_group.clone(),  # a view would keep the key alive
        part=part,
        weight=torch.ones(part.shape),
        mean=torch.zeros(part.shape),
    )


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
