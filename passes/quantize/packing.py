"""Lay quantized weights out as PyTorch's kernels read them, and take them out of compressed-tensors' layout.

::

    compressed module ──read_integers──> Integers (values, scales, zero points) ──pack_int4──> bytes + scales and zeros
                                              │                                                     │
                                              └──dequantize──> float weight <────unpack_int4────────┘

``aten._weight_int4pack_mm_for_cpu`` and its CUDA twin compute ``x @ W.T`` with ``W = (u - 8) * scale + zero`` for
unsigned four-bit ``u``; both scale and zero belong to a row and a group of 32, 64, 128 or 256 columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

aten = torch.ops.aten

INT4_GROUP_SIZES = (256, 128, 64, 32)
"""Columns a scale may belong to, in the int4 kernels."""
INT4_OFFSET = 8
"""What the kernels take off each unsigned value."""
CPU_BLOCK = 64
"""Rows that the CPU kernel keeps together on a machine with AVX-512; rows are filled up to a multiple of it."""
CUDA_ROWS = 8
"""The CUDA kernel's tile of rows."""
CUDA_TILE = 16
"""The CUDA kernel's tile of columns; 2, 4 or 8 of them lie together."""


@dataclass(frozen=True)
class Integers:
    """A weight in integers: ``weight = (values - zero_points) * scales``.

    Attributes
    ----------
    values : torch.Tensor
        Shape (out_features, in_features), int8.
    scales : torch.Tensor
        Shape (out_features, groups); a group is ``in_features / groups`` columns.
    zero_points : torch.Tensor or None
        Shape of ``scales``, int8; None for symmetric.
    bits : int
        Of one value: from -2^(bits-1) to 2^(bits-1) - 1.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    bits: int

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, computed in ``dtype``, shape (out_features, in_features)."""
        rows, groups = self.scales.shape
        values = self.values.to(dtype).view(rows, groups, -1)
        if self.zero_points is not None:
            values = values - self.zero_points.to(dtype).unsqueeze(-1)
        return (values * self.scales.to(dtype).unsqueeze(-1)).view(rows, -1)


