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

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from profilers.base import (
    DoesNotFitError,
    NotApplicableError,
    ProfileContext,
    Profiler,
    ProfilerError,
    Progress,
    SilentProgress,
)
from profilers.device import memory_available_bytes, memory_total_bytes, synchronize
from profilers.meta import meta_model
from profilers.phases import PhaseState, check_context, context_limit, decode_step, prefill, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DEFAULT_CONTEXTS = (512, 2048, 8192, 32768, 131072)
#: Bits of one cached value that the "what fits" tables are made for.
CACHE_BITS = (16, 8, 4)
#: Without explicit contexts, points of at most this many tokens (batch × context) are run on the real device.
DEFAULT_MEASURED_TOKENS = {"cpu": 1024, "cuda": 32768}
#: Caches that compress chunks of tokens are linear only between multiples of this many tokens.
CHUNK_TOKENS = 512
#: Lengths before any window is full, for ``bytes_per_token_growing``.
SHORT_LENGTHS = (2, 3)
#: How far the third length, which confirms the line through the first two, lies beyond them.
CONFIRMING_TOKENS = 61
_PLAIN = (type(None), bool, int, float, str, type, torch.dtype, torch.device, torch.Stream)


@dataclass(frozen=True)
class KVLayer:
    """What one layer keeps between tokens, for one sequence.

    Attributes
    ----------
    index : int
        Layer number; an encoder–decoder layer appears twice, once as ``"cross"``.
    kind : str
        ``"full"``, ``"sliding"``, ``"latent"``, ``"indexed"``, ``"compressed"``, ``"linear"``, ``"hybrid"``,
        ``"hybrid_sliding"``, ``"cross"`` or ``"none"``.
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
    ``cross_attention_bytes_per_token``, per encoder token, comes on top.
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


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of the storages that one layer of a cache holds now.

    Attributes
    ----------
    index : int
    kind : str
        As in :class:`KVLayer`.
    cache_class : str
    bytes : int
        All of it. A storage that two layers share is counted with the first.
    state_bytes : int
        Part that is recurrent or convolution state.
    window : int or None
        Tokens.
    kv_heads : int or None
    element_bits : int or None
        Bits of one cached value outside the states.
    """

    index: int
    kind: str
    cache_class: str
    bytes: int
    state_bytes: int
    window: int | None
    kv_heads: int | None
    element_bits: int | None


@dataclass(frozen=True)
class CacheMeasurement:
    """What a cache held after prefill and after the decode step, and what the allocator handed out for it."""

    prefill_bytes: int
    bytes: int
    layers: tuple[LayerBytes, ...]
    allocator_bytes: int | None
    allocator_reason: str | None


# ---------------------------------------------------------------------------------------------------------------------
# Opening a cache
# ---------------------------------------------------------------------------------------------------------------------


def cache_bytes(cache: object) -> int:
    """Return the bytes of the storages that a transformers cache holds.

    A tensor that is a view of a larger storage keeps all of it, so the storage counts, each once.
    Single integers that the cache keeps as tensors (lengths, the window) are bookkeeping and not counted.

    Raises
    ------
    NotApplicableError
        For a cache or cache-layer class that transformers does not ship, or one that holds something unknown.
    """
    return sum(layer.bytes for layer in cache_layers(cache))


def cache_layers(cache: object) -> tuple[LayerBytes, ...]:
    """Return what each layer of a transformers cache holds; see :func:`cache_bytes`."""
    from transformers.cache_utils import EncoderDecoderCache

    seen: set[int] = set()
    if isinstance(cache, EncoderDecoderCache):
        _check_cache(cache, but={"self_attention_cache", "cross_attention_cache"})
        own = list(_opened(cache.self_attention_cache, seen))
        return (*own, *_opened(cache.cross_attention_cache, seen, cross=True))
    return tuple(_opened(cache, seen))


def _shipped(thing: object) -> bool:
    return type(thing).__module__.split(".")[0] == "transformers"


