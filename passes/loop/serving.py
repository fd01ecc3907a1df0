"""What depth-wise batching gains on this device: the same prompts, served in four ways, in turn.

::

    one by one        model.generate for each prompt when it has arrived and the one before is done
    static batch      waits for the last prompt, then one padded batch through model.generate
    token by token    ordinary continuous batching: a prompt joins when the others begin a token   (join=token)
    depth-batched     a prompt joins when the others come to its block                             (join=block)

Every way is a real run on the clock, its waiting for arrivals included. A round runs all four; gains are ratios within
a round. Whether every way gave the same tokens is said; in 16 bits near ties may go either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from passes.loop.depth_batched import DepthBatchedDecoder
from profilers.device import synchronize
from profilers.intervals import Interval, median_interval
from profilers.phases import context_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 8
GAP_STEPS = 1.4
"""Steps of one sequence between two arrivals: no whole number, so that prompts arrive in mid-token."""
FEWEST_ROUNDS, MOST_ROUNDS = 6, 20
ROUND_SECONDS, LIMIT_SECONDS = 20.0, 60.0
WAYS = ("one by one", "static batch", "token by token", "depth-batched")
OURS = WAYS[-1]

Run = tuple[list[tuple[int, ...]], list[float]]
"""Tokens of each prompt, and seconds from its arrival to its last token."""


@dataclass(frozen=True)
class Gain:
    """One way beside depth-wise batching.

    Attributes
    ----------
    way : str
    total_seconds, latency_seconds : float
        Medians over the rounds: until all prompts are answered, and mean over prompts from arrival to the last token.
    total_gain, latency_gain : float
        Median over the rounds of this way's time / that of depth-wise batching: above 1, the latter is faster.
    total_interval, latency_interval : tuple of float or None
        At 95 %; None with too few rounds.
    same_tokens : bool
        Whether every round gave the tokens that depth-wise batching gave.
    """

    way: str
    total_seconds: float
    latency_seconds: float
    total_gain: float
    total_interval: Interval | None
    latency_gain: float
    latency_interval: Interval | None
    same_tokens: bool


@dataclass(frozen=True)
class Serving:
    """All ways, and what was served.

    Attributes
    ----------
    sequences, prompt_tokens, new_tokens : int
    arrivals_seconds : tuple of float
    rounds : int
    gains : tuple of Gain
        Of every way, the last depth-wise batching itself.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    arrivals_seconds: tuple[float, ...]
    rounds: int
    gains: tuple[Gain, ...]


def measure(
    model: PreTrainedModel,
    *,
    sequences: int = SEQUENCES,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    gap_steps: float = GAP_STEPS,
    seed: int = 0,
    seconds: tuple[float, float] = (ROUND_SECONDS, LIMIT_SECONDS),
) -> Serving:
    """Serve random prompts that arrive one after another, in every way.

    Parameters
    ----------
    model : PreTrainedModel
        Looped, in evaluation mode.
    sequences, prompt_tokens, new_tokens : int
        Prompts, tokens in each, and tokens of each answer.
    gap_steps : float
        Between two arrivals, in decode steps of one sequence as measured first.
    seed : int
        Of the random token ids.
    seconds : tuple of float
        How long rounds go on, and at most where they are fewer than ``FEWEST_ROUNDS``.

    Raises
    ------
    passes.base.PassError
        If the model cannot be batched over depth, naming what differs.
    """
    deep, wide = DepthBatchedDecoder(model), DepthBatchedDecoder(model, join="token")
    limit = context_limit(model.config)
    if limit is not None:
        prompt_tokens = max(1, min(prompt_tokens, limit - new_tokens))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, vocabulary, (sequences, prompt_tokens), generator=generator).to(model.device)
    one_by_one(model, prompts[:1], new_tokens, [0.0])  # warms up
    started = time.perf_counter()
    one_by_one(model, prompts[:1], new_tokens, [0.0])
    gap = gap_steps * (time.perf_counter() - started) / new_tokens
    arrivals = [number * gap for number in range(sequences)]
    ways: dict[str, Callable[[], Run]] = {
        "one by one": lambda: one_by_one(model, prompts, new_tokens, arrivals),
        "static batch": lambda: static_batch(model, prompts, new_tokens, arrivals),
        "token by token": lambda: continuous(wide, prompts, new_tokens, arrivals),
        OURS: lambda: continuous(deep, prompts, new_tokens, arrivals),
    }
    rounds: list[dict[str, tuple[Run, float]]] = []
    begun = time.perf_counter()
    while len(rounds) <= MOST_ROUNDS:
        order = list(ways)[len(rounds) % len(ways) :] + list(ways)[: len(rounds) % len(ways)]
        rounds.append({name: _timed(ways[name], model.device) for name in order})
        spent = time.perf_counter() - begun
        if spent >= seconds[0 if len(rounds) > FEWEST_ROUNDS else 1]:
            break
    kept = rounds[1:] or rounds  # the first warms up
    return Serving(
        sequences, prompt_tokens, new_tokens, tuple(arrivals), len(kept), tuple(_gain(name, kept) for name in WAYS)
    )