def read_integers(state: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> Integers:
    """Read an integer weight out of a compressed module's own tensors.

    Parameters
    ----------
    state : mapping of str to torch.Tensor
        ``weight_packed`` (pack-quantized) or ``weight`` (int-quantized), ``weight_scale``, and for asymmetric weights
        ``weight_zero_point``.
    scheme : QuantizationScheme
        With integer weights whose scales belong to the tensor, to rows or to groups.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weights = scheme.weights
    bits = int(weights.num_bits)
    scales, zero_points = state["weight_scale"], state.get("weight_zero_point")
    packed = state.get("weight_packed")
    if packed is None:
        values = state["weight"]
    else:
        shape = torch.Size(int(size) for size in state["weight_shape"])
        values = unpack_from_int32(packed, bits, shape)
        if zero_points is not None and zero_points.dtype == torch.int32:
            zero_points = unpack_from_int32(zero_points, bits, torch.Size((shape[0], scales.shape[-1])), packed_dim=0)
    if weights.symmetric:
        zero_points = None
    rows = values.shape[0]
    scales = scales.reshape(-1, 1).expand(rows, 1) if scales.dim() < 2 or scales.shape[0] != rows else scales
    if zero_points is not None:
        zero_points = zero_points.reshape(-1, 1).expand(rows, 1) if zero_points.numel() == 1 else zero_points
        zero_points = zero_points.to(torch.int8).contiguous()
    return Integers(values.contiguous(), scales.contiguous(), zero_points, bits)


def int4_group_size(group_size: int | None, in_features: int) -> int | None:
    """Return the group size to run the int4 kernels with: the file's, or one that divides it; None if there is none.

    Parameters
    ----------
    group_size : int or None
        Columns that share a scale in the file; None for whole rows.
    in_features : int
    """
    columns = group_size or in_features
    if in_features % columns:
        return None
    return next((size for size in INT4_GROUP_SIZES if columns % size == 0), None)


def padded_rows(out_features: int, device: torch.device) -> int:
    """Return the rows that a packed int4 weight has on this device: no fewer than ``out_features``."""
    tile = CPU_BLOCK if device.type == "cpu" else CUDA_ROWS
    return math.ceil(out_features / tile) * tile


def pack_int4(weight: Integers, group_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack a weight of at most 4 bits for the int4 kernel of the device that it is on.

    Parameters
    ----------
    weight : Integers
    group_size : int
        From :func:`int4_group_size`.
    dtype : torch.dtype
        Of scales and zeros: that of the activations.

    Returns
    -------
    packed : torch.Tensor
        In the kernel's own layout; rows are filled up with zeros to :func:`padded_rows`.
    scales_and_zeros : torch.Tensor
        Shape (in_features / group_size, padded rows, 2).
    """
    rows, columns = weight.values.shape
    device = weight.values.device
    missing = padded_rows(rows, device) - rows
    unsigned = F.pad(weight.values.to(torch.int32) + INT4_OFFSET, (0, 0, 0, missing), value=INT4_OFFSET)
    if device.type == "cpu":
        packed = aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    else:
        pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
        tiles = next(tiles for tiles in (8, 4, 2) if columns % (tiles * CUDA_TILE) == 0)
        packed = aten._convert_weight_to_int4pack(pairs, tiles)
    repeats = columns // weight.scales.shape[1] // group_size
    scales = weight.scales.float().repeat_interleave(repeats, dim=1)
    zeros = torch.zeros_like(scales)
    if weight.zero_points is not None:  # (v - zero point) * scale = v * scale + zero
        zeros = -weight.zero_points.float().repeat_interleave(repeats, dim=1) * scales
    both = torch.stack((scales.t(), zeros.t()), dim=-1)
    return packed, F.pad(both, (0, 0, 0, missing)).to(dtype).contiguous()


def unpack_int4(
    packed: torch.Tensor, scales_and_zeros: torch.Tensor, group_size: int, *, symmetric: bool
) -> torch.Tensor:
    """Return the weight that :func:`pack_int4` packed for a CPU with AVX-512, in the dtype of its scales.

    The values of a block of 64 rows lie column after column, 32 bytes each: the low halves are rows 0 to 31, the high
    ones rows 32 to 63 (:func:`cpu_layout_known` checks that it is so here).

    Returns
    -------
    torch.Tensor
        Transposed: shape (in_features, padded rows).
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    blocks = packed.view(rows // CPU_BLOCK, columns, CPU_BLOCK // 2)
    # Bytes are put in order before they are converted: that moves half as much, and converts in long runs.
    unsigned = torch.cat(((blocks & 0xF).transpose(0, 1), (blocks >> 4).transpose(0, 1)), dim=-1)
    values = (unsigned.view(torch.int8) - INT4_OFFSET).to(scales_and_zeros.dtype)
    groups = values.view(columns // group_size, group_size, rows)
    scales, zeros = scales_and_zeros.unbind(-1)
    groups.mul_(scales.contiguous()[:, None])  # a strided factor would be read one by one
    if not symmetric:
        groups.add_(zeros.contiguous()[:, None])
    return groups.view(columns, rows)


@functools.cache
def cpu_layout_known() -> bool:
    """Return whether the CPU kernel packs as :func:`unpack_int4` reads; it depends on the CPU's vector width."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (2 * CPU_BLOCK, 64), generator=generator, dtype=torch.int8)
    weight = Integers(values, torch.ones(2 * CPU_BLOCK, 1), None, 4)
    packed, scales_and_zeros = pack_int4(weight, 64, torch.float32)
    return bool((unpack_int4(packed, scales_and_zeros, 64, symmetric=True) == values.t()).all())


def own_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's own parameters and buffers by name, as plain tensors."""
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    return {name: tensor.data for name, tensor in own.items() if tensor is not None}