def _check_cache(cache: object, but: set[str]) -> None:
    """Refuse a cache that is not transformers' own or keeps tensors outside its layers."""
    from transformers.cache_utils import Cache

    name = type(cache).__name__
    if not isinstance(cache, Cache) or not _shipped(cache):
        raise NotApplicableError(
            f"unknown cache class '{name}': its footprint would be a guess; "
            "profile the model with the cache that transformers gives it"
        )
    for attribute, value in vars(cache).items():
        if attribute not in but and list(_tensors(value, f"cache class '{name}', attribute '{attribute}'")):
            raise NotApplicableError(
                f"cache class '{name}' holds tensors in '{attribute}', outside its layers: whose they are is unknown"
            )


def _opened(cache: object, seen: set[int], *, cross: bool = False) -> Iterator[LayerBytes]:
    from transformers import cache_utils

    _check_cache(cache, but={"layers"})
    known = (cache_utils.CacheLayerMixin, cache_utils.LinearAttentionCacheLayerMixin)
    for index, layer in enumerate(cache.layers):  # type: ignore[attr-defined]
        name = type(layer).__name__
        if not isinstance(layer, known) or not _shipped(layer):
            raise NotApplicableError(
                f"layer {index} keeps an unknown cache layer class '{name}': its footprint would be a guess; "
                "profile the model with the cache that transformers gives it"
            )
        states = held = 0
        element_bits = None
        for attribute, value in vars(layer).items():
            is_state = attribute in ("conv_states", "recurrent_states")
            for tensor in _tensors(value, f"layer {index} ('{name}'), attribute '{attribute}'"):
                storage = tensor.untyped_storage()
                if (tensor.dim() == 0 and not tensor.is_floating_point()) or _identity(tensor) in seen:
                    continue
                seen.add(_identity(tensor))
                held += storage.nbytes()
                if is_state:
                    states += storage.nbytes()
                else:
                    element_bits = max(element_bits or 0, 8 * tensor.element_size())
        keys = getattr(layer, "keys", None)
        yield LayerBytes(
            index=index,
            kind=_kind(layer, held, cross),
            cache_class=name,
            bytes=held,
            state_bytes=states,
            window=getattr(layer, "sliding_window", None),
            kv_heads=int(keys.shape[1]) if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None,
            element_bits=element_bits,
        )


