"""Serve several sequences at once, batched over depth: those that wait for one block run together, whatever their loop.

::

    tick      block 0        block 1        block 0 (second loop of a cycle)
    a         layer 0  ────  layer 1  ────  layer 2 ─┐
    b                  arrives, prefills ──  layer 0 ─┴─ one call of block 0's linears for both

Ordinary continuous batching lets a sequence join when the others begin a token; here it joins when they come to its
block. Each tick runs the place (:mod:`passes.loop.rows`) where most sequences wait, the least advanced on a tie. A
larger group passes through every place once a token, so a smaller one is met within that time. Sequences in lockstep
read each block as often as an ordinary batch does: nothing is gained there.

Greedy decoding. Prompts are processed one at a time by the model itself.

Reference: Bae et al., Relaxed Recursive Transformers, ICLR 2025, arXiv:2410.20672, continuous depth-wise batching.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from passes.base import PassError
from passes.loop import rows
from passes.loop.layout import LoopPlan
from passes.loop.modeling_looped import FORMAT
from profilers.phases import context_limit, prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Join = Literal["block", "token"]
Prompt = str | Sequence[int] | torch.Tensor

_GREEDY: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "min_length": (0,),
    "min_new_tokens": (0,), "encoder_repetition_penalty": (1.0,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (), "suppress_tokens": (), "begin_suppress_tokens": (), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "sequence_bias": (), "guidance_scale": (1.0,), "exponential_decay_length_penalty": (),
}  # fmt: skip
"""Settings of a generation config that would change greedy decoding, and their neutral values."""
_CHECK_TOKENS = 3


@dataclass(frozen=True)
class Served:
    """What one prompt was answered with.

    Attributes
    ----------
    tokens : tuple of int
        New ones, the end-of-sequence token included where it came.
    text : str or None
        None without a tokenizer.
    arrived_seconds, first_token_seconds, finished_seconds : float
        Since :meth:`DepthBatchedDecoder.generate` was called.
    """

    tokens: tuple[int, ...]
    text: str | None
    arrived_seconds: float
    first_token_seconds: float
    finished_seconds: float


@dataclass
class _Sequence:
    """A prompt that is being answered; ``layer`` is the next to run for the token after ``held`` tokens."""

    slot: int
    ids: torch.Tensor
    arrival: float
    held: int = 0
    layer: int = 0
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    finished: float | None = None


class DepthBatchedDecoder:
    """Decodes for a looped model.

    Parameters
    ----------
    model : PreTrainedModel
        Looped, in evaluation mode; left as it is.
    tokenizer : PreTrainedTokenizerBase, optional
        For prompts that are text.
    join : str
        ``block``: a sequence joins the others at its block; ``token``: when all begin a token, which is ordinary
        continuous batching.

    Attributes
    ----------
    ticks : int
        Places run since it was made: each calls the linears of one block, or of one layer alone, once.
    rows_run : int
        Rows in all ticks: layers run, over sequences.

    Raises
    ------
    PassError
        If the model is not looped, or its layers cannot be split up so, naming what differs.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, join: Join = "block"
    ) -> None:
        loop = getattr(model.config, "loop", None)
        if not isinstance(loop, dict) or loop.get("format") != FORMAT:
            raise PassError(f"{type(model).__name__} is no looped model; make one with: effcli optimize --pass loop:…")
        self.model, self.tokenizer, self.join = model, tokenizer, join
        plan = LoopPlan.from_json(loop)
        rows.neutral(model.generation_config, _GREEDY)
        self._inner: Any = model.get_submodule(plan.stack.rpartition(".")[0])
        self._head: Any = model.get_output_embeddings()
        self._layers = plan.layers
        self._places = rows.places(model, plan)
        self._place_of = {layer: number for number, place in enumerate(self._places) for layer in place.layers}
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = frozenset(ends if isinstance(ends, (list, tuple)) else () if ends is None else (ends,))
        self._check()
        self.ticks = self.rows_run = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        arrivals: Sequence[float] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> list[Served]:
        """Answer prompts greedily.

        Parameters
        ----------
        prompts : sequence of str, of token ids, or of torch.Tensor of shape (tokens,)
        max_new_tokens : int
            Of each answer.
        arrivals : sequence of float, optional
            Seconds from now at which each prompt arrives; default: all at once.
        clock, sleep : callable
            Where time comes from, in seconds.

        Returns
        -------
        list of Served
            In the order of the prompts.

        Raises
        ------
        PassError
            For an empty or too long prompt, text without a tokenizer, or arrivals of another number or below 0.
        """
        waiting = self._sequences(prompts, max_new_tokens, arrivals)
        every = list(waiting)
        waiting.sort(key=lambda item: item.arrival)
        longest = max((len(item.ids) for item in every), default=0) + max_new_tokens
        with torch.inference_mode():
            state = _State(self.model, self._inner, len(every), longest)
            begun, active = clock(), list[_Sequence]()
            while waiting or active:
                may_join = self.join == "block" or all(item.layer == 0 for item in active)
                while may_join and waiting and waiting[0].arrival <= clock() - begun:
                    item = waiting.pop(0)
                    state.begin(item)
                    self._book([item], max_new_tokens, clock() - begun)
                    active += [item] if item.finished is None else []
                if not active:
                    if waiting:
                        sleep(max(0.0, waiting[0].arrival - (clock() - begun)))
                    continue
                done = self._tick(state, active)
                if done:
                    state.choose(done, self._head)
                    self._book(done, max_new_tokens, clock() - begun)
                    active = [item for item in active if item.finished is None]
        return [self._served(item) for item in every]

    def _sequences(
        self, prompts: Sequence[Prompt], max_new_tokens: int, arrivals: Sequence[float] | None
    ) -> list[_Sequence]:
        if max_new_tokens < 1:
            raise PassError(f"max_new_tokens={max_new_tokens} is no number of tokens; give 1 or more")
        times = [0.0] * len(prompts) if arrivals is None else list(arrivals)
        if len(times) != len(prompts) or any(at < 0 for at in times):
            raise PassError(f"{len(times)} arrivals for {len(prompts)} prompts; give one each, of 0 seconds or more")
        limit, found = context_limit(self.model.config), []
        for slot, (prompt, arrival) in enumerate(zip(prompts, times, strict=True)):
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise PassError("a prompt is text and the decoder has no tokenizer; give token ids, or a tokenizer")
                prompt = self.tokenizer(prompt)["input_ids"]
            ids = torch.as_tensor(prompt, dtype=torch.long).reshape(-1).to(self.model.device)
            if not len(ids) or (limit is not None and len(ids) + max_new_tokens > limit):
                raise PassError(
                    f"prompt {slot} has {len(ids)} tokens and max_new_tokens={max_new_tokens}; the model has "
                    f"{limit} positions: give 1 token or more, and no more together than that"
                )
            found.append(_Sequence(slot, ids, arrival))
        return found

    def _tick(self, state: _State, active: Sequence[_Sequence]) -> list[_Sequence]:
        """Run the place where most sequences wait; return those that are through the last layer."""
        waiting: dict[int, list[_Sequence]] = {}
        for item in active:
            waiting.setdefault(self._place_of[item.layer], []).append(item)
        number = max(waiting, key=lambda place: (len(waiting[place]), -min(item.layer for item in waiting[place])))
        items = sorted(waiting[number], key=lambda item: (item.layer, item.slot))
        state.run(self._places[number], items)
        self.ticks += 1
        self.rows_run += len(items)
        for item in items:
            item.layer += 1
        return [item for item in items if item.layer == self._layers]

    def _book(self, items: Sequence[_Sequence], max_new_tokens: int, now: float) -> None:
        """Note the time of tokens that were just chosen, and whether they were the last."""
        for item in items:
            item.layer = 0
            item.first = now if len(item.tokens) == 1 else item.first
            if len(item.tokens) == max_new_tokens or item.tokens[-1] in self._ends:
                item.finished = now

    def _served(self, item: _Sequence) -> Served:
        text = None if self.tokenizer is None else str(self.tokenizer.decode(item.tokens, skip_special_tokens=True))
        assert item.finished is not None
        return Served(tuple(item.tokens), text, item.arrival, item.first, item.finished)

    @torch.inference_mode()
    def _check(self) -> None:
        """Hold one token of two sequences, once at every pair of layers of a place, against the model itself.

        Raises
        ------
        PassError
            If the logits are others.
        """
        device, size = self.model.device, self.model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randint(0, size, (_CHECK_TOKENS + more,), generator=generator).to(device) for more in (0, 2)]
        expected = torch.cat([self.model(ids[None]).logits[:, -1] for ids in texts])
        apart = {layer - place.layers[0] for place in self._places for layer in place.layers}
        for ahead in sorted(apart):
            state = _State(self.model, self._inner, 2, _CHECK_TOKENS + 4)
            items = [_Sequence(slot, ids[:-1], 0.0) for slot, ids in enumerate(texts)]
            for item, ids in zip(items, texts, strict=True):
                state.begin(item)
                state.enter([item], ids[-1:])
            behind, leading = items
            for _ in range(ahead):
                self._step(state, [leading])
            while behind.layer < self._layers:
                both = [item for item in items if item.layer < self._layers]
                together = len({self._place_of[item.layer] for item in both}) == 1
                for group in (both,) if together else ([item] for item in both):
                    self._step(state, group)
            found = self._head(self._inner.norm(state.hidden))[:, -1]
            if not rows.same(found, expected):
                raise PassError(
                    f"layers cannot be batched over depth: with sequences {ahead} layers apart, "
                    f"{type(self.model).__name__} gives other logits than by itself, so its layers are not called in "
                    "the usual way; run the model as it is (runtime=plain, model.generate)"
                )

    def _step(self, state: _State, items: Sequence[_Sequence]) -> None:
        state.run(self._places[self._place_of[items[0].layer]], sorted(items, key=lambda item: item.layer))
        for item in items:
            item.layer += 1


