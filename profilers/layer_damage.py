"""What it costs to let layers share their weights, or to skip them: KL divergence from the original, on text.

::

    original ── one forward ──> what each layer returned, kept    final states ──> log p   (kept, or made again)
                                      │
    changed from layer k on ── layers before k return what was kept ──> layers k ... L ──> log q ──> KL(p || q)

The layers before the first changed one give what they gave before, so they are not computed again; that this is exact
is checked on each text, and the whole model is run where it is not. Definitions are those of :mod:`profilers.quality`:
KL in nats a predicted token (positions 2 to T of each window), from a log-softmax in float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from profilers.attention_capture import decoder_layers
from profilers.base import ProfilerError, Progress, SilentProgress
from profilers.layer_exchange import (
    check_layers,
    check_shareable,
    layer_linears,
    layer_output,
    replaced_weights,
    skipping,
    with_weights_of,
)
from profilers.reference import Head, check_windows, checked_head, final_states, log_probabilities, positions_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = Literal["first", "average"]

TOKENS_AT_ONCE = 1024
"""Tokens of which all layers' outputs are kept, unless one window is longer."""
KEPT_LOG_PROBABILITIES = 1 << 26
"""The original's log-probabilities are kept up to this many (256 MiB), and made again for each change above it."""


@dataclass(frozen=True)
class Change:
    """A change to some layers of a model.

    Attributes
    ----------
    first : int
        The first layer that computes something else.
    applied : callable
        Returns a context in which the model is changed.
    """

    first: int
    applied: Callable[[], AbstractContextManager[None]]


def tie_damage(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    groups: Sequence[Sequence[int]],
    *,
    weights: Weights = "average",
    progress: Progress | None = None,
) -> list[float]:
    """Return, for each group of layers, what it costs to run all of them with one set of linear weights.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder in evaluation mode; afterwards it is exactly as it was.
    batches : iterable of torch.Tensor
        Token ids, each of shape (B, T).
    groups : sequence of sequences of int
        Indices of layers, two or more of one kind in each group.
    weights : {"first", "average"}
        The weights that all layers of a group get: those of the first one named, or the mean of all.
    progress : Progress or None

    Returns
    -------
    list of float
        KL(original || changed) in nats a token, mean over tokens. Infinite where the changed model's logits are not
        finite, or where it rules out a token that the original does not.

    Raises
    ------
    NotApplicableError
        For an encoder-decoder, or a head that reads more than the final hidden states.
    ProfilerError
        For groups that cannot share (:func:`profilers.layer_exchange.check_shareable`), for token ids that the model
        cannot read, or where the original's own logits are not finite.
    """
    changes = tie_changes(model, groups, weights)
    return [float(found.mean()) for found in divergences(model, batches, changes, "Tying layers", progress)]


def skip_damage(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    layers: Sequence[int],
    *,
    progress: Progress | None = None,
) -> list[float]:
    """Return what it costs to skip each of ``layers``, one at a time; see :func:`tie_damage`."""
    changes = skip_changes(model, layers)
    return [float(found.mean()) for found in divergences(model, batches, changes, "Skipping layers", progress)]


def tie_changes(model: PreTrainedModel, groups: Sequence[Sequence[int]], weights: Weights) -> list[Change]:
    """Return the change that tying each group is, after checking that the groups can be tied."""
    for group in groups:
        if len(set(group)) < 2:
            raise ProfilerError(f"a group of layers to tie needs two or more different ones, not {tuple(group)}")
    check_shareable(model, groups)
    return [_tie_change(model, tuple(group), weights) for group in groups]


def _tie_change(model: PreTrainedModel, group: tuple[int, ...], weights: Weights) -> Change:
    if weights == "first":
        sources = {index: group[0] for index in group[1:]}
        return Change(min(sources), lambda: with_weights_of(model, sources))
    return Change(min(group), lambda: _averaged(model, group))


@contextlib.contextmanager
def _averaged(model: PreTrainedModel, group: tuple[int, ...]) -> Iterator[None]:
    mean = average_weights(model, group)
    with replaced_weights(model, dict.fromkeys(group, mean)):
        yield


@torch.no_grad()
def average_weights(model: PreTrainedModel, group: Sequence[int]) -> Mapping[str, torch.Tensor]:
    """Return the mean of the layers' weights by name of the linear, summed in float32, in the weights' own dtype."""
    stack = decoder_layers(model)[1]
    members: list[dict[str, Any]] = [dict(layer_linears(stack[index])) for index in group]
    means = {}
    for name, first in members[0].items():
        weight = first.weight
        total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for member in members[1:]:
            total += member[name].weight
        means[name] = total.div_(len(members)).to(weight.dtype)
    return means


def skip_changes(model: PreTrainedModel, layers: Sequence[int]) -> list[Change]:
    """Return the change that skipping each layer is."""
    check_layers(model, layers)
    return [_skip_change(model, index) for index in layers]


def _skip_change(model: PreTrainedModel, index: int) -> Change:
    return Change(index, lambda: skipping(model, (index,)))


