"""Predict what a product-quantized cache does on a device: bytes, times by context, and what training it takes.

See ``docs/passes/kv-pq.md`` for how each figure is arrived at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.base import Figures, ModelProfile, Prediction

if TYPE_CHECKING:
    from passes.kv_pq.parameters import KVPQParameters
    from passes.kv_pq.targets import Targets

CONTEXTS = (2048, 8192, 32768, 131072)
"""That are planned for besides the profile's own, where the model has so many positions."""
TIMED_MEMORY_PART = 8
"""A context is timed if so many times its buffers are free."""
TIMED_COPIES = 12
"""Times one layer's keys and values that timing it takes: caches in turn, and copies while they grow."""
SLOWER_ABOVE = 1.03
"""TPOT after / before from which decode is said to become slower; less is within what a timing varies by."""
FORWARD_EFFICIENCY = 0.5
"""Share of the measured matrix-product peak that calibration's forward passes reach."""
ASSIGN_EFFICIENCY = 0.1
"""Share of it that assigning vectors to centroids reaches: products with few columns, and a minimum each."""
VECTOR_COPIES = 2
"""Of the keys and values that k-means sees: as collected, and centred and scaled."""
LOGIT_COPIES = 4
"""Logits in float32, their softmax, the noise that tokens are drawn with, and their gradient."""
SAVED_HIDDEN, SAVED_INNER = 12, 3
"""Vectors of the hidden and of the inner size that a layer keeps for the backward pass, for each token."""
FLOAT32_BYTES = 4
CENTROIDS = 256
PROCESS_BYTES = 700_000_000
"""Of the Python process on a CPU with PyTorch and transformers imported, without a model."""


@dataclass(frozen=True)
class Stored:
    """What a cache holds for one sequence.

    Attributes
    ----------
    coded_bytes_per_token, plain_bytes_per_token : int
        Of the compressed layers, as codes and in full precision.
    other_bytes_per_token : int
        Of layers that stay as they are.
    exact_tokens : int
        Kept and recent ones, at most.
    """

    coded_bytes_per_token: int
    plain_bytes_per_token: int
    other_bytes_per_token: int
    exact_tokens: int

    def before(self, context: int) -> int:
        """Return the bytes of today's cache."""
        return context * (self.plain_bytes_per_token + self.other_bytes_per_token)

    def after(self, context: int) -> int:
        """Return the bytes of a product-quantized one: the full-precision blocks are there from the start."""
        coded = max(0, context - self.exact_tokens)
        exact = self.exact_tokens * self.plain_bytes_per_token
        return coded * self.coded_bytes_per_token + exact + context * self.other_bytes_per_token


def predict(parameters: KVPQParameters, profile: ModelProfile, found: Targets) -> Prediction:
    """Predict bytes, times and memory after the pass, and what the pass itself needs.

    Parameters
    ----------
    parameters : KVPQParameters
    profile : ModelProfile
        Its model is on the meta device. Without measured times the predicted ones are None and a note says so.
    found : Targets
    """
    figures, itemsize = profile.figures, profile.dtype.itemsize
    held = stored(parameters, found, itemsize)
    codebooks = codebook_bytes(found)
    notes = [
        f"KV cache: {held.coded_bytes_per_token:,} bytes a token in place of {held.plain_bytes_per_token:,} "
        f"(at most {parameters.budget_bits:g} bits a value), {held.exact_tokens} tokens of each sequence in full "
        f"precision, and about {codebooks / 1e6:.3g} MB of codebooks whatever the context"
    ]
    if found.skipped:
        notes.append(f"the cache of {len(found.skipped)} layers stays as it is")
    tpot = _tpot(parameters, profile, found, held, notes)
    ttft = _ttft(profile, found, notes)
    peak = figures.peak_memory_bytes
    if peak is not None:
        change = profile.batch * (held.after(profile.context) - held.before(profile.context)) + codebooks
        peak += change
        notes.append(
            f"peak memory: the measured one and {change / 1e6:+.3g} MB: this cache in place of that one, and codebooks"
        )
    weights = figures.weight_bytes or _parameters(profile) * itemsize
    seconds, memory = _cost(parameters, profile, found, weights, notes)
    fits = _fits(profile, memory, notes)
    slower = None if tpot is None or not figures.tpot_seconds else tpot > SLOWER_ABOVE * figures.tpot_seconds
    if slower:
        notes.append(f"decode is predicted to become slower on this device at context {profile.context:,}")
    growing = held.coded_bytes_per_token + held.other_bytes_per_token
    return Prediction(
        figures=Figures(
            weight_bytes=figures.weight_bytes,
            kv_bytes_per_token=float(growing),
            ttft_seconds=ttft,
            tpot_seconds=tpot,
            peak_memory_bytes=peak,
        ),
        bits_per_parameter=None,
        pass_seconds=seconds,
        pass_memory_bytes=memory,
        fits=fits,
        slower=slower,
        notes=tuple(notes),
    )


