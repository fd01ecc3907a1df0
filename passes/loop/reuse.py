"""Whether a block's weights are moved again in each of its loops, or stay in a cache: measured, never assumed.

::

    copies of a block's linears   one set            layer 3 ─┐             own sets   layer 3 ── copy 0
    (all made alike)                                 layer 4 ─┴─ copy 0                layer 4 ── copy 1

    round after round: a decode step with one set, a decode step with own sets; each linear is timed in both

The code path, the values and the way in which the weights were allocated are the same; only how many sets there are
differs. A ratio of the two times is taken in each round, since the rest of the machine slows both sides of a round down
alike; its median has an interval by order statistics (:func:`profilers.intervals.median_interval`).

What a time says about bytes is a bound: in that time memory delivers ``seconds * bandwidth`` at most, so whatever the
linears read beyond it came from a cache.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from passes.loop.layout import LoopPlan
from passes.loop.modeling_looped import BLOCKS, LoopedLinear
from profilers.device import memory_available_bytes, synchronize
from profilers.intervals import Interval, median_interval
from profilers.op_trace import OpClock
from profilers.peaks import last_level_cache_bytes
from profilers.phases import token_ids
from profilers.timing import check_point, decode_room, first_token, next_token, out_of_memory_as_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sets = Literal["one", "own"]
Verdict = Literal["less", "same", "not known"]

WARM_UP_ROUNDS = 2
FEWEST_ROUNDS, MOST_ROUNDS = 6, 60
ROUND_SECONDS, LIMIT_SECONDS = 9.0, 15.0
"""Rounds go on for ``ROUND_SECONDS``, for fewer than ``FEWEST_ROUNDS`` up to ``LIMIT_SECONDS``."""
LEAST_NOISE = 0.03
"""A ratio of times this close to 1 is none, whatever its interval."""
MEMORY_SHARE = 0.8
"""Of the free memory that the copies may take."""
HIDDEN_BELOW = 0.25
"""Below this share of a time, reading weights from memory explains so little of it that the time says nothing."""


@dataclass(frozen=True)
class Group:
    """Linears of some layers in one decode step, timed with one set of weights a block and with own sets.

    Attributes
    ----------
    name : str
    layers : int
    read_bytes : int
        Weights that these linears read in a step, wherever from.
    one_seconds, own_seconds : float
        Medians over the rounds.
    ratio : float
        Median over the rounds of one set / own sets.
    interval : tuple of float or None
        Of the ratio, at 95 %; None with too few rounds.
    """

    name: str
    layers: int
    read_bytes: int
    one_seconds: float
    own_seconds: float
    ratio: float
    interval: Interval | None


@dataclass(frozen=True)
class Reuse:
    """What one set of weights a block changes about the time of a decode step.

    Attributes
    ----------
    batch : int
    context : tuple of int
        Tokens in the cache before the first and before the last step that was timed.
    rounds : int
    first, later, looped : Group
        Linears of the layers that run a block first, of those that run it again, and both.
    alone : Group or None
        The same linears of layers that share with none; None where there are no such layers.
    step : Group
        The whole decode step; its bytes are those of ``looped`` and ``alone``.
    largest_block_bytes : int
        Weights of the largest block.
    cache_bytes : int or None
        Last-level cache of the device, as the system states it.
    bandwidth_bytes_per_second : float
        Measured, of memory.
    """

    batch: int
    context: tuple[int, int]
    rounds: int
    first: Group
    later: Group
    looped: Group
    alone: Group | None
    step: Group
    largest_block_bytes: int
    cache_bytes: int | None
    bandwidth_bytes_per_second: float

    def from_memory_bytes(self, group: Group) -> float:
        """Return the most of a group's weights that came from memory with one set, in bytes a step."""
        return min(float(group.read_bytes), group.one_seconds * self.bandwidth_bytes_per_second)

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """Whether a step moves fewer bytes than with own sets, and why that is not known where it is not."""
        ratio, interval = self.looped.ratio, self.looped.interval
        if interval is None:
            return (
                "not known",
                f"rounds: {self.rounds}, too few for an interval; the device is slow or busy",
            )
        shown = f"{ratio:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
        if interval[1] < 1 and ratio < 1 - LEAST_NOISE:
            return "less", ""
        needed = self.looped.read_bytes / self.bandwidth_bytes_per_second
        if needed < HIDDEN_BELOW * self.looped.own_seconds:
            share = needed / self.looped.own_seconds
            return "not known", (
                f"reading the weights from memory explains {share:.0%} of these linears' time, so their time does not "
                f"show what was moved (one set / own sets {shown})"
            )
        if interval[0] > 1 - LEAST_NOISE and interval[1] < 1 + LEAST_NOISE:
            return "same", ""
        return "not known", f"the noise is too large: one set / own sets {shown}"


