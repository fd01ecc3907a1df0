"""What goes with a sink: massive activations, and how far a change of one token spreads.

Both are read from the decoder layers' outputs (the residual stream) in one forward over sequences and copies of them
with one token changed::

    sequences ────────────────┐             ┌──> h   ──> massive activations (Sun et al. 2024)
                              ├── forward ──┤
    one token of each changed ┘             └──> h'  ──> |h' - h| / |h| by layer and position (Barbero et al. 2025)

Defaults and what departs from the papers: ``docs/profilers/sinks.md``.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from profilers.attention_capture import decoder_layers
from profilers.phases import forward_without_cache
from profilers.text import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASSIVE_THRESHOLD = 100.0
"""Least |a| of a massive activation (Sun et al. 2024, section 2)."""

MASSIVE_RATIO = 1_000.0
"""Least |a| over the median |a| of the same hidden state (Sun et al. 2024, section 2)."""


@dataclass(frozen=True)
class MassiveActivation:
    """A hidden-state entry with |a| > 100 and |a| > 1000 x the median."""

    layer: int
    position: int  # 1-based
    token: str
    dimension: int
    value: float
    ratio_to_median: float
    bos: bool


@dataclass(frozen=True)
class PerturbationSpread:
    """How far the representation moves when one token is changed.

    ``relative_change[layer][position]`` is |h' - h| / |h|, averaged over sequences.
    """

    bos: bool
    context: int
    changed_position: int  # 1-based
    sequences: int
    relative_change: tuple[tuple[float, ...], ...]
    mean_by_layer: tuple[float, ...]  # over the positions at and after the changed one


@dataclass(frozen=True)
class Activations:
    """What :func:`measure_activations` reads: every massive activation once, unsorted, and the spread."""

    massive: tuple[MassiveActivation, ...]
    perturbation: PerturbationSpread


def measure_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    stream: TokenStream,
    input_ids: torch.Tensor,
    encoder_ids: torch.Tensor,
    *,
    bos: bool,
    seed: int,
) -> Activations:
    """Run sequences beside copies with one token changed; read both from the decoder layers' outputs.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerBase or None
        Names the tokens; without one they are named by number.
    stream : TokenStream
        Where the token put in comes from.
    input_ids, encoder_ids : torch.Tensor
        Shape (sequences, T); the second is what the encoder of an encoder-decoder reads.
    bos : bool
        Whether the sequences start with a BOS token; copied to the results.
    seed : int
        Of the token put in.
    """
    sequences, length = input_ids.shape
    changed_index = length // 2
    vocabulary_size = model.config.get_text_config(decoder=True).vocab_size
    changed = _change_token(input_ids, changed_index, stream, vocabulary_size, seed)
    massive: dict[tuple[int, int, int, int], MassiveActivation] = {}
    spread: dict[int, list[float]] = {}

    def read(layer: int, hidden: torch.Tensor) -> None:
        before, after = hidden.float().chunk(2)  # (sequences, T, width) each
        tiny = torch.finfo(torch.float32).tiny
        change = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(tiny)
        spread[layer] = change.mean(dim=0).tolist()
        for sequence, state in enumerate(before):
            for position, dimension, value, ratio in _massive_entries(state):
                token = int(input_ids[sequence, position])
                known = massive.get((layer, position, dimension, token))
                if known is None or abs(value) > abs(known.value):
                    massive[layer, position, dimension, token] = MassiveActivation(
                        layer=layer,
                        position=position + 1,
                        token=str(token) if tokenizer is None else tokenizer.decode([token]),
                        dimension=dimension,
                        value=value,
                        ratio_to_median=ratio,
                        bos=bos,
                    )

    with _decoder_outputs(model, read):
        forward_without_cache(model, torch.cat([input_ids, changed]), torch.cat([encoder_ids, encoder_ids]))
    relative_change = tuple(tuple(spread[layer]) for layer in sorted(spread))
    return Activations(
        massive=tuple(massive.values()),
        perturbation=PerturbationSpread(
            bos=bos,
            context=length,
            changed_position=changed_index + 1,
            sequences=sequences,
            relative_change=relative_change,
            mean_by_layer=tuple(statistics.fmean(change[changed_index:]) for change in relative_change),
        ),
    )


def _massive_entries(state: torch.Tensor) -> list[tuple[int, int, float, float]]:
    """List (position, dimension, value, |value| / median) of the massive entries of a hidden state (T, width)."""
    magnitudes = state.abs()
    large = (magnitudes > MASSIVE_THRESHOLD).nonzero().tolist()
    if not large:
        return []
    median = magnitudes.median().item()
    return [
        (position, dimension, state[position, dimension].item(), magnitudes[position, dimension].item() / median)
        for position, dimension in large
        if median > 0 and magnitudes[position, dimension].item() > MASSIVE_RATIO * median
    ]


def _change_token(ids: torch.Tensor, index: int, stream: TokenStream, vocabulary_size: int, seed: int) -> torch.Tensor:
    """Replace the token at ``index`` of each sequence by another token of the text."""
    candidates = torch.unique(stream.ids)
    generator = torch.Generator().manual_seed(seed)
    changed = ids.clone()
    for row in changed:
        others = candidates[candidates != row[index]]
        if others.numel():
            row[index] = others[torch.randint(others.numel(), (1,), generator=generator)].item()
        else:
            row[index] = (row[index] + 1) % vocabulary_size
    return changed


@contextlib.contextmanager
def _decoder_outputs(model: PreTrainedModel, read: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call ``read`` with each decoder layer's index and output hidden states, shape (B, T, width)."""
    handles = []

    def watch(index: int, layer: torch.nn.Module) -> None:
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            read(index, output[0] if isinstance(output, tuple) else output)

        handles.append(layer.register_forward_hook(hook))

    try:
        for index, layer in enumerate(decoder_layers(model)[1]):
            watch(index, layer)
        yield
    finally:
        for handle in handles:
            handle.remove()
