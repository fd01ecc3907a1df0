"""How much of a model is left after it was changed: perplexity, divergence from the original, agreement.

::

    original ── record_reference ──> Reference (hidden states + head) ── original dropped ──┐
    changed  ── measure_quality(changed, windows, reference) ───────────────────────────────┴──> QualityResult

Per predicted token (positions 2 to T of each window, each window on its own), in nats, from a log-softmax in float32
(float64 for float64 logits)::

    NLL = -log q(token)                  perplexity = exp(mean NLL)
    KL(p || q) = sum_v p(v) * (log p(v) - log q(v))      p: original, q: changed
    agreement: argmax p = argmax q

Logits exist for some positions at a time only, so memory does not grow with tokens x vocabulary. The two models are
never in memory together. Intervals are Student's t over blocks of text (:mod:`profilers.intervals`); a block is a
window, or part of one where there are few windows.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from profilers.base import ProfilerError, Progress, SilentProgress
from profilers.intervals import CONFIDENCE, Interval, block_interval, wilson
from profilers.phases import runtime_of
from profilers.reference import (
    LOGITS_AT_ONCE,
    Reference,
    batch_size,
    check_windows,
    checked_head,
    final_states,
    log_probabilities,
    positions_at_once,
    record_reference,
)
from profilers.tasks import TaskComparison

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Divergence",
    "LogitDifference",
    "Perplexity",
    "QualityResult",
    "Reference",
    "TaskComparison",
    "compare_logits",
    "measure_quality",
    "record_reference",
]

BLOCKS = 16
"""Blocks that an interval is over, at least, where the text allows: windows are divided if there are fewer."""

BLOCK_TOKENS = 32
"""A window is divided into blocks of no fewer predicted tokens than this."""

BOOTSTRAP_REPEATS = 400
"""Resamples of blocks for the interval of a percentile, which has no closed form."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of the changed model, and of the original on the same text.

    Attributes
    ----------
    before : float or None
        Of the original; None without a reference.
    after : float
    interval, before_interval : tuple of float or None
        None where the text gives fewer than two blocks.
    ratio, ratio_interval : float, tuple of float, or None
        ``after / before``, paired by block: the text's own difficulty cancels, so this interval is the narrow one.
    """

    before: float | None
    after: float
    interval: Interval | None
    before_interval: Interval | None
    ratio: float | None
    ratio_interval: Interval | None


@dataclass(frozen=True)
class Divergence:
    """KL(original || changed) a token, in nats: mean and 99th percentile over all tokens, with their intervals."""

    mean: float
    p99: float
    interval: Interval | None
    p99_interval: Interval | None = None


@dataclass(frozen=True)
class QualityResult:
    """Quality of a model on a text, and against the original where there is a reference.

    Attributes
    ----------
    perplexity : Perplexity
    kl : Divergence or None
    top1_agreement : float or None
        Share of tokens for which both models rank the same token first.
    top1_interval : tuple of float or None
        Over blocks, and never narrower than Wilson's interval for as many independent tokens.
    tokens : int
        Predicted tokens.
    blocks : int
        That intervals are over.
    interval_reason : str or None
        Why there is no interval.
    context : int
        Tokens of a window.
    text : str
    confidence : float
    tasks : tuple of TaskComparison
    """

    perplexity: Perplexity
    kl: Divergence | None
    top1_agreement: float | None
    top1_interval: Interval | None
    tokens: int
    blocks: int
    context: int
    text: str
    confidence: float = CONFIDENCE
    interval_reason: str | None = None
    tasks: tuple[TaskComparison, ...] = ()


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits are apart over the same tokens.

    Attributes
    ----------
    tokens : int
        Positions compared.
    relative_error : float
        ||model - reference|| / ||reference||, over all logits.
    max_absolute_error : float
    top1_agreement : float
    """

    tokens: int
    relative_error: float
    max_absolute_error: float
    top1_agreement: float