class _TimedLinear(nn.Module):
    """Stands for a shared linear and books its time under the layer that calls it."""

    def __init__(self, linear: nn.Module, layer: int, book: _Book) -> None:
        super().__init__()
        self.linear, self.layer, self._book = linear, layer, book

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the linear returns."""
        output: torch.Tensor = self._book.run(self.layer, self.linear, inputs)
        return output


class _Book:
    """Seconds of linears by layer, of one decode step at a time."""

    def __init__(self, device: torch.device) -> None:
        self._clock = OpClock(device)
        self._open: list[tuple[int, Callable[[], float]]] = []

    def run(self, layer: int, function: Callable[..., Any], *args: Any) -> Any:
        output, seconds = self._clock.run(function, args, {})
        self._open.append((layer, seconds))
        return output

    def take(self) -> dict[int, float]:
        """Return what was booked since the last call."""
        self._clock.finish()
        found: dict[int, float] = {}
        for layer, seconds in self._open:
            found[layer] = found.get(layer, 0.0) + seconds()
        self._open.clear()
        return found


class Copies:
    """The linears of every block, copied once for each of its layers, and the ways to run a model with them.

    Parameters
    ----------
    model : PreTrainedModel
        Looped; its own weights stay where they are.
    plan : LoopPlan
    """

    def __init__(self, model: PreTrainedModel, plan: LoopPlan) -> None:
        self.plan = plan
        self._stack: Any = model.get_submodule(plan.stack)
        self._names = {index: tuple(block.ranks) for block in plan.blocks for index in block.layers}
        self._first = {index: block.layers[0] for block in plan.blocks for index in block.layers}
        self._copies = {
            (index, name): copy.deepcopy(self.linear(index, name).shared)
            for index, names in sorted(self._names.items())
            for name in names
        }
        self._book = _Book(model.device)

    def linear(self, layer: int, name: str) -> LoopedLinear:
        """Return a layer's looped linear."""
        found = self._stack[layer].get_submodule(name)
        assert isinstance(found, LoopedLinear)
        return found

    @contextlib.contextmanager
    def running(self, sets: Sets) -> Iterator[_Book]:
        """Run the layers with the copies of their block's first layer, or each with its own, and time the linears."""
        before: dict[tuple[int, str], Any] = {}
        own: list[tuple[Any, str, nn.Module]] = []
        try:
            for index, name in self._copies:
                looped = self.linear(index, name)
                before[index, name] = looped._block
                chosen = self._copies[index if sets == "own" else self._first[index], name]
                looped._block = (SimpleNamespace(linear=_TimedLinear(chosen, index, self._book)), "linear")  # type: ignore[assignment]
            for index, name, linear in self.alone():
                where, _, last = name.rpartition(".")
                holder = self._stack[index].get_submodule(where)
                own.append((holder, last, linear))
                setattr(holder, last, _TimedLinear(linear, index, self._book))
            yield self._book
        finally:
            for (index, name), block in before.items():
                self.linear(index, name)._block = block
            for holder, last, linear in own:
                setattr(holder, last, linear)

    def alone(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Return the linears of layers that share with none: those called like a shared one."""
        names = sorted({name for block in self.plan.blocks for name in block.ranks})
        for index in range(self.plan.layers):
            if index in self.plan.shared_layers:
                continue
            there = dict(self._stack[index].named_modules())
            for name in names:
                if name in there:
                    yield index, name, there[name]

    def read_bytes(self, layer: int) -> int:
        """Return the weight bytes of a layer's linears."""
        if layer in self._names:
            return sum(stored_bytes(self._copies[layer, name]) for name in self._names[layer])
        return sum(stored_bytes(linear) for index, _, linear in self.alone() if index == layer)


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def bytes_of_copies(model: PreTrainedModel, plan: LoopPlan) -> int:
    """Return what :class:`Copies` takes, in bytes."""
    blocks: Any = model.get_submodule(plan.stack.rpartition(".")[0]).get_submodule(BLOCKS)
    return sum(len(block.layers) * stored_bytes(blocks[number]) for number, block in enumerate(plan.blocks))


def why_not(model: PreTrainedModel, plan: LoopPlan) -> str | None:
    """Return why the comparison cannot be made here; None if it can."""
    if model.device.type not in ("cpu", "cuda"):
        return f"linears are timed on a CPU or a CUDA device, not on {model.device}"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    if not plan.blocks:
        return "no layers share"
    needed, free = bytes_of_copies(model, plan), memory_available_bytes(model.device)
    if needed > MEMORY_SHARE * free:
        return (
            f"the layers with own copies of their weights take {needed / 1e9:.1f} GB and {model.device} has "
            f"{free / 1e9:.1f} GB free"
        )
    return None


def measure(
    model: PreTrainedModel,
    plan: LoopPlan,
    *,
    batch: int,
    context: int,
    bandwidth_bytes_per_second: float,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Reuse:
    """Time decode steps with one set of weights a block and with own sets, in turn.

    Parameters
    ----------
    model : PreTrainedModel
        Looped, on its device, in evaluation mode; left as it is.
    plan : LoopPlan
        Its own, with at least one block.
    batch, context : int
        Sequences, and tokens in each before the first step.
    bandwidth_bytes_per_second : float
        Measured, of the device's memory.
    seed : int
        Of the random token ids.
    clock : callable
        Returns seconds.

    Raises
    ------
    profilers.base.DoesNotFitError
        If the device has not enough memory.
    profilers.base.ProfilerError
        If the batch or context is not positive or past the model's limit.
    """
    check_point(model, batch, context)
    held, steps = decode_room(model.config, context, 2 * (WARM_UP_ROUNDS + MOST_ROUNDS))
    samples: dict[Sets, list[tuple[float, dict[int, float]]]] = {"one": [], "own": []}
    with out_of_memory_as_error(batch, context, model.device):
        copies = Copies(model, plan)
        run = first_token(model, token_ids(model, batch, held, seed))
        begun = clock()
        for number in range(min(MOST_ROUNDS + WARM_UP_ROUNDS, steps // 2)):
            order: tuple[Sets, ...] = ("one", "own") if number % 2 else ("own", "one")
            for sets in order:
                with copies.running(sets) as book:
                    synchronize(model.device)
                    start = clock()
                    run = next_token(model, *run)
                    synchronize(model.device)
                    samples[sets].append((clock() - start, book.take()))
            if _enough(len(samples["one"]) - WARM_UP_ROUNDS, clock() - begun):
                break
    rounds = max(1, len(samples["one"]) - WARM_UP_ROUNDS)
    one, own = (samples[sets][-rounds:] for sets in ("one", "own"))
    later = frozenset(index for block in plan.blocks for index in block.layers[1:])
    alone = frozenset(index for index, _, _ in copies.alone())

    def group(name: str, layers: frozenset[int]) -> Group:
        seconds = [[sum(by_layer[index] for index in layers) for _, by_layer in side] for side in (one, own)]
        return _group(name, len(layers), sum(map(copies.read_bytes, layers)), *seconds)

    looped = group("linears of both", plan.shared_layers)
    apart = group("linears of layers that share with none", alone) if alone else None
    read = looped.read_bytes + (apart.read_bytes if apart is not None else 0)
    last = held + 2 * len(samples["one"]) - 1
    return Reuse(
        batch=batch,
        context=(held + 2 * WARM_UP_ROUNDS, last),
        rounds=rounds,
        first=group("linears, first loop of a block", plan.shared_layers - later),
        later=group("linears, later loops", later),
        looped=looped,
        alone=apart,
        step=_group("whole decode step", plan.layers, read, *([step for step, _ in side] for side in (one, own))),
        largest_block_bytes=max(copies.read_bytes(block.layers[0]) for block in plan.blocks),
        cache_bytes=last_level_cache_bytes(model.device),
        bandwidth_bytes_per_second=bandwidth_bytes_per_second,
    )


def _enough(rounds: int, seconds: float) -> bool:
    return seconds >= (ROUND_SECONDS if rounds >= FEWEST_ROUNDS else LIMIT_SECONDS)


def _group(name: str, layers: int, read: int, one: Sequence[float], own: Sequence[float]) -> Group:
    ratio, interval = median_interval([left / right for left, right in zip(one, own, strict=True)])
    return Group(name, layers, read, median_interval(one)[0], median_interval(own)[0], ratio, interval)
