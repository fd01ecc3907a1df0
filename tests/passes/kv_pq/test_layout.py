"""Which channels share a code: the dynamic programme against brute force, and parts of each other kind."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from passes.kv_pq import layout


def covariance(dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    scale = torch.rand(dim, generator=generator, dtype=torch.float64) * 3
    return (root @ root.t()) * scale[:, None] * scale


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("parts", [2, 3, 5, 8])
def test_the_best_cut_is_that_of_brute_force(parts: int, seed: int) -> None:
    matrix = covariance(8, seed)
    order = matrix.diagonal().argsort(descending=True)
    best = math.inf
    for cuts in itertools.combinations(range(1, 8), parts - 1):
        part = torch.empty(8, dtype=torch.int64)
        for index, (first, end) in enumerate(itertools.pairwise((0, *cuts, 8))):
            part[order[first:end]] = index
        best = min(best, layout.error_of(matrix, part))
    found = layout.Uneven(matrix, 8)
    assert found.error(parts) == pytest.approx(best, rel=1e-9)
    assert layout.error_of(matrix, found.part(parts)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("more", [1, 2, 3])
def test_residual_parts_are_those_of_brute_force(more: int) -> None:
    """Of all prefixes of the order and all cuts of them, the rest left as it is."""
    matrix = covariance(6)
    order = matrix.diagonal().argsort(descending=True)
    alone = layout.errors_of(matrix.diagonal()[:, None, None])[order]
    best = math.inf
    for end in range(more, 7):
        for cuts in itertools.combinations(range(1, end), more - 1):
            runs = [alone[first:last] for first, last in itertools.pairwise((0, *cuts, end))]
            best = min(best, sum(float(layout.errors_of(run.diag()[None])) for run in runs) + float(alone[end:].sum()))
    found = layout.Uneven(matrix, 9)
    assert found.error(6 + more) == pytest.approx(best, rel=1e-9)
    part = found.residual_part(6 + more)
    refined = part[order] >= 0
    assert sorted(set(part[order[refined]].tolist())) == list(range(more))
    assert refined.tolist() == sorted(refined.tolist(), reverse=True)
    assert found.error(6) > found.error(7) > found.error(8) > found.error(9)
    assert not (found.residual_part(6) >= 0).any()


def test_channels_that_matter_more_get_smaller_parts() -> None:
    matrix = torch.diag(torch.tensor([100.0, 100.0] + [1.0] * 6, dtype=torch.float64))
    part = layout.Uneven(matrix, 8).part(4)
    sizes = torch.bincount(part)
    assert sizes[part[0]] == sizes[part[1]] == 1
    assert sizes.tolist() == [1, 1, 3, 3]


def test_no_parts_are_too_few_or_too_many() -> None:
    found = layout.Uneven(covariance(20), 20)
    assert found.error(2) == math.inf  # 20 channels in parts of at most 8
    assert found.error(3) < math.inf
    assert found.error(20) < found.error(10)


def test_the_expected_error_of_one_channel_is_that_of_the_best_scalar_quantizer() -> None:
    """Panter and Dite: pi sqrt(3) / 2 * variance / levels^2."""
    expected = math.pi * math.sqrt(3) / 2 * 4.0 / 256**2
    assert float(layout.errors_of(torch.tensor([[[4.0]]]).double())) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("dim", "parts"), [(64, 32), (64, 33), (16, 5), (8, 8)])
def test_even_parts_cover_all_channels(dim: int, parts: int) -> None:
    pairs = torch.stack([torch.arange(dim // 2), torch.arange(dim // 2) + dim // 2], -1)
    for part in (
        layout.neighbours(dim, parts),
        layout.rope_pairs(pairs, dim, parts),
        layout.correlated(covariance(dim), parts),
    ):
        sizes = torch.bincount(part, minlength=parts)
        assert sizes.sum() == dim
        assert sizes.max() - sizes.min() <= 1
    halves = layout.rope_pairs(pairs, dim, dim // 2)
    assert (halves[: dim // 2] == halves[dim // 2 :]).all()


def test_correlated_channels_are_found() -> None:
    matrix = torch.eye(6, dtype=torch.float64)
    for one, other in ((0, 3), (1, 5), (2, 4)):
        matrix[one, other] = matrix[other, one] = 0.9
    part = layout.correlated(matrix, 3)
    assert [int(part[one]) for one in (0, 1, 2)] == [int(part[other]) for other in (3, 5, 4)]


def test_hadamard_is_orthogonal() -> None:
    matrix = layout.hadamard(16)
    assert torch.equal(matrix @ matrix.t(), 16 * torch.eye(16))
    assert torch.equal(matrix.abs(), torch.ones(16, 16))
