"""A random rotation makes every vector look Gaussian, so that one codebook fits all, without calibration.

TurboQuant (Zandieh et al. 2025, algorithm 1, "mse") and HIGGS (Malinovskii et al., NAACL 2025)::

    norm = |x| (16 bits)        u = sqrt(D) / norm · x · diag(random signs) · Hadamard / sqrt(D)
    every coordinate of u is nearly N(0, 1): nearest level of the Lloyd-Max codebook (TurboQuant),
    or of a grid of pairs of coordinates (HIGGS)

Departures: the codebook is of the Gaussian, not of a coordinate of a random unit vector (Beta), which it nears as D
grows; a dense random rotation where D is not a power of two; no residual bit for unbiased dot products.
"""

from __future__ import annotations

import functools
import math

import torch

from passes.kv_pq.layout import hadamard
from tests.benchmarks.kv_baselines.base import SCALE_BITS, Baseline
from tests.benchmarks.kv_baselines.kmeans import assign, kmeans

LLOYD_ROUNDS = 5_000
GRID_SAMPLES = 1 << 16
GRID_ROUNDS = 40


@functools.cache
def lloyd_max(levels: int) -> torch.Tensor:
    """Return the levels, ascending, float64, that quantize N(0, 1) with the least mean squared error.

    Lloyd 1957 and Max 1960: a boundary is midway between levels, a level the mean of what lies between boundaries,
    for the Gaussian ``(pdf(a) - pdf(b)) / (cdf(b) - cdf(a))``.
    """
    probability = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    found = torch.special.ndtri(probability)
    ends = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(LLOYD_ROUNDS):
        edges = torch.cat([-ends, (found[1:] + found[:-1]) / 2, ends])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        found = (density[:-1] - density[1:]) / torch.special.ndtr(edges).diff()
    return found


@functools.cache
def gaussian_grid(points: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Return ``points`` vectors, (points, dim), that quantize a Gaussian of ``dim`` dimensions with little error."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(1, GRID_SAMPLES, dim, generator=generator)
    return kmeans(samples, points, rounds=GRID_ROUNDS, seed=seed)[0]


def random_rotation(dim: int, seed: int = 0) -> torch.Tensor:
    """Return an orthogonal matrix (D, D): random signs and a Hadamard matrix, or a random one for other sizes."""
    generator = torch.Generator().manual_seed(seed)
    if dim & (dim - 1):
        q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        return (q * r.diagonal().sign()).float()
    signs = torch.randint(0, 2, (dim,), generator=generator) * 2.0 - 1
    return signs[:, None] * hadamard(dim) / math.sqrt(dim)


class Rotated(Baseline):
    """A norm, a rotation, and a codebook of the Gaussian for groups of ``dim`` coordinates.

    Parameters
    ----------
    bits : int
        Of a coordinate; the codebook has ``2^(bits · dim)`` entries.
    dim : int
        1: TurboQuant; 2: HIGGS.
    """

    def __init__(self, bits: int, dim: int = 1, seed: int = 0) -> None:
        self.name = "TurboQuant-style" if dim == 1 else f"HIGGS-style, grid of {dim} dimensions"
        self.bits = bits
        self._dim = dim
        self._seed = seed

    @functools.cached_property
    def _grid(self) -> torch.Tensor:
        """Entries of the codebook, (points, dim); made when it is first needed."""
        points = 2 ** (int(self.bits) * self._dim)
        return lloyd_max(points)[:, None].float() if self._dim == 1 else gaussian_grid(points, self._dim, self._seed)

    def effective_bits(self, head_dim: int) -> float:
        return self.bits + SCALE_BITS / head_dim

    @property
    def codebook_bytes(self) -> int:
        return self._grid.numel() * self._grid.element_size()

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Return what vectors (..., D) are after quantization, float32."""
        x = x.float()
        size = x.shape[-1]
        rotation = random_rotation(size, self._seed).to(x.device)
        grid = self._grid.to(x.device)
        half = torch.finfo(torch.float16)
        norm = (x.norm(dim=-1, keepdim=True) / math.sqrt(size)).clamp(half.tiny, half.max).half().float()
        u = (x / norm) @ rotation
        codes = assign(u.reshape(1, -1, self._dim), grid[None])[0]
        return grid[codes].view_as(u) @ rotation.T * norm

    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rounded(keys), self.rounded(values)
