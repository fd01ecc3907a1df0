"""Codebooks made by hand, and a brute-force model of what a product-quantized cache must compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import sdpa_mask

from passes.kv_pq import attention
from passes.kv_pq.codebooks import Codebooks, LayerCodebooks, ModelShape
from passes.kv_pq.quantizer import CENTROIDS, VectorQuantizer
from passes.kv_pq.rope import Rope, find_ropes


def random_quantizer(
    heads: int,
    head_dim: int,
    *,
    parts: int,
    gains: bool = False,
    basis: bool = False,
    spread: float = 0.1,
    seed: int = 0,
) -> VectorQuantizer:
    """Return codebooks with random parts of uneven size, one fewer in every second head.

    With ``parts == head_dim``, a fine grid for each channel.
    """
    random = torch.Generator().manual_seed(seed)
    part = torch.stack(
        [
            torch.cat([torch.arange(count), torch.randint(count, (head_dim - count,), generator=random)])[
                torch.randperm(head_dim, generator=random)
            ]
            for count in (parts - (head % 2 if 1 < parts < head_dim else 0) for head in range(heads))
        ]
    )
    unit = 1.0 if gains else spread
    if parts == head_dim:
        reach = unit * (
            1.5 * head_dim**0.5 if gains else 5
        )  # a vector that is divided by its RMS has no larger channel
        centroids = torch.linspace(-reach, reach, CENTROIDS)[None, :, None].expand(heads, -1, head_dim).clone()
    else:
        centroids = unit * torch.randn(heads, CENTROIDS, head_dim, generator=random)
    dense = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=random))[0]
    dense = dense * (0.5 + torch.rand(heads, 1, head_dim, generator=random))
    return VectorQuantizer(
        centroids=centroids,
        part=part,
        weight=0.5 + torch.rand(heads, head_dim, generator=random),
        mean=0.1 * spread * torch.randn(heads, head_dim, generator=random),
        gains=spread * torch.logspace(-2, 1, CENTROIDS).expand(heads, -1).contiguous() if gains else None,
        basis=dense if basis else None,
        inverse=torch.linalg.inv(dense) if basis else None,
    )


def random_codebooks(
    model: PreTrainedModel,
    *,
    parts: int | tuple[int, int] = 4,
    gains: bool = False,
    rope: bool = False,
    basis: bool = False,
    kept: int = 4,
    recent: int = 8,
    spread: float = 0.1,
    seed: int = 0,
) -> Codebooks:
    """Return random codebooks for each full-attention layer of a tiny model.

    ``parts`` is for keys and values, or a pair; ``rope``: keys are stored before rotary embedding, where the model has
    one; ``basis``: for values, and for keys that are stored as they are.
    """
    shape, sizes = ModelShape.of(model.config), cached_sizes(model)
    types, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    chosen = [index for index, kind in enumerate(types) if kind == "full_attention"]
    ropes = find_ropes(model, chosen) if rope else {}
    of_keys, of_values = (parts, parts) if isinstance(parts, int) else parts
    layers = {}
    for index in chosen:
        turned = ropes.get(index)
        turned = turned if isinstance(turned, Rope) else None
        make: dict[str, Any] = {"gains": gains, "spread": spread}
        layers[index] = LayerCodebooks(
            random_quantizer(
                *sizes[index][0],
                parts=of_keys,
                basis=basis and turned is None,
                seed=1000 * seed + 2 * index,
                **make,
            ),
            random_quantizer(
                *sizes[index][1],
                parts=of_values,
                basis=basis,
                seed=1000 * seed + 2 * index + 1,
                **make,
            ),
            turned,
        )
    return Codebooks(layers, shape, kept, recent, {"made": "by hand"})


def cached_sizes(model: PreTrainedModel) -> dict[int, tuple[tuple[int, int], tuple[int, int]]]:
    """Return heads and channels of the keys and the values that each layer of a model caches."""
    cache = plain_cache(model.config)
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.int64, device=model.device), past_key_values=cache)
    return {
        index: (layer.keys.shape[1::2], layer.values.shape[1::2])
        for index, layer in enumerate(cache.layers)
        if getattr(layer, "keys", None) is not None
    }


def fine_codebooks(model: PreTrainedModel, **options: Any) -> Codebooks:
    """Return codebooks with a grid of 256 levels for each channel: 8 bits a value, and next to no error."""
    return random_codebooks(model, parts=ModelShape.of(model.config).head_dim, gains=True, **options)


def coded_slots(length: int, recent: int) -> int:
    """Return how many of ``length`` slots are codes: the oldest, in batches of half the recent block."""
    stay = recent // 2
    batch = max(1, recent - stay)
    return batch * max(0, (length - stay) // batch)


def quantized(
    layer: LayerCodebooks, keys: torch.Tensor, values: torch.Tensor, padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values (B, H, T, D) as the codes say them, in the codebooks' own words, float64.

    Codes are the device's own: encoders take either of two centroids that are as near, and have tests of their own.
    """
    positions = torch.arange(keys.shape[2]) - padding[:, None]
    k = layer.rope.rotate(keys.float(), positions, back=True) if layer.rope else keys.float()
    k = layer.keys.decode(attention.encode(k, layer.keys), torch.float64)
    if layer.rope:
        k = layer.rope.rotate(k, positions)
    return k.double(), layer.values.decode(attention.encode(values.float(), layer.values), torch.float64)


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax attention and its log-sum-exp in float64; ``visible`` is broadcastable to (B, Hq, Tq, S)."""
    groups = query.shape[1] // keys.shape[1]
    k, v = (item.double().repeat_interleave(groups, 1) for item in (keys, values))
    scores = query.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return weights @ v, lse


@contextlib.contextmanager
def brute_force(model: PreTrainedModel, codebooks: Codebooks) -> Iterator[None]:
    """Let a model with a plain DynamicCache compute what one with a product-quantized cache must compute.

    All keys and values stay in full precision; each time a query comes, those that would be codes by then are encoded
    and decoded, and attention is a float64 softmax over everything. Left padding is read from the mask.
    """

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_unused: Any,
    ) -> tuple[torch.Tensor, None]:
        batch, _, new, _ = query.shape
        total = key.shape[2]
        slots = torch.arange(total)
        visible = slots <= (torch.arange(new) + total - new)[:, None]
        padding = torch.zeros(batch, dtype=torch.int64)
        if attention_mask is not None:
            assert attention_mask.dtype == torch.bool
            visible = attention_mask
            padding = (attention_mask[:, 0, -1].int().cumsum(-1) == 0).sum(-1)
        k, v = key.double(), value.double()
        layer = codebooks.layers.get(module.layer_idx)  # type: ignore[call-overload]
        coded = coded_slots(total - new, codebooks.recent_tokens)
        if layer is not None and coded:
            is_code = (slots < coded) & (slots >= padding[:, None] + codebooks.kept_tokens)
            said_k, said_v = quantized(layer, key, value, padding)
            k = torch.where(is_code[:, None, :, None], said_k, k)
            v = torch.where(is_code[:, None, :, None], said_v, v)
        out, lse = dense_attention(query, k, v, visible, scaling or query.shape[-1] ** -0.5, softcap)
        if s_aux is not None:
            out = out * torch.sigmoid(lse - s_aux.double().view(1, -1, 1))[..., None]
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    name = "brute_force_kv_pq"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def plain_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return the cache that transformers would use."""
    return DynamicCache(config=config)


def with_other(codebooks: Codebooks, **changes: Any) -> Codebooks:
    """Return the same codebooks with other fields of :class:`ModelShape`."""
    return replace(codebooks, model=replace(codebooks.model, **changes))
