"""Run decoder layers on rows that are at different layers of one block, each row with its own layer's parts.

::

    rows       hidden states of sequences, one token each: (rows, 1, hidden)
                  │
    norm          ├─ rows of layer 3 ── norm of layer 3 ─┐         what is the layer's own runs on its rows
                  └─ rows of layer 4 ── norm of layer 4 ─┤
    linear        all rows ── W of the block, one call ──┴─ + B_l (A_l x) + bias_l   of each row's layer
    attention     all rows, each against its own sequence's keys and values of its own layer

A *place* is what rows can be batched at: a shared block, or a layer on its own. Of a place the first layer's forward
runs, with each module that holds weights replaced by one that splits the rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.base import PassError
from passes.loop.layout import LoopPlan
from passes.loop.modeling_looped import LoopedLinear
from profilers import own_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASKED = ("hidden_states", "attention_mask", "position_embeddings", "past_key_values")
_PARTS = ("embed_tokens", "rotary_emb", "norm")
_PLAIN_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on nothing but the position."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOOSE_TOLERANCE = 0.05


@dataclass
class Split:
    """How many rows, one after another, belong to each member of a place; the same object for all its modules."""

    parts: Sequence[tuple[int, int]] = ()  # (member, rows)


class RowWise(nn.Module):
    """Runs each row through the module of its own layer.

    Parameters
    ----------
    members : sequence of nn.Module
        The same module of every layer of the place.
    split : Split
    """

    def __init__(self, members: Sequence[nn.Module], split: Split) -> None:
        super().__init__()
        self._members, self._split = tuple(members), split  # not registered: they belong to their layers

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return every row's own result, in the rows' order."""
        parts = self._split.parts
        if len(parts) == 1:
            output: torch.Tensor = self._members[parts[0][0]](inputs)
            return output
        pieces = inputs.split_with_sizes([rows for _, rows in parts])
        return torch.cat([self._members[member](piece) for (member, _), piece in zip(parts, pieces, strict=True)])


class RowShared(RowWise):
    """A shared linear: one call for all rows, then each row its own layer's parts and bias."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return ``W x + B_l (A_l x) + S_l x + bias_l``, shape (rows, 1, out_features)."""
        parts = self._split.parts
        if len(parts) == 1:
            return super().forward(inputs)
        first = self._members[0]
        assert isinstance(first, LoopedLinear)
        shared: torch.Tensor = first.shared(inputs)
        sizes = [rows for _, rows in parts]
        pieces = zip(parts, shared.split_with_sizes(sizes), inputs.split_with_sizes(sizes), strict=True)
        members: Sequence[Any] = self._members
        return torch.cat([members[member].with_own(output, piece) for (member, _), output, piece in pieces])


class KeptRows:
    """Keys and values of every sequence and layer, and the cache that a layer's forward meets.

    Parameters
    ----------
    slots : int
        Sequences.
    capacity : int
        Most tokens of one.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self._slots, self._capacity = slots, capacity
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._now: tuple[Sequence[tuple[int, torch.Tensor]], Sequence[torch.Tensor], int] = ((), (), 0)

    def put(self, slot: int, cache: Any) -> None:
        """Take over a sequence's keys and values from a cache that transformers filled."""
        for layer, kept in enumerate(cache.layers):
            if layer not in self._kept:
                _, heads, _, size = kept.keys.shape
                of_values = kept.values.shape[-1]
                empty = kept.keys.new_zeros
                self._kept[layer] = (
                    empty(self._slots, heads, self._capacity, size),
                    empty(self._slots, heads, self._capacity, of_values),
                )
            for target, source in zip(self._kept[layer], (kept.keys, kept.values), strict=True):
                target[slot, :, : source.shape[-2]] = source[0]

    def point_at(
        self, layers: Sequence[tuple[int, torch.Tensor]], positions: Sequence[torch.Tensor], longest: int
    ) -> None:
        """Say whose rows come next.

        Parameters
        ----------
        layers : sequence of (int, torch.Tensor)
            Layer index and the slots of its rows.
        positions : sequence of torch.Tensor
            Of the new token, one a row, for each entry of ``layers``.
        longest : int
            Tokens of the longest sequence among them, the new one included.
        """
        self._now = layers, positions, longest

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *rest: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep each row's new key and value; return all of its sequence, padded to the longest.

        Parameters
        ----------
        keys, values : torch.Tensor
            Shape (rows, heads, 1, size).
        layer_idx : int
            Not used: every row has a layer of its own.

        Returns
        -------
        tuple of torch.Tensor
            Shape (rows, heads, longest, size).
        """
        layers, positions, longest = self._now
        sizes = [len(slots) for _, slots in layers]
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for side, new in enumerate((keys, values)):
            for (layer, slots), where, piece in zip(layers, positions, new.split_with_sizes(sizes), strict=True):
                kept = self._kept[layer][side]
                kept[slots, :, where] = piece[:, :, 0]
                found[side].append(kept[:, :, :longest].index_select(0, slots))
        keys, values = (side[0] if len(side) == 1 else torch.cat(side) for side in found)
        return keys, values


class Place:
    """Layers whose rows can run together: those of a block, or one alone.

    Attributes
    ----------
    layers : tuple of int
    """

    def __init__(self, stack: Any, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._split = Split()
        self._layer = stack[layers[0]] if len(layers) == 1 else _merged([stack[i] for i in layers], self._split, "")

    def run(self, parts: Sequence[tuple[int, int]], hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Run rows through their layers.

        Parameters
        ----------
        parts : sequence of (int, int)
            Member (its number in ``layers``) and how many rows follow for it.
        hidden : torch.Tensor
            Shape (rows, 1, hidden size).
        """
        self._split.parts = parts
        output = self._layer(hidden, use_cache=True, **arguments)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found


