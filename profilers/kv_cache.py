"""KV-cache footprint: predicted on the meta device, measured on the real one, and what fits.

::

    config ── meta twin ── prefill(c − 1), decode(1) ── the model's own cache ── bytes of every storage it holds
                                                                                    │  predicted
    live model ────────── prefill(c − 1), decode(1) ── the model's own cache ───────┤
                                                                                    ▼  measured: equal to the byte

There are no per-architecture formulas: the cache classes of transformers are run and then opened. A cache or cache
layer that transformers does not ship is refused by name. See ``docs/profilers/kv.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from profilers.base import DoesNotFitError, ProfileContext, Profiler, ProfilerError, Progress, SilentProgress
from profilers.cache_contents import LayerBytes, cache_bytes, cache_layers
from profilers.cache_prediction import (
    CacheLaw,
    CacheMeasurement,
    LayerLaw,
    Predictor,
    fit_law,
    measure_cache,
    predict_cache_bytes,
    predictor_of,
)
from profilers.device import memory_available_bytes, memory_total_bytes
from profilers.own_cache import of
from profilers.phases import check_batch, check_context, context_limit
from profilers.weights import weight_bytes_and_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "PROFILER",
    "CacheMeasurement",
    "KVLayer",
    "KVPoint",
    "KVResult",
    "LayerBytes",
    "cache_bytes",
    "cache_layers",
    "measure_cache",
    "measure_kv",
    "predict_cache_bytes",
    "run",
]

DEFAULT_CONTEXTS = (512, 2048, 8192, 32768, 131072)
#: Bits of one cached value that the "what fits" tables are made for.
CACHE_BITS = (16, 8, 4)
#: Without explicit contexts, points of at most this many tokens (batch × context) are run on the real device.
DEFAULT_MEASURED_TOKENS = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True)
class KVLayer:
    """What one layer keeps between tokens, for one sequence.

    Attributes
    ----------
    index : int
        Layer number; an encoder–decoder layer appears twice, once as ``"cross"``.
    kind : str
        ``"full"``, ``"sliding"``, ``"latent"``, ``"indexed"``, ``"compressed"``, ``"linear"``, ``"hybrid"``,
        ``"hybrid_sliding"``, ``"cross"`` or ``"none"``; of a cache that the model makes itself, what its class says
        (``"quantized"``).
    cache_class : str
        Class of the transformers cache layer.
    bytes_per_token : float
        Slope once every window is full; of a ``"cross"`` layer, per encoder token.
    fixed_bytes : int
        Bytes that do not depend on the context: recurrent and convolution states, full windows.
    window : int or None
        Sliding window, in tokens.
    bytes_per_token_growing : float
        Slope before any window is full.
    state_bytes : int
        Part of ``fixed_bytes`` that is recurrent or convolution state.
    kv_heads : int or None
        Heads of the cached keys; ``None`` when no keys are cached.
    """

    index: int
    kind: str  # "full" | "sliding" | "latent" | "linear" | "hybrid..." | "cross" | "none"
    cache_class: str
    bytes_per_token: float  # slope once every window is full
    fixed_bytes: int
    window: int | None
    bytes_per_token_growing: float
    state_bytes: int
    kv_heads: int | None


@dataclass(frozen=True)
class KVPoint:
    """Cache of ``batch`` sequences of ``context`` tokens, the last of them decoded, the others prefilled.

    The prefill figures are what is held between the prefill of ``context − 1`` tokens and the first decode step:
    transformers keeps the storage of the whole prompt for sliding-window layers until then. An encoder–decoder
    model has ``context`` encoder tokens as well.
    """

    batch: int
    context: int
    predicted_bytes: int
    measured_bytes: int | None
    measured_reason: str | None
    difference_bytes: int | None
    allocator_bytes: int | None
    allocator_reason: str | None
    predicted_prefill_bytes: int
    measured_prefill_bytes: int | None


@dataclass(frozen=True)
class KVResult:
    """bytes(context) = fixed_bytes + bytes_per_token x context, a sequence, once every sliding window is full.

    ``bytes_per_token_growing`` is the slope before any window is full. ``max_context`` and ``max_batch`` are keyed
    by bits per cached value ("16", "8", "4"; payload only, scales not counted, recurrent states left as they are);
    ``None`` there means that nothing sets a limit (the cache does not grow) or that ``memory_bytes`` is ``None``.
    In an encoder–decoder model ``bytes_per_token`` is that of self-attention, per decoder token;
    ``cross_attention_bytes_per_token``, per encoder token, comes on top. ``shared_bytes`` is what a cache of the
    model's own needs once, whatever the sequences (codebooks): neither weights nor cache; ``None`` without one.
    """

    dtype: str
    attention: str  # "MHA" | "GQA" | "MQA" | "MLA" | "none" | "mixed"
    bytes_per_token: float
    fixed_bytes: int
    bytes_per_token_growing: float
    latent_bytes_per_token: float | None
    latent_reason: str | None
    cross_attention_bytes_per_token: float | None
    layers: tuple[KVLayer, ...]
    points: tuple[KVPoint, ...]
    weight_bytes: int
    memory_bytes: int | None  # device memory that weights and cache have to share
    memory_reason: str | None
    workspace_bytes: int  # most bytes of new tensors alive at once in one decode step of one sequence, traced on meta
    model_context_limit: int | None
    max_context: dict[str, int | None]  # batch 1; by memory alone
    max_batch: dict[str, dict[str, int | None]]  # bits -> context -> batch
    crossover_context: int | None  # context at which one sequence's cache is as large as the weights
    shared_bytes: int | None = None


def measure_kv(
    model: PreTrainedModel,
    *,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> KVResult:
    """Predict the model's cache at every batch × context, measure it on the device, and say what fits.

    Parameters
    ----------
    model : PreTrainedModel
        Live; on the meta device everything is predicted and nothing measured.
    batches : sequence of int
    contexts : sequence of int or None
        Tokens. Every one given is measured; with ``None``, ``DEFAULT_CONTEXTS`` up to the model's limit are predicted
        and those of at most ``DEFAULT_MEASURED_TOKENS`` tokens measured.
    device : torch.device or None
        Device whose memory the cache has to fit, by default the model's own.
    progress : Progress or None

    Raises
    ------
    DoesNotFitError
        If a point given cannot fit in the memory that is available, or a batch not even at the shortest default.
    NotApplicableError
        For an unknown cache class, or a model that cannot be run on the meta device.
    ProfilerError
        For a context past the model's limit, or a cache that does not grow linearly.
    """
    progress = progress or SilentProgress()
    device = device or model.device
    live = model.device.type != "meta"
    limit = context_limit(model.config)
    if contexts is None:
        chosen = tuple(length for length in DEFAULT_CONTEXTS if limit is None or length <= limit)
        chosen = chosen or ((limit,) if limit else ())
    else:
        chosen = tuple(contexts)
    for length in chosen:
        check_context(model.config, length)
    for batch in batches:
        check_batch(batch)

    with progress.task("KV cache: predicting"):
        predict = predictor_of(model)
        law = fit_law(predict)
        workspace = predict.workspace_bytes()

    memory, memory_reason = _memory(device)
    available = memory_available_bytes(device) if live and memory is not None else None
    weights = weight_bytes_and_parameters(model).bytes
    pairs = [(batch, length) for batch in batches for length in chosen]
    predicted = {pair: _predicted(predict, law, *pair) for pair in pairs}
    if available is not None:
        for batch in batches:
            required = chosen if contexts is not None else (min(chosen),)
            for length in required:
                _check_fits(model, batch, length, max(predicted[batch, length]), available, device)

    points = []
    with progress.task("KV cache: measuring", total=len(pairs)) as task:
        for pair in pairs:
            reason = _not_measured(*pair, live, contexts is not None, device, max(predicted[pair]), available)
            measured = None
            if reason is None:
                try:
                    measured = measure_cache(model, *pair)
                except torch.OutOfMemoryError as error:
                    reason = f"the forward pass ran out of memory on {device}"
                    if contexts is not None:
                        raise DoesNotFitError(
                            f"batch {pair[0]} x context {pair[1]}: {reason}; give a smaller --batch or --context"
                        ) from error
            points.append(_point(*pair, predicted[pair], measured, reason))
            task.advance()

    own = of(model)
    shared = None if own is None else own.shared_bytes
    held = weights + (shared or 0)
    room = None if memory is None else memory - held - workspace
    layers = tuple(_kv_layer(law_of_layer, model.config) for law_of_layer in law.layers)
    decoding = [layer for layer in layers if layer.kind != "cross"]
    cross = [layer for layer in layers if layer.kind == "cross"]
    latent, latent_reason = _latent(model.config, decoding, model.dtype)
    return KVResult(
        dtype=str(model.dtype).removeprefix("torch."),
        attention=_attention(model.config, layers),
        bytes_per_token=sum(layer.bytes_per_token for layer in decoding),
        fixed_bytes=sum(layer.fixed_bytes for layer in decoding),
        bytes_per_token_growing=sum(layer.bytes_per_token_growing for layer in decoding),
        latent_bytes_per_token=latent,
        latent_reason=latent_reason,
        cross_attention_bytes_per_token=sum(layer.bytes_per_token for layer in cross) if cross else None,
        layers=layers,
        points=tuple(points),
        weight_bytes=weights,
        memory_bytes=memory,
        memory_reason=memory_reason,
        workspace_bytes=workspace,
        model_context_limit=limit,
        max_context={str(bits): None if room is None else law.longest(room, bits) for bits in CACHE_BITS},
        max_batch={
            str(bits): {
                str(length): None if memory is None else _batches(law, length, bits, memory - held, workspace)
                for length in chosen
            }
            for bits in CACHE_BITS
        },
        crossover_context=_crossover(law, weights),
        shared_bytes=shared,
    )


def _predicted(predict: Predictor, law: CacheLaw, batch: int, context: int) -> tuple[int, int]:
    """Return the bytes after the decode step and after prefill, from the law where it was proved, else by running."""
    if law.covers(context):
        return int(batch * law.bytes(context)), int(batch * law.prefill_bytes(context))
    exact = predict(batch, context)
    return exact.bytes, exact.prefill_bytes


def _check_fits(
    model: PreTrainedModel, batch: int, context: int, need: int, available: int, device: torch.device
) -> None:
    if need <= available:
        return
    most = batch * available // need
    remedy = (
        f"give at most --batch {most} at this context, or a shorter --context" if most else "give a shorter --context"
    )
    raise DoesNotFitError(
        f"batch {batch} x context {context} needs {need} bytes for its cache and {device} has {available} left beside "
        f"{type(model).__name__}; {remedy}"
    )


def _not_measured(
    batch: int, context: int, live: bool, explicit: bool, device: torch.device, need: int, available: int | None
) -> str | None:
    """Return why this point is not run on the device, ``None`` if it is."""
    if not live:
        return "config only: there are no weights to run"
    if available is not None and need > available:
        return f"needs {need} bytes and {available} are left on {device}"
    cheap = DEFAULT_MEASURED_TOKENS.get(device.type, 0)
    if not explicit and batch * context > cheap:
        return f"more than {cheap} tokens; ask for it with --context {context} to have it run"
    return None


def _point(
    batch: int, context: int, predicted: tuple[int, int], measured: CacheMeasurement | None, reason: str | None
) -> KVPoint:
    return KVPoint(
        batch=batch,
        context=context,
        predicted_bytes=predicted[0],
        measured_bytes=measured.bytes if measured else None,
        measured_reason=reason,
        difference_bytes=measured.bytes - predicted[0] if measured else None,
        allocator_bytes=measured.allocator_bytes if measured else None,
        allocator_reason=measured.allocator_reason if measured else reason,
        predicted_prefill_bytes=predicted[1],
        measured_prefill_bytes=measured.prefill_bytes if measured else None,
    )


def _kv_layer(law: LayerLaw, config: PreTrainedConfig) -> KVLayer:
    layer = law.layer
    latent = layer.kind == "full" and _latent_width(config) is not None and layer.kv_heads == 1
    return KVLayer(
        index=layer.index,
        kind="latent" if latent else layer.kind,
        cache_class=layer.cache_class,
        bytes_per_token=float(law.slope),
        fixed_bytes=law.fixed,
        window=layer.window,
        bytes_per_token_growing=float(law.growing),
        state_bytes=layer.state_bytes,
        kv_heads=layer.kv_heads,
    )


def _latent_width(config: PreTrainedConfig) -> int | None:
    """Return the values a token of one layer's latent: compressed KV and the shared rotary key (DeepSeek-V2 §2.1)."""
    text = config.get_text_config(decoder=True)
    rank = getattr(text, "kv_lora_rank", None)
    return None if rank is None else int(rank) + int(text.qk_rope_head_dim)