def stored(parameters: KVPQParameters, found: Targets, itemsize: int) -> Stored:
    """Return the bytes of a sequence's cache before and after."""
    vectors = 2 * len(found.layers) * found.shape.kv_heads
    return Stored(
        coded_bytes_per_token=vectors * parameters.codes(found.shape.head_dim),
        plain_bytes_per_token=vectors * found.shape.head_dim * itemsize,
        other_bytes_per_token=found.other_bytes_per_token,
        exact_tokens=parameters.kept + parameters.recent,
    )


def codebook_bytes(found: Targets) -> int:
    """Return the bytes of the centroids, which all but make up the codebooks."""
    shape = found.shape
    return 2 * len(found.layers) * shape.kv_heads * CENTROIDS * shape.head_dim * FLOAT32_BYTES


def _tpot(
    parameters: KVPQParameters, profile: ModelProfile, found: Targets, held: Stored, notes: list[str]
) -> float | None:
    """Return the time of a decode step at the profile's context; add a note for each context."""
    from profilers.device import memory_available_bytes
    from profilers.phases import context_limit, decode_history

    measured, batch = profile.figures.tpot_seconds, profile.batch
    if measured is None:
        notes.append("the profile holds no measured times, so none are predicted; profile the model with its weights")
        return None
    limit = context_limit(profile.model.config)
    longer = [context for context in CONTEXTS if context > profile.context and (limit is None or context <= limit)]
    layers, seconds = len(found.layers), None
    at_profile: float | None = None
    free = memory_available_bytes(profile.device)
    for context in (profile.context, *longer):
        before, after = batch * held.before(context), batch * held.after(context)
        line = f"context {context:,}: KV cache {before / 1e6:,.3g} MB -> {after / 1e6:,.3g} MB ({after / before:.2f} x)"
        floor = (before - after) / profile.peaks.memory_bytes_per_second
        line += f", {1e3 * floor:+.3g} ms a step of reading less at the measured bandwidth"
        buffers = TIMED_COPIES * batch * context * held.plain_bytes_per_token // layers
        if buffers * TIMED_MEMORY_PART > free:
            notes.append(f"{line}; attention not timed: its buffers need {buffers / 1e9:.3g} GB")
            continue
        times = _step_times(parameters, profile, found, decode_history(profile.model.config, context))
        plain, coded = layers * times.plain_seconds, layers * times.coded_seconds
        if at_profile is None:
            at_profile = plain
        now = measured + plain - at_profile
        then = max(now - plain, 0.0) + coded
        if context == profile.context:
            seconds = then
        notes.append(
            f"{line}; attention of all layers, timed apart: {1e3 * plain:.3g} ms -> {1e3 * coded:.3g} ms, so a step "
            f"takes {1e3 * now:.3g} ms -> {1e3 * then:.3g} ms"
        )
    return seconds


def _step_times(parameters: KVPQParameters, profile: ModelProfile, found: Targets, context: int) -> Any:
    from passes.kv_pq.step_times import StepShape, time_step

    config = profile.model.config.get_text_config(decoder=True)
    shape = found.shape
    turns = parameters.keys != "after-rope" and getattr(config, "rope_parameters", None) is not None
    return time_step(
        StepShape(
            batch=profile.batch,
            query_heads=config.num_attention_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            codes=parameters.codes(shape.head_dim),
            kept=parameters.kept,
            recent=parameters.recent,
            gains=parameters.gains,
            rope=turns,
        ),
        context,
        config,
        profile.device,
        profile.dtype,
    )


def _ttft(profile: ModelProfile, found: Targets, notes: list[str]) -> float | None:
    """Return the time of a prefill and of encoding what it leaves behind."""
    measured, rate = profile.figures.ttft_seconds, _rate(profile)
    if measured is None or rate is None:
        return None
    flops = _assign_flops(found, profile.batch * profile.context)
    encoding = flops / (FORWARD_EFFICIENCY * rate)
    notes.append(
        f"prefill: {flops:.2g} FLOP of seeking nearest centroids on top, {1e3 * encoding:.3g} ms at "
        f"{FORWARD_EFFICIENCY:.0%} of the measured float32 peak ({encoding / measured:+.1%})"
    )
    return measured + encoding


def _assign_flops(found: Targets, tokens: int) -> float:
    """FLOPs of the distances of every key and value to its 256 centroids: one multiply-add a channel and centroid."""
    shape = found.shape
    return 2.0 * 2 * len(found.layers) * shape.kv_heads * shape.head_dim * CENTROIDS * tokens


def _rate(profile: ModelProfile, dtype: str = "float32") -> float | None:
    return profile.peaks.flops_per_second.get(dtype)


def _cost(
    parameters: KVPQParameters, profile: ModelProfile, found: Targets, weights: int, notes: list[str]
) -> tuple[float | None, int]:
    """Return seconds and bytes that training the codebooks takes."""
    from passes.calibration_text import BATCH_TOKENS
    from passes.kv_pq.fit import GRADIENT_TOKENS, VECTORS
    from passes.kv_pq.kmeans import COARSE_VECTORS, FINE_ROUNDS

    tokens = parameters.samples * parameters.length
    seen = min(tokens, VECTORS)
    backward = min(tokens, GRADIENT_TOKENS) if parameters.weighting == "attention" else 0
    name = str(profile.dtype).removeprefix("torch.")
    forward_rate, assign_rate = _rate(profile, name), _rate(profile)
    seconds = None
    if forward_rate is not None and assign_rate is not None:
        # A backward pass to keys and values costs about a forward one: no gradients of weights are made.
        passes = 2.0 * _parameters(profile) * (tokens + backward) / (FORWARD_EFFICIENCY * forward_rate)
        assigned = parameters.iterations * min(seen, COARSE_VECTORS) + FINE_ROUNDS * seen * (seen > COARSE_VECTORS)
        rounds = _assign_flops(found, assigned) / (ASSIGN_EFFICIENCY * assign_rate)
        seconds = passes + rounds
        notes.append(
            f"pass time: {passes:.3g} s of running {tokens:,} tokens forwards and {backward:,} backwards, "
            f"{rounds:.3g} s of k-means over {seen:,} of them, at {FORWARD_EFFICIENCY:.0%} and "
            f"{ASSIGN_EFFICIENCY:.0%} of the measured peaks"
        )
    shape = found.shape
    vectors = 2 * len(found.layers) * shape.kv_heads * shape.head_dim * FLOAT32_BYTES
    collected = vectors * (VECTOR_COPIES * seen + backward)
    text, batch = profile.model.config.get_text_config(decoder=True), min(backward, BATCH_TOKENS)
    inner = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    kept = text.num_hidden_layers * (SAVED_HIDDEN * text.hidden_size + SAVED_INNER * inner) * profile.dtype.itemsize
    graph = batch * (LOGIT_COPIES * text.vocab_size * FLOAT32_BYTES + kept)
    memory = weights + collected + graph + codebook_bytes(found)
    if profile.device.type == "cpu":
        memory += PROCESS_BYTES
    notes.append(
        f"pass memory: the weights, {collected / 1e6:,.3g} MB of keys, values and their gradients, and "
        f"{graph / 1e6:,.3g} MB of logits and activations to run {batch:,} tokens backwards"
    )
    return seconds, memory


def _fits(profile: ModelProfile, memory: int, notes: list[str]) -> bool:
    from profilers.device import memory_available_bytes

    available = memory_available_bytes(profile.device)
    notes[-1] += f"; {available / 1e9:.3g} GB are free"
    return memory <= available


def _parameters(profile: ModelProfile) -> int:
    return sum(parameter.numel() for parameter in profile.model.parameters())
