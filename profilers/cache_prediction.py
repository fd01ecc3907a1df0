"""Run a model for its cache, live or on the meta device, and find the law its bytes follow.

::

    config ── meta twin ── prefill(c − 1), decode(1) ── the model's own cache ── bytes ── law: bytes of any context
    live model ─────────── prefill(c − 1), decode(1) ── the model's own cache ── bytes

There are no per-architecture formulas: the same forwards run in both cases and the cache is opened afterwards. Of a
model that makes a cache of its own, the layers that differ from transformers' are asked (:mod:`profilers.own_cache`).
See ``docs/profilers/kv.md``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from profilers.base import NotApplicableError, ProfilerError
from profilers.cache_contents import LayerBytes, cache_bytes, cache_layers
from profilers.device import synchronize
from profilers.meta import meta_model
from profilers.own_cache import OwnCache, of
from profilers.phases import PhaseState, check_context, decode_step, prefill, token_ids
from profilers.storages import address_of, is_gone, weak_storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Caches that compress chunks of tokens are linear only between multiples of this many tokens.
CHUNK_TOKENS = 512
#: Lengths before any window is full, for ``bytes_per_token_growing``.
SHORT_LENGTHS = (2, 3)
#: How far the third length, which confirms the line through the first two, lies beyond them.
CONFIRMING_TOKENS = 61


@dataclass(frozen=True)
class CacheMeasurement:
    """What a cache held after prefill and after the decode step, and what the allocator handed out for it."""

    prefill_bytes: int
    bytes: int
    layers: tuple[LayerBytes, ...]
    allocator_bytes: int | None
    allocator_reason: str | None


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
        given = {address_of(value) for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)}
        return output.untyped_storage().nbytes() == same.untyped_storage().nbytes() and address_of(output) not in given


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
                self._storages[address_of(tensor)] = (weak_storage(tensor), storage.nbytes())
                self._bytes += storage.nbytes()
        if self._bytes > self.peak_bytes:  # only then is it worth knowing which of them are gone
            self._storages = {key: (weak, size) for key, (weak, size) in self._storages.items() if not is_gone(weak)}
            self._bytes = sum(size for _, size in self._storages.values())
            self.peak_bytes = max(self.peak_bytes, self._bytes)


def _layout(value: Any) -> object:
    """Return a hashable description, equal only where an op's output would have the same layout."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(_layout(item) for item in value)
    return type(value), value  # 1, 1.0 and True are equal but promote differently


class Predictor:
    """Runs a model on the meta device at any size, at most once each.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device, with the cache that transformers gives it.
    own : OwnCache or None
        What the live model says of the cache that it makes instead.
    """

    def __init__(self, model: PreTrainedModel, own: OwnCache | None = None) -> None:
        self.model = model
        self.own = own
        self._shapes = _Shapes()
        self._done: dict[tuple[int, int], CacheMeasurement] = {}

    def __call__(self, batch: int, context: int) -> CacheMeasurement:
        """Return what the cache of ``batch`` sequences of ``context`` tokens holds; see :func:`measure_cache`."""
        if (batch, context) not in self._done:
            with self._meta():
                self._done[batch, context] = self._replaced(measure_cache(self.model, batch, context), batch, context)
        return self._done[batch, context]

    def _replaced(self, found: CacheMeasurement, batch: int, context: int) -> CacheMeasurement:
        """Put in the layers of the model's own cache."""
        if self.own is None:
            return found
        prompt, decoded = max(1, context - 1), int(context > 1)
        layers, prefill_bytes = [], found.prefill_bytes
        for layer in found.layers:
            growth = self.own.layers.get(layer.index)
            if growth is not None:
                # A layer that grows by the token holds its share of the tokens after the prefill.
                prefill_bytes -= layer.bytes * prompt // context
                prefill_bytes += self.own.layer_bytes(layer.index, batch, prompt, 0)
                layer = replace(
                    layer,
                    kind=growth.kind,
                    cache_class=growth.cache_class,
                    bytes=self.own.layer_bytes(layer.index, batch, prompt, decoded),
                    element_bits=None,
                )
            layers.append(layer)
        held = sum(layer.bytes for layer in layers)
        return replace(found, layers=tuple(layers), bytes=held, prefill_bytes=prefill_bytes)

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


def predictor_of(model: PreTrainedModel) -> Predictor:
    """Return what predicts the cache of a model, live or on the meta device."""
    twin = model if model.device.type == "meta" else meta_model(model.config, model.dtype)
    return Predictor(twin, of(model))


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
    return Predictor(meta_model(config, dtype))(batch, context).bytes


# ---------------------------------------------------------------------------------------------------------------------
# The law: bytes of one sequence as a function of its context
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerLaw:
    """One layer's bytes: ``fixed + slope * context`` beyond the window, states and ``growing * context`` below it."""

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
class CacheLaw:
    """Bytes of one sequence: linear from ``first`` tokens on, at every multiple of ``step``, and in the batch.

    Of a model's own cache it is what its layers tend to, proved at no length (``step`` is 0).
    """

    layers: tuple[LayerLaw, ...]
    prefill_slope: Fraction
    prefill_fixed: int
    first: int
    step: int

    def covers(self, context: int) -> bool:
        """Return whether the law was proved at this context."""
        return self.step > 0 and context >= self.first and (context - self.first) % self.step == 0

    def bytes(self, context: int, bits: int | None = None) -> Fraction:
        """Return the bytes after the decode step, with cached values of ``bits`` bits (``None``: as they are)."""
        return sum((layer.bytes(context, bits) for layer in self.layers), Fraction(0))

    def prefill_bytes(self, context: int) -> Fraction:
        """Return the bytes held between the prefill and the decode step."""
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


def fit_law(predict: Predictor) -> CacheLaw:
    """Find the law from two lengths beyond every window, confirmed at a third and at batch 2.

    The layer classes of ``transformers.cache_utils`` grow by the token. Those defined beside one model may compress
    chunks of tokens, and are linear only from multiple to multiple of ``CHUNK_TOKENS``.

    Raises
    ------
    ProfilerError
        If the cache does not grow linearly with the context or with the batch.
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
    own = {} if predict.own is None else predict.own.layers
    if own:
        step = 0
    else:
        _check_batch(runs[0].bytes, predict(2, first).bytes, first)
    layers = []
    for at, layer in enumerate(runs[-1].layers):
        if layer.index in own:
            growth = own[layer.index]
            line = Fraction(growth.bytes_per_token), growth.fixed_bytes
            layers.append(LayerLaw(layer, *line, Fraction(growth.growing_bytes_per_token)))
            continue
        name = f"layer {at} ({layer.cache_class})"
        line = _line(name, lengths, [run.layers[at].bytes for run in runs])
        growing = Fraction(short[1].layers[at].bytes - short[0].layers[at].bytes, SHORT_LENGTHS[1] - SHORT_LENGTHS[0])
        layers.append(LayerLaw(layer, *line, growing))
    if own:
        prefill = sum((layer.slope for layer in layers), Fraction(0)), sum(layer.fixed for layer in layers)
    else:
        prefill = _line("the prefill", lengths, [run.prefill_bytes for run in runs])
    return CacheLaw(tuple(layers), *prefill, first, step)


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
