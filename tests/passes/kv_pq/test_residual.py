"""Residual parts: codes against a search by brute force, decoding, and what training them gains."""

from __future__ import annotations

import dataclasses
import math

import torch

from passes.kv_pq import residual
from passes.kv_pq.quantizer import CENTROIDS, VectorQuantizer
from tests.passes.kv_pq import random_codebooks as made


def test_codes_are_those_of_brute_force_one_stage_after_the_other() -> None:
    side = made.quantizer(3, 16, 8, gains=True, basis=True, residual=2, steps=None)
    assert side.residual_parts == (2, 1, 0)
    x = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(4))
    codes = side.encode(x)
    assert codes.shape == (2, 20, sum(side.parts) + 3 + 3)  # residual parts, gains
    y = (x.double() - side.mean[:, None]) @ side.basis.double()
    for head, parts in enumerate(side.parts):
        own = codes[..., side.offsets[head] : side.offsets[head + 1]].long()
        left = y[:, head] / side.gains[head][own[..., -1]][..., None]
        for index, table, part in (
            *((index, side.centroids, side.part) for index in range(parts)),
            *((index, side.residual_centroids, side.residual_part) for index in range(side.residual_parts[head])),
        ):
            of = part[head] == index
            place = index + (0 if part is side.part else parts)
            chosen = table[head][:, of].double()
            distance = ((left[..., None, of] - chosen).square() * side.weight[head, of]).sum(-1)
            taken = distance.gather(-1, own[..., place, None])[..., 0]
            assert (taken <= distance.amin(-1) * (1 + 1e-4) + 1e-9).all()
            left[..., of] -= chosen[own[..., place]]


def test_decoding_adds_two_centroids() -> None:
    side = made.quantizer(2, 8, 8, residual=1)
    codes = made.random_codes(side, 1, 5)
    found = side.decode(codes, torch.float32)[0]
    for head in range(2):
        own = codes[0, :, side.offsets[head] : side.offsets[head + 1]].long()
        for channel in range(8):
            expected = side.centroids[head, own[:, side.part[head, channel]], channel] + side.mean[head, channel]
            if side.residual_part[head, channel] >= 0:
                place = side.parts[head] + side.residual_part[head, channel]
                expected = expected + side.residual_centroids[head, own[:, place], channel]
            assert torch.equal(found[head, :, channel], expected)


def test_a_channel_refined_alone_has_the_error_of_65536_levels() -> None:
    """Uniform values on an even grid of n levels have the squared error (width / n)^2 / 12."""
    generator = torch.Generator().manual_seed(0)
    grid = (torch.arange(CENTROIDS) + 0.5) / CENTROIDS
    side = VectorQuantizer(
        grid[None, :, None].expand(1, -1, 3).contiguous(), torch.arange(3)[None], torch.ones(1, 3), torch.zeros(1, 3)
    )
    y = torch.rand(1, 40_000, 3, generator=generator)
    part = torch.tensor([[-1, 0, -1]])
    found = residual.refine(side, part, y, torch.ones(1, 40_000), iterations=8, generator=generator)
    assert found.residual_parts == (1,) and found.codes == 4
    fresh = torch.rand(1, 1, 20_000, 3, generator=generator)
    lost = (found.decode(found.encode(fresh), torch.float32) - fresh).square().mean((0, 1, 2))
    assert math.isclose(lost[0], 1 / 256**2 / 12, rel_tol=0.05)
    assert 0.9 < lost[1] / (1 / 65_536**2 / 12) < 1.5
    plain = dataclasses.replace(found, residual_part=None, residual_centroids=None)
    assert torch.equal(plain.encode(fresh), found.encode(fresh)[..., :3])
