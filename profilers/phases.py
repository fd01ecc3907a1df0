"""The two phases of inference as plain calls that work for every architecture, on meta and on real devices.

::

    prefill(model, batch, context) ──> PhaseState (cache, encoder output) ──> decode_step(model, state) ──> PhaseState

Token ids are random with a seed: times, bytes and shapes do not depend on the text, except through routed experts.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from profilers.base import ProfilerError
from profilers.meta import meta_compatible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LIMIT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_CACHE_KEYS = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class PhaseState:
    """What one forward leaves for the next.

    Attributes
    ----------
    cache : object or None
        A ``transformers`` cache; :func:`decode_step` grows it in place. ``None`` if the model keeps none.
    logits : torch.Tensor
        Shape (batch, 1, vocabulary), or (batch, tokens, vocabulary) if the model cannot compute the last alone.
    encoder_outputs : object or None
        Of encoder-decoder models.
    """

    cache: Any
    logits: torch.Tensor
    encoder_outputs: Any = None


def context_limit(config: Any) -> int | None:
    """Return how many positions the model was built for, or ``None`` if its config names no limit."""
    text = config.get_text_config(decoder=True)
    for key in _LIMIT_KEYS:
        limit = getattr(text, key, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def check_batch(batch: int) -> None:
    """Refuse a number of sequences below 1.

    Raises
    ------
    ProfilerError
    """
    if batch < 1:
        raise ProfilerError(f"batch {batch} is not a number of sequences; give 1 or more")


def check_context(config: Any, context: int) -> None:
    """Refuse a context that the model has no positions for.

    Raises
    ------
    ProfilerError
        If ``context`` is not positive or is past :func:`context_limit`.
    """
    limit = context_limit(config)
    if context < 1:
        raise ProfilerError(f"context {context} is not a number of tokens; give 1 or more")
    if limit is not None and context > limit:
        raise ProfilerError(
            f"context {context} is past the model's limit of {limit} positions; give --context {limit} or less"
        )


def decode_history(config: Any, context: int) -> int:
    """Return how many tokens the cache holds before a decode step at ``context``.

    That is ``context``, but one less where the model has no position left for one more token.
    """
    limit = context_limit(config)
    return context - 1 if limit is not None and context >= limit > 1 else context


def generates(model: Any) -> bool:
    """Return whether a model generates: False for one that says so itself (``generates``), an encoder."""
    return bool(getattr(model, "generates", True))


def runtime_of(model: Any) -> str | None:
    """Return what runs a model's layers where that is not torch (``runtime``): only its logits can be seen then."""
    name: str | None = getattr(model, "runtime", None)
    return name


def token_ids(model: PreTrainedModel, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Return token ids of shape (batch, tokens) on the model's device: random, or without values on meta."""
    if model.device.type == "meta":
        return torch.empty(batch, tokens, dtype=torch.long, device="meta")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(model.device)


def prefill(
    model: PreTrainedModel, batch: int, context: int, *, seed: int = 0, input_ids: torch.Tensor | None = None
) -> PhaseState:
    """Process ``context`` tokens of ``batch`` sequences into a fresh cache.

    An encoder-decoder reads ``context`` tokens in the encoder and as many in the decoder. Only the last position's
    logits are computed where the model can do that (``logits_to_keep``), as generation does.

    Parameters
    ----------
    model : PreTrainedModel
    batch, context : int
        Sequences, and tokens in each.
    seed : int
        Of the random token ids.
    input_ids : torch.Tensor or None
        Shape (batch, context), to use instead of random ids.
    """
    ids = token_ids(model, batch, context, seed) if input_ids is None else input_ids
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return _forward(model, inputs)


def decode_step(
    model: PreTrainedModel, state: PhaseState, *, seed: int = 0, input_ids: torch.Tensor | None = None
) -> PhaseState:
    """Process one more token of every sequence. The cache of ``state`` grows in place and is the one returned.

    Parameters
    ----------
    model : PreTrainedModel
    state : PhaseState
        From :func:`prefill` or an earlier step.
    seed : int
        Of the random token ids.
    input_ids : torch.Tensor or None
        Shape (batch, 1), to use instead of random ids.
    """
    ids = token_ids(model, state.logits.shape[0], 1, seed) if input_ids is None else input_ids
    accepted = _forward_parameters(model.__class__)
    inputs: dict[str, Any] = {key: state.cache for key in _CACHE_KEYS if key in accepted}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "encoder_outputs": state.encoder_outputs}
    else:
        inputs["input_ids"] = ids
    return _forward(model, inputs)


@torch.no_grad()
def forward_without_cache(model: PreTrainedModel, input_ids: torch.Tensor, encoder_ids: torch.Tensor) -> None:
    """Run the model over whole sequences for whoever watches it; no cache is kept and no output returned.

    Parameters
    ----------
    model : PreTrainedModel
    input_ids : torch.Tensor
        Shape (batch, tokens), on any device; what the decoder reads.
    encoder_ids : torch.Tensor
        What the encoder of an encoder-decoder reads; not used otherwise.
    """
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate moves the inputs
    input_ids = input_ids.to(device)
    if model.config.is_encoder_decoder:
        model(input_ids=encoder_ids.to(device), decoder_input_ids=input_ids, use_cache=False)
        return
    head: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in _forward_parameters(model.__class__) else {}
    model(input_ids=input_ids, use_cache=False, **head)


@functools.cache
def _forward_parameters(model_class: type[Any]) -> frozenset[str]:
    """Names that the forward takes; looked up once, since asking costs as much as several ops of a decode step."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def _forward(model: PreTrainedModel, inputs: dict[str, Any]) -> PhaseState:
    if "logits_to_keep" in _forward_parameters(model.__class__):
        inputs["logits_to_keep"] = 1
    with torch.inference_mode(), meta_compatible() if model.device.type == "meta" else contextlib.nullcontext():
        output = model(**inputs, use_cache=True, return_dict=True)
    caches = [getattr(output, key) for key in _CACHE_KEYS if getattr(output, key, None) is not None]
    encoder_outputs = inputs.get("encoder_outputs")
    if encoder_outputs is None and model.config.is_encoder_decoder:
        from transformers.modeling_outputs import BaseModelOutput

        encoder_outputs = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
    return PhaseState(caches[0] if caches else None, output.logits, encoder_outputs)
