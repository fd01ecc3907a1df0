"""Which layers of a model resemble each other, and what it would cost to let them share weights or to skip them.

Likeness is a property of hidden states (:mod:`profilers.layer_similarity`) and cheap; damage is measured by running the
changed model (:mod:`profilers.layer_damage`) and costs a forward for each change, so it is taken over few tokens. The
two often disagree: a layer may hardly turn the hidden state and still be the one that the next layers depend on.

In a notebook::

    from profilers.redundancy import measure_redundancy, tie_damage

    result = measure_redundancy(model, windows)                 # windows: token ids, shape (n, T)
    tie_damage(model, [windows], [(4, 5), (4, 5, 6)])           # KL in nats a token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from profilers.attention_capture import decoder_layers
from profilers.base import NotApplicableError, ProfileContext, Profiler, Progress, SilentProgress
from profilers.intervals import CONFIDENCE, Interval, block_interval
from profilers.layer_damage import (
    Weights,
    divergences,
    skip_changes,
    skip_damage,
    tie_changes,
    tie_damage,
)
from profilers.layer_exchange import layer_kinds, layer_linears, skipping, unshareable, with_weights_of
from profilers.layer_similarity import angles, cka_tokens, hidden_states, linear_cka
from profilers.phases import context_limit
from profilers.reference import check_windows
from profilers.text import token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "PROFILER",
    "LayerRedundancy",
    "RedundancyResult",
    "TiedGroup",
    "layer_kinds",
    "layer_linears",
    "measure_redundancy",
    "run",
    "skip_damage",
    "skipping",
    "tie_damage",
    "unshareable",
    "with_weights_of",
]

GROUP_SIZES = (2, 3, 4)
"""Numbers of adjacent layers that are tied; the larger ones are left out where they would cost too much."""

WINDOW_TOKENS = 128
"""Tokens of one window of text."""

SIMILARITY_TOKENS = 1024
"""Tokens that likeness is taken over."""

FEWEST_TOKENS, MOST_TOKENS = 256, 2048
"""Tokens that damage is measured on."""

DAMAGE_FLOPS = {"cpu": 7.5e12}
"""FLOP that measuring damage may take, by type of device: about a minute of two cores."""

ACCELERATOR_FLOPS = 1e15

BLOCK_TOKENS = 32
"""Predicted tokens of a block that intervals are over, about."""


@dataclass(frozen=True)
class LayerRedundancy:
    """One decoder layer.

    Attributes
    ----------
    layer : int
    kind : int
        Index into ``kinds``.
    input_output_cosine, input_output_angular_distance : float or None
        Between the hidden state before and after the layer, means over tokens. The distance is arccos(cosine) / pi of
        each token. None if a state is zero.
    skip_kl_nats_per_token : float or None
        KL(original || model without this layer).
    skip_kl_interval : tuple of float or None
    skip_reason : str or None
        Why there is no figure.
    unshareable_reason : str or None
        Why it cannot share weights with another layer.
    """

    layer: int
    kind: int
    input_output_cosine: float | None
    input_output_angular_distance: float | None
    skip_kl_nats_per_token: float | None
    skip_kl_interval: Interval | None
    skip_reason: str | None
    unshareable_reason: str | None


@dataclass(frozen=True)
class TiedGroup:
    """Adjacent layers that ran with one set of linear weights.

    Attributes
    ----------
    layers : tuple of int
    kl_nats_per_token : float or None
        KL(original || tied).
    kl_interval : tuple of float or None
    reason : str or None
        Why there is no figure.
    """

    layers: tuple[int, ...]
    kl_nats_per_token: float | None
    kl_interval: Interval | None
    reason: str | None


@dataclass(frozen=True)
class RedundancyResult:
    """Likeness and damage of all layers.

    Attributes
    ----------
    text : str
        What the tokens were.
    context : int
        Tokens of a window.
    similarity_tokens : int
        Tokens that cosines and angular distances are means over.
    cka_tokens : int
        Tokens that CKA is over; the first of each window is none of them.
    damage_tokens : int
        Predicted tokens that damages are means over.
    tie_weights : str
        What tied layers run with: the ``"average"`` of their weights.
    confidence : float
        Of the intervals.
    kinds : tuple of str
        Layers of one kind may share weights.
    layers : tuple of LayerRedundancy
    block_angular_distances : tuple of (tuple of float or None)
        ``[n - 1][l]``: mean angular distance between the input of layer l and what n layers make of it.
    cka : tuple of (tuple of float)
        Linear CKA between the outputs of two layers, L x L; empty if unknown.
    cka_reason : str or None
        Why it is not known.
    groups : tuple of TiedGroup
        By size, then by first layer.
    notes : tuple of str
        What was left out, and why.
    """

    text: str
    context: int
    similarity_tokens: int
    cka_tokens: int
    damage_tokens: int
    tie_weights: str
    confidence: float
    kinds: tuple[str, ...]
    layers: tuple[LayerRedundancy, ...]
    block_angular_distances: tuple[tuple[float | None, ...], ...]
    cka: tuple[tuple[float, ...], ...]
    cka_reason: str | None
    groups: tuple[TiedGroup, ...]
    notes: tuple[str, ...] = ()


def run(context: ProfileContext) -> RedundancyResult:
    """Profile the redundancy of a live model on text."""
    request, config = context.request, context.config
    stream = token_stream(
        context.tokenizer, config.get_text_config(decoder=True).vocab_size, request.text, request.seed
    )
    asked = request.contexts[0] if request.contexts else None
    length = asked or min(WINDOW_TOKENS, context_limit(config) or WINDOW_TOKENS, stream.ids.numel())
    windows = stream.separate_windows(max(1, MOST_TOKENS // length), length)
    return measure_redundancy(context.model, windows, text=stream.name, progress=context.progress)


def measure_redundancy(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    group_sizes: Sequence[int] | None = None,
    damage_tokens: int | None = None,
    weights: Weights = "average",
    text: str = "given tokens",
    progress: Progress | None = None,
) -> RedundancyResult:
    """Measure the redundancy of a live model, which is afterwards exactly as it was.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder in evaluation mode.
    windows : torch.Tensor
        Token ids, shape (n, T). Likeness and damage take as many of them, evenly spaced, as their tokens allow.
    group_sizes : sequence of int or None
        Numbers of adjacent layers to tie; ``None``: 2, 3 and 4, without the larger ones where those cost too much.
    damage_tokens : int or None
        Tokens to measure damage on; ``None``: 256 to 2,048, as many as fit the work that the device may be given.
    weights : {"first", "average"}
        What tied layers run with.
    text : str
        What the tokens were.
    progress : Progress or None

    Returns
    -------
    RedundancyResult

    Raises
    ------
    NotApplicableError
        For an encoder-decoder, or layers that do not each return one state a token.
    ProfilerError
        For windows that the model cannot read, or logits that are not finite.

    References
    ----------
    Men et al. 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You Expect. Gromov et al. 2024,
    The Unreasonable Ineffectiveness of the Deeper Layers. Kornblith et al. 2019, Similarity of Neural Network
    Representations Revisited.
    """
    if model.config.is_encoder_decoder:
        raise NotApplicableError(f"{type(model).__name__} is an encoder-decoder; redundancy is measured for decoders")
    check_windows(model, windows)
    progress = progress or SilentProgress()
    with progress.task("Likeness of layers", total=1) as task:
        likeness = _likeness(model, _evenly(windows, SIMILARITY_TOKENS))
        task.advance()

    kinds = layer_kinds(model)
    reasons = [unshareable(layer) for layer in decoder_layers(model)[1]]
    groups_by_size = {
        size: _adjacent(kinds, reasons, size) for size in (GROUP_SIZES if group_sizes is None else group_sizes)
    }
    notes = []
    if group_sizes is None:
        notes += _drop_costly(model, groups_by_size)
    groups = [group for found in groups_by_size.values() for group in found]
    tokens = damage_tokens or affordable_tokens(model, len(kinds) + len(groups))
    chosen = _evenly(windows, tokens)
    changes = [*skip_changes(model, range(len(kinds))), *tie_changes(model, groups, weights)]
    found = divergences(model, [chosen], changes, "Damage of skipping and tying", progress)
    damages = [_damage(values, chosen.shape[0]) for values in found]
    skips, ties = damages[: len(kinds)], damages[len(kinds) :]
    distinct = tuple(dict.fromkeys(kinds))
    return RedundancyResult(
        text=text,
        context=windows.shape[1],
        similarity_tokens=likeness.tokens,
        cka_tokens=likeness.cka_tokens,
        damage_tokens=chosen.shape[0] * (chosen.shape[1] - 1),
        tie_weights=weights,
        confidence=CONFIDENCE,
        kinds=distinct,
        layers=tuple(
            LayerRedundancy(
                layer=index,
                kind=distinct.index(kind),
                input_output_cosine=likeness.cosines[index],
                input_output_angular_distance=likeness.block_distances[0][index],
                skip_kl_nats_per_token=skips[index].mean,
                skip_kl_interval=skips[index].interval,
                skip_reason=skips[index].reason,
                unshareable_reason=reasons[index],
            )
            for index, kind in enumerate(kinds)
        ),
        block_angular_distances=likeness.block_distances,
        cka=likeness.cka,
        cka_reason=likeness.cka_reason,
        groups=tuple(
            TiedGroup(group, tie.mean, tie.interval, tie.reason) for group, tie in zip(groups, ties, strict=True)
        ),
        notes=tuple(notes),
    )


def affordable_tokens(model: PreTrainedModel, changes: int) -> int:
    """Return on how many tokens so many changes can be measured: a multiple of 128 between the fewest and the most."""
    tokens = int(DAMAGE_FLOPS.get(model.device.type, ACCELERATOR_FLOPS) // (changes * _flops_a_token(model)))
    return min(MOST_TOKENS, max(FEWEST_TOKENS, tokens // WINDOW_TOKENS * WINDOW_TOKENS))


def _flops_a_token(model: PreTrainedModel) -> int:
    """Return about what one change costs a token: half the layers, on average, and the head."""
    config = model.config.get_text_config(decoder=True)
    body = sum(parameter.numel() for parameter in decoder_layers(model)[1].parameters())
    return int(body + 2 * config.vocab_size * config.hidden_size)


def _drop_costly(model: PreTrainedModel, groups: dict[int, list[tuple[int, ...]]]) -> list[str]:
    """Leave out the largest groups while all changes on the fewest tokens cost too much; return notes on that."""
    notes = []
    layers = len(decoder_layers(model)[1])
    budget = DAMAGE_FLOPS.get(model.device.type, ACCELERATOR_FLOPS)
    while len(groups) > 1:
        changes = layers + sum(len(found) for found in groups.values())
        if changes * _flops_a_token(model) * FEWEST_TOKENS <= budget:
            break
        size = max(groups)
        notes.append(f"groups of {size} layers were not tied: a model of this size takes too long on this device")
        del groups[size]
    return notes


def _adjacent(kinds: Sequence[str], reasons: Sequence[str | None], size: int) -> list[tuple[int, ...]]:
    """Return the runs of ``size`` adjacent layers that can share weights."""
    runs = (tuple(range(first, first + size)) for first in range(len(kinds) - size + 1))
    return [
        run for run in runs if len({kinds[index] for index in run}) == 1 and not any(reasons[index] for index in run)
    ]


def _evenly(windows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return evenly spaced windows of at most so many tokens together, at least one."""
    count = min(windows.shape[0], max(1, tokens // windows.shape[1]))
    return windows[torch.arange(count, device=windows.device) * windows.shape[0] // count]


# --- damage ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Damage:
    mean: float | None
    interval: Interval | None
    reason: str | None


def _damage(values: np.ndarray, windows: int) -> _Damage:
    """Return the mean over tokens and its interval over blocks of text."""
    if not np.isfinite(values).all():
        return _Damage(None, None, "the changed model's logits are not finite, or rule out what the original does not")
    parts = max(1, values.size // windows // BLOCK_TOKENS)
    blocks = [block for row in values.reshape(windows, -1) for block in np.array_split(row, parts)]
    mean, interval = block_interval([math.fsum(block) for block in blocks], [block.size for block in blocks])
    return _Damage(mean, None if interval is None else (max(0.0, interval[0]), interval[1]), None)


# --- likeness -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Likeness:
    tokens: int
    cka_tokens: int
    cosines: tuple[float | None, ...]
    block_distances: tuple[tuple[float | None, ...], ...]
    cka: tuple[tuple[float, ...], ...]
    cka_reason: str | None


def _likeness(model: PreTrainedModel, windows: torch.Tensor) -> _Likeness:
    states = hidden_states(model, windows)
    found = angles(states)
    layers = len(states) - 1
    # The first token of a text is where massive activations sit: a hundred times the norm of all others, it alone would
    # decide CKA, which would be 1 between any two layers that have it.
    later = torch.ones(windows.shape, dtype=torch.bool)
    later[:, 0] = False
    places = later.flatten().nonzero()[:, 0]
    cka = linear_cka([each[places.to(each.device)] for each in states[1:]])
    known = bool(torch.isfinite(cka).all())
    return _Likeness(
        tokens=windows.numel(),
        cka_tokens=cka_tokens(layers, places.numel()),
        cosines=tuple(_finite(value) for value in torch.diagonal(found.cosine, 1).tolist()),
        block_distances=tuple(
            tuple(_finite(value) for value in torch.diagonal(found.distance, size).tolist())
            for size in range(1, layers + 1)
        ),
        cka=tuple(tuple(row) for row in cka.tolist()) if known else (),
        cka_reason=None if known else "a layer returns the same state, or one that is not finite, for all tokens",
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


PROFILER = Profiler(
    name="redundancy",
    title="Redundancy of layers",
    run=run,
    result_type=RedundancyResult,
    default=False,
    paper="Men et al. 2024, ShortGPT; Gromov et al. 2024; Kornblith et al. 2019",
)