def measure_quality(
    model: PreTrainedModel,
    windows: torch.Tensor,
    reference: Reference | None = None,
    *,
    text_name: str,
    progress: Progress | None = None,
) -> QualityResult:
    """Measure a model's quality on windows of text.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder, in evaluation mode; its linear layers may be of any kind.
    windows : torch.Tensor
        Token ids, shape (n, T); windows should not overlap.
    reference : Reference or None
        Of the original on the same windows.
    text_name : str
        What the text is, for reports.
    progress : Progress or None

    Returns
    -------
    QualityResult

    Raises
    ------
    NotApplicableError
        For an encoder-decoder, or a head that reads more than the final hidden states (not of a model that another
        runtime runs: its logits are all that is read).
    ProfilerError
        For windows that the model cannot read or that are not the reference's, another vocabulary than the
        reference's, or log-probabilities that are not finite.
    """
    shape = (windows.shape[0], windows.shape[1] - 1) if windows.dim() == 2 else (0, 0)
    after, before, divergence = (np.zeros(shape) for _ in range(3))
    agrees = np.zeros(shape, dtype=bool)
    for window, start, stop, logits, original in _logits(model, windows, reference, windows.shape[-1] - 1, progress):
        place = (window, slice(start, stop))
        targets = windows[window, start + 1 : stop + 1].to(logits.device)
        own = log_probabilities(logits)
        after[place] = _negative_log_likelihood(own, targets)
        if original is not None:
            theirs = log_probabilities(original)
            before[place] = _negative_log_likelihood(theirs, targets)
            divergence[place] = _divergence(theirs, own)
            agrees[place] = (logits.argmax(dim=-1) == original.argmax(dim=-1)).cpu().numpy()
    _check_finite("model's log-probabilities", after)
    _check_finite("reference's log-probabilities", before)
    _check_finite("divergence from the reference", divergence)
    blocks = _Blocks(*shape)
    mean, interval = blocks.mean(after)
    perplexity = Perplexity(None, _exp(mean), _exp_interval(interval), None, None, None)
    kl = agreement = agreement_interval = None
    if reference is not None:
        mean_before, interval_before = blocks.mean(before)
        difference, difference_interval = blocks.mean(after - before)
        perplexity = Perplexity(
            before=_exp(mean_before),
            after=_exp(mean),
            interval=_exp_interval(interval),
            before_interval=_exp_interval(interval_before),
            ratio=_exp(difference),
            ratio_interval=_exp_interval(difference_interval),
        )
        mean_kl, interval_kl = blocks.mean(divergence)
        kl = Divergence(
            mean=mean_kl,
            p99=float(np.quantile(divergence, 0.99)),
            interval=None if interval_kl is None else (max(0.0, interval_kl[0]), interval_kl[1]),
            p99_interval=blocks.bootstrap_quantile(divergence, 0.99),
        )
        agreement, over_blocks = blocks.mean(agrees.astype(float))
        over_tokens = wilson(int(agrees.sum()), agrees.size)
        if over_blocks is not None:
            agreement_interval = (
                max(0.0, min(over_blocks[0], over_tokens[0])),
                min(1.0, max(over_blocks[1], over_tokens[1])),
            )
    return QualityResult(
        perplexity=perplexity,
        kl=kl,
        top1_agreement=agreement,
        top1_interval=agreement_interval,
        tokens=after.size,
        blocks=blocks.count,
        context=windows.shape[1],
        text=text_name,
        interval_reason=None if blocks.count > 1 else "one block of text says nothing about spread; give more text",
    )


def compare_logits(
    model: PreTrainedModel, windows: torch.Tensor, reference: Reference, *, progress: Progress | None = None
) -> LogitDifference:
    """Compare a model's logits with the reference's, over every position of the windows.

    Parameters
    ----------
    model : PreTrainedModel
    windows : torch.Tensor
        Token ids, shape (n, T).
    reference : Reference
        Of the same windows.
    progress : Progress or None

    Raises
    ------
    NotApplicableError, ProfilerError
        As :func:`measure_quality`.
    """
    error = norm = largest = 0.0
    agreeing = tokens = 0
    for _, _, _, logits, original in _logits(model, windows, reference, windows.shape[-1], progress):
        assert original is not None
        own, theirs = logits.double(), original.double()
        difference = own - theirs
        error += difference.square().sum().item()
        norm += theirs.square().sum().item()
        largest = max(largest, difference.abs().max().item())
        agreeing += int((logits.argmax(dim=-1) == original.argmax(dim=-1)).sum())
        tokens += logits.shape[0]
    if not math.isfinite(error + norm + largest):
        raise ProfilerError("logits are not finite, so they cannot be compared; try --dtype float32")
    return LogitDifference(tokens, math.sqrt(error / norm), largest, agreeing / tokens)


