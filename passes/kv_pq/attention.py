"""Attention of a model whose cache is product-quantized.

::

    query ──┬── kept + recent block (full precision) ──> output, log-sum-exp ──┐
            ├── history, from its codes ───────────────> output, log-sum-exp ──┼──> merged output
            └── new tokens of a prefill (exact, causal) > output, log-sum-exp ──┘

Softmax over a union of keys is the mean of the softmaxes over its parts, weighted by ``exp(log-sum-exp)``
(FlashAttention, section 3.1; MILLION, section 4.3), so each part is computed by what suits it. The function is
registered with transformers under :data:`NAME`; a call whose keys carry a cache layer (``pq_layer``) is computed here,
any other by transformers' own attention.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from passes.base import PassError
from passes.kv_pq.layer_views import exact, exact_mask
from profilers.attention_kernels import BLOCK_ELEMENTS, additive_mask, attention_with_lse

if TYPE_CHECKING:
    from passes.kv_pq.codebooks import LayerCodebooks
    from passes.kv_pq.layer import PQLayer
    from passes.kv_pq.quantizer import VectorQuantizer

NAME = "effcli_pq"
"""What transformers knows this attention by."""
KERNEL_QUERIES = 16
"""Most queries that are given to a kernel."""
MINIMUM_BLOCK = 64
"""Slots of the history that are decoded at a time, at least."""

Part = tuple[torch.Tensor, torch.Tensor]
"""Output (B, Hq, Tq, D) and log-sum-exp (B, Hq, Tq) over some of the keys."""


def register() -> None:
    """Make :data:`NAME` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one attention; the arguments and the result are those of transformers' attention interface."""
    layer: PQLayer | None = getattr(key, "pq_layer", None)
    if layer is not None and getattr(value, "pq_layer", None) is not layer:
        layer.refuse_other_tensors()
        layer = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if layer is None or layer.past == 0:
        if softcap is None and s_aux is None:
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        else:
            square = causal and query.shape[2] > 1 and attention_mask is None
            part = attention_with_lse(
                query, key, value, mask=attention_mask, is_causal=square, scale=scale, softcap=softcap
            )
            output = _with_sink(part, s_aux).to(query.dtype).transpose(1, 2).contiguous()
    else:
        if kwargs.get("position_bias") is not None:
            raise PassError(
                f"{type(module).__name__} adds a position bias to its scores, which kv-pq does not know; "
                "leave kv-pq out for this model"
            )
        parts = attend_layer(layer, query, attention_mask, scale=scale, softcap=softcap, causal=causal)
        output = _with_sink(merge(parts), s_aux).to(query.dtype).transpose(1, 2).contiguous()
    if layer is not None:
        layer.settle()
    return output, None


def attend_layer(
    layer: PQLayer,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    causal: bool,
) -> list[Part]:
    """Return the parts of an attention over everything that a layer holds, new tokens included.

    Parameters
    ----------
    layer : PQLayer
        With tokens before the new ones.
    query : torch.Tensor
        Shape (B, Hq, Tq, D).
    mask : torch.Tensor or None
        As transformers makes it, (B, 1, Tq, S). Where it says no more than left padding and causality
        (``layer.rows.plain``) the history is attended to without it.
    scale : float
    softcap : float or None
    causal : bool
    """
    rows, queries = layer.rows, query.shape[2]
    given = None if rows.plain else mask
    history: dict[str, Any] = {
        "start": rows.start,
        "stop": layer.coded,
        "offset": rows.padding,
        "scale": scale,
        "softcap": softcap,
    }
    keys, values = exact(layer, query.dtype)
    visible = exact_mask(layer, queries, given, causal=causal)
    codes = (layer.key_codes, layer.value_codes)
    if queries == 1 and given is None and layer.waiting is None:
        found = _kernels_for(layer.codebooks, query.device)
        if hasattr(found, "attend_all"):  # everything in one launch
            shown = None if visible is None else visible[:, 0, 0]
            return [
                found.attend_all(
                    query, *codes, layer.codebooks, exact_keys=keys, exact_values=values, visible=shown, **history
                )
            ]
    parts = []
    if layer.coded:
        seen = None if given is None else given[..., : layer.coded]
        parts.append(attend(query, *codes, layer.codebooks, mask=seen, **history))
    if keys.shape[2]:
        parts.append(attention_with_lse(query, keys, values, mask=visible, scale=scale, softcap=softcap))
    if layer.waiting is not None:
        keys, values = layer.waiting
        new = None if mask is None else mask[..., layer.past :]
        square = causal and new is None and queries > 1
        part = attention_with_lse(query, keys, values, mask=new, is_causal=square, scale=scale, softcap=softcap)
        parts.append(part)
    return parts


def merge(parts: list[Part]) -> Part:
    """Return the attention over the union of disjoint sets of keys; output in float32."""
    output, lse = parts[0]
    output = output.float()
    for other, other_lse in parts[1:]:
        share = torch.sigmoid(other_lse - lse).nan_to_num(0.0)  # neither part has seen anything: both outputs are 0
        output = torch.lerp(output, other.float(), share[..., None])
        lse = torch.logaddexp(lse, other_lse)
    return output, lse


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
    softcap: float | None,
    mask: torch.Tensor | None = None,
) -> Part:
    """Attend over coded slots with the fastest code that the device has; arguments of :func:`attend_reference`.

    Kernels read codes once a query, so many queries, and masks that say more than padding, are computed in torch.
    """
    common: dict[str, Any] = {"start": start, "stop": stop, "offset": offset, "scale": scale, "softcap": softcap}
    few = mask is None and query.shape[2] <= KERNEL_QUERIES
    found = _kernels_for(layer, query.device) if few else "there are too many queries"
    if isinstance(found, str):
        return attend_reference(query, key_codes, value_codes, layer, mask=mask, **common)
    output, lse = found.attend(query, key_codes, value_codes, layer, **common)
    return output, lse