def _identity(tensor: torch.Tensor) -> int:
    """Return what tells one live storage from another; on the meta device all data pointers are 0."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any, where: str) -> Iterator[torch.Tensor]:
    """Yield every tensor inside plain containers; refuse whatever could hide one."""
    from transformers import PreTrainedConfig

    if type(value) in (torch.Tensor, torch.nn.Parameter):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, where)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, where)
    elif not isinstance(value, (*_PLAIN, PreTrainedConfig)):
        raise NotApplicableError(
            f"{where} holds a '{type(value).__name__}', whose bytes are not known; this cache is refused"
        )


def _kind(layer: object, held: int, cross: bool) -> str:
    from transformers import cache_utils

    if not held:
        return "none"
    if cross:
        return "cross"
    sliding = isinstance(layer, cache_utils.DynamicSlidingWindowLayer | cache_utils.StaticSlidingWindowLayer)
    if isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin):
        if not isinstance(layer, cache_utils.CacheLayerMixin):
            return "linear"
        return "hybrid_sliding" if sliding else "hybrid"
    if type(layer).__module__ != cache_utils.__name__:
        return "compressed"  # defined beside one model: compressed or sparse attention
    if "indexer_keys" in vars(layer):
        return "indexed"
    return "sliding" if sliding else "full"


# ---------------------------------------------------------------------------------------------------------------------
# Running a model for its cache
# ---------------------------------------------------------------------------------------------------------------------


def measure_cache(model: PreTrainedModel, batch: int, context: int) -> CacheMeasurement:
    """Prefill ``context − 1`` tokens, decode one more, and open the cache.

    Parameters
    ----------
    model : PreTrainedModel
        Live, or on the meta device (then nothing is computed and the figures are the prediction).
    batch : int
        Sequences.
    context : int
        Tokens a sequence; of an encoder–decoder model, encoder tokens and decoder tokens alike.

    Raises
    ------
    NotApplicableError
        If the model returns no cache, or one of an unknown class.
    ProfilerError
        For a size below 1.
    """
    if batch < 1 or context < 1:
        raise ProfilerError(f"batch {batch} x context {context} is not a size; both must be at least 1")
    device = model.device
    on_cuda = device.type == "cuda"
    before = 0
    if on_cuda:
        _decoded(model, 1, 2, cache_bytes)  # libraries take their workspace from the same allocator on the first call
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
    cache, prefill_bytes = _decoded(model, batch, context, cache_bytes)
    allocator = torch.cuda.memory_allocated(device) - before if on_cuda else None
    layers = cache_layers(cache)
    return CacheMeasurement(
        prefill_bytes=prefill_bytes,
        bytes=sum(layer.bytes for layer in layers),
        layers=layers,
        allocator_bytes=allocator,
        allocator_reason=None if on_cuda else f"no allocator counts live bytes on device '{device.type}'",
    )


def _decoded(model: PreTrainedModel, batch: int, context: int, between: Callable[[object], int]) -> tuple[object, int]:
    """Return the cache after the decode step, and what ``between`` saw after the prefill."""
    ids = token_ids(model, batch, max(1, context - 1))
    if model.config.is_encoder_decoder:
        # The encoder reads all tokens, the decoder's prefill all but the last.
        with torch.inference_mode():
            encoded = model.get_encoder()(input_ids=token_ids(model, batch, context))
        state = decode_step(model, PhaseState(None, ids, encoded), input_ids=ids)
    else:
        state = prefill(model, batch, ids.shape[1], input_ids=ids)
    if state.cache is None:
        raise NotApplicableError(
            f"'{type(model).__name__}' returns no cache with use_cache=True: what it keeps between tokens, "
            "if anything, cannot be seen and is not guessed"
        )
    seen = between(state.cache)
    if context > 1:
        state = decode_step(model, state, input_ids=ids[:, :1])
    return state.cache, seen


class _Shapes(TorchDispatchMode):
    """Make repeated ops on the meta device cheap: remember the output's layout by the inputs' layouts.

    A transformer repeats the same ops in every layer, and deriving an output's shape costs far more than looking it
    up. Ops that write into an input, or return one or a view of one, are always run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[object, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
        self._alive: _Alive | None = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[_Alive]:
        """Record the most bytes of new tensors alive at once inside the block."""
        self._alive = _Alive()
        try:
            yield self._alive
        finally:
            self._alive = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable or any(output.alias_info is not None for output in schema.returns):
            return func(*args, **kwargs)
        key = (func, _layout(args), _layout(tuple(kwargs.items())))
        found = self._known.get(key)
        if found is not None:
            output = torch.empty_strided(found[0], found[1], dtype=found[2], device="meta")
        else:
            output = func(*args, **kwargs)
            if self._is_fresh(output, (args, kwargs)):
                self._known[key] = (output.shape, output.stride(), output.dtype)
        if self._alive is not None:
            self._alive.add(output)
        return output

    @staticmethod
    def _is_fresh(output: object, inputs: object) -> bool:
        """Whether the output is one whole new meta storage, which its layout alone can bring back."""
        if type(output) is not torch.Tensor or output.device.type != "meta":
            return False
        same = torch.empty_strided(output.shape, output.stride(), dtype=output.dtype, device="meta")
        given = {_identity(value) for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)}
        return output.untyped_storage().nbytes() == same.untyped_storage().nbytes() and _identity(output) not in given


class _Alive:
    """Most bytes alive at once of the storages it has seen."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def add(self, output: object) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[_identity(tensor)] = (_weak(storage), storage.nbytes())
                self._bytes += storage.nbytes()
        if self._bytes > self.peak_bytes:  # only then is it worth knowing which of them are gone
            self._storages = {key: (weak, size) for key, (weak, size) in self._storages.items() if not _gone(weak)}
            self._bytes = sum(size for _, size in self._storages.values())
            self.peak_bytes = max(self.peak_bytes, self._bytes)


def _gone(weak: StorageWeakRef) -> bool:
    return bool(weak.expired())  # type: ignore[no-untyped-call]


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _layout(value: Any) -> object:
    """Return a hashable description, equal only where an op's output would have the same layout."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(_layout(item) for item in value)
    return type(value), value  # 1, 1.0 and True are equal but promote differently