def _timed(run: Callable[[], Run], device: torch.device) -> tuple[Run, float]:
    synchronize(device)
    started = time.perf_counter()
    found = run()
    synchronize(device)
    return found, time.perf_counter() - started


def _gain(name: str, rounds: Sequence[dict[str, tuple[Run, float]]]) -> Gain:
    totals = [(found[name][1], found[OURS][1]) for found in rounds]
    means = [tuple(sum(found[way][0][1]) / len(found[way][0][1]) for way in (name, OURS)) for found in rounds]
    total_gain, total_interval = median_interval([theirs / ours for theirs, ours in totals])
    latency_gain, latency_interval = median_interval([theirs / ours for theirs, ours in means])
    return Gain(
        way=name,
        total_seconds=median_interval([theirs for theirs, _ in totals])[0],
        latency_seconds=median_interval([pair[0] for pair in means])[0],
        total_gain=total_gain,
        total_interval=total_interval,
        latency_gain=latency_gain,
        latency_interval=latency_interval,
        same_tokens=all(found[name][0][0] == found[OURS][0][0] for found in rounds),
    )


def one_by_one(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, arrivals: Sequence[float]) -> Run:
    """Answer each prompt by itself, in the order of arrival."""
    begun, tokens, latencies = time.perf_counter(), [], []
    for prompt, arrival in zip(prompts, arrivals, strict=True):
        _wait(begun, arrival)
        tokens += _generate(model, prompt[None], new_tokens)
        latencies.append(time.perf_counter() - begun - arrival)
    return tokens, latencies


def static_batch(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, arrivals: Sequence[float]) -> Run:
    """Wait for the last prompt, then answer all in one batch."""
    begun = time.perf_counter()
    _wait(begun, max(arrivals))
    tokens = _generate(model, prompts, new_tokens)
    done = time.perf_counter() - begun
    return tokens, [done - arrival for arrival in arrivals]


def continuous(decoder: DepthBatchedDecoder, prompts: torch.Tensor, new_tokens: int, arrivals: Sequence[float]) -> Run:
    """Answer with a decoder that lets prompts join while it runs."""
    served = decoder.generate(list(prompts), new_tokens, arrivals)
    return [item.tokens for item in served], [item.finished_seconds - item.arrived_seconds for item in served]


def _wait(begun: float, until: float) -> None:
    time.sleep(max(0.0, until - (time.perf_counter() - begun)))


def _generate(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int) -> list[tuple[int, ...]]:
    """Return the new tokens of every prompt, the end-of-sequence token included where it came."""
    settings: Any = model.generation_config
    ends = settings.eos_token_id
    stop = frozenset(ends if isinstance(ends, (list, tuple)) else () if ends is None else (ends,))
    padding = settings.pad_token_id if settings.pad_token_id is not None else min(stop, default=0)
    made = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False,
        pad_token_id=padding,
    )  # fmt: skip
    answers = []
    for row in made[:, prompts.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in stop), len(row))
        answers.append(tuple(row[: end + 1]))
    return answers
