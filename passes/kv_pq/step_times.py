"""Time one layer's attention in a decode step: over transformers' own cache, and over a product-quantized one.

::

    as it is    keys, values of the history + the new token's ──> copied together ──> attention     (DynamicCache)
    after       codes of the history, kept and recent tokens  ──────────────────────> attention     (PQCache)

Both run the code that generation runs, on random vectors, in turn, so whatever else the machine does slows both. Some
copies of each are walked through, because a model reads other layers' caches before it comes back to one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from passes.kv_pq import attention
from passes.kv_pq.codebooks import LayerCodebooks
from passes.kv_pq.layer import PQLayer
from passes.kv_pq.quantizer import CENTROIDS, VectorQuantizer
from passes.kv_pq.rope import Rope
from profilers.device import synchronize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

COPIES = 6
WALKS = 9
WALK_SECONDS = 0.6
"""No further walk is started after this long."""
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class StepShape:
    """One layer's attention in a decode step.

    Attributes
    ----------
    batch, query_heads, kv_heads, head_dim : int
    codes : int
        Bytes that a key, and a value, is stored in.
    kept, recent : int
        Tokens in full precision.
    gains, rope : bool
        Whether a vector's size is one of its codes; whether keys are turned when they are read.
    """

    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int
    codes: int
    kept: int
    recent: int
    gains: bool
    rope: bool


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of one layer's attention in one decode step, as it is and after."""

    plain_seconds: float
    coded_seconds: float


@torch.inference_mode()
def time_step(
    shape: StepShape, context: int, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> StepTimes:
    """Time both attentions after ``context`` tokens.

    Parameters
    ----------
    shape : StepShape
    context : int
        Tokens in the cache.
    config : PreTrainedConfig
        Of the model; it is not changed.
    device : torch.device
    dtype : torch.dtype
        Of queries, keys and values.
    """
    random = torch.Generator().manual_seed(0)

    def vectors(heads: int, tokens: int) -> torch.Tensor:
        x = torch.randn(shape.batch, heads, tokens, shape.head_dim, generator=random)
        return x.to(device, dtype)

    keys, values = vectors(shape.kv_heads, context), vectors(shape.kv_heads, context)
    query, key, value = vectors(shape.query_heads, 1), vectors(shape.kv_heads, 1), vectors(shape.kv_heads, 1)
    module: Any = SimpleNamespace(
        num_key_value_groups=shape.query_heads // shape.kv_heads, is_causal=True, layer_idx=0, training=False
    )
    plain = DynamicCache()
    plain.update(keys, values, 0)
    coded = _coded_layer(shape, config, keys, values)
    memo = {id(coded.codebooks): coded.codebooks, id(coded.config): coded.config}
    caches = [plain.layers[0], *(copy.deepcopy(plain.layers[0]) for _ in range(COPIES - 1))]
    layers = [coded, *(copy.deepcopy(coded, dict(memo)) for _ in range(COPIES - 1))]

    def as_it_is() -> None:
        for cache in caches:
            sdpa_attention_forward(module, query, *cache.update(key, value), None)

    def after() -> None:
        for layer in layers:
            attention.forward(module, query, *layer.update(key, value), None)

    samples: dict[str, list[float]] = {"plain": [], "coded": []}
    began = time.perf_counter()
    for walk in range(WALKS + 1):
        for name, run in (("plain", as_it_is), ("coded", after)):
            seconds = _timed(run, device)
            if walk:  # the first warms up
                samples[name].append(seconds / COPIES)
        if walk and time.perf_counter() - began > WALK_SECONDS:
            break
    return StepTimes(statistics.median(samples["plain"]), statistics.median(samples["coded"]))


def _timed(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _coded_layer(shape: StepShape, config: PreTrainedConfig, keys: torch.Tensor, values: torch.Tensor) -> PQLayer:
    chosen = copy.deepcopy(config.get_text_config(decoder=True))
    chosen._attn_implementation_internal = attention.NAME
    rope = None
    if shape.rope:
        even = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        rope = Rope(ROPE_BASE**-even)
    books = LayerCodebooks(_random_side(shape, 1), _random_side(shape, 2), rope)
    layer = PQLayer(0, books, kept_tokens=shape.kept, recent_tokens=shape.recent, config=chosen)
    layer.update(keys, values)
    layer.settle()
    return layer


def _random_side(shape: StepShape, seed: int) -> VectorQuantizer:
    random = torch.Generator().manual_seed(seed)
    heads, size = shape.kv_heads, shape.head_dim
    parts = min(size, shape.codes - shape.gains)
    given = {}
    if residual := shape.codes - shape.gains - parts:  # two channels each
        refined = (torch.arange(size) // 2).where(torch.arange(size) < 2 * residual, -1)
        given["residual_part"] = refined.expand(heads, -1).contiguous()
        given["residual_centroids"] = torch.randn(heads, CENTROIDS, size, generator=random) * (refined >= 0)
    return VectorQuantizer(
        centroids=torch.randn(heads, CENTROIDS, size, generator=random),
        part=(torch.arange(size) * parts // size).expand(heads, -1).contiguous(),
        weight=torch.ones(heads, size),
        mean=torch.zeros(heads, size),
        gains=torch.linspace(0.5, 2, CENTROIDS).expand(heads, -1).contiguous() if shape.gains else None,
        **given,
    )