def _merged(members: Sequence[nn.Module], split: Split, path: str) -> nn.Module:
    """Return the first member with its weight-holding modules split by rows; the members stay as they are."""
    first = members[0]
    if isinstance(first, LoopedLinear):
        return RowShared(members, split)
    if not first._modules:
        return RowWise(members, split) if any(True for _ in (*first.parameters(), *first.buffers())) else first
    own = [name for name, _ in (*first.named_parameters(recurse=False), *first.named_buffers(recurse=False))]
    if own:
        raise _refused(f"'{path or type(first).__name__}' of a layer holds '{own[0]}' beside other modules")
    merged = copy.copy(first)
    merged._modules = {
        name: None
        if child is None
        else _merged([member.get_submodule(name) for member in members], split, f"{path}.{name}".lstrip("."))
        for name, child in first._modules.items()
    }
    return merged


def _refused(reason: str) -> PassError:
    return PassError(
        f"layers cannot be batched over depth: {reason}; run the model as it is (runtime=plain, model.generate)"
    )


def places(model: PreTrainedModel, plan: LoopPlan) -> tuple[Place, ...]:
    """Return the places of a looped model, in the order of their first layers.

    Raises
    ------
    PassError
        If the architecture has not the usual decoder-layer call, naming what differs.
    """
    check(model, plan.stack, [block.layers for block in plan.blocks])
    stack = model.get_submodule(plan.stack)
    groups = [block.layers for block in plan.blocks]
    groups += [(index,) for index in range(plan.layers) if index not in plan.shared_layers]
    return tuple(Place(stack, group) for group in sorted(groups))


def check(model: PreTrainedModel, stack_name: str, groups: Sequence[Sequence[int]]) -> None:
    """Refuse what :mod:`passes.loop.depth_batched` could not run as the model runs itself; works on the meta device.

    Parameters
    ----------
    model : PreTrainedModel
        Looped or not.
    stack_name : str
        Of its list of layers.
    groups : sequence of sequence of int
        Layers whose rows would run together.

    Raises
    ------
    PassError
        Naming what differs.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    inner = model.get_submodule(stack_name.rpartition(".")[0])
    absent = [part for part in _PARTS if not isinstance(getattr(inner, part, None), nn.Module)]
    if absent:
        raise _refused(f"{name} has no '{absent[0]}' beside its layers")
    stack: Any = model.get_submodule(stack_name)
    accepted = inspect.signature(type(stack[0]).forward).parameters
    lacking = [argument for argument in _ASKED if argument not in accepted]
    if lacking:
        raise _refused(f"the layers of {name} take no '{lacking[0]}'")
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if kinds != {"full_attention"}:
        raise _refused(f"{name} has {', '.join(sorted(kinds - {'full_attention'}))}")
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise _refused(f"{name} attends to a window of {config.sliding_window} tokens")
    rope = str(getattr(inner.rotary_emb, "rope_type", "default"))
    if rope not in _PLAIN_ROPE:
        raise _refused(f"the rotary embedding of {name} is '{rope}', which depends on a sequence's length")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise _refused(f"attention runs with '{config._attn_implementation}', and rows of one batch need sdpa or eager")
    if own_cache.of(model) is not None:
        raise _refused(f"{name} makes a KV cache of its own")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise _refused("the model is spread over several devices")
    for group in groups:
        _merged([stack[index] for index in group], Split(), "")


def row_mask(positions: torch.Tensor, longest: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what each row may attend to: 0 up to its own position, the lowest number beyond; (rows, 1, 1, longest)."""
    beyond = torch.arange(longest, device=positions.device)[None] > positions[:, None]
    mask = torch.zeros(beyond.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(beyond, torch.finfo(dtype).min)[:, None, None]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two results differ by rounding only."""
    error = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    return bool(error <= _TOLERANCE.get(expected.dtype, _LOOSE_TOLERANCE))


def neutral(config: Any, values: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a generation config that does more than take the likeliest token.

    Raises
    ------
    PassError
    """
    for key, allowed in values.items():
        if getattr(config, key, None) not in (None, *allowed):
            raise PassError(
                f"depth-wise batching decodes greedily, and the generation config has {key}={getattr(config, key)!r}; "
                "unset it, or use model.generate"
            )
