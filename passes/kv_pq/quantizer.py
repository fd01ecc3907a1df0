"""Product quantization of key or value vectors: one set of codebooks for each KV head of a layer.

::

    x (D) ──minus mean──> · basis ──divided by gain──> channels fall into M parts ──nearest of 256 centroids──> M codes
                                      └── nearest of 256 gains ──────────────────────────────────────────────> 1 code
    x̂ = (gain · ŷ) · inverse + mean,        ŷ[c] = centroids[code of the part that c is in, c]

A part is any set of channels, so channels that matter more can be in smaller parts and get more bits: every code is one
byte whatever its part's size. Heads that matter more can have more parts: the codes of a token lie side by side, head
after head. Scores and outputs never need x̂ itself: a query is multiplied by ``inverse`` once, and so is an output.

Where one code for each channel is not enough, some channels have a second one for what the first left over (residual
quantization; Chen et al. 2010, "Approximate nearest neighbor search by residual vector quantization"): ŷ is then the
sum of two centroids. A token's codes of one head are those of its parts, of its residual parts, and of its gain.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CENTROIDS = 256
"""Of each part: a code is one byte."""
BLOCK_ELEMENTS = 1 << 22
"""Distances that are in memory at a time."""


@dataclass(frozen=True)
class VectorQuantizer:
    """The codebooks of the keys, or of the values, of one layer.

    Attributes
    ----------
    centroids : torch.Tensor
        Shape (H, 256, D), float32: H KV heads, D channels of a head.
    part : torch.Tensor
        Shape (H, D), int64: the part of its head, 0 to M - 1, that a channel is in; heads have their own M.
    weight : torch.Tensor
        Shape (H, D), float32: of each channel's squared error when the nearest centroid is sought.
    mean : torch.Tensor
        Shape (H, D), float32: what is subtracted first.
    gains : torch.Tensor or None
        Shape (H, 256), float32, ascending and positive: what vectors are divided by; its code is the last one.
    basis, inverse : torch.Tensor or None
        Shape (H, D, D), float32: y = (x - mean) @ basis, and back.
    residual_part : torch.Tensor or None
        Shape (H, D), int64: the residual part of its head, from 0 on, that refines a channel; -1: none does.
    residual_centroids : torch.Tensor or None
        Shape (H, 256, D), float32: added to ``centroids``; 0 where nothing is refined.
    """

    centroids: torch.Tensor
    part: torch.Tensor
    weight: torch.Tensor
    mean: torch.Tensor
    gains: torch.Tensor | None = None
    basis: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    residual_part: torch.Tensor | None = None
    residual_centroids: torch.Tensor | None = None

    @property
    def heads(self) -> int:
        """H."""
        return self.centroids.shape[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.centroids.shape[2]

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """M of each head."""
        return tuple(last + 1 for last in self.part.amax(1).tolist())

    @cached_property
    def residual_parts(self) -> tuple[int, ...]:
        """Residual parts of each head."""
        if self.residual_part is None:
            return (0,) * self.heads
        return tuple(last + 1 for last in self.residual_part.amax(1).tolist())

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where the codes of each head begin among those of a token, and where the last head's end: H + 1 places.

        The code of a head's gain is its last one.
        """
        gain = int(self.gains is not None)
        counts = (sum(of) + gain for of in zip(self.parts, self.residual_parts, strict=True))
        return tuple(itertools.accumulate(counts, initial=0))

    @property
    def codes(self) -> int:
        """Bytes that a token takes over all heads: one a part, one a residual part, and one for each gain."""
        return self.offsets[-1]

    @property
    def bits_per_value(self) -> float:
        """Bits a channel, gains included, on average over heads."""
        return 8 * self.codes / (self.heads * self.head_dim)

    @cached_property
    def places(self) -> torch.Tensor:
        """Which of a token's codes is that of a channel: shape (H, D), int64."""
        return self.part + self.part.new_tensor(self.offsets[:-1])[:, None]

    @cached_property
    def residual_places(self) -> torch.Tensor:
        """Which of a token's codes refines a channel: shape (H, D), int64; one that does not where nothing does."""
        if self.residual_part is None:
            return self.places
        begin = self.part.new_tensor(self.offsets[:-1]) + self.part.new_tensor(self.parts)
        return (self.residual_part + begin[:, None]).where(self.residual_part >= 0, self.places)

    @cached_property
    def gain_places(self) -> torch.Tensor:
        """Which of a token's codes is that of a head's gain: shape (H,), int64."""
        return self.part.new_tensor(self.offsets[1:]) - 1

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what there is, by attribute name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) is not None}

    def to(self, device: torch.device) -> VectorQuantizer:
        """Return the same on another device."""
        return VectorQuantizer(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the codes of vectors.

        Parameters
        ----------
        x : torch.Tensor
            Shape (B, H, T, D), any floating type.

        Returns
        -------
        torch.Tensor
            Shape (B, T, codes), uint8.
        """
        import torch

        if self.residual_part is not None:
            from passes.kv_pq import residual

            return residual.encode(x, self, lambda given, side: side.encode(given))
        batch, heads, length, dim = x.shape
        y = x.float() - self.mean[:, None, :]
        if self.basis is not None:
            y = y @ self.basis
        y = y.transpose(0, 1).reshape(heads, batch * length, dim)
        out = torch.empty(batch * length, self.codes, dtype=torch.uint8, device=x.device)
        if self.gains is not None:
            energy = (y.square() * self.weight[:, None, :]).sum(-1) / self.weight.sum(-1, keepdim=True)
            chosen = nearest(energy.sqrt(), self.gains)
            y = y / self.gains.gather(1, chosen)[..., None]
            out[:, self.gain_places] = chosen.to(torch.uint8).t()
        columns, table, length2 = self._by_part()
        for head, parts in enumerate(self.parts):
            at = self.offsets[head]
            rows = max(1, BLOCK_ELEMENTS // (parts * CENTROIDS))
            for start in range(0, batch * length, rows):
                block = y[head, start : start + rows]
                padded = torch.cat([block, block.new_zeros(block.shape[0], 1)], -1)[:, columns[head, :parts]]
                distance = torch.baddbmm(
                    length2[head, :parts, None], padded.transpose(0, 1), table[head, :parts], alpha=-2
                )
                out[start : start + rows, at : at + parts] = distance.argmin(-1).to(torch.uint8).t()
        return out.view(batch, length, self.codes)

    def decode_centroids(self, codes: torch.Tensor) -> torch.Tensor:
        """Return gain · ŷ of codes (B, T, codes): shape (B, H, T, D), float32, before ``inverse`` and mean."""
        import torch

        codes = codes.long()
        index = codes[..., self.places].transpose(1, 2)  # (B, H, T, D)
        channel = torch.arange(self.head_dim, device=codes.device)
        head = torch.arange(self.heads, device=codes.device)[:, None]
        y = self.centroids[head[..., None], index, channel]
        if self.residual_centroids is not None:
            y = y + self.residual_centroids[head[..., None], codes[..., self.residual_places].transpose(1, 2), channel]
        if self.gains is not None:
            y = y * self.gains[head, codes[..., self.gain_places].transpose(1, 2)][..., None]
        return y

    def decode(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return x̂ of codes (B, T, codes): shape (B, H, T, D)."""
        y = self.decode_centroids(codes)
        if self.inverse is not None:
            y = y @ self.inverse
        return (y + self.mean[:, None, :]).to(dtype)

    def _by_part(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return columns of each part (H, M, S), padded with D; weighted centroids (H, M, S, 256); their length.

        M is the largest of all heads'.
        """
        import torch

        heads, dim = self.part.shape
        width = max(int(torch.bincount(row).max()) for row in self.part)
        columns = torch.full((heads, max(self.parts), width), dim, dtype=torch.int64, device=self.part.device)
        for head, parts in enumerate(self.parts):
            for part in range(parts):
                members = (self.part[head] == part).nonzero().flatten()
                columns[head, part, : members.numel()] = members
        padded = torch.cat([self.centroids, self.centroids.new_zeros(heads, CENTROIDS, 1)], -1)
        weight = torch.cat([self.weight, self.weight.new_zeros(heads, 1)], -1)
        index = torch.arange(heads, device=columns.device)[:, None, None]
        table = padded.transpose(1, 2)[index, columns]  # (H, M, S, 256)
        weights = weight[index, columns][..., None]
        return columns, table * weights, (table.square() * weights).sum(2)


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest of ascending levels (H, L) for values (H, N)."""
    import torch

    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(middle.contiguous(), values.contiguous())
