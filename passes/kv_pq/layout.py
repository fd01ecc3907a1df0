"""Which channels share a code: more important ones in smaller parts, which get more bits a channel.

Every code is one byte, so a part of n channels spends 8/n bits on each. For a part with (weighted) covariance S the
error of 256 centroids is about ``n · g(n) · det(S)^(1/n) · 2^(-16/n)`` (high-resolution theory: Zador 1982, Gersho
1979, with g for Gaussian vectors), and never more than the trace of S. Channels are put in order of importance; cutting
that order into M runs of least total error is a dynamic programme over (channels, parts), solved exactly.

Once every channel is a part of its own, further codes are residual parts: they code again what those of the first
channels in that order leave over, by the same programme, which may now leave channels out.
"""

from __future__ import annotations

import functools
import math

import torch

MOST_CHANNELS = 8
"""Of one part: one bit a channel."""
_GAUSSIAN = (2.72, 2.2, 1.95, 1.8, 1.7, 1.62, 1.56, 1.5)
"""g(n), from pi·sqrt(3)/2 at n = 1 towards 1 as n grows; above 2 interpolated."""


def errors_of(covariances: torch.Tensor) -> torch.Tensor:
    """Return the errors that are expected of parts with these covariances (K, n, n), shape (K,)."""
    size = covariances.shape[-1]
    trace = covariances.diagonal(dim1=-2, dim2=-1).sum(-1)
    floor = torch.eye(size, dtype=covariances.dtype) * (1e-9 * trace / size + 1e-300)[:, None, None]
    log_volume = torch.linalg.slogdet(covariances + floor).logabsdet
    rate = size * _GAUSSIAN[size - 1] * torch.exp(log_volume / size) * 2.0 ** (-16 / size)
    return torch.minimum(trace, rate)


class Uneven:
    """The best parts of a head for each number of parts.

    Parameters
    ----------
    covariance : torch.Tensor
        Shape (D, D), of weighted channels.
    most : int
        The largest number of parts that will be asked for.
    """

    def __init__(self, covariance: torch.Tensor, most: int) -> None:
        self._covariance, self._most = covariance, most
        self._order, self._best, self._taken = _solved(covariance, min(most, covariance.shape[0]))

    def error(self, parts: int) -> float:
        """Return the expected error with this number of parts, residual ones included; infinite if too few."""
        dim = self._order.numel()
        return self._best[-1][parts] if parts <= dim else self._refined[0][parts - dim]

    @functools.cached_property
    def _refined(self) -> tuple[list[float], list[int], list[list[int]]]:
        """Return, by the number of residual parts, the least error and of how many channels; and the last parts."""
        dim, most = self._order.numel(), self._most - self._order.numel()
        alone = errors_of(self._covariance.diagonal().double()[self._order][:, None, None])
        _, best, taken = _solved(alone.diag(), most)
        rest = alone.sum() - torch.cat([alone.new_zeros(1), alone.cumsum(0)])
        errors, ends = [], []
        for parts in range(most + 1):
            totals = torch.tensor([best[end][parts] for end in range(dim + 1)], dtype=alone.dtype) + rest
            ends.append(int(totals.argmin()))
            errors.append(float(totals.min()))
        return errors, ends, taken

    def residual_part(self, parts: int) -> torch.Tensor:
        """Return the residual part of each channel with this number of parts in all, shape (D,); -1: none."""
        dim = self._order.numel()
        found = torch.full((dim,), -1, dtype=torch.int64)
        if parts > dim:
            _, ends, taken = self._refined
            end = ends[parts - dim]
            for index in range(parts - dim, 0, -1):
                size = taken[end][index]
                found[self._order[end - size : end]] = index - 1
                end -= size
        return found

    def part(self, parts: int) -> torch.Tensor:
        """Return the part of each channel, shape (D,)."""
        end = self._order.numel()
        part = torch.empty(end, dtype=torch.int64)
        for index in range(parts, 0, -1):
            size = self._taken[end][index]
            part[self._order[end - size : end]] = index - 1
            end -= size
        return part


def _solved(covariance: torch.Tensor, parts: int) -> tuple[torch.Tensor, list[list[float]], list[list[int]]]:
    """Return channels by importance, least errors by (channels, parts), and the size of the last part in each."""
    dim = covariance.shape[0]
    order = covariance.diagonal().argsort(descending=True, stable=True)
    sorted_covariance = covariance[order][:, order].double()
    costs: dict[tuple[int, int], float] = {}
    for size in range(1, min(MOST_CHANNELS, dim) + 1):
        blocks = torch.stack([sorted_covariance[i : i + size, i : i + size] for i in range(dim - size + 1)])
        costs |= {(first, size): error for first, error in enumerate(errors_of(blocks).tolist())}
    best = [[math.inf] * (parts + 1) for _ in range(dim + 1)]
    taken = [[0] * (parts + 1) for _ in range(dim + 1)]
    best[0][0] = 0.0
    for first in range(dim):
        for used in range(min(parts, first + 1)):
            if best[first][used] == math.inf:
                continue
            for size in range(1, min(MOST_CHANNELS, dim - first) + 1):
                error = best[first][used] + costs[first, size]
                if error < best[first + size][used + 1]:
                    best[first + size][used + 1] = error
                    taken[first + size][used + 1] = size
    return order, best, taken


def error_of(covariance: torch.Tensor, part: torch.Tensor) -> float:
    """Return the expected error of a head with these parts."""
    total = 0.0
    for index in range(int(part.max()) + 1):
        members = (part == index).nonzero().flatten()
        total += float(errors_of(covariance[members][:, members][None].double()))
    return total


def hadamard(size: int) -> torch.Tensor:
    """Return Sylvester's Hadamard matrix, shape (size, size), of a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def neighbours(dim: int, parts: int) -> torch.Tensor:
    """Return parts of neighbouring channels, sizes as even as can be."""
    return (torch.arange(dim) * parts) // dim


def rope_pairs(pairs: torch.Tensor, dim: int, parts: int) -> torch.Tensor:
    """Return parts that keep the channels of a rotation pair together, sizes as even as can be.

    Parameters
    ----------
    pairs : torch.Tensor
        Shape (R / 2, 2).
    """
    order = torch.cat([pairs.flatten(), torch.arange(pairs.numel(), dim)])
    part = torch.empty(dim, dtype=torch.int64)
    part[order] = neighbours(dim, parts)
    return part


def correlated(covariance: torch.Tensor, parts: int) -> torch.Tensor:
    """Return parts of channels that vary together: each of even size, filled greedily by correlation."""
    dim = covariance.shape[0]
    deviation = covariance.diagonal().clamp_min(1e-30).sqrt()
    likeness = (covariance / deviation[:, None] / deviation).abs()
    sizes = torch.bincount(neighbours(dim, parts), minlength=parts).tolist()
    free = set(range(dim))
    part = torch.empty(dim, dtype=torch.int64)
    for index, size in enumerate(sizes):
        members = [min(free, key=lambda channel: -float(covariance[channel, channel]))]
        free.remove(members[0])
        while len(members) < size:
            nearest = max(free, key=lambda channel: float(likeness[channel, members].sum()))
            members.append(nearest)
            free.remove(nearest)
        part[members] = index
    return part
