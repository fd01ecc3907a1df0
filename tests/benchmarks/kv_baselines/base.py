"""What every way to store keys and values in fewer bits says and does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from tests.benchmarks.kv_baselines.fake import KEPT_TOKENS, fake_quantized

Samples = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""By layer: keys after rotary embedding and values, each (H, N, D), float32."""

SCALE_BITS = 16
"""Of a scale, a zero or a norm."""


class Baseline(ABC):
    """One method at one setting; an instance is a transform for :func:`~.fake.fake_quantized`.

    Attributes
    ----------
    name : str
        Method, without the bits.
    bits : float
        Nominal bits a value.
    needs_samples : bool
        ``fit`` must be called before use.
    """

    name: str
    bits: float
    needs_samples = False

    @abstractmethod
    def effective_bits(self, head_dim: int) -> float:
        """Return stored bits a value over keys and values: codes, scales, zeros and norms, without codebooks."""

    @property
    def codebook_bytes(self) -> int:
        """What is stored once, whatever the length."""
        return 0

    def fit(self, samples: Samples) -> None:
        """Learn from keys and values of calibration text."""
        raise NotImplementedError(f"{self.name} has nothing to learn")

    @abstractmethod
    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (B, H, T, D) after quantizing and dequantizing, in any floating type."""


@torch.no_grad()
def collect(model: PreTrainedModel, windows: torch.Tensor, *, kept: int = KEPT_TOKENS) -> Samples:
    """Return the keys and values of every token of windows (n, T) but the first ``kept`` of each."""
    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def note(
        layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found.setdefault(layer, []).append((keys[0].float(), values[0].float()))
        return keys, values

    with fake_quantized(model, note, kept=kept):
        for window in windows:
            model.get_decoder()(input_ids=window[None].to(model.device), use_cache=False)
    return {
        layer: (torch.cat([keys for keys, _ in parts], 1), torch.cat([values for _, values in parts], 1))
        for layer, parts in found.items()
    }