def divergences(
    model: PreTrainedModel,
    batches: Iterable[torch.Tensor],
    changes: Sequence[Change],
    description: str,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Return, for each change, KL(original || changed) of every predicted token, in nats, float64.

    Rows of the batches follow one another; a row of T tokens has T - 1 values.
    """
    parts = [part for batch in batches for part in torch.split(batch, max(1, TOKENS_AT_ONCE // batch.shape[1]))]
    if not parts:
        raise ProfilerError("there is no text to measure on; give at least one batch of token ids")
    for part in parts:
        check_windows(model, part)
    head = checked_head(model, parts[0])
    found: list[list[np.ndarray]] = [[] for _ in changes]
    with (progress or SilentProgress()).task(description, total=len(parts) * len(changes)) as task:
        for part in parts:
            original = Original(model, head, part)
            for change, values in zip(changes, found, strict=True):
                with change.applied():
                    values.append(original.divergence(change.first))
                task.advance()
    return [np.concatenate(values) for values in found]


class Original:
    """What a model gives for a batch before it is changed.

    Parameters
    ----------
    model : PreTrainedModel
    head : Head
    ids : torch.Tensor
        Shape (B, T).

    Attributes
    ----------
    outputs : list of Any
        What each layer returned.
    resumable : bool
        Whether the model can start from a layer's output and give the same to the bit.
    """

    def __init__(self, model: PreTrainedModel, head: Head, ids: torch.Tensor) -> None:
        self._model, self._head, self._ids = model, head, ids
        self._stack = decoder_layers(model)[1]
        with recorded_outputs(model) as outputs:
            final = final_states(model, ids)
        self.outputs = outputs
        self._final = _predicting(final)
        self._step = positions_at_once(head)
        self._kept: list[torch.Tensor] | None = None
        if self._final.shape[0] * head.vocabulary_size <= KEPT_LOG_PROBABILITIES:
            self._kept = list(self._log_probabilities())
        self.resumable = len(outputs) == len(self._stack)
        self.resumable = self.resumable and self._resumes(final)

    def divergence(self, first: int) -> np.ndarray:
        """Return KL(original || model as it is now) of every predicted token; layers before ``first`` are unchanged."""
        states = _predicting(self._states_from(first))
        found = []
        for place, theirs in enumerate(self._kept or self._log_probabilities()):
            own = log_probabilities(self._head.logits(states[place * self._step : (place + 1) * self._step]))
            found.append(_divergence(theirs, own))
        return np.concatenate(found)

    def _log_probabilities(self) -> Iterator[torch.Tensor]:
        for states in torch.split(self._final, self._step):
            found = log_probabilities(self._head.logits(states))
            if not bool(torch.isfinite(found.amax(dim=-1)).all()):
                raise ProfilerError("the model's own logits are not finite; try --dtype float32")
            yield found

    def _resumes(self, final: torch.Tensor) -> bool:
        """Return whether starting from the middle gives the final states, to the bit."""
        return torch.equal(self._states_from((len(self._stack) + 1) // 2), final)

    def _states_from(self, first: int) -> torch.Tensor:
        with contextlib.ExitStack() as changes:
            if first > 0 and self.resumable:
                for layer in self._stack[:first]:
                    changes.enter_context(_returning(layer, self.outputs[first - 1]))
            return final_states(self._model, self._ids)


def _predicting(states: torch.Tensor) -> torch.Tensor:
    """Return the states of all positions but the last of each window, one after another."""
    return states[:, :-1].flatten(0, 1)


@contextlib.contextmanager
def recorded_outputs(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Collect a copy of what each decoder layer returns, in the order in which they run."""
    found: list[Any] = []
    handles = []
    try:
        for layer in decoder_layers(model)[1]:
            handles.append(layer.register_forward_hook(lambda _layer, _args, output: found.append(_copied(output))))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _copied(output: Any) -> Any:
    """Copy the hidden states: the model may go on to change its own in place."""
    states = layer_output(output).detach().clone()
    return states if isinstance(output, torch.Tensor) else (states, *output[1:])


@contextlib.contextmanager
def _returning(layer: torch.nn.Module, output: Any) -> Iterator[None]:
    """Let a layer compute nothing and return ``output``."""
    own = layer.__dict__
    before = own.get("forward")
    own["forward"] = lambda *_args, **_kwargs: _copied(output)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _divergence(theirs: torch.Tensor, own: torch.Tensor) -> np.ndarray:
    """Return KL(theirs || own) by position; infinite where ``own`` is not a distribution."""
    kl = F.kl_div(own, theirs, log_target=True, reduction="none").sum(dim=-1)
    if not bool(torch.isfinite(kl).all()):  # a token of probability 0 adds nothing, whatever ``own`` says of it
        p = theirs.exp()
        kl = torch.where(p > 0, p * (theirs - own), 0.0).sum(dim=-1)
    # Rounding alone can make it negative.
    found: np.ndarray = kl.double().clamp_min(0.0).nan_to_num(nan=math.inf, posinf=math.inf).cpu().numpy()
    return found
