"""Attention over product-quantized keys and values on a GPU, and encoding, through Triton.

Contracts are those of :mod:`passes.kv_pq.cpu_kernels`; :func:`attend_all` takes the tokens held in full precision as
further splits of the same launch. On a CPU these run only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import NamedTuple

import torch

from passes.base import PassError
from passes.kv_pq import residual
from passes.kv_pq.by_identity import by_identity
from passes.kv_pq.codebooks import LayerCodebooks
from passes.kv_pq.quantizer import VectorQuantizer, nearest
from passes.kv_pq.rope import Rope

BLOCK = 64
"""Tokens that a program takes at a time."""
SMALLEST_TILE = 16
"""Of a tensor-core product."""
LARGEST_ROWS = 64
"""Query rows of one KV head that a program takes."""
BLOCKS_A_SPLIT = 4
"""At least: shorter splits cost more to merge than they gain."""
PROGRAMS_A_PROCESSOR = 2
"""That splits are made for."""
ENCODED_AT_ONCE = 64
INTERPRETED_SPLITS = 3
"""In the interpreter, where there are no processors to fill."""
_FIRST_ROPE_BLOCKS = 64


class _Tables(NamedTuple):
    """One layer as ``attend_splits`` reads it: A and B are the halves of key channels, padded to HALF each.

    ``key_table`` (H, 256, 2 HALF), ``value_table`` (H, 256, WIDTH); ``key_part``, ``value_part`` the code of each of
    these channels; ``order`` (2 HALF) the channel of a query, -1 for none; ``key_mean`` (H, 2 HALF), to be turned with
    keys, or None; ``inverse`` (H, D, D) of values; ``ropes`` rotations by their number of blocks;
    ``key_gain_place``, ``value_gain_place`` (H,) the code of a head's gain; ``key_residual``, ``value_residual`` a
    table and codes in the same order, whose centroids are added; a channel that has none reads zeros.
    """

    key_table: torch.Tensor
    value_table: torch.Tensor
    key_part: torch.Tensor
    value_part: torch.Tensor
    order: torch.Tensor
    key_mean: torch.Tensor | None
    inverse: torch.Tensor | None
    ropes: dict[int, tuple[torch.Tensor, ...]]
    key_gain_place: torch.Tensor
    value_gain_place: torch.Tensor
    key_residual: tuple[torch.Tensor, torch.Tensor] | None
    value_residual: tuple[torch.Tensor, torch.Tensor] | None


def available(device: torch.device) -> str | None:
    """Return why these kernels cannot run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton has no kernels for {device.type}"
    return None


def unsupported(layer: LayerCodebooks) -> str | None:
    """Return why a layer's format is not one that these kernels read, or None."""
    if layer.rope is not None and layer.keys.inverse is not None:
        return "its keys have both a rotary embedding to put back and a basis"
    return None


