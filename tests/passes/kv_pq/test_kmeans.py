"""k-means over all parts against scikit-free references: Lloyd's rounds by hand, known clusters, known distortion."""

from __future__ import annotations

import pytest
import torch

from passes.kv_pq.kmeans import train_centroids
from passes.kv_pq.quantizer import VectorQuantizer


def trained(y: torch.Tensor, part: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    heads, count, dim = y.shape
    centroids, _ = train_centroids(
        y,
        part,
        more.get("weight", torch.ones(heads, dim)),
        more.get("sample_weight", torch.ones(heads, count)),
        iterations=30,
        generator=torch.Generator().manual_seed(0),
    )
    return centroids


def test_256_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(1, 256, 2, generator=generator) * 100
    y = centres.repeat_interleave(20, 1) + torch.randn(1, 5120, 2, generator=generator) * 1e-3
    found = trained(y, torch.zeros(1, 2, dtype=torch.int64))
    nearest = torch.cdist(centres[0].double(), found[0].double()).min(-1).values
    assert (nearest < 0.01).float().mean() > 0.9  # Lloyd's algorithm may put two into one cluster


def test_one_channel_of_a_gaussian_reaches_the_known_distortion() -> None:
    """256 levels: pi sqrt(3) / 2 / 256^2 = 4.15e-5 of the variance, for ever more vectors."""
    y = torch.randn(1, 60_000, 1, generator=torch.Generator().manual_seed(2))
    part = torch.zeros(1, 1, dtype=torch.int64)
    quantizer = VectorQuantizer(trained(y, part), part, torch.ones(1, 1), torch.zeros(1, 1))
    fresh = torch.randn(1, 1, 60_000, 1, generator=torch.Generator().manual_seed(3))
    lost = (quantizer.decode(quantizer.encode(fresh), torch.float32) - fresh).square().mean()
    assert 4.0e-5 < float(lost) < 6.0e-5


def test_centroids_are_the_weighted_means_of_their_vectors() -> None:
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(2, 2000, 6, generator=generator)
    part = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2]])
    weight = torch.rand(2, 6, generator=generator) + 0.1
    samples = torch.rand(2, 2000, generator=generator)
    centroids, rounds = train_centroids(
        y, part, weight, samples, iterations=500, generator=torch.Generator().manual_seed(0)
    )
    assert rounds < 500
    codes = VectorQuantizer(centroids, part, weight, torch.zeros(2, 6)).encode(y[None])[0].long()  # 3 of each head
    for head, index in ((0, 1), (1, 0)):
        columns = (part[head] == index).nonzero().flatten()
        for code in (0, 100, 255):
            chosen = codes[:, 3 * head + index] == code
            if chosen.sum() == 0:
                continue
            share = samples[head, chosen][:, None]
            mean = (y[head, chosen][:, columns] * share).sum(0) / share.sum()
            torch.testing.assert_close(centroids[head, code, columns], mean, atol=0.02, rtol=0.02)


def test_no_centroid_stays_without_vectors() -> None:
    y = torch.cat([torch.zeros(1, 2000, 2), torch.randn(1, 600, 2, generator=torch.Generator().manual_seed(5))], 1)
    part = torch.zeros(1, 2, dtype=torch.int64)
    quantizer = VectorQuantizer(trained(y, part), part, torch.ones(1, 2), torch.zeros(1, 2))
    assert quantizer.encode(y[None])[..., 0].unique().numel() > 200


def test_the_same_seed_gives_the_same_centroids() -> None:
    y = torch.randn(2, 1000, 4, generator=torch.Generator().manual_seed(6))
    part = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    assert torch.equal(trained(y, part), trained(y, part))


def test_weights_decide_where_centroids_go() -> None:
    generator = torch.Generator().manual_seed(7)
    y = torch.randn(1, 4000, 2, generator=generator)
    part = torch.zeros(1, 2, dtype=torch.int64)

    def lost(weight: torch.Tensor) -> torch.Tensor:
        quantizer = VectorQuantizer(trained(y, part, weight=weight), part, weight, torch.zeros(1, 2))
        return (quantizer.decode(quantizer.encode(y[None]), torch.float32)[0] - y).square().mean((0, 1))

    even, first = lost(torch.ones(1, 2)), lost(torch.tensor([[100.0, 1.0]]))
    assert first[0] < 0.5 * even[0]
    assert first[1] > even[1]


@pytest.mark.parametrize("heads", [1, 3])
def test_shapes(heads: int) -> None:
    y = torch.randn(heads, 700, 5)
    part = torch.tensor([0, 1, 1, 0, 2]).expand(heads, -1).contiguous()
    assert trained(y, part).shape == (heads, 256, 5)