class _Predictor:
    """Runs a model on the meta device at any size, at most once each."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._shapes = _Shapes()
        self._done: dict[tuple[int, int], CacheMeasurement] = {}

    def __call__(self, batch: int, context: int) -> CacheMeasurement:
        if (batch, context) not in self._done:
            with self._meta():
                self._done[batch, context] = measure_cache(self.model, batch, context)
        return self._done[batch, context]

    def workspace_bytes(self) -> int:
        """Return the most bytes of new tensors alive at once in a decode step of one sequence."""
        with self._meta(), contextlib.ExitStack() as stack:
            counted: list[_Alive] = []

            def start(cache: object) -> int:
                counted.append(stack.enter_context(self._shapes.counting()))
                return 0

            _decoded(self.model, 1, SHORT_LENGTHS[0], start)
            return counted[0].peak_bytes

    @contextlib.contextmanager
    def _meta(self) -> Iterator[None]:
        try:
            with self._shapes:
                yield
        except (RuntimeError, NotImplementedError) as error:
            raise NotApplicableError(
                f"'{type(self.model).__name__}' cannot be run on the meta device, so its cache cannot be predicted "
                f"({str(error).splitlines()[0]}); profilers.kv_cache.measure_cache measures a live model"
            ) from error


def predict_cache_bytes(config: PreTrainedConfig, batch: int, context: int, dtype: torch.dtype) -> int:
    """Return the bytes that the cache of ``batch`` sequences of ``context`` tokens will hold, without any weights.

    The model is built on the meta device and run at exactly this size; see :func:`measure_cache` for what is counted.

    Raises
    ------
    NotApplicableError
        For an unknown cache class, or a model that cannot be run on the meta device.
    ProfilerError
        For a context past the model's limit.
    """
    check_context(config, context)
    return _Predictor(meta_model(config, dtype))(batch, context).bytes


# ---------------------------------------------------------------------------------------------------------------------
# The law: bytes of one sequence as a function of its context
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LayerLaw:
    """One layer's cached bytes; ``full`` beyond the window, ``growing`` below it, ``state_bytes`` included in both."""

    layer: LayerBytes  # at the longest length that was run
    slope: Fraction
    fixed: int
    growing: Fraction

    def bytes(self, context: int, bits: int | None) -> Fraction:
        """Return the bytes at ``context`` with cached values of ``bits`` bits (``None``: as they are)."""
        filled = self.fixed + self.slope * context
        if self.layer.window is not None and context < self.layer.window:
            filled = self.layer.state_bytes + self.growing * context
        if bits is None or not self.layer.element_bits:
            return filled
        state = self.layer.state_bytes
        return state + (filled - state) * Fraction(bits, self.layer.element_bits)


@dataclass(frozen=True)
class _Law:
    """Linear in the context from ``first`` on, at every multiple of ``step`` tokens, and in the batch."""

    layers: tuple[_LayerLaw, ...]
    prefill_slope: Fraction
    prefill_fixed: int
    first: int
    step: int

    def covers(self, context: int) -> bool:
        return context >= self.first and (context - self.first) % self.step == 0

    def bytes(self, context: int, bits: int | None = None) -> Fraction:
        return sum((layer.bytes(context, bits) for layer in self.layers), Fraction(0))

    def prefill_bytes(self, context: int) -> Fraction:
        return self.prefill_fixed + self.prefill_slope * context

    def longest(self, room: int, bits: int | None = None) -> int | None:
        """Return the longest context whose cache is at most ``room`` bytes, ``None`` if it never outgrows it."""
        if not any(layer.slope for layer in self.layers):
            windows = [layer.layer.window for layer in self.layers if layer.layer.window]
            if self.bytes(max(windows, default=1), bits) <= room:
                return None
        low, high = 0, 1
        while self.bytes(high, bits) <= room:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.bytes(middle, bits) <= room else (low, middle)
        return low