def attend(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    layer: LayerCodebooks,
    *,
    start: torch.Tensor,
    stop: int,
    offset: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the coded history of one layer; see :func:`passes.kv_pq.cpu_kernels.attend`.

    Products are computed in the query's type, sums in float32.

    Raises
    ------
    PassError
        If the device or the layer's format is not supported.
    """
    return attend_all(
        query, key_codes, value_codes, layer, start=start, stop=stop, offset=offset, scale=scale, softcap=softcap
    )


def attend_all(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    layer: LayerCodebooks,
    *,
    start: torch.Tensor,
    stop: int,
    offset: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    exact_keys: torch.Tensor | None = None,
    exact_values: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the coded history and over tokens held in full precision, merged.

    Parameters
    ----------
    query, key_codes, value_codes, layer, start, stop, offset, scale, softcap
        As for :func:`attend`.
    exact_keys, exact_values : torch.Tensor or None
        Shape (B, H, n, D), any strides: every query sees them, with rotary embedding applied.
    visible : torch.Tensor or None
        Shape (B, n), bool: which of them a row sees; None: all.

    Returns
    -------
    out : torch.Tensor
        Shape (B, Hq, Tq, D), float32: normalized over all; 0 where there is nothing to see.
    lse : torch.Tensor
        Shape (B, Hq, Tq), float32.

    Raises
    ------
    PassError
        If the device or the layer's format is not supported.
    """
    reason = available(query.device) or unsupported(layer)
    if reason is not None:
        raise PassError(f"kv-pq's GPU kernels cannot be used: {reason}; use passes.kv_pq.attention instead")
    import triton  # type: ignore[import-untyped]

    from passes.kv_pq.triton_kernels import attend_splits, merge_splits

    batch, query_heads, length, dim = query.shape
    heads = layer.keys.heads
    rows = query_heads // heads * length
    query = query.contiguous()
    tables = _tables(layer, query.dtype)
    half, width = tables.order.numel() // 2, tables.value_table.shape[-1]
    asked, bias = (query, None) if layer.rope is not None else _ask(query, layer.keys, scale)
    rope = _rope_tables(tables, layer.rope, stop, half) if layer.rope is not None else (query,) * 4
    exact = 0 if exact_keys is None else exact_keys.shape[2]
    if exact_keys is None or exact_values is None:
        exact_keys = exact_values = query
    exact_splits = math.ceil(exact / BLOCK / BLOCKS_A_SPLIT)
    block_rows = min(LARGEST_ROWS, max(SMALLEST_TILE, triton.next_power_of_2(rows)))
    code_splits = _splits(query.device, stop, batch * heads * math.ceil(rows / block_rows)) if stop else 0
    splits = code_splits + exact_splits
    out = query.new_zeros(query.shape, dtype=torch.float32)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    if not splits:
        return out, lse
    sums = out.new_empty(splits, batch * heads * rows, width)
    highest, total = out.new_empty(2, splits, batch * heads * rows)
    nothing = query  # for pointers that are not read
    attend_splits[splits, batch * heads, math.ceil(rows / block_rows)](
        query, asked, nothing if bias is None else bias, key_codes, value_codes,
        tables.key_table, tables.value_table, tables.key_part, tables.value_part,
        *(tables.key_residual or (nothing,) * 2), *(tables.value_residual or (nothing,) * 2),
        tables.key_gain_place, tables.value_gain_place,
        nothing if layer.keys.gains is None else layer.keys.gains,
        nothing if layer.values.gains is None else layer.values.gains,
        nothing if tables.key_mean is None else tables.key_mean, tables.order, *rope, start, offset,
        exact_keys, exact_values, nothing if visible is None else visible.to(torch.uint8).contiguous(),
        sums, highest, total, stop, exact, scale, softcap or 0.0,
        *key_codes.stride()[:2], *value_codes.stride()[:2], *exact_keys.stride(), *exact_values.stride(),
        HEADS=heads, ROWS=rows, DIM=dim,
        BLOCK_ROWS=block_rows, BLOCK=BLOCK, HALF=half, WIDTH=width, CODE_SPLITS=code_splits,
        EXACT_SPLITS=max(exact_splits, 1), HAS_ROPE=layer.rope is not None, HAS_BIAS=bias is not None,
        HAS_KEY_GAINS=layer.keys.gains is not None, HAS_VALUE_GAINS=layer.values.gains is not None,
        HAS_KEY_RESIDUAL=tables.key_residual is not None, HAS_VALUE_RESIDUAL=tables.value_residual is not None,
        HAS_MEAN=tables.key_mean is not None, HAS_SOFTCAP=softcap is not None, HAS_VISIBLE=visible is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    merge_splits[(batch * heads * rows,)](
        sums, highest, total, layer.values.mean, nothing if tables.inverse is None else tables.inverse, out, lse,
        HEADS=heads, ROWS=rows, DIM=dim, WIDTH=width, CHUNK=min(SMALLEST_TILE, width), CODE_SPLITS=code_splits,
        SPLITS=splits, PADDED_SPLITS=triton.next_power_of_2(splits), HAS_INVERSE=tables.inverse is not None,
    )  # fmt: skip
    return out, lse


def encode(x: torch.Tensor, quantizer: VectorQuantizer) -> torch.Tensor:
    """Return the codes of vectors, as :meth:`VectorQuantizer.encode` but for ties within float32 rounding.

    Parameters
    ----------
    x : torch.Tensor
        Shape (B, H, T, D), any floating type.
    quantizer : VectorQuantizer

    Returns
    -------
    torch.Tensor
        Shape (B, T, codes), uint8.

    Raises
    ------
    PassError
        If the device is not supported.
    """
    reason = available(x.device)
    if reason is not None:
        raise PassError(f"kv-pq's GPU kernels cannot be used: {reason}; use VectorQuantizer.encode instead")
    if quantizer.residual_part is not None:
        return residual.encode(x, quantizer, encode)
    from passes.kv_pq.triton_kernels import nearest_centroids

    batch, heads, length, dim = x.shape
    count = batch * length
    y = x.float() - quantizer.mean[:, None, :]
    if quantizer.basis is not None:
        y = y @ quantizer.basis
    y = y.transpose(0, 1).reshape(heads, count, dim)
    out = torch.empty(count, quantizer.codes, dtype=torch.uint8, device=x.device)
    if quantizer.gains is not None:
        energy = (y.square() * quantizer.weight[:, None, :]).sum(-1) / quantizer.weight.sum(-1, keepdim=True)
        chosen = nearest(energy.sqrt(), quantizer.gains)
        y = y / quantizer.gains.gather(1, chosen)[..., None]
        out[:, quantizer.gain_places] = chosen.to(torch.uint8).t()
    columns, table, norm, places = _encoder_tables(quantizer)
    if count:
        nearest_centroids[math.ceil(count / ENCODED_AT_ONCE), places.shape[1], heads](
            y.contiguous(), columns, table, norm, places, out, count,
            PARTS=places.shape[1], CODES=quantizer.codes, DIM=dim, LARGEST=columns.shape[-1], BLOCK=ENCODED_AT_ONCE,
        )  # fmt: skip
    return out.view(batch, length, quantizer.codes)


def _splits(device: torch.device, stop: int, programs: int) -> int:
    """Return into how many ranges of history each of ``programs`` is split, so that all processors have work."""
    most = max(1, stop // (BLOCK * BLOCKS_A_SPLIT))
    if device.type != "cuda":
        return min(most, INTERPRETED_SPLITS)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(most, math.ceil(PROGRAMS_A_PROCESSOR * processors / programs))


def _ask(query: torch.Tensor, keys: VectorQuantizer, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries in the space of centroids and what the mean adds to their scores; nothing has to be turned."""
    batch, query_heads, length, dim = query.shape
    grouped = query.float().view(batch, keys.heads, -1, dim)
    bias = scale * grouped @ keys.mean[:, :, None]
    if keys.inverse is not None:
        grouped = grouped @ keys.inverse.mT
    return grouped.contiguous(), bias.contiguous()


@by_identity
def _encoder_tables(side: VectorQuantizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return columns, tables and lengths of parts, and the place (H, M) of their codes, -1 for none."""
    columns, table, norm = side._by_part()
    most = max(side.parts)
    places = [
        [at + part if part < parts else -1 for part in range(most)]
        for at, parts in zip(side.offsets, side.parts, strict=False)
    ]
    return columns.int().contiguous(), table.contiguous(), norm.contiguous(), columns.new_tensor(places).int()


@by_identity
def _all_tables(_layer: LayerCodebooks) -> dict[torch.dtype, _Tables]:
    return {}


def _tables(layer: LayerCodebooks, dtype: torch.dtype) -> _Tables:
    kept = _all_tables(layer)
    if dtype not in kept:
        kept[dtype] = _make_tables(layer, dtype)
    return kept[dtype]


def _make_tables(layer: LayerCodebooks, dtype: torch.dtype) -> _Tables:
    import triton

    keys, values = layer.keys, layer.values
    device, dim = keys.centroids.device, keys.head_dim
    middle = (dim + 1) // 2
    half = max(SMALLEST_TILE, triton.next_power_of_2(middle))
    if layer.rope is None:
        first, second = torch.arange(middle, device=device), torch.arange(middle, dim, device=device)
    else:
        first, second = layer.rope.pairs().t()
        rest = torch.arange(layer.rope.width, dim, device=device)  # turned by an angle of 0
        first, second = torch.cat([first, rest[::2]]), torch.cat([second, rest[1::2]])
    order = torch.full((2, half), -1, device=device)
    order[0, : first.numel()], order[1, : second.numel()] = first, second
    order = order.flatten()
    key_table, key_part = _in_order(keys.centroids, order), _in_order(keys.places, order)
    mean = None
    if layer.rope is not None:
        mean = _in_order(keys.mean, order)
        if keys.gains is None:
            key_table, mean = key_table + mean[:, None], None
    plain = torch.full((max(SMALLEST_TILE, triton.next_power_of_2(dim)),), -1, device=device)
    plain[:dim] = torch.arange(dim, device=device)
    return _Tables(
        key_table.to(dtype).contiguous(),
        _in_order(values.centroids, plain).to(dtype).contiguous(),
        key_part.int().contiguous(),
        _in_order(values.places, plain).int().contiguous(),
        order.int(),
        mean,
        None if values.inverse is None else values.inverse.contiguous(),
        {},
        keys.gain_places.int(),
        values.gain_places.int(),
        _residual(keys, order, dtype),
        _residual(values, plain, dtype),
    )


def _residual(
    side: VectorQuantizer, order: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if side.residual_centroids is None:
        return None
    table = _in_order(side.residual_centroids, order).to(dtype).contiguous()
    return table, _in_order(side.residual_places, order).int().contiguous()


def _in_order(of: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return channels (the last dimension) in an order; 0 where it is -1."""
    return torch.where(order >= 0, of[..., order.clamp(min=0)], 0)


def _rope_tables(tables: _Tables, rope: Rope, stop: int, half: int) -> tuple[torch.Tensor, ...]:
    """Return cosines and sines within a block (BLOCK, HALF) and of blocks (n, HALF) for slots up to ``stop``."""
    needed = stop // BLOCK + 1
    most = max(tables.ropes, default=0)
    if most < needed:
        most = max(_FIRST_ROPE_BLOCKS, needed, 2 * most)
        frequencies = rope.frequencies.new_zeros(half)
        frequencies[: rope.frequencies.numel()] = rope.frequencies
        padded = Rope(frequencies)
        inside = torch.arange(BLOCK, device=frequencies.device)
        blocks = torch.arange(most, device=frequencies.device) * BLOCK
        tables.ropes.clear()
        tables.ropes[most] = (*padded.angles(inside), *padded.angles(blocks))
    return tables.ropes[most]
