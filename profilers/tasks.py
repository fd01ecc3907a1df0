"""Multiple-choice and cloze tasks from a JSONL file, scored by log-likelihood as lm-evaluation-harness does.

One JSON object a line, all of one kind; other keys are ignored::

    {"query": "Question: ... Answer:", "choices": ["yes", "no"], "gold": 0}      multiple choice
    {"context": "... the capital is", "continuation": "Paris"}                   cloze

A continuation (each choice, after a space) is scored by the sum of the log-probabilities of its tokens after the
context. ``acc``: the gold choice has the largest sum; ``acc_norm``, ``acc_bytes``: the largest sum a character, a
UTF-8 byte of the choice. Cloze ``acc``: greedy decoding would give the continuation.

Context and continuation are tokenized together and parted at the length of the context's own tokens, after trailing
spaces of the context have been moved to the continuation, so that tokens across the seam are those of running text.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from profilers.base import ProfilerError, Progress, SilentProgress
from profilers.intervals import Interval, paired_difference, wilson

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from profilers.reference import Head

MULTIPLE_CHOICE, CLOZE = "multiple-choice", "cloze"

SAMPLES = 500
"""Samples of a task that are scored unless told otherwise: enough for an interval of about 4 points each way."""

BATCH_TOKENS = 4_096
"""Tokens in one forward, padding included, unless a single request is longer."""


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes
    ----------
    line : int
        In the file, from 1.
    context : str
    continuations : tuple of str
        The choices, or the one continuation of a cloze sample; without the space before it.
    gold : int
        Index of the right one.
    """

    line: int
    context: str
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Samples of one kind.

    Attributes
    ----------
    name : str
        The file's, without suffix.
    kind : str
        ``multiple-choice`` or ``cloze``.
    samples : tuple of Sample
    available : int
        Samples in the file; more than there are here if they were limited.
    """

    name: str
    kind: str
    samples: tuple[Sample, ...]
    available: int


@dataclass(frozen=True)
class TaskResult:
    """Which samples a model got right; plain values, so it can be kept as JSON.

    Attributes
    ----------
    name, kind : str
    available : int
        Samples in the file.
    fingerprint : str
        sha256 over the samples: only results on the same ones can be compared.
    correct : dict
        By metric (``acc``, ``acc_norm``, ``acc_bytes``), a flag for each sample.
    """

    name: str
    kind: str
    available: int
    fingerprint: str
    correct: dict[str, tuple[bool, ...]]


@dataclass(frozen=True)
class TaskComparison:
    """One metric of one task, before and after.

    Attributes
    ----------
    name : str
    kind : str
        ``multiple-choice`` or ``cloze``.
    samples : int
    before : float or None
        Share that the original got right; None without it.
    after : float
    interval : tuple of float
        Of ``after``, Wilson's.
    difference : float or None
        ``after - before``.
    difference_interval : tuple of float or None
        Paired by sample.
    metric : str
        As lm-evaluation-harness calls it: ``acc``, ``acc_norm``, ``acc_bytes``.
    available : int or None
        Samples in the file, of which ``samples`` were drawn.
    """

    name: str
    kind: str
    samples: int
    before: float | None
    after: float
    interval: Interval
    difference: float | None
    difference_interval: Interval | None
    metric: str = "acc"
    available: int | None = None


# --- reading --------------------------------------------------------------------------------------------------------


def read_task(path: Path, *, limit: int | None = SAMPLES, seed: int = 0) -> Task:
    """Read a task from a JSONL file.

    Parameters
    ----------
    path : Path
    limit : int or None
        Keep this many samples at most, drawn by ``seed``, in the order of the file; None keeps all.
    seed : int

    Raises
    ------
    ProfilerError
        If the file cannot be read or holds no sample, or a line is not one; the message has the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ProfilerError(f"no task file at '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProfilerError(f"cannot read task file '{path}': {error}") from None
    parsed = [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not parsed:
        raise ProfilerError(f"task file '{path}' holds no sample; give one JSON object a line")
    kind = parsed[0][0]
    for other, sample in parsed:
        if other != kind:
            raise ProfilerError(
                f"'{path}' line {sample.line} is a {other} sample among {kind} ones; keep one kind in a file"
            )
    samples = [sample for _, sample in parsed]
    if limit is not None and limit < len(samples):
        samples = [samples[index] for index in sorted(random.Random(seed).sample(range(len(samples)), limit))]
    return Task(path.stem, kind, tuple(samples), len(parsed))


def _parse(path: Path, number: int, line: str) -> tuple[str, Sample]:
    where = f"'{path}' line {number}"
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ProfilerError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    keys = set(data) if isinstance(data, dict) else set()
    if keys >= {"query", "choices", "gold"}:
        choices, gold = data["choices"], data["gold"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise ProfilerError(f"{where}: 'choices' is not a list of two or more")
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            raise ProfilerError(
                f"{where}: 'gold' is {gold!r}, not the index of one of {len(choices)} choices (0 first)"
            )
        kind, context = MULTIPLE_CHOICE, data["query"]
    elif keys >= {"context", "continuation"}:
        kind, context, choices, gold = CLOZE, data["context"], [data["continuation"]], 0
    else:
        found = ", ".join(sorted(map(str, keys))) or type(data).__name__
        raise ProfilerError(f"{where} has {found}; needed are query, choices and gold, or context and continuation")
    if not isinstance(context, str) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ProfilerError(f"{where}: the context and every continuation are texts, and no continuation is empty")
    return kind, Sample(number, context, tuple(choices), gold)


# --- scoring --------------------------------------------------------------------------------------------------------


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Task,
    *,
    progress: Progress | None = None,
) -> TaskResult:
    """Score every sample of a task.

    Memory does not grow with the number of samples: requests go through the model some thousand tokens at a time, and
    logits are computed for the continuations' tokens only.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder, in evaluation mode.
    tokenizer : PreTrainedTokenizerBase or None
    task : Task
    progress : Progress or None

    Raises
    ------
    NotApplicableError
        For an encoder-decoder.
    ProfilerError
        Without a tokenizer, for a continuation that is longer than the model's context, or logits that are not finite.
    """
    if tokenizer is None:
        raise ProfilerError(f"task '{task.name}' needs a tokenizer and the model has none; leave the task out")
    requests = _requests(model, tokenizer, task)
    scores = iter(_log_likelihoods(model, requests, task.name, progress or SilentProgress()))
    correct: dict[str, list[bool]] = {}
    for sample in task.samples:
        found = [next(scores) for _ in sample.continuations]
        for metric, right in _metrics(task.kind, sample, found).items():
            correct.setdefault(metric, []).append(right)
    text = json.dumps([(s.context, s.continuations, s.gold) for s in task.samples])
    return TaskResult(
        name=task.name,
        kind=task.kind,
        available=task.available,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        correct={metric: tuple(flags) for metric, flags in correct.items()},
    )


def _metrics(kind: str, sample: Sample, scores: Sequence[tuple[float, bool]]) -> dict[str, bool]:
    if kind == CLOZE:
        return {"acc": scores[0][1]}
    sums = [total for total, _ in scores]
    sizes = {
        "acc": [1] * len(sums),
        "acc_norm": [len(choice) for choice in sample.continuations],
        "acc_bytes": [len(choice.encode()) for choice in sample.continuations],
    }
    return {metric: _largest(sums, divisors) == sample.gold for metric, divisors in sizes.items()}


def _largest(sums: Sequence[float], divisors: Sequence[int]) -> int:
    """Return the index of the largest quotient, the first of equal ones."""
    return max(range(len(sums)), key=lambda index: sums[index] / divisors[index])


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of its continuation, as lm-evaluation-harness parts them.

    A space goes between the two unless the continuation starts with one. The context starts with a BOS token where the
    tokenizer adds one by itself; an empty context is one BOS (or EOS) token.
    """
    from profilers.text import adds_bos

    if not continuation[:1].isspace():
        continuation = " " + continuation
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    if not context:
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return ([] if prefix is None else [prefix]), _encode(tokenizer, continuation)
    before = _encode(tokenizer, context)
    return start + before, _encode(tokenizer, context + continuation)[len(before) :]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _requests(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> list[tuple[list[int], list[int]]]:
    """Return, for each continuation, the tokens that the model reads and those that it is to predict last."""
    from profilers.phases import context_limit

    limit = context_limit(model.config)
    requests = []
    for sample in task.samples:
        for text in sample.continuations:
            context, continuation = encode_pair(tokenizer, sample.context, text)
            where = f"task '{task.name}' line {sample.line}"
            if not continuation:
                raise ProfilerError(f"{where}: a continuation has no token of its own after the context")
            if not context:
                raise ProfilerError(
                    f"{where}: the context is empty and the tokenizer has no BOS or EOS to stand for it"
                )
            if limit is not None and len(continuation) > limit:
                raise ProfilerError(
                    f"{where}: a continuation of {len(continuation)} tokens is past the model's {limit} positions"
                )
            # The last token is predicted and never read; what does not fit is cut off the start of the context.
            ids = (context + continuation)[-(limit + 1) if limit is not None else 0 :]
            requests.append((ids[:-1], continuation))
    return requests


def _log_likelihoods(
    model: PreTrainedModel, requests: Sequence[tuple[list[int], list[int]]], name: str, progress: Progress
) -> list[tuple[float, bool]]:
    """Return, for each request, the log-likelihood of the continuation, and whether greedy decoding gives it."""
    import torch

    from profilers.reference import checked_head, final_states

    order = sorted(range(len(requests)), key=lambda index: -len(requests[index][0]))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    head = checked_head(model, torch.tensor([requests[order[0]][0]]))
    with progress.task(f"Task {name}", total=len(requests)) as line:
        while order:
            longest = len(requests[order[0]][0])
            size = max(1, BATCH_TOKENS // longest)
            batch, order = order[:size], order[size:]
            # Padding on the right is never seen by a token before it.
            ids = torch.tensor([requests[i][0] + [0] * (longest - len(requests[i][0])) for i in batch])
            states = final_states(model, ids)
            counts = [len(requests[i][1]) for i in batch]
            ends = [len(requests[i][0]) for i in batch]
            predicting = torch.cat(
                [states[row, end - count : end] for row, (end, count) in enumerate(zip(ends, counts, strict=True))]
            )
            targets = torch.tensor([token for i in batch for token in requests[i][1]])
            likelihoods, greedy = _score_tokens(head, predicting, targets)
            for index, part, hits in zip(
                batch, torch.split(likelihoods, counts), torch.split(greedy, counts), strict=True
            ):
                results[index] = (part.sum().item(), bool(hits.all()))
            line.advance(len(batch))
    if not all(math.isfinite(total) for total, _ in results):
        raise ProfilerError(f"task '{name}': log-probabilities are not finite; try --dtype float32")
    return results


def _score_tokens(head: Head, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability (float64) and rank-first flag of each target, some positions at a time."""
    import torch

    from profilers.reference import log_probabilities, positions_at_once

    likelihoods, greedy = [], []
    for part, wanted in zip(*(torch.split(item, positions_at_once(head)) for item in (states, targets)), strict=True):
        logits = head.logits(part)
        wanted = wanted.to(logits.device)
        likelihoods.append(log_probabilities(logits).gather(-1, wanted[:, None])[:, 0].double().cpu())
        greedy.append((logits.argmax(dim=-1) == wanted).cpu())
    return torch.cat(likelihoods), torch.cat(greedy)


# --- comparing ------------------------------------------------------------------------------------------------------


def compare(after: TaskResult, before: TaskResult | None = None) -> tuple[TaskComparison, ...]:
    """Return one comparison a metric.

    Parameters
    ----------
    after : TaskResult
    before : TaskResult or None
        Of the original, on the same samples.

    Raises
    ------
    ProfilerError
        If the two were not scored on the same samples.
    """
    if before is not None and before.fingerprint != after.fingerprint:
        raise ProfilerError(f"task '{after.name}' was scored on other samples before; score both models again")
    comparisons = []
    for metric, flags in after.correct.items():
        right, samples = sum(flags), len(flags)
        share_before = difference = interval = None
        if before is not None:
            pairs = list(zip(before.correct[metric], flags, strict=True))
            gained = sum(not was and now for was, now in pairs)
            lost = sum(was and not now for was, now in pairs)
            share_before = sum(was for was, _ in pairs) / samples
            difference, interval = (gained - lost) / samples, paired_difference(gained, lost, samples)
        comparisons.append(
            TaskComparison(
                name=after.name,
                kind=after.kind,
                samples=samples,
                before=share_before,
                after=right / samples,
                interval=wilson(right, samples),
                difference=difference,
                difference_interval=interval,
                metric=metric,
                available=after.available,
            )
        )
    return tuple(comparisons)
