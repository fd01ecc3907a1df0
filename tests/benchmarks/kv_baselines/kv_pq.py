"""The kv-pq pass's own codebooks in the same harness as the baselines."""

from __future__ import annotations

import torch

from passes.kv_pq.codebooks import Codebooks
from tests.benchmarks.kv_baselines.base import Baseline


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
