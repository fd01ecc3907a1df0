"""FP8 (e4m3), one scale a tensor: what serving engines call an fp8 KV cache.

One scale for the keys and one for the values of each layer, so that the largest magnitude of the calibration text
becomes the format's largest, 448 (Micikevicius et al. 2022, "FP8 formats for deep learning"); what is larger saturates.
"""

from __future__ import annotations

import torch

from tests.benchmarks.kv_baselines.base import Baseline, Samples

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max


def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the nearest of what ``scale`` times an FP8 number can be, float32."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FORMAT).float() * scale


class FP8(Baseline):
    """Keys and values in e4m3."""

    name = "FP8 e4m3, scale by tensor"
    bits = 8.0
    needs_samples = True

    def __init__(self) -> None:
        self._scales: dict[int, tuple[float, float]] = {}

    def effective_bits(self, head_dim: int) -> float:
        return self.bits

    @property
    def codebook_bytes(self) -> int:
        return 2 * 4 * len(self._scales)

    def fit(self, samples: Samples) -> None:
        self._scales = {
            layer: (keys.abs().max().item() / LARGEST, values.abs().max().item() / LARGEST)
            for layer, (keys, values) in samples.items()
        }

    def __call__(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_keys, of_values = self._scales[layer]
        return rounded(keys, of_keys), rounded(values, of_values)