def _fit(predict: _Predictor) -> _Law:
    """Find the law from two lengths beyond every window, confirmed at a third and at batch 2.

    The layer classes of ``transformers.cache_utils`` grow by the token. Those defined beside one model may compress
    chunks of tokens, and are linear only from multiple to multiple of ``CHUNK_TOKENS``.
    """
    short = [predict(1, length) for length in SHORT_LENGTHS]
    window = max((layer.window or 0 for layer in short[0].layers), default=0)
    first = max(window + 1, SHORT_LENGTHS[-1])
    if any(layer.kind == "compressed" for layer in short[0].layers):
        step = CHUNK_TOKENS
        first = -(-first // step) * step
        lengths = (first, first + step, first + 3 * step)
    else:
        step = 1
        lengths = (first, first + step, first + step + CONFIRMING_TOKENS)
    runs = [predict(1, length) for length in lengths]
    _check_batch(runs[0].bytes, predict(2, first).bytes, first)
    layers = []
    for at, layer in enumerate(runs[-1].layers):
        name = f"layer {at} ({layer.cache_class})"
        line = _line(name, lengths, [run.layers[at].bytes for run in runs])
        growing = Fraction(short[1].layers[at].bytes - short[0].layers[at].bytes, SHORT_LENGTHS[1] - SHORT_LENGTHS[0])
        layers.append(_LayerLaw(layer, *line, growing))
    return _Law(tuple(layers), *_line("the prefill", lengths, [run.prefill_bytes for run in runs]), first, step)


def _check_batch(one: int, two: int, length: int) -> None:
    if two != 2 * one:
        raise ProfilerError(
            f"two sequences of {length} tokens hold {two} bytes, one {one}: the cache does not grow linearly with the "
            "batch; use profilers.kv_cache.predict_cache_bytes for single sizes"
        )


def _line(name: str, lengths: Sequence[int], sizes: Sequence[int]) -> tuple[Fraction, int]:
    """Return slope and intercept of the line through two points, if the third is on it."""
    slope = Fraction(sizes[1] - sizes[0], lengths[1] - lengths[0])
    fixed = sizes[0] - slope * lengths[0]
    if fixed.denominator != 1 or fixed + slope * lengths[2] != sizes[2]:
        raise ProfilerError(
            f"the cache does not grow linearly with the context: {name} holds {list(sizes)} bytes at {list(lengths)} "
            "tokens; use profilers.kv_cache.predict_cache_bytes for single sizes"
        )
    return slope, int(fixed)


# ---------------------------------------------------------------------------------------------------------------------
# The instrument
# ---------------------------------------------------------------------------------------------------------------------


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
    if any(batch < 1 for batch in batches):
        raise ProfilerError(f"batch {min(batches)} is not a number of sequences; give 1 or more")

    with progress.task("KV cache: predicting"):
        predict = _Predictor(meta_model(model.config, model.dtype) if live else model)
        law = _fit(predict)
        workspace = predict.workspace_bytes()

    memory, memory_reason = _memory(device)
    available = memory_available_bytes(device) if live and memory is not None else None
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
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

    room = None if memory is None else memory - weights - workspace
    layers = tuple(_kv_layer(law_of_layer, model.config) for law_of_layer in law.layers)
    own = [layer for layer in layers if layer.kind != "cross"]
    cross = [layer for layer in layers if layer.kind == "cross"]
    latent, latent_reason = _latent(model.config, own, model.dtype)
    return KVResult(
        dtype=str(model.dtype).removeprefix("torch."),
        attention=_attention(model.config, layers),
        bytes_per_token=sum(layer.bytes_per_token for layer in own),
        fixed_bytes=sum(layer.fixed_bytes for layer in own),
        bytes_per_token_growing=sum(layer.bytes_per_token_growing for layer in own),
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
                str(length): None if memory is None else _batches(law, length, bits, memory - weights, workspace)
                for length in chosen
            }
            for bits in CACHE_BITS
        },
        crossover_context=_crossover(law, weights),
    )


def _predicted(predict: _Predictor, law: _Law, batch: int, context: int) -> tuple[int, int]:
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


def _kv_layer(law: _LayerLaw, config: PreTrainedConfig) -> KVLayer:
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


def _batches(law: _Law, context: int, bits: int, room: int, workspace: int) -> int:
    """Return how many sequences of ``context`` tokens fit into ``room`` bytes, each with its own workspace."""
    return max(0, int(room / (law.bytes(context, bits) + workspace)))


def _crossover(law: _Law, weights: int) -> int | None:
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
