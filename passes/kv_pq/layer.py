"""What a product-quantized cache holds for one layer.

::

    slot     0 ......... padding ........ padding + K ................. coded ............ length
    held     (codes, never read)  kept          codes                    recent
    by row   left padding         full precision 1 byte a part           full precision

Slots are counted over the batch, so rows with different left padding have different tokens in a slot. Codes are held
for every slot below ``coded``; attention reads those from ``padding + K`` on, because the first K tokens of each row
are kept. When the recent block is full its older half becomes codes as one batch, so that the latest tokens are always
in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.cache_utils import CacheLayerMixin

from passes.base import PassError
from passes.kv_pq import attention
from passes.kv_pq.layer_views import Rows, dequantized
from passes.kv_pq.placement import Aside, aside, on_device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from passes.kv_pq.codebooks import LayerCodebooks
    from passes.kv_pq.quantizer import VectorQuantizer

SLOTS = 64
"""Capacity is a multiple of this."""
GROWTH = 512
"""When codes outgrow their storage it gets this part of itself larger, at least ``SLOTS``: what is copied by then is a
few percent of what attention has read, and what is held is never much more than the tokens."""
ENCODED_TOKENS = 4096
"""Encoded at a time, so that temporaries do not grow with the prompt."""


class PQLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one full-attention layer: kept, coded and recent tokens.

    Parameters
    ----------
    index : int
        Of the layer in the model.
    codebooks : LayerCodebooks
    kept_tokens, recent_tokens : int
        As in :class:`~passes.kv_pq.codebooks.Codebooks`.
    config : PreTrainedConfig
        The model's own text config: which attention it runs is read from it at each update.
    capacity : int
        Slots to preallocate codes for when the first are made; more are made room for as they come.
    dtype : torch.dtype or None
        Of kept and recent tokens; None: that of the model's keys.

    Attributes
    ----------
    length, past : int
        Slots held, and held before the latest update.
    coded : int
        Slots below it are codes.
    key_codes, value_codes : torch.Tensor
        Shape (B, capacity, codes), uint8.
    exact_keys, exact_values : torch.Tensor
        Shape (B, H, kept + recent, D): kept tokens first.
    decodes : bool
        Whether updates return decoded keys and values although the model runs kv-pq's attention, because the model
        changes them before its attention gets them.
    waiting : tuple of torch.Tensor or None
        New keys and values that are too many for the recent block, until they have been attended to.
    """

    cache_kind: ClassVar = "quantized"
    cache_shared: ClassVar = ("codebooks", "rows", "_aside")
    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        index: int,
        codebooks: LayerCodebooks,
        *,
        kept_tokens: int,
        recent_tokens: int,
        config: PreTrainedConfig,
        capacity: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.codebooks = codebooks
        self.kept_tokens = kept_tokens
        self.recent_tokens = recent_tokens
        self.config = config
        self.capacity = capacity
        self.exact_dtype = dtype
        self.length = self.past = self.coded = 0
        self.rows: Rows = Rows.of(torch.zeros(0, dtype=torch.int64), kept_tokens)
        self.waiting: tuple[torch.Tensor, torch.Tensor] | None = None
        self.decodes = False
        self._unattended = False
        self._ahead = 0  # slots after ``coded`` whose codes are being made on another stream
        self._aside: Aside | None = None

    @property
    def batch_size(self) -> int:
        """Rows; an AttributeError before the first update, as transformers' layers have it."""
        if not self.is_initialized:
            raise AttributeError("batch_size")
        return int(self.exact_keys.shape[0])

    def cached_tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor that holds tokens; codebooks belong to the model, not to the cache."""
        if not self.is_initialized:
            return {}
        return {name: getattr(self, name) for name in ("exact_keys", "exact_values", "key_codes", "value_codes")}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate what does not depend on the number of tokens."""
        self._check(key_states, value_states)
        self.dtype, self.device = self.exact_dtype or key_states.dtype, key_states.device
        self.codebooks, self._aside = on_device(self.codebooks, self.device), aside(self.device)
        batch, heads, _, size = key_states.shape
        slots = self.kept_tokens + self.recent_tokens
        sizes = (size, value_states.shape[-1])
        self.exact_keys, self.exact_values = (
            torch.zeros(batch, heads, slots, width, dtype=self.dtype, device=self.device) for width in sizes
        )
        self.key_codes, self.value_codes = (
            torch.empty(batch, 0, side.codes, dtype=torch.uint8, device=self.device)
            for side in (self.codebooks.keys, self.codebooks.values)
        )
        self.is_initialized = True
        self.set_rows(self.rows)

    def set_rows(self, rows: Rows) -> None:
        """Take over the padding of the batch; rows of another batch size are taken as rows without padding."""
        if self.is_initialized:
            if rows.padding.shape[0] != self.batch_size:
                padding = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
                rows = Rows.of(padding, self.kept_tokens, plain=rows.plain)
            rows = rows.to(self.device)
        self.rows = rows

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for kind, states in (("keys", key_states), ("values", value_states)):
            side: VectorQuantizer = getattr(self.codebooks, kind)
            found, made = (states.shape[1], states.shape[3]), (side.heads, side.head_dim)
            if found != made:
                raise PassError(
                    f"layer {self.index}: the codebooks are for {made[0]} heads of {made[1]} channels, and the model's "
                    f"{kind} have {found[0]} of {found[1]}; make codebooks for this model with kv-pq"
                )
        if self.is_initialized and key_states.shape[0] != self.batch_size:
            raise PassError(
                f"the cache holds {self.batch_size} sequences and is given {key_states.shape[0]}; "
                "use another cache, or batch_repeat_interleave"
            )
        if self.is_initialized and key_states.device != self.device:
            raise PassError(
                f"layer {self.index} of the cache is on {self.device} and is given keys on {key_states.device}; "
                "use another cache"
            )

    # --- new tokens -------------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values, and return what the model's attention is to be given.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            Shape (B, H, T, D).

        Returns
        -------
        keys, values : torch.Tensor
            Where the model runs :data:`passes.kv_pq.attention.NAME`: the new ones, their ``pq_layer`` being this
            layer. Otherwise all of them, (B, H, length, D), decoded for the time of this attention.

        Raises
        ------
        PassError
            If heads, head size, batch or device are not those of the cache, or if the attention stopped reading it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        if self._unattended:  # so far it was right without: a first update returns everything there is
            self.refuse_other_tensors()
            self.settle()
        key_states, value_states = key_states.detach(), value_states.detach()
        self.past = self.length
        if self.decodes or self.config._attn_implementation != attention.NAME:
            keys, values = self._with_history(key_states, value_states)
            self._take(key_states, value_states)
            self.settle()
            return keys, values
        self._take(key_states, value_states)
        self._unattended = True
        # Attributes are set on new tensor objects: on the model's own they would keep this layer alive in a cycle.
        keys, values = key_states.view_as(key_states), value_states.view_as(value_states)
        keys.pq_layer = values.pq_layer = self  # type: ignore[attr-defined]
        return keys, values

    def refuse_other_tensors(self) -> None:
        """Go over to decoding: the model hands its attention other keys or values than those that :meth:`update` gave.

        Raises
        ------
        PassError
            If the cache had tokens by then, which that attention has missed.
        """
        if self.past:
            raise PassError(
                f"the attention of layer {self.index} did not read its product-quantized cache: the model hands it "
                "other keys or values than those that the cache returned; call passes.kv_pq.cache.detach(model) and "
                "use the cache with the model's own attention"
            )
        self.decodes = True

    def _take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        new, held = keys.shape[2], self.length - self.coded
        if held + new <= self.recent_tokens:
            at = self.kept_tokens + held
            self.exact_keys[:, :, at : at + new] = keys
            self.exact_values[:, :, at : at + new] = values
        else:
            self.waiting = (keys, values)
        self.length += new

    def settle(self) -> None:
        """Encode what has become history; called when the new tokens have been attended to."""
        self._unattended = False
        if self.waiting is not None:
            self._absorb(*self.waiting)
            self.waiting = None
            return
        held, batch = self.length - self.coded, batch_tokens(self.recent_tokens)
        if self._aside is not None and not self._ahead and held >= max(batch, self.recent_tokens * 3 // 4):
            self._encode_ahead(self._aside, batch)
        if held >= max(self.recent_tokens, 1):
            self._shift(batch)

    def _absorb(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take tokens that the recent block has no room for: encode all but the latest ones."""
        held = self.length - keys.shape[2] - self.coded
        if held:
            recent = slice(self.kept_tokens, self.kept_tokens + held)
            keys = torch.cat([self.exact_keys[:, :, recent].to(keys.dtype), keys], 2)
            values = torch.cat([self.exact_values[:, :, recent].to(values.dtype), values], 2)
        tokens = keys.shape[2]
        move = ready_tokens(tokens, self.recent_tokens)
        self._wait()
        self._ahead = 0
        self._reserve(self.coded + move)
        self._write_codes(keys[:, :, :move], values[:, :, :move])
        self._keep(keys[:, :, :move], values[:, :, :move])
        self.coded += move
        rest = slice(self.kept_tokens, self.kept_tokens + tokens - move)
        self.exact_keys[:, :, rest] = keys[:, :, move:]
        self.exact_values[:, :, rest] = values[:, :, move:]

    def _shift(self, batch: int) -> None:
        """Turn the oldest recent tokens into codes and move the others up."""
        begin, held = self.kept_tokens, self.length - self.coded
        old = slice(begin, begin + batch)
        if self._ahead:
            self._wait()
            self._ahead = 0
        else:
            self._reserve(self.coded + batch)
            self._write_codes(self.exact_keys[:, :, old], self.exact_values[:, :, old])
        self._keep(self.exact_keys[:, :, old], self.exact_values[:, :, old])
        self.coded += batch
        for block in (self.exact_keys, self.exact_values):
            block[:, :, begin : begin + held - batch] = block[:, :, begin + batch : begin + held].clone()

    def _encode_ahead(self, aside: Aside, batch: int) -> None:
        """Start encoding the oldest recent tokens beside what follows; they are needed when the block is full."""
        self._reserve(self.coded + batch)
        old = slice(self.kept_tokens, self.kept_tokens + batch)
        aside.run(self._encoding(self.exact_keys[:, :, old], self.exact_values[:, :, old]))
        self._ahead = batch

    def _wait(self) -> None:
        if self._aside is not None:
            self._aside.wait()

    def _reserve(self, slots: int) -> None:
        """Make room for the codes of so many slots."""
        held = self.key_codes.shape[1]
        if slots <= held:
            return
        wanted = grown_capacity(held, max(slots, self.capacity))
        for name in ("key_codes", "value_codes"):
            before = getattr(self, name)
            grown = before.new_empty(before.shape[0], wanted, before.shape[2])
            grown[:, : self.coded] = before[:, : self.coded]
            setattr(self, name, grown)

    def _write_codes(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Encode tokens that begin at slot ``coded``."""
        self._encoding(keys, values)()

    def _encoding(self, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], None]:
        """Return what encodes tokens that begin at slot ``coded``, into the storage that there is now."""
        begin, rows, books = self.coded, self.rows, self.codebooks
        key_codes, value_codes = self.key_codes, self.value_codes

        def work() -> None:
            for at in range(0, keys.shape[2], ENCODED_TOKENS):
                k, v = keys[:, :, at : at + ENCODED_TOKENS], values[:, :, at : at + ENCODED_TOKENS]
                slots = slice(begin + at, begin + at + k.shape[2])
                if books.rope is not None:
                    positions = torch.arange(slots.start, slots.stop, device=k.device)
                    if rows.most:
                        positions = positions - rows.padding[:, None]
                    k = books.rope.rotate(k.float(), positions, back=True)
                key_codes[:, slots] = attention.encode(k, books.keys)
                value_codes[:, slots] = attention.encode(v, books.values)

        return work

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy those of the tokens, which begin at slot ``coded``, that are among the first of their row."""
        kept, tokens = self.kept_tokens, keys.shape[2]
        if not kept or not tokens or self.coded >= self.rows.most + kept:
            return
        index = self.rows.padding[:, None] + torch.arange(kept, device=self.device) - self.coded  # (B, K)
        here = ((index >= 0) & (index < tokens))[:, None, :, None]
        index = index.clamp(0, tokens - 1)[:, None, :, None]
        for block, states in ((self.exact_keys, keys), (self.exact_values, values)):
            chosen = states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
            block[:, :, :kept] = torch.where(here, chosen.to(block.dtype), block[:, :, :kept])

    def _with_history(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return everything that is held, decoded, with new keys and values after it."""
        if not self.length:
            return keys, values
        held = dequantized(self, keys.dtype)
        return torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2)

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Return the tensors, cut to the tokens there are, and the numbers that :meth:`restore` takes."""
        if not self.is_initialized:
            return {}, {}
        exact = self.kept_tokens + self.length - self.coded
        held = {
            name: tensor[:, :, :exact] if name.startswith("exact") else tensor[:, : self.coded]
            for name, tensor in self.cached_tensors().items()
        }
        return held, {"length": self.length, "coded": self.coded}

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, int], rows: Rows) -> None:
        """Take over what :meth:`saved` returned."""
        self.lazy_initialization(tensors["exact_keys"], tensors["exact_values"])
        self.set_rows(rows)
        self.length = self.past = numbers["length"]
        self._reserve(numbers["coded"])
        self.coded = numbers["coded"]
        for name, tensor in tensors.items():
            tokens = 2 if name.startswith("exact") else 1
            getattr(self, name).narrow(tokens, 0, tensor.shape[tokens]).copy_(tensor)

    def share(self, memo: dict[int, Any]) -> None:
        """Make a deep copy share what is not this layer's own."""
        self._wait()
        memo |= {id(item): item for item in (self.config, self.codebooks)}

    # --- transformers' cache layer ----------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the mask."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the slots held."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens.

        What is left of the history stays as codes: full precision does not come back.

        Parameters
        ----------
        tokens_to_remove : int
            Negative: so many tokens; positive: down to so many slots, as transformers has it.
        """
        length = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        length = max(0, min(length, self.length))
        self._wait()
        if length < self.coded + self._ahead:
            self._ahead = 0
        self.coded = min(self.coded, length)
        self.length = self.past = length

    def reset(self) -> None:
        """Forget all tokens and give back the storage."""
        self._wait()
        for name in self.cached_tensors():
            delattr(self, name)
        self.is_initialized = self._unattended = self.decodes = False
        self.waiting = None
        self.length = self.past = self.coded = self._ahead = 0
        self.rows = Rows.of(torch.zeros(0, dtype=torch.int64), self.kept_tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows in another order, as beam search does."""
        self._each_row(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each_row(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the rows."""
        self._each_row(lambda tensor: tensor[indices.to(tensor.device)])

    def _each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        self._wait()
        for name, tensor in self.cached_tensors().items():
            setattr(self, name, change(tensor))
        rows = self.rows
        self.rows = Rows(change(rows.padding), change(rows.start), rows.most, rows.plain)


def batch_tokens(recent_tokens: int) -> int:
    """Return how many tokens become codes at a time."""
    return max(1, recent_tokens - recent_tokens // 2)


def ready_tokens(tokens: int, recent_tokens: int) -> int:
    """Return how many of the tokens after the codes are to become codes, in whole batches."""
    batch = batch_tokens(recent_tokens)
    return max(0, tokens - recent_tokens // 2) // batch * batch


def grown_capacity(held: int, needed: int) -> int:
    """Return the slots that codes get room for when ``held`` are too few for the ``needed`` ones."""
    wanted = max(needed, held + held // GROWTH)
    return -(-wanted // SLOTS) * SLOTS
