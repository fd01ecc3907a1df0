"""What instruments ask a model about its product-quantized cache: bytes at any size, and forwards through codes."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from passes.kv_pq.layer import PQLayer, batch_tokens, grown_capacity, ready_tokens
from passes.kv_pq.through import through_codes
from profilers.own_cache import LayerGrowth

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes.kv_pq.codebooks import Codebooks


class Footprint:
    """The cache that a model makes with these codebooks, as :class:`profilers.own_cache.OwnCache`.

    Parameters
    ----------
    model : PreTrainedModel
        Kept and recent tokens have its dtype.
    codebooks : Codebooks
    """

    def __init__(self, model: PreTrainedModel, codebooks: Codebooks) -> None:
        self._model_of = weakref.ref(model)  # the model holds this
        self._codebooks = codebooks

    @property
    def _model(self) -> PreTrainedModel:
        model = self._model_of()
        assert model is not None
        return model

    @property
    def shared_bytes(self) -> int:
        """Bytes of the codebooks."""
        return self._codebooks.bytes

    @property
    def layers(self) -> dict[int, LayerGrowth]:
        """What each compressed layer keeps of one sequence."""
        return {
            index: LayerGrowth(
                cache_class=PQLayer.__name__,
                kind=PQLayer.cache_kind,
                bytes_per_token=self._coded_bytes(index),
                fixed_bytes=self._exact_bytes(index),
                growing_bytes_per_token=0,
            )
            for index in self._codebooks.layers
        }

    def layer_bytes(self, layer: int, batch: int, prompt: int, decoded: int) -> int:
        """Return what a layer holds after a prompt and so many single steps, to the byte."""
        slots = capacity(prompt, decoded, self._codebooks.recent_tokens, ahead=self._model.device.type == "cuda")
        return batch * (self._exact_bytes(layer) + slots * self._coded_bytes(layer))

    def applied(self) -> AbstractContextManager[None]:
        """Return a context in which forwards go through the codes: see :mod:`passes.kv_pq.through`."""
        return through_codes(self._model, self._codebooks)

    def _coded_bytes(self, layer: int) -> int:
        books = self._codebooks.layers[layer]
        return books.keys.codes + books.values.codes

    def _exact_bytes(self, layer: int) -> int:
        books, itemsize = self._codebooks.layers[layer], self._model.dtype.itemsize
        tokens = self._codebooks.kept_tokens + self._codebooks.recent_tokens
        return sum(tokens * side.heads * side.head_dim * itemsize for side in (books.keys, books.values))


def capacity(prompt: int, decoded: int, recent: int, *, ahead: bool = False) -> int:
    """Return for how many slots a layer has storage for codes after a prompt and so many single steps.

    Parameters
    ----------
    prompt, decoded : int
        Tokens.
    recent : int
        Size of the recent block, of which the older half becomes codes when it is full.
    ahead : bool
        Whether storage is reserved when the block is three quarters full, as on CUDA.
    """
    batch = batch_tokens(recent)
    slots = coded = reserved = 0
    if prompt > recent:  # encoded at once
        coded = ready_tokens(prompt, recent)
        slots = grown_capacity(0, coded) if coded else 0
    for length in range(prompt, prompt + decoded + 1):
        full = length - coded >= max(recent, 1)
        early = ahead and not reserved and length - coded >= max(batch, recent * 3 // 4)
        if length == prompt > recent or not (full or early):
            continue
        if coded + batch > slots:
            slots = grown_capacity(slots, coded + batch)
        reserved = batch
        if full:
            coded, reserved = coded + batch, 0
    return slots
