"""How alike the hidden states are before and after each layer: cosine, angular distance, CKA.

::

    h_0 ── layer 0 ──> h_1 ── layer 1 ──> h_2 ... h_L        each T tokens x D

    angular distance of n layers from l on     mean over tokens of arccos(cos(h_l, h_{l+n})) / pi
    linear CKA of two layers' outputs X, Y     <K, K'> / (|K| |K'|),  K = Xc Xc', the T x T matrix of dot products of
                                               states from which their mean over tokens is taken (Xc)

References: Men et al. 2024, ShortGPT (cosine of a layer's input and output); Gromov et al. 2024, The Unreasonable
Ineffectiveness of the Deeper Layers (angular distance of blocks); Kornblith et al. 2019, Similarity of Neural Network
Representations Revisited (linear CKA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from profilers.attention_capture import decoder_layers
from profilers.base import NotApplicableError
from profilers.layer_damage import recorded_outputs
from profilers.layer_exchange import layer_input, layer_output
from profilers.reference import final_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_ELEMENTS = 1 << 21
"""Elements of float64 states that are compared at a time."""
GRAM_ELEMENTS = 1 << 25
"""Elements of all layers' T x T matrices together (128 MiB)."""


@dataclass(frozen=True)
class Angles:
    """Cosines and angular distances between hidden states, means over tokens.

    Attributes
    ----------
    cosine : torch.Tensor
        Shape (L + 1, L + 1), float64: between h_i and h_j. NaN where one of them is zero.
    distance : torch.Tensor
        Shape (L + 1, L + 1), float64: arccos(cosine) / pi of each token, averaged; 0 same direction, 1 opposite.
    """

    cosine: torch.Tensor
    distance: torch.Tensor


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return h_0 to h_L for one batch: what the first layer was given and what each layer returned.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder in evaluation mode.
    ids : torch.Tensor
        Shape (B, T).

    Returns
    -------
    list of torch.Tensor
        L + 1 tensors of shape (B * T, D).

    Raises
    ------
    NotApplicableError
        If the layers do not all run once and return states of one shape.
    """
    first: list[torch.Tensor] = []
    stack = decoder_layers(model)[1]

    def keep_input(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first.append(layer_input(args, kwargs).clone())

    handle = stack[0].register_forward_pre_hook(keep_input, with_kwargs=True)
    try:
        with recorded_outputs(model) as outputs:
            final_states(model, ids)
    finally:
        handle.remove()
    states = first + [layer_output(output) for output in outputs]
    if len(states) != len(stack) + 1 or any(found.shape[:-1] != ids.shape for found in states):
        name = type(model).__name__
        raise NotApplicableError(f"the layers of {name} do not each return one state a token, so they have no likeness")
    return [found.flatten(0, 1) for found in states]


def angles(states: Sequence[torch.Tensor]) -> Angles:
    """Return cosines and angular distances between all pairs of hidden states.

    Parameters
    ----------
    states : sequence of torch.Tensor
        Each of shape (T, D).
    """
    tokens, width = states[0].shape
    step = max(1, CHUNK_ELEMENTS // (len(states) * width))
    cosine = torch.zeros(len(states), len(states), dtype=torch.float64)
    distance = torch.zeros_like(cosine)
    for start in range(0, tokens, step):
        chunk = torch.stack([found[start : start + step].cpu().double() for found in states], dim=1)  # (t, L + 1, D)
        unit = chunk / torch.linalg.vector_norm(chunk, dim=-1, keepdim=True)
        cosines = (unit @ unit.mT).clamp(-1.0, 1.0)
        cosine += cosines.sum(dim=0)
        distance += cosines.arccos().sum(dim=0) / math.pi
    return Angles(cosine / tokens, distance / tokens)


def cka_tokens(layers: int, tokens: int) -> int:
    """Return over how many of so many tokens the CKA of so many layers is taken."""
    return min(tokens, max(2, math.isqrt(GRAM_ELEMENTS // layers)))


@torch.no_grad()
def linear_cka(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the linear CKA of every pair.

    Parameters
    ----------
    states : sequence of torch.Tensor
        L tensors of shape (T, D); above :func:`cka_tokens`, evenly spaced tokens stand for all.

    Returns
    -------
    torch.Tensor
        Shape (L, L), float64; NaN for states that are the same at all tokens.
    """
    tokens = states[0].shape[0]
    count = cka_tokens(len(states), tokens)
    chosen = torch.arange(count, device=states[0].device) * tokens // count
    grams = torch.empty(len(states), count * count, device=states[0].device)
    for gram, found in zip(grams, states, strict=True):
        centred = found[chosen.to(found.device)].double()
        centred -= centred.mean(dim=0)
        largest = centred.abs().amax()
        one = (centred / largest).float()  # so that no product overflows
        product = (one @ one.mT).flatten()
        gram.copy_(product / torch.linalg.vector_norm(product, dtype=torch.float64))
    return (grams @ grams.mT).double().cpu()
