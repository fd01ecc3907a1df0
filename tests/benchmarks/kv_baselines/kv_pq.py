"""The kv-pq pass's own codebooks in the same harness as the baselines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from passes.kv_pq.cache import PQCache, attach, detach
from passes.kv_pq.codebooks import Codebooks
from tests.benchmarks.kv_baselines.base import Baseline

CHUNK_TOKENS = 16
"""As many queries as kernels are given at a time."""


@contextlib.contextmanager
def through_cache(model: PreTrainedModel, codebooks: Codebooks, chunk: int = CHUNK_TOKENS) -> Iterator[None]:
    """Let forwards without a cache go chunk by chunk through a real ``PQCache`` that starts empty.

    What generation sees: a chunk attends to itself and to the recent block exactly, and to all else from codes.
    """
    attach(model, codebooks)
    base: Any = getattr(model, model.base_model_prefix)
    inner = base.forward

    def forward(input_ids: torch.Tensor, **_unused: Any) -> BaseModelOutputWithPast:
        cache = PQCache(model.config, codebooks)
        states = [
            inner(input_ids=part, past_key_values=cache, use_cache=True, return_dict=True)[0]
            for part in torch.split(input_ids, chunk, dim=1)
        ]
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(states, 1))

    try:
        with mock.patch.object(base, "forward", forward):
            yield
    finally:
        detach(model)


class KVPQ(Baseline):
    """Keys and values encoded and decoded by trained codebooks.

    Parameters
    ----------
    bits : float
        What was asked for.
    codebooks : Codebooks
        Of the model that is measured, on its device.
    """

    name = "kv-pq"

    def __init__(self, bits: float, codebooks: Codebooks) -> None:
        self.bits = bits
        self.codebooks = codebooks

    def effective_bits(self, head_dim: int) -> float:
        return self.codebooks.bits_per_value

    @property
    def codebook_bytes(self) -> int:
        return self.codebooks.bytes

    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.codebooks.layers:
            raise ValueError(f"layer {layer} has no codebooks: leave it out of the layers that are quantized")
        store = self.codebooks.layers[layer]
        plain = keys.float()
        if store.rope is not None:
            plain = store.rope.rotate(plain, positions, back=True)
        plain = store.keys.decode(store.keys.encode(plain), torch.float32)
        if store.rope is not None:
            plain = store.rope.rotate(plain, positions)
        return plain, store.values.decode(store.values.encode(values), torch.float32)
