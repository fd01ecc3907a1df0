"""Triton code of :mod:`passes.kv_pq.kernels`; import it only where Triton is installed.

::

    grid (splits, B x H, blocks of query rows)
      split < CODE_SPLITS   a range of the history: codes ─> centroids ─> turned within the block ─> scores ─> sums
      the others            kept and recent tokens in full precision
    merge, grid (B x H x rows): splits by log-sum-exp; sums of centroids through `inverse`, plus mean

A program decodes a block of tokens once for all query heads that share the KV head. Channels of keys lie as two halves,
``a`` and ``b``: channel i of each forms a rotated pair. A key's rotation is that of its block of positions, undone on
the query, and that within the block, whose table stays in registers. Sums are float32; products of 16-bit types are
the tensor cores', accumulated in float32.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit  # type: ignore[untyped-decorator]
def _add_block(scores, highest, total, sums, values, gains, HAS_GAINS: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return running maximum, sum of weights and weighted sum of values with one block more."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp(highest - base)
    weights = tl.exp(scores - base[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if HAS_GAINS:
        weights = weights * gains[None, :]
    sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return higher, total, sums


@triton.jit  # type: ignore[untyped-decorator]
def _shaped(scores, seen, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    if HAS_SOFTCAP:
        scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))  # tanh
    return tl.where(seen[None, :], scores, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def attend_splits(  # type: ignore[no-untyped-def]
    query, asked, bias, key_codes, value_codes, key_table, value_table, key_part, value_part,
    key_residual_table, key_residual_part, value_residual_table, value_residual_part,
    key_gain_place, value_gain_place, key_gains, value_gains, key_mean, key_order,
    cos, sin, block_cos, block_sin, start, offset, exact_keys, exact_values, visible,
    sums_out, highest_out, total_out,
    stop, exact_tokens, scale, softcap,
    key_batch, key_slot, value_batch, value_slot,
    ek_batch, ek_head, ek_token, ek_channel, ev_batch, ev_head, ev_token, ev_channel,
    HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, WIDTH: tl.constexpr, CODE_SPLITS: tl.constexpr, EXACT_SPLITS: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_GAINS: tl.constexpr, HAS_VALUE_GAINS: tl.constexpr,
    HAS_KEY_RESIDUAL: tl.constexpr, HAS_VALUE_RESIDUAL: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_VISIBLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend over one split; HALF and WIDTH are half of the channels and all of them, padded for tensor cores."""
    split = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    rows = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    half = tl.arange(0, HALF)
    channel = tl.arange(0, WIDTH)
    token = tl.arange(0, BLOCK)
    dtype = key_table.dtype.element_ty
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
    gains = tl.zeros([BLOCK], tl.float32)
    query_rows = (pair * ROWS + rows)[:, None] * DIM

    if split < CODE_SPLITS:
        order_a, order_b = tl.load(key_order + half), tl.load(key_order + HALF + half)
        in_rows = (rows < ROWS)[:, None]
        q_a = tl.load(asked + query_rows + order_a[None, :], in_rows & (order_a >= 0)[None, :], 0.0).to(tl.float32)
        q_b = tl.load(asked + query_rows + order_b[None, :], in_rows & (order_b >= 0)[None, :], 0.0).to(tl.float32)
        ask_a, ask_b = q_a, q_b
        constant = tl.zeros([BLOCK_ROWS], tl.float32)
        if HAS_BIAS:
            constant += tl.load(bias + pair * ROWS + rows, rows < ROWS, 0.0)
        part_a = tl.load(key_part + head * 2 * HALF + half)
        part_b = tl.load(key_part + head * 2 * HALF + HALF + half)
        part_v = tl.load(value_part + head * WIDTH + channel)
        if HAS_KEY_RESIDUAL:
            refined_a = tl.load(key_residual_part + head * 2 * HALF + half)
            refined_b = tl.load(key_residual_part + head * 2 * HALF + HALF + half)
        if HAS_VALUE_RESIDUAL:
            refined_v = tl.load(value_residual_part + head * WIDTH + channel)
        keys_at = key_codes + batch * key_batch
        values_at = value_codes + batch * value_batch
        key_gain, value_gain = tl.load(key_gain_place + head), tl.load(value_gain_place + head)
        first = tl.load(start + batch)
        origin = tl.zeros_like(first)
        if HAS_ROPE:
            origin = tl.load(offset + batch)
            cos_in = tl.load(cos + token[:, None] * HALF + half[None, :])
            sin_in = tl.load(sin + token[:, None] * HALF + half[None, :])
        low = (first - origin) // BLOCK
        blocks = tl.maximum(tl.cdiv(stop - origin, BLOCK), low)
        share = tl.cdiv(blocks - low, CODE_SPLITS)
        begin = low + split * share
        end = tl.minimum(begin + share, blocks)
        for block in range(begin, end):
            slots = origin + block * BLOCK + token
            seen = (slots >= first) & (slots < stop)
            row = keys_at + slots[:, None] * key_slot
            code_a = tl.load(row + part_a[None, :], seen[:, None], 0).to(tl.int32)
            code_b = tl.load(row + part_b[None, :], seen[:, None], 0).to(tl.int32)
            table = key_table + head * 256 * 2 * HALF
            k_a = tl.load(table + code_a * (2 * HALF) + half[None, :])
            k_b = tl.load(table + code_b * (2 * HALF) + HALF + half[None, :])
            if HAS_KEY_RESIDUAL:
                code_a = tl.load(row + refined_a[None, :], seen[:, None], 0).to(tl.int32)
                code_b = tl.load(row + refined_b[None, :], seen[:, None], 0).to(tl.int32)
                table = key_residual_table + head * 256 * 2 * HALF
                k_a += tl.load(table + code_a * (2 * HALF) + half[None, :])
                k_b += tl.load(table + code_b * (2 * HALF) + HALF + half[None, :])
            if HAS_KEY_GAINS:
                chosen = tl.load(keys_at + slots * key_slot + key_gain, seen, 0).to(tl.int32)
                gains = tl.load(key_gains + head * 256 + chosen)
            if HAS_ROPE:
                x, y = k_a.to(tl.float32), k_b.to(tl.float32)
                if HAS_KEY_GAINS:
                    x, y = x * gains[:, None], y * gains[:, None]
                if HAS_MEAN:
                    x += tl.load(key_mean + head * 2 * HALF + half)[None, :]
                    y += tl.load(key_mean + head * 2 * HALF + HALF + half)[None, :]
                k_a, k_b = (x * cos_in - y * sin_in).to(dtype), (y * cos_in + x * sin_in).to(dtype)
                c = tl.load(block_cos + block * HALF + half)[None, :]
                s = tl.load(block_sin + block * HALF + half)[None, :]
                ask_a, ask_b = q_a * c + q_b * s, q_b * c - q_a * s
            scores = tl.dot(ask_a.to(dtype), tl.trans(k_a), input_precision=PRECISION)
            scores += tl.dot(ask_b.to(dtype), tl.trans(k_b), input_precision=PRECISION)
            if HAS_KEY_GAINS and not HAS_ROPE:
                scores = scores * gains[None, :]
            scores = _shaped(scores * scale + constant[:, None], seen, softcap, HAS_SOFTCAP)
            row = values_at + slots[:, None] * value_slot
            code_v = tl.load(row + part_v[None, :], seen[:, None], 0).to(tl.int32)
            values = tl.load(value_table + head * 256 * WIDTH + code_v * WIDTH + channel[None, :])
            if HAS_VALUE_RESIDUAL:
                code_v = tl.load(row + refined_v[None, :], seen[:, None], 0).to(tl.int32)
                values += tl.load(value_residual_table + head * 256 * WIDTH + code_v * WIDTH + channel[None, :])
            if HAS_VALUE_GAINS:
                chosen = tl.load(values_at + slots * value_slot + value_gain, seen, 0).to(tl.int32)
                gains = tl.load(value_gains + head * 256 + chosen)
            highest, total, sums = _add_block(scores, highest, total, sums, values, gains, HAS_VALUE_GAINS, PRECISION)
    else:
        inside = channel < DIM
        q = tl.load(query + query_rows + channel[None, :], (rows < ROWS)[:, None] & inside[None, :], 0.0).to(dtype)
        keys_at = exact_keys + batch * ek_batch + head * ek_head
        values_at = exact_values + batch * ev_batch + head * ev_head
        share = tl.cdiv(tl.cdiv(exact_tokens, BLOCK), EXACT_SPLITS)
        begin = (split - CODE_SPLITS) * share
        for block in range(begin, begin + share):
            tokens = block * BLOCK + token
            held = tokens < exact_tokens
            seen = held
            if HAS_VISIBLE:
                seen = seen & (tl.load(visible + batch * exact_tokens + tokens, held, 0) != 0)
            both = held[:, None] & inside[None, :]
            keys = tl.load(keys_at + tokens[:, None] * ek_token + channel[None, :] * ek_channel, both, 0.0).to(dtype)
            values = tl.load(values_at + tokens[:, None] * ev_token + channel[None, :] * ev_channel, both, 0.0)
            scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
            scores = _shaped(scores, seen, softcap, HAS_SOFTCAP)
            highest, total, sums = _add_block(scores, highest, total, sums, values.to(dtype), gains, False, PRECISION)

    at = (tl.num_programs(1) * split + pair) * ROWS + rows
    tl.store(highest_out + at, highest, rows < ROWS)
    tl.store(total_out + at, total, rows < ROWS)
    tl.store(sums_out + at[:, None] * WIDTH + channel[None, :], sums, (rows < ROWS)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def merge_splits(  # type: ignore[no-untyped-def]
    sums_in, highest_in, total_in, mean, inverse, out, lse,
    HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    CODE_SPLITS: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr, HAS_INVERSE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query row."""
    row = tl.program_id(0).to(tl.int64)
    head = row // ROWS % HEADS
    split = tl.arange(0, PADDED_SPLITS)
    channel = tl.arange(0, WIDTH)
    inside = channel < DIM
    at = split * tl.num_programs(0) + row
    held = split < SPLITS
    highest = tl.load(highest_in + at, held, float("-inf"))
    top = tl.max(highest, 0)
    factor = tl.exp(highest - tl.where(top == float("-inf"), 0.0, top))
    weights = factor * tl.load(total_in + at, held, 0.0)
    total = tl.sum(weights, 0)
    coded, exact = split < CODE_SPLITS, held & (split >= CODE_SPLITS)
    where = at[:, None] * WIDTH
    whole = tl.load(sums_in + where + channel[None, :], exact[:, None], 0.0)
    merged = tl.sum(whole * factor[:, None], 0)
    merged += tl.load(mean + head * DIM + channel, inside, 0.0) * tl.sum(tl.where(coded, weights, 0.0), 0)
    if HAS_INVERSE:
        for chunk in range(0, WIDTH, CHUNK):
            some = chunk + tl.arange(0, CHUNK)
            part = tl.load(sums_in + where + some[None, :], coded[:, None], 0.0)
            matrix = tl.load(
                inverse + head * DIM * DIM + some[:, None] * DIM + channel[None, :],
                (some < DIM)[:, None] & inside[None, :],
                0.0,
            )
            merged += tl.sum(tl.sum(part * factor[:, None], 0)[:, None] * matrix, 0)
    else:
        whole = tl.load(sums_in + where + channel[None, :], coded[:, None], 0.0)
        merged += tl.sum(whole * factor[:, None], 0)
    safe = tl.where(total == 0, 1.0, total)
    tl.store(out + row * DIM + channel, merged / safe, inside)
    tl.store(lse + row, top + tl.log(safe))  # top is -inf where there is nothing to see


@triton.jit  # type: ignore[untyped-decorator]
def nearest_centroids(  # type: ignore[no-untyped-def]
    vectors, columns, table, length, places, out, count,
    PARTS: tl.constexpr, CODES: tl.constexpr, DIM: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the code of one part for a block of vectors (H, N, D); centroids are (H, M, S, 256), weighted."""
    part, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    centroid = tl.arange(0, 256)
    at = head * PARTS + part
    distance = tl.zeros([BLOCK, 256], tl.float32) + tl.load(length + at * 256 + centroid)[None, :]
    for member in range(LARGEST):
        channel = tl.load(columns + at * LARGEST + member)
        x = tl.load(vectors + (head * count + row) * DIM + channel, (row < count) & (channel < DIM), 0.0)
        distance -= 2 * x[:, None] * tl.load(table + (at * LARGEST + member) * 256 + centroid)[None, :]
    chosen = tl.argmin(distance, 1)
    place = tl.load(places + at)  # -1 where another head has more parts
    tl.store(out + row.to(tl.int64) * CODES + place, chosen.to(tl.uint8), (row < count) & (place >= 0))
