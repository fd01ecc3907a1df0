"""Linear layers whose weights stay packed: one class for each kernel of PyTorch's that multiplies by low-bit weights.

Weights are buffers, and there is no ``weight`` attribute. A layer stays on the device and in the dtype that it was
packed for: another layout would be needed elsewhere, so moving one is refused. How far each kernel is from float64 is
in ``docs/passes/kernels.md``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from passes.base import PassError
from passes.quantize.packing import Integers, cpu_layout_known, pack_int4, unpack_int4

aten = torch.ops.aten

UNPACK_INT4_ROWS = 40
"""Rows of activations from which unpacking an int4 weight and multiplying in floating point is faster on a CPU."""
UNPACK_INT8_ROWS = 12
"""The same for int8."""
INT8_RANGE = 127.5
"""Half of an int8's range of 255 steps: compressed-tensors divides a token's largest value by it."""
FP8_MAX = 448.0
"""Largest value of float8_e4m3fn."""
INT_MM_CUDA_ROWS = 32
"""aten._int_mm takes more than 16 rows on CUDA; fewer are filled up with zeros to this many."""
SMALLEST_SCALE = 1e-12
"""A token of zeros has no scale; this one keeps it finite."""


class PackedLinear(nn.Module, ABC):
    """A linear layer on a packed weight.

    Attributes
    ----------
    in_features, out_features : int
    packed_parameters : int
        Elements of the weight that is packed and of the bias; without those of a weight that is counted elsewhere,
        which this is a copy of. See :mod:`profilers.weights`.
    kernel : str
        The op that multiplies.
    """

    kernel: str
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.packed_parameters = in_features * out_features + (0 if bias is None else bias.numel())
        self.dtype = dtype
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))

    @abstractmethod
    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ weight.T`` for rows of shape (n, in_features): shape (n, out_features)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias`` for x of shape (..., in_features)."""
        out = self.product(x.reshape(-1, self.in_features))
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer as ``torch.nn.Linear`` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Refuse a move to another device or dtype; everything else that nn.Module applies to tensors goes through."""
        device = next(self.buffers()).device
        moved = fn(torch.empty(0, dtype=self.dtype, device=device))
        if moved.device != device or moved.dtype != self.dtype:
            raise PassError(
                f"a weight packed for {device} in {self.dtype} cannot become {moved.dtype} on {moved.device}; "
                "load the checkpoint again with that device and dtype"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class Int4Linear(PackedLinear):
    """Weights of at most 4 bits in groups, activations as they are (w4a16).

    Parameters
    ----------
    weight : Integers
        On the device that it will run on.
    group_size : int
        From :func:`passes.quantize.packing.int4_group_size`.
    bias : torch.Tensor or None
    dtype : torch.dtype
        Of activations.
    """

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, weight: Integers, group_size: int, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        rows, columns = weight.values.shape
        super().__init__(columns, rows, bias, dtype)
        self.group_size = group_size
        self.symmetric = weight.zero_points is None
        self.on_cpu = weight.values.device.type == "cpu"
        self.kernel = "aten._weight_int4pack_mm_for_cpu" if self.on_cpu else "aten._weight_int4pack_mm"
        self.unpacks = self.on_cpu and cpu_layout_known()
        packed, scales_and_zeros = pack_int4(weight, group_size, dtype)
        self.padded = int(scales_and_zeros.shape[1]) != rows
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", scales_and_zeros)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply packed for few rows; for many, unpack the weight first and multiply in floating point."""
        if self.unpacks and rows.shape[0] >= UNPACK_INT4_ROWS:
            out = rows @ unpack_int4(self.packed, self.scales_and_zeros, self.group_size, symmetric=self.symmetric)
        elif self.on_cpu:
            out = aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.scales_and_zeros)
        else:
            out = aten._weight_int4pack_mm(rows, self.packed, self.group_size, self.scales_and_zeros)
        narrowed: torch.Tensor = out[:, : self.out_features] if self.padded else out
        return narrowed


class Int8Linear(PackedLinear):
    """Weights of 5 to 8 bits, symmetric, one scale a row; activations as they are (w8a16)."""

    kernel = "aten._weight_int8pack_mm"
    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: Integers, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.values.shape[1], weight.values.shape[0], bias, dtype)
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales.reshape(-1).to(dtype))

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply packed for few rows; for many, in floating point with the scales applied to the result."""
        if rows.shape[0] >= UNPACK_INT8_ROWS:
            return F.linear(rows, self.values.to(rows.dtype)) * self.scales
        out: torch.Tensor = aten._weight_int8pack_mm(rows, self.values, self.scales)
        return out


class DynamicInt8Linear(PackedLinear):
    """Weights in int8 with one scale a row, activations rounded to int8 with one scale a token (w8a8).

    The product is exact in integers. A token's scale is its largest absolute value / 127.5, as compressed-tensors has
    it, computed in float32.
    """

    kernel = "aten._int_mm"
    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: Integers, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.values.shape[1], weight.values.shape[0], bias, dtype)
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales.reshape(-1).float())

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Round the rows, multiply in integers, scale."""
        exact = rows.float()
        scale = (exact.abs().amax(dim=-1, keepdim=True) / INT8_RANGE).clamp_min(SMALLEST_SCALE)
        rounded = (exact / scale).round().clamp_(-128, 127).to(torch.int8)
        if rounded.device.type == "cuda" and rounded.shape[0] < INT_MM_CUDA_ROWS:
            rounded = F.pad(rounded, (0, 0, 0, INT_MM_CUDA_ROWS - rounded.shape[0]))
        product: torch.Tensor = aten._int_mm(rounded, self.values.t())[: rows.shape[0]]
        return (product.float() * (scale * self.scales)).to(rows.dtype)


class Fp8Linear(PackedLinear):
    """Weights in float8_e4m3fn with one scale a row, activations rounded to it with one scale a token (fp8)."""

    kernel = "aten._scaled_mm"
    values: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(values.shape[1], values.shape[0], bias, dtype)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales.float().reshape(1, -1).expand(1, values.shape[0]).contiguous())

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Round the rows and multiply; the kernel applies both scales and writes bfloat16."""
        exact = rows.float()
        scale = (exact.abs().amax(dim=-1, keepdim=True) / FP8_MAX).clamp_min(SMALLEST_SCALE)
        rounded = (exact / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        out: torch.Tensor = aten._scaled_mm(
            rounded, self.values.t(), scale_a=scale, scale_b=self.scales, out_dtype=torch.bfloat16
        )
        return out.to(rows.dtype)