def _latent(config: PreTrainedConfig, layers: Sequence[KVLayer], dtype: torch.dtype) -> tuple[float | None, str | None]:
    width = _latent_width(config)
    if width is None:
        return None, "the model has no latent attention (no kv_lora_rank in its config)"
    caching = sum(layer.kv_heads is not None for layer in layers)
    return float(width * caching * dtype.itemsize), None


def _attention(config: PreTrainedConfig, layers: Iterable[KVLayer]) -> str:
    """Name the attention by the heads that are cached against the query heads."""
    queries = getattr(config.get_text_config(decoder=True), "num_attention_heads", None)
    names = set()
    for layer in layers:
        if layer.kv_heads is None or layer.kind == "none":
            continue
        if _latent_width(config) is not None:
            names.add("MLA")
        elif layer.kv_heads == queries:
            names.add("MHA")
        else:
            names.add("MQA" if layer.kv_heads == 1 else "GQA")
    return "none" if not names else names.pop() if len(names) == 1 else "mixed"


def _memory(device: torch.device) -> tuple[int | None, str | None]:
    try:
        return memory_total_bytes(device), None
    except ProfilerError as error:
        return None, str(error)


def _batches(law: CacheLaw, context: int, bits: int, room: int, workspace: int) -> int:
    """Return how many sequences of ``context`` tokens fit into ``room`` bytes, each with its own workspace."""
    return max(0, int(room / (law.bytes(context, bits) + workspace)))


def _crossover(law: CacheLaw, weights: int) -> int | None:
    """Return the shortest context whose cache is at least as large as the weights, ``None`` if none is."""
    below = law.longest(weights - 1)
    return None if below is None else below + 1


def run(context: ProfileContext) -> KVResult:
    """Profile the cache of a live model or, with ``config_only``, of its config."""
    return measure_kv(
        context.model,
        batches=context.request.batches,
        contexts=context.request.contexts,
        device=context.device,
        progress=context.progress,
    )


PROFILER = Profiler(
    name="kv",
    title="KV cache",
    run=run,
    result_type=KVResult,
    needs_weights=False,
    paper="Shazeer 2019 (multi-query, arXiv:1911.02150); Ainslie et al. 2023 (grouped-query, arXiv:2305.13245); "
    "DeepSeek-AI 2024 (latent, arXiv:2405.04434)",
)
