"""The quantized caches that transformers ships, run by their own code where their backends are installed."""

from __future__ import annotations

import torch
from transformers import cache_utils

from tests.benchmarks.kv_baselines.base import SCALE_BITS, Baseline

GROUP = 64
BACKENDS = {
    # class, axis of keys and of values: groups of successive channels of one token in both
    "quanto": ("QuantoQuantizedLayer", 0),
    "HQQ": ("HQQQuantizedLayer", 1),
}


class TransformersCache(Baseline):
    """``QuantizedCache`` with one of its backends.

    Raises
    ------
    ImportError
        If the backend is not installed, as transformers says it.
    """

    def __init__(self, backend: str, bits: int) -> None:
        self.name = self.title(backend)
        self.bits = bits
        self._class, self._axis = BACKENDS[backend]
        self._layer()

    @staticmethod
    def title(backend: str) -> str:
        """Return the name of the method with this backend, installed or not."""
        return f"transformers QuantizedCache, {backend}"

    def _layer(self) -> cache_utils.QuantizedLayer:
        made = getattr(cache_utils, self._class)
        found: cache_utils.QuantizedLayer = made(
            nbits=self.bits, axis_key=self._axis, axis_value=self._axis, q_group_size=GROUP
        )
        return found

    def effective_bits(self, head_dim: int) -> float:
        return self.bits + 2 * SCALE_BITS / GROUP

    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        store = self._layer()
        store.lazy_initialization(keys, values)
        found = [store._dequantize(store._quantize(x.contiguous(), axis=self._axis)) for x in (keys, values)]
        return found[0].view_as(keys), found[1].view_as(values)
