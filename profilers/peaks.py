"""Measured ceilings of one device: memory bandwidth and matrix-product rate, the two lines of its roofline.

Never taken from a datasheet. See ``docs/profilers/peaks.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from profilers.base import Progress


@dataclass(frozen=True)
class WorkingSetBandwidth:
    """Best bandwidth measured with a working set of this size (caches make small ones faster)."""

    working_set_bytes: int
    bytes_per_second: float


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings.

    Attributes
    ----------
    device : str
        Name of the device they were measured on.
    copy_bytes_per_second : float
        Large copy, bytes read plus bytes written.
    read_bytes_per_second : float
        Large read-only reduction or matrix-vector product, bytes read.
    memory_bytes_per_second : float
        The larger of the two: the slanted line of the roofline, used for MBU and attainable times.
    by_working_set : tuple of WorkingSetBandwidth
        Ascending by size; never increasing in bandwidth (an envelope), ending at the main-memory figure.
    flops_per_second : dict of str to float
        Large matrix product by dtype name (``"bfloat16"``), a multiply-add being 2 FLOPs.
    op_overhead_seconds : float
        Time of one tiny op, launched back to back: what an op costs when it does nothing.
    seconds_spent : float
        How long measuring took.
    """

    device: str
    copy_bytes_per_second: float
    read_bytes_per_second: float
    memory_bytes_per_second: float
    by_working_set: tuple[WorkingSetBandwidth, ...]
    flops_per_second: dict[str, float]
    op_overhead_seconds: float
    seconds_spent: float

    def bandwidth(self, working_set_bytes: int) -> float:
        """Return the bandwidth ceiling in bytes/s for ops that touch this many bytes."""
        for level in self.by_working_set:
            if working_set_bytes <= level.working_set_bytes:
                return level.bytes_per_second
        return self.memory_bytes_per_second


def measure_peaks(
    device: torch.device, dtypes: Sequence[torch.dtype], progress: Progress | None = None
) -> Peaks:
    """Measure this device's ceilings for the given dtypes."""
    raise NotImplementedError