class _State:
    """Hidden states, positions and caches of the sequences that are served."""

    def __init__(self, model: PreTrainedModel, inner: Any, slots: int, capacity: int) -> None:
        self._model, self._inner = model, inner
        self._cache = rows.KeptRows(slots, capacity)
        width = inner.embed_tokens.weight.shape[1]
        self.hidden = torch.zeros(slots, 1, width, dtype=model.dtype, device=model.device)
        self._angles: tuple[torch.Tensor, ...] | None = None

    def begin(self, item: _Sequence) -> None:
        """Process a prompt and choose its first new token."""
        done = prefill(self._model, 1, len(item.ids), input_ids=item.ids[None])
        self._cache.put(item.slot, done.cache)
        item.held = len(item.ids)
        token = done.logits[0, -1].argmax()
        item.tokens.append(int(token))
        self.enter([item], token[None])

    def enter(self, items: Sequence[_Sequence], tokens: torch.Tensor) -> None:
        """Put the next token of some sequences before the first layer; shape (sequences,)."""
        slots = self._index([item.slot for item in items])
        hidden = self._inner.embed_tokens(tokens[:, None])
        angles = self._inner.rotary_emb(hidden, self._index([item.held for item in items])[:, None])
        if self._angles is None:
            self._angles = tuple(part.new_zeros(len(self.hidden), *part.shape[1:]) for part in angles)
        self.hidden[slots] = hidden
        for kept, part in zip(self._angles, angles, strict=True):
            kept[slots] = part

    def run(self, place: rows.Place, items: Sequence[_Sequence]) -> None:
        """Run sequences, sorted by layer, through the layers that they wait for."""
        assert self._angles is not None
        slots, held = self._index([item.slot for item in items]), [item.held for item in items]
        positions, longest = self._index(held), max(held) + 1
        members = [place.layers.index(item.layer) for item in items]
        parts = [(member, members.count(member)) for member in dict.fromkeys(members)]
        sizes = [count for _, count in parts]
        by_layer = [
            (place.layers[member], part) for (member, _), part in zip(parts, slots.split_with_sizes(sizes), strict=True)
        ]
        self._cache.point_at(by_layer, positions.split_with_sizes(sizes), longest)
        alike = min(held) == max(held)
        self.hidden[slots] = place.run(
            parts,
            self.hidden[slots],
            attention_mask=None if alike else rows.row_mask(positions, longest, self.hidden.dtype),
            position_embeddings=tuple(part[slots] for part in self._angles),
            past_key_values=self._cache,
        )

    def choose(self, items: Sequence[_Sequence], head: Any) -> None:
        """Choose the next token of sequences that are through the last layer."""
        slots = self._index([item.slot for item in items])
        tokens = head(self._inner.norm(self.hidden[slots]))[:, -1].argmax(dim=-1)
        for item, token in zip(items, tokens.tolist(), strict=True):
            item.held += 1
            item.tokens.append(token)
        self.enter(items, tokens)

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, device=self._model.device)


def depth_batched(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> DepthBatchedDecoder:
    """Return a decoder that serves several prompts at once; see :class:`DepthBatchedDecoder`.

    Examples
    --------
    >>> model, tokenizer = effcli.load("out")  # doctest: +SKIP
    >>> effcli.depth_batched(model, tokenizer).generate(["Hello", "The sea"], 32)  # doctest: +SKIP
    """
    return DepthBatchedDecoder(model, tokenizer)
