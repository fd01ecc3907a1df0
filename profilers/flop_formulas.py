"""FLOPs of one op call: torch's own formulas, and ours for the ops that torch has none for.

A multiply-add is 2 FLOPs. Elementwise ops, reductions and normalizations are 0, as in
:class:`torch.utils.flop_counter.FlopCounterMode`, so that totals agree with it wherever both count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], int]


def attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Return FLOPs of q.k and p.v over the dense rectangle of queries x keys; the softmax is 0.

    Parameters
    ----------
    query : torch.Tensor
        Shape (..., query heads, T_q, d).
    key, value : torch.Tensor
        Shapes (..., KV heads, T_k, d) and (..., KV heads, T_k, d_v).
    """
    return 2 * query.numel() * key.shape[-2] + 2 * math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1]


def _by_inner_dimension(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """``args[0]`` (..., k) times a matrix with k rows, packed or not: 2 k for each output element."""
    return 2 * int(out.numel()) * int(args[0].shape[-1])


def _grouped(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Count a grouped product: each row meets only its own group's matrix, so the cost is that of the rows routed."""
    a, b = args[0], args[1]
    if a.dim() == 2 and b.dim() == 2:  # the groups divide the inner dimension
        return 2 * int(a.numel()) * int(b.shape[-1])
    return 2 * int(out.numel()) * int(a.shape[-1])


def _vector(position: int) -> Formula:
    """Matrix-vector or dot product whose first factor is ``args[position]``."""
    return lambda args, kwargs, out: 2 * int(args[position].numel())


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return attention_flops(args[0], args[1], args[2])


def _triangular_solve(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Count substitution with an n x n triangle: row i takes i multiply-adds and a division, n^2 for each column."""
    return int(out.numel()) * int(args[0].shape[-1])


_OURS: dict[str, Formula] = {
    "aten::linalg_solve_triangular": _triangular_solve,
    "aten::linear": _by_inner_dimension,
    "aten::_int_mm": _by_inner_dimension,
    "aten::_weight_int8pack_mm": _by_inner_dimension,
    "aten::_weight_int4pack_mm": _by_inner_dimension,
    "aten::_weight_int4pack_mm_for_cpu": _by_inner_dimension,
    "aten::_weight_int4pack_mm_with_scales_and_zeros": _by_inner_dimension,
    "aten::mv": _vector(0),
    "aten::addmv": _vector(1),
    "aten::dot": _vector(0),
    "aten::vdot": _vector(0),
    "aten::addbmm": lambda args, kwargs, out: 2 * int(args[1].numel()) * int(args[2].shape[-1]),
    "aten::_grouped_mm": _grouped,
    "aten::_scaled_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
}


def formula(op: torch._ops.OpOverload) -> Formula | None:
    """Return the formula of ``op``, to be called with its arguments, keyword arguments and output, or ``None``."""
    ours = _OURS.get(op._schema.name)
    if ours is not None:
        return ours
    torchs = flop_registry.get(op._overloadpacket)
    if torchs is None:
        return None
    return lambda args, kwargs, out: int(torchs(*args, **kwargs, out_val=out))