def _logits(
    model: PreTrainedModel,
    windows: torch.Tensor,
    reference: Reference | None,
    positions: int,
    progress: Progress | None,
) -> Iterator[tuple[int, int, int, torch.Tensor, torch.Tensor | None]]:
    """Yield window, first and last position, and both models' logits there, of the first ``positions`` of each."""
    check_windows(model, windows)
    if reference is not None and not torch.equal(reference.windows, windows.cpu()):
        raise ProfilerError("the reference was recorded on other windows; record it again on these")
    found = _by_states(model, windows, positions) if runtime_of(model) is None else _by_steps(model, windows, positions)
    with (progress or SilentProgress()).task("Quality", total=windows.shape[0]) as task:
        for window, start, stop, logits in found:
            original = None
            if reference is not None:
                original = reference.logits(window, start, stop).to(logits.device)
                if original.shape != logits.shape:
                    raise ProfilerError(
                        f"the model gives {logits.shape[-1]} logits and the reference {original.shape[-1]}; "
                        "they can only be compared over one vocabulary"
                    )
            yield window, start, stop, logits, original
            if stop == positions:
                task.advance()


def _by_states(
    model: PreTrainedModel, windows: torch.Tensor, positions: int
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Yield window, first and last position, and logits there: the head on some of the final states at a time."""
    head = checked_head(model, windows)
    step = positions_at_once(head)
    numbers = itertools.count()
    for batch in torch.split(windows, batch_size(windows)):
        for states, window in zip(final_states(model, batch), numbers, strict=False):
            for start in range(0, positions, step):
                stop = min(start + step, positions)
                yield window, start, stop, head.logits(states[start:stop])


def _by_steps(
    model: PreTrainedModel, windows: torch.Tensor, positions: int
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Yield the same of a model whose states cannot be seen: some tokens at a time, after a cache of those before."""
    step = max(1, LOGITS_AT_ONCE // model.config.get_text_config(decoder=True).vocab_size)
    for window, ids in enumerate(windows.to(model.device)):
        cache = None
        for start in range(0, positions, step):
            stop = min(start + step, positions)
            with torch.inference_mode():
                found = model(input_ids=ids[None, start:stop], past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            yield window, start, stop, found.logits[0]


def _negative_log_likelihood(log_probabilities: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    found: np.ndarray = -log_probabilities.gather(-1, targets[:, None])[:, 0].double().cpu().numpy()
    return found


def _divergence(theirs: torch.Tensor, own: torch.Tensor) -> np.ndarray:
    """Return KL(theirs || own) by position. A token of probability 0 adds nothing, whatever ``own`` says of it."""
    p = theirs.exp()
    terms = (theirs - own).mul_(p)
    kl = torch.where(p > 0, terms, terms.new_zeros(())).sum(dim=-1)
    found: np.ndarray = kl.double().clamp_min(0.0).cpu().numpy()  # rounding alone can make it negative
    return found


def _check_finite(what: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        window, position = np.argwhere(~np.isfinite(values))[0]
        raise ProfilerError(
            f"the {what} are not finite at window {window + 1}, token {position + 2}: the weights or activations "
            "overflow; try --dtype float32"
        )


class _Blocks:
    """Windows, or equal parts of them, that intervals are over."""

    def __init__(self, windows: int, predicted: int) -> None:
        parts = max(1, min(math.ceil(BLOCKS / windows), predicted // BLOCK_TOKENS))
        edges = [round(predicted * part / parts) for part in range(parts + 1)]
        self._slices = [
            (window, slice(low, high))
            for window in range(windows)
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]
        self.count = len(self._slices)

    def mean(self, values: np.ndarray) -> tuple[float, Interval | None]:
        blocks = [values[place] for place in self._slices]
        return block_interval([math.fsum(block) for block in blocks], [block.size for block in blocks])

    def bootstrap_quantile(self, values: np.ndarray, quantile: float) -> Interval | None:
        """Return the percentile interval of a quantile over resampled blocks; seeded, so it repeats."""
        if self.count < 2:
            return None
        blocks = [values[place] for place in self._slices]
        generator = np.random.default_rng(0)
        found = [
            np.quantile(np.concatenate([blocks[i] for i in generator.integers(self.count, size=self.count)]), quantile)
            for _ in range(BOOTSTRAP_REPEATS)
        ]
        low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


def _exp(value: float) -> float:
    """Return e^value, at most the largest float: a broken model's interval may end beyond it."""
    return math.exp(min(value, math.log(sys.float_info.max)))


def _exp_interval(interval: Interval | None) -> Interval | None:
    return None if interval is None else (_exp(interval[0]), _exp(interval[1]))