def encode(x: torch.Tensor, quantizer: VectorQuantizer) -> torch.Tensor:
    """Return the codes (B, T, codes) of vectors (B, H, T, D), found by the fastest code that the device has."""
    found = kernels(x.device)
    codes = quantizer.encode(x) if isinstance(found, str) else found.encode(x, quantizer)
    assert torch.is_tensor(codes)
    return codes


@functools.cache
def kernels(device: torch.device) -> ModuleType | str:
    """Return the module whose ``attend`` and ``encode`` serve a device, or why plain torch does."""
    if device.type == "cpu":
        from passes.kv_pq import cpu_kernels

        return cpu_kernels.available() or cpu_kernels
    if device.type == "cuda":
        from passes.kv_pq import kernels as triton_kernels

        return triton_kernels.available(device) or triton_kernels
    return f"there are no kernels for {device.type}"


def _kernels_for(layer: LayerCodebooks, device: torch.device) -> ModuleType | str:
    """Return the module for a device, or why it cannot be used for these codebooks."""
    found = kernels(device)
    unsupported = getattr(found, "unsupported", None)
    return found if unsupported is None else unsupported(layer) or found


def attend_reference(
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
    mask: torch.Tensor | None = None,
) -> Part:
    """Attend over the coded history in plain torch, a block of slots at a time, in float32.

    Parameters
    ----------
    query : torch.Tensor
        Shape (B, Hq, Tq, D); Hq is a multiple of H. Every query sees every slot in [start, stop).
    key_codes, value_codes : torch.Tensor
        Shape (B, capacity, codes), uint8.
    layer : LayerCodebooks
    start : torch.Tensor
        Shape (B,), int64: first slot of each row.
    stop : int
        One past the last slot.
    offset : torch.Tensor
        Shape (B,), int64: left padding; slot - offset is the position.
    scale : float
        Of scores.
    softcap : float or None
        Scores become ``softcap * tanh(scores / softcap)``.
    mask : torch.Tensor or None
        Broadcastable to (B, Hq, Tq, stop): what queries see besides, boolean or added to the scores.

    Returns
    -------
    output : torch.Tensor
        Shape (B, Hq, Tq, D), float32, normalized over the history; 0 where nothing is seen.
    lse : torch.Tensor
        Shape (B, Hq, Tq), float32; -inf where nothing is seen.
    """
    batch, heads, new, _ = query.shape
    kv_heads = layer.keys.heads
    rows = heads // kv_heads * new
    turned = layer.rope is not None
    q = query.reshape(batch, kv_heads, rows, -1).float() * scale
    constant = torch.zeros(1, device=query.device)
    if not turned:  # keys need no turning, so the query takes their basis and mean once
        constant = (q * layer.keys.mean[:, None, :]).sum(-1, keepdim=True)
        if layer.keys.inverse is not None:
            q = q @ layer.keys.inverse.transpose(1, 2)
    peak = torch.full((batch, kv_heads, rows, 1), -torch.inf, device=query.device)
    total = torch.zeros_like(peak)
    output = torch.zeros(batch, kv_heads, rows, layer.values.head_dim, device=query.device)
    block = max(MINIMUM_BLOCK, BLOCK_ELEMENTS // (batch * kv_heads * max(rows, query.shape[-1])))
    first = int(start.min()) if stop else 0
    for at in range(first, stop, block):
        end = min(at + block, stop)
        slots = torch.arange(at, end, device=query.device)
        codes = key_codes[:, at:end]
        if layer.rope is not None:
            keys = layer.rope.rotate(layer.keys.decode(codes, torch.float32), slots - offset[:, None])
        else:
            keys = layer.keys.decode_centroids(codes)
        scores = q @ keys.transpose(-1, -2) + constant
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill((slots < start[:, None])[:, None, None, :], -torch.inf)
        if mask is not None:
            part = additive_mask(mask[..., at:end], torch.float32).expand(batch, heads, new, -1)
            scores = scores + part.reshape(batch, kv_heads, rows, -1)
        high = torch.maximum(peak, scores.amax(-1, keepdim=True))
        base = torch.where(high == -torch.inf, 0.0, high)
        weights = torch.exp(scores - base)
        shrink = torch.exp(peak - base)
        total = total * shrink + weights.sum(-1, keepdim=True)
        output = output * shrink + weights @ layer.values.decode_centroids(value_codes[:, at:end])
        peak = high
    seen = total > 0
    output = output / torch.where(seen, total, 1.0)
    if layer.values.inverse is not None:
        output = output @ layer.values.inverse
    output = torch.where(seen, output + layer.values.mean[:, None, :], 0.0)
    lse = torch.where(seen, peak + total.log(), -torch.inf)
    return output.reshape(batch, heads, new, -1), lse.reshape(batch, heads, new)


def _with_sink(part: Part, logits: torch.Tensor | None) -> torch.Tensor:
    """Return the output when a learned logit a head takes part in the softmax and carries no value (gpt-oss)."""
    output, lse = part
    if logits is None:
        return output
    return output.float() * torch.sigmoid(lse - logits.detach().float().view(1, -1, 1))[..., None]
