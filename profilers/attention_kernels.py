"""Softmax attention that also returns its log-sum-exp: fused kernels where there are some, blocks elsewhere.

No T x T matrix is formed: the fused kernels work in tiles, and blocks of scores are bounded by ``BLOCK_ELEMENTS``.
Shapes: B sequences, H query heads, Hkv key/value heads (H a multiple of Hkv; query head h reads key/value head
h // (H / Hkv)), T queries, S keys, d and dv head sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 1 << 22
"""Most elements of a temporary (16 MiB in float32), so that memory does not grow with T²."""

HEAD_ALIGNMENT = 8
"""CUDA's fused kernels want head sizes that are multiples of this; smaller ones are padded with zeros."""

BIAS_ALIGNMENT = 16
"""CUDA's memory-efficient kernel wants rows of the mask aligned to this many elements."""


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax attention's output and log-sum-exp, from one fused kernel where there is one.

    CPU: the flash kernel. CUDA: the flash kernel, else the memory-efficient one. Elsewhere, and with a soft cap:
    block by block in torch operations. Head sizes are padded with zeros where a kernel wants equal or aligned ones.

    Parameters
    ----------
    query, key, value : torch.Tensor
        Shapes (B, H, T, d), (B, Hkv, S, d), (B, Hkv, S, dv).
    mask : torch.Tensor or None
        Broadcastable to (B, H, T, S); boolean (True: visible) or added to the scores.
    is_causal : bool
        Key j is visible to query i only for j <= i.
    scale : float or None
        Factor on the dot products; ``None`` means d^-0.5.
    softcap : float or None
        Scores become ``softcap * tanh(scores / softcap)``.

    Returns
    -------
    output : torch.Tensor
        Shape (B, H, T, dv), the query's dtype; 0 for a query that sees no key.
    log_sum_exp : torch.Tensor
        Shape (B, H, T), float32; -inf for a query that sees no key.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    fused = None
    if softcap is None and not (mask is not None and is_causal):
        if query.device.type == "cpu":
            fused = _fused_cpu(query, key, value, mask, is_causal, scale)
        elif query.device.type == "cuda":
            fused = _fused_cuda(query, key, value, mask, is_causal, scale)
    if fused is None:
        output, log_sum_exp = _blockwise(query, key, value, mask, is_causal, scale, softcap)
        return output, log_sum_exp.detach()
    output, log_sum_exp = fused
    log_sum_exp = log_sum_exp.detach().float()
    if mask is not None:  # the CPU's kernel says 0 for a query that sees nothing
        log_sum_exp = log_sum_exp.masked_fill(~_any_seen(mask), -torch.inf)
    return output, log_sum_exp


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a boolean mask as one that is added to the scores (0 where visible, else -inf); others as they are."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return mask


def _any_seen(mask: torch.Tensor) -> torch.Tensor:
    """Return which queries see a key: the mask's shape without its last dimension."""
    return mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1) > -torch.inf


def _pad_heads(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return tensor if tensor.shape[-1] == size else F.pad(tensor, (0, size - tensor.shape[-1]))


def _fused_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = max(query.shape[-1], value.shape[-1])
    if mask is not None:
        mask = additive_mask(mask, query.dtype)
        if query.dtype == torch.float64:  # the kernel reads any other type of mask as if it were float64
            mask = mask.double()
        while mask.ndim < 4:
            mask = mask.unsqueeze(0)
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _pad_heads(query, size),
        _pad_heads(key, size),
        _pad_heads(value, size),
        0.0,
        is_causal,
        attn_mask=mask,
        scale=scale,
    )
    return output[..., : value.shape[-1]], log_sum_exp


def _fused_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return output and log-sum-exp of the first CUDA kernel that takes these inputs, or None."""
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

    queries, value_size = query.shape[2], value.shape[-1]
    size = -(-max(query.shape[-1], value_size) // HEAD_ALIGNMENT) * HEAD_ALIGNMENT
    query, key, value = (_pad_heads(tensor, size) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    square = queries == key.shape[2]
    flash = SDPAParams(query, key, value, None, 0.0, is_causal, grouped)
    if mask is None and (square or not is_causal) and can_use_flash_attention(flash):
        output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )[:2]
        return output[..., :value_size], log_sum_exp
    if grouped:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if mask is not None:
        mask = additive_mask(mask, query.dtype).to(query.dtype)
        keys = mask.shape[-1]
        mask = F.pad(mask, (0, -keys % BIAS_ALIGNMENT))[..., :keys]
        mask = mask.expand(query.shape[0], query.shape[1], queries, key.shape[2])
    if not can_use_efficient_attention(SDPAParams(query, key, value, mask, 0.0, is_causal, False)):
        return None
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, is_causal, scale=scale
    )[:2]
    return output[..., :value_size], log_sum_exp[..., :queries]


def _blockwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention a block of queries at a time, in float32."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    rows = max(1, BLOCK_ELEMENTS // (batch * heads * keys))
    output = query.new_empty(batch, heads, queries, value.shape[-1])
    log_sum_exp = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    wide = value.float().repeat_interleave(heads // value.shape[1], dim=1)
    for start in range(0, queries, rows):
        block = slice(start, start + rows)
        scores = attention_scores(query, key, mask, is_causal, scale, softcap, queries=block, keys=slice(0, keys))
        block_lse = scores.logsumexp(dim=-1)
        seen = torch.where(block_lse == -torch.inf, 0.0, block_lse)  # a query that sees nothing gets a zero output
        output[:, :, block] = (torch.exp(scores - seen[..., None]) @ wide).to(output.dtype)
        log_sum_exp[:, :, block] = block_lse
    return output, log_sum_exp


def attention_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    *,
    queries: slice,
    keys: slice,
) -> torch.Tensor:
    """Return the scores that enter the softmax for a block: shape (B, H, queries, keys), float32, -inf where hidden.

    The caller bounds the block. Arguments are those of :func:`attention_with_lse`; the soft cap comes before the mask.
    """
    block_q, block_k = query[:, :, queries].float(), key[:, :, keys].float()
    batch, heads, rows, size = block_q.shape
    kv_heads, columns = block_k.shape[1:3]
    grouped = block_q.reshape(batch, kv_heads, heads // kv_heads * rows, size)
    scores = (grouped @ block_k.transpose(-1, -2)).view(batch, heads, rows, columns) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        part = mask[..., queries, :] if mask.shape[-2] > 1 else mask
        part = part[..., keys] if mask.shape[-1] > 1 else part
        scores = scores + additive_mask(part, torch.float32).float()
    if is_causal:
        first_q, first_k = queries.start or 0, keys.start or 0
        positions = torch.arange(max(rows, columns), device=scores.device)
        hidden = positions[None, :columns] + first_k > positions[:rows, None] + first_q
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores
