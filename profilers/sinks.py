"""Attention sinks of every head, without ever forming the T x T attention matrix.

For a head with causal attention weights A, the attention that key k receives is the mean over the queries that may look
at it, its own included (Gu et al. 2025, section 3)::

    alpha_k = 1 / (T - k + 1) * sum over i >= k of A[i, k]          A[i, k] = exp(q_i . k_k * scale - lse_i)

Fused attention knows ``lse_i``, so ``alpha_1`` of every head costs one dot product a query. The sink rate of a
sequence is the share of layer x head pairs with ``alpha_1 > epsilon`` (strict), thresholded for each sequence, then
averaged over sequences.

In a notebook::

    from profilers.sinks import measure_sinks, sink_alphas

    result = measure_sinks(model, tokenizer, contexts=(64, 512))
    alphas = sink_alphas(model, tokenizer("...", return_tensors="pt").input_ids)  # by layer: (sequences, heads)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from profilers.activations import Activations, MassiveActivation, PerturbationSpread, measure_activations
from profilers.attention_capture import AttentionCall, decoder_layers, observe_attention
from profilers.base import ProfileContext, Profiler, ProfilerError, Progress, SilentProgress
from profilers.phases import check_context, context_limit, forward_without_cache
from profilers.text import token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PROFILER",
    "MassiveActivation",
    "PerturbationSpread",
    "SinkPoint",
    "SinkPosition",
    "SinksResult",
    "measure_sinks",
    "run",
    "sink_alphas",
]

DEFAULT_CONTEXT = 64
"""Tokens in a sequence, special tokens included, as in the public code of Gu et al. 2025."""

DEFAULT_SEQUENCES = 100
"""Sequences the rate averages over, as in Gu et al. 2025."""

POINT_TOKENS = 16_384
"""Tokens measured at one context; beyond it there are fewer sequences, never less than one."""

FORWARD_TOKENS = 4_096
"""Tokens in one forward pass, unless a single sequence is longer."""

POSITIONS_CONTEXT_LIMIT = 1_024
"""Longest context at which all key positions are measured unasked: that costs as much as attention again, T² a head."""

POSITIONS_LISTED = 5
"""Strongest positions besides the first that are reported."""

MINIMUM_QUERIES = 8
"""A position that fewer queries can see is not ranked: its mean is over too few (the last one's is over one)."""

POSITION_ROWS = 32
"""Queries in a block when all positions are measured."""

DETAIL_SEQUENCES = 4
"""Sequences for massive activations and perturbation spread."""

MASSIVE_LISTED = 20
"""Largest massive activations that are listed; all are counted."""

_NOT_A_MIXER = re.compile(r"norm|mlp|moe|feed_?forward|dropout|expert|router|activation", re.IGNORECASE)
_LINEAR_MIXER = re.compile(r"linear|lightning", re.IGNORECASE)


@dataclass(frozen=True)
class SinkPosition:
    """One key position: attention it receives, averaged over heads and sequences."""

    position: int  # 1-based, as in the paper: 1 is the first token
    mean_alpha: float
    sink_rate: float  # share of heads with alpha > epsilon, averaged over sequences


@dataclass(frozen=True)
class SinkPoint:
    """Sinks at one context length, with or without a BOS token.

    ``alpha`` is ``alpha_1`` by layer and head, averaged over sequences; a layer without softmax attention is None.
    ``sink_rate`` is thresholded for each sequence, then averaged, at the first epsilon; None where no layer has softmax
    attention (then ``sequences`` is 0). ``positions`` are the strongest besides the first:
    highest sink rate first, then highest mean alpha.
    """

    context: int
    bos: bool
    sequences: int
    sink_rate: float | None
    sink_rate_by_epsilon: dict[str, float]
    alpha: tuple[tuple[float, ...] | None, ...]
    positions: tuple[SinkPosition, ...]
    positions_reason: str | None
    value_norm_ratio: tuple[float | None, ...]  # by layer: norm of the first token's value / median norm
    uniform_alpha: float  # H_T / T: what uniform causal attention would give


@dataclass(frozen=True)
class SinksResult:
    """Sink rates and what goes with them.

    ``sequences`` is what was asked for; each point says how many it has. ``massive_activation_count`` counts distinct
    (with or without BOS, layer, position, token, dimension); ``massive_activations`` lists the largest of them.
    """

    epsilon: float
    epsilons: tuple[float, ...]
    sequences: int
    text: str  # what the sequences were taken from
    points: tuple[SinkPoint, ...]
    bos_reason: str | None  # why there is no point with (or without) BOS, if so
    not_applicable: dict[str, str]  # layer index -> reason
    massive_activations: tuple[MassiveActivation, ...]
    massive_activation_count: int
    perturbation: tuple[PerturbationSpread, ...]


def run(context: ProfileContext) -> SinksResult:
    """Profile the sinks of a live model."""
    request = context.request
    return measure_sinks(
        context.model,
        context.tokenizer,
        contexts=request.contexts or (DEFAULT_CONTEXT,),
        sequences=request.sequences,
        epsilons=request.epsilons,
        text=request.text,
        seed=request.seed,
        progress=context.progress,
    )


def measure_sinks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    contexts: Sequence[int] = (DEFAULT_CONTEXT,),
    sequences: int = DEFAULT_SEQUENCES,
    epsilons: Sequence[float] = (0.3,),
    text: str | None = None,
    seed: int = 0,
    positions: bool | None = None,
    progress: Progress | None = None,
) -> SinksResult:
    """Measure the sinks of ``model`` on text, with and without a BOS token.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode. Of an encoder-decoder, the decoder's self-attention is measured; the encoder reads the text.
    tokenizer : PreTrainedTokenizerBase or None
        Without one, tokens are random.
    contexts : sequence of int
        Sequence lengths T, in tokens, a BOS token included.
    sequences : int
        Sequences at T = 64. Longer contexts have fewer: at most max(16,384, 64 x ``sequences``) tokens, at least one.
    epsilons : sequence of float
        Thresholds on alpha_1, each in (0, 1); the first is the one quoted.
    text : str or None
        ``None`` means the offline default text.
    seed : int
        Seed of random tokens and of the perturbation.
    positions : bool or None
        Measure every key position. ``None``: up to a context of 1,024.
    progress : Progress or None

    Returns
    -------
    SinksResult

    Raises
    ------
    ProfilerError
        If the text is too short, a context is past the model's limit, or the attention cannot be observed.

    References
    ----------
    Gu et al. 2025, When Attention Sink Emerges in Language Models. Barbero et al. 2025, Why do LLMs attend to the first
    token? Sun et al. 2024, Massive Activations in Large Language Models.
    """
    _check(model, contexts, sequences, epsilons)
    stream = token_stream(tokenizer, _text_config(model).vocab_size, text, seed)
    bos_token, bos_reason = _bos_token(model, tokenizer)
    kinds = (False,) if bos_token is None else (True, False)
    stream.windows(1, max(contexts))  # a text too short for the longest is said before anything is measured
    not_applicable, layers = _applicability(model, stream.windows(1, min(DEFAULT_CONTEXT, *contexts)))
    applicable = len(not_applicable) < layers

    batches = {length: _batches(_sequence_count(sequences, length), length) for length in contexts}
    forwards = len(kinds) * ((sum(map(len, batches.values())) if applicable else 0) + 1)
    points: list[SinkPoint] = []
    details: list[Activations] = []
    with (progress or SilentProgress()).task("Attention sinks", total=forwards) as task:
        for length in contexts:
            for with_bos in kinds:
                tally = _Tally(length, layers, tuple(epsilons))
                measure_positions = length <= POSITIONS_CONTEXT_LIMIT if positions is None else positions
                if applicable:
                    windows = stream.windows(_sequence_count(sequences, length), length)
                    for batch in batches[length]:
                        ids = _with_bos(windows[batch], bos_token if with_bos else None)
                        tally.add(_measure(model, ids, windows[batch], positions=measure_positions))
                        task.advance()
                points.append(tally.point(with_bos, measure_positions))
        length = min(DEFAULT_CONTEXT, context_limit(model.config) or DEFAULT_CONTEXT, stream.ids.numel())
        windows = stream.windows(min(DETAIL_SEQUENCES, sequences), length)
        for with_bos in kinds:
            ids = _with_bos(windows, bos_token if with_bos else None)
            details.append(measure_activations(model, tokenizer, stream, ids, windows, bos=with_bos, seed=seed))
            task.advance()
    massive = sorted((found for detail in details for found in detail.massive), key=lambda found: -abs(found.value))
    return SinksResult(
        epsilon=epsilons[0],
        epsilons=tuple(epsilons),
        sequences=sequences,
        text=stream.name,
        points=tuple(points),
        bos_reason=bos_reason,
        not_applicable=not_applicable,
        massive_activations=tuple(massive[:MASSIVE_LISTED]),
        massive_activation_count=len(massive),
        perturbation=tuple(detail.perturbation for detail in details),
    )


def sink_alphas(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return alpha_1 of every sequence and head, by layer.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    input_ids : torch.Tensor
        Shape (B, T), without padding. An encoder-decoder reads them on both sides.

    Returns
    -------
    tuple
        By layer, a float32 tensor of shape (B, heads), or None for a layer without softmax attention.
    """
    return tuple(None if layer is None else layer.alpha for layer in _measure(model, input_ids, input_ids).layers)


# --- one forward pass -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LayerSinks:
    alpha: torch.Tensor  # (B, heads): alpha_1
    value_ratio: torch.Tensor  # (B,): |v_1| / median |v_k|, mean over key/value heads
    all_alphas: torch.Tensor | None  # (B, heads, T): alpha_k


@dataclass(frozen=True)
class _Measured:
    layers: tuple[_LayerSinks | None, ...]


def _measure(
    model: PreTrainedModel, input_ids: torch.Tensor, encoder_ids: torch.Tensor, *, positions: bool = False
) -> _Measured:
    """Run the model once and collect the sinks of each decoder layer."""
    prefix, stack = decoder_layers(model)
    calls: dict[int, dict[str, list[_LayerSinks]]] = {}

    def collect(call: AttentionCall) -> None:
        layer = _index_in(prefix, call.name)
        if layer is None or call.is_cross:
            return
        sinks = _LayerSinks(
            alpha=call.first_key_probabilities().mean(dim=-1),
            value_ratio=_value_ratio(call.value),
            all_alphas=_all_alphas(call) if positions else None,
        )
        calls.setdefault(layer, {}).setdefault(call.name, []).append(sinks)

    with observe_attention(model, collect):
        forward_without_cache(model, input_ids, encoder_ids)
    merged = tuple(_merge(calls[layer]) if layer in calls else None for layer in range(len(stack)))
    for layer, sinks in enumerate(merged):
        if sinks is not None and not torch.isfinite(sinks.alpha).all():
            raise ProfilerError(
                f"attention of layer {layer} is not finite in {model.dtype}; measure in another dtype, such as float32"
            )
    return _Measured(merged)


def _merge(calls: dict[str, list[_LayerSinks]]) -> _LayerSinks:
    """Join a layer's calls: repeated calls of one module are averaged, different modules are further heads."""
    modules = [
        _LayerSinks(
            alpha=torch.stack([call.alpha for call in repeated]).mean(dim=0).cpu(),
            value_ratio=torch.stack([call.value_ratio for call in repeated]).mean(dim=0).cpu(),
            all_alphas=None
            if repeated[0].all_alphas is None
            else torch.stack([call.all_alphas for call in repeated if call.all_alphas is not None]).mean(dim=0).cpu(),
        )
        for repeated in calls.values()
    ]
    alphas = [module.all_alphas for module in modules if module.all_alphas is not None]
    return _LayerSinks(
        alpha=torch.cat([module.alpha for module in modules], dim=1),
        value_ratio=torch.stack([module.value_ratio for module in modules]).mean(dim=0),
        all_alphas=torch.cat(alphas, dim=1) if alphas else None,
    )


def _all_alphas(call: AttentionCall) -> torch.Tensor:
    """Return alpha_k for every key k: shape (B, H, T), a block of queries at a time."""
    batch, heads, length, _ = call.query.shape
    received = torch.zeros(batch, heads, length, device=call.query.device)
    for start in range(0, length, POSITION_ROWS):
        stop = min(start + POSITION_ROWS, length)
        block = call.probabilities(slice(start, stop), slice(0, stop))
        received[:, :, :stop] += block.tril(diagonal=start).sum(dim=2)  # only queries i >= k, whatever the mask
    return received / torch.arange(length, 0, -1, device=received.device)


def _value_ratio(value: torch.Tensor) -> torch.Tensor:
    """Return |v_1| / median over k of |v_k| for each sequence, the mean over key/value heads: shape (B,)."""
    norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
    length = norms.shape[-1]
    ordered = norms.sort(dim=-1).values
    median = (ordered[..., (length - 1) // 2] + ordered[..., length // 2]) / 2
    ratio: torch.Tensor = (norms[..., 0] / median).mean(dim=-1)
    return ratio


def _index_in(prefix: str, name: str) -> int | None:
    """Return which item of the list called ``prefix`` the module ``name`` belongs to."""
    if not name.startswith(prefix + "."):
        return None
    return int(name[len(prefix) + 1 :].split(".", 1)[0])


# --- averages over sequences ----------------------------------------------------------------------------------------


class _Tally:
    """Sums over sequences of everything a :class:`SinkPoint` averages."""

    def __init__(self, context: int, layers: int, epsilons: tuple[float, ...]) -> None:
        self.context = context
        self.epsilons = epsilons
        self.sequences = 0
        self.rates = [0.0] * len(epsilons)  # sum over sequences of the share above epsilon
        self.alpha: list[torch.Tensor | None] = [None] * layers
        self.value_ratio: list[float | None] = [None] * layers
        self.position_alpha = torch.zeros(context, dtype=torch.float64)
        self.position_rate = torch.zeros(context, dtype=torch.float64)

    def add(self, measured: _Measured) -> None:
        present = [(index, layer) for index, layer in enumerate(measured.layers) if layer is not None]
        every_head = torch.cat([layer.alpha for _, layer in present], dim=1).double()  # (B, all heads)
        self.sequences += every_head.shape[0]
        for index, epsilon in enumerate(self.epsilons):
            self.rates[index] += (every_head > epsilon).double().mean(dim=1).sum().item()
        for index, layer in present:
            total = layer.alpha.double().sum(dim=0)
            before = self.alpha[index]
            self.alpha[index] = total if before is None else before + total
            self.value_ratio[index] = (self.value_ratio[index] or 0.0) + layer.value_ratio.double().sum().item()
            if layer.all_alphas is not None:
                alphas = layer.all_alphas.double()
                self.position_alpha += alphas.sum(dim=(0, 1)) / every_head.shape[1]
                self.position_rate += (alphas > self.epsilons[0]).double().sum(dim=(0, 1)) / every_head.shape[1]

    def point(self, with_bos: bool, measured_positions: bool) -> SinkPoint:
        count = self.sequences
        rates = {f"{epsilon:g}": rate / count for epsilon, rate in zip(self.epsilons, self.rates, strict=True) if count}
        positions, positions_reason = self._positions(measured_positions)
        return SinkPoint(
            context=self.context,
            bos=with_bos,
            sequences=count,
            sink_rate=self.rates[0] / count if count else None,
            sink_rate_by_epsilon=rates,
            alpha=tuple(None if total is None else tuple((total / count).tolist()) for total in self.alpha),
            positions=positions,
            positions_reason=positions_reason,
            value_norm_ratio=tuple(_finite(None if total is None else total / count) for total in self.value_ratio),
            uniform_alpha=sum(1 / i for i in range(1, self.context + 1)) / self.context,
        )

    def _positions(self, measured: bool) -> tuple[tuple[SinkPosition, ...], str | None]:
        ranked = self.context - MINIMUM_QUERIES + 1  # keys 1..ranked have enough queries
        if self.sequences == 0:
            return (), "no layer has softmax attention"
        if not measured:
            return (), f"measured up to a context of {POSITIONS_CONTEXT_LIMIT:,} unless asked for (cost grows with T²)"
        if ranked < 2:
            return (), f"no position besides the first has {MINIMUM_QUERIES} queries at a context of {self.context}"
        means, rates = self.position_alpha / self.sequences, self.position_rate / self.sequences
        found = [SinkPosition(index + 1, means[index].item(), rates[index].item()) for index in range(1, ranked)]
        found.sort(key=lambda position: (-position.sink_rate, -position.mean_alpha))
        return tuple(found[:POSITIONS_LISTED]), None


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None


# --- what can be measured -------------------------------------------------------------------------------------------


def _applicability(model: PreTrainedModel, ids: torch.Tensor) -> tuple[dict[str, str], int]:
    """Run one sequence to find the layers that compute no softmax attention; return why not, and the layer count."""
    measured = _measure(model, ids, ids).layers
    types = getattr(_text_config(model), "layer_types", None) or [None] * len(measured)
    reasons = {}
    for index, layer in enumerate(decoder_layers(model)[1]):
        if measured[index] is None:
            kind = types[index] if index < len(types) else None
            reasons[str(index)] = _why_not_applicable(model, index, layer, kind)
    return reasons, len(measured)


def _why_not_applicable(model: PreTrainedModel, index: int, layer: torch.nn.Module, kind: str | None) -> str:
    mixers = [type(child).__name__ for child in layer.children() if not _NOT_A_MIXER.search(type(child).__name__)]
    hidden = [
        name
        for name in (type(module).__name__ for module in layer.modules())
        if "attention" in name.lower() and not _LINEAR_MIXER.search(name)
    ]
    if hidden and not (kind and _LINEAR_MIXER.search(kind)):
        raise ProfilerError(
            f"layer {index} of {type(model).__name__} has a '{hidden[0]}' whose attention could not be observed; "
            "load the model with attn_implementation='sdpa' if it supports that, or leave this instrument out"
        )
    mixer = " + ".join(mixers) or type(layer).__name__
    return f"no softmax attention: {mixer}" + (f" ({kind})" if kind else "")


def _check(model: PreTrainedModel, contexts: Sequence[int], sequences: int, epsilons: Sequence[float]) -> None:
    if sequences < 1:
        raise ProfilerError(f"cannot average over {sequences} sequences; ask for at least 1")
    if not contexts or not epsilons:
        raise ProfilerError("sinks need at least one context and one epsilon")
    for epsilon in epsilons:
        if not 0 < epsilon < 1:
            raise ProfilerError(f"epsilon {epsilon:g} is not a share of attention; give a number between 0 and 1")
    for length in contexts:
        if length < 2:
            raise ProfilerError(f"a context of {length} has no query besides the first; give 2 or more")
        check_context(model.config, length)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _bos_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int | None, str | None]:
    """Return the token a sequence starts with, or None and why there is none."""
    if model.config.is_encoder_decoder:
        start = getattr(model.config, "decoder_start_token_id", None)
        return start, None if start is not None else "the decoder has no start token"
    if tokenizer is None:
        token = getattr(_text_config(model), "bos_token_id", None)
        return token, None if token is not None else "the model's config has no BOS token"
    return tokenizer.bos_token_id, None if tokenizer.bos_token_id is not None else "the tokenizer has no BOS token"


def _with_bos(windows: torch.Tensor, bos_token: int | None) -> torch.Tensor:
    """Put a BOS token first and drop the last token, so that the length stays."""
    if bos_token is None:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], bos_token), windows[:, :-1]], dim=1)


def _sequence_count(sequences: int, length: int) -> int:
    return min(sequences, max(1, max(POINT_TOKENS, DEFAULT_CONTEXT * sequences) // length))


def _batches(sequences: int, length: int) -> list[slice]:
    size = max(1, FORWARD_TOKENS // length)
    return [slice(start, min(start + size, sequences)) for start in range(0, sequences, size)]


PROFILER = Profiler(
    name="sinks",
    title="Attention sinks",
    run=run,
    result_type=SinksResult,
    paper="Gu et al. 2025, When Attention Sink Emerges in Language Models",
)
