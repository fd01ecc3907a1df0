"""Windows of calibration text for a pass, in batches that keep matrix products busy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.base import PassError

if TYPE_CHECKING:
    import torch

    from passes.base import PassContext

BATCH_TOKENS = 2048
"""Tokens of one forward pass while calibrating: enough to keep matrix products busy, few enough for activations."""


def batches(context: PassContext, samples: int, length: int, *, without: str) -> list[torch.Tensor]:
    """Return ``samples`` windows of ``length`` tokens in batches, shape (B, T) each.

    Parameters
    ----------
    context : PassContext
    samples, length : int
    without : str
        What to say where there is no text, and what to do instead.

    Raises
    ------
    PassError
        If there is no text, or it is too short.
    """
    from profilers.base import ProfilerError

    text = context.calibration
    if text is None:
        raise PassError(without)
    needed = samples * length
    have = getattr(text, "ids", None)
    if have is not None and have.numel() < needed:
        raise PassError(
            f"the calibration text '{text.name}' has {have.numel()} tokens, and samples={samples} of "
            f"length={length} need {needed}; give a longer text, or samples={have.numel() // length}"
        )
    try:
        windows = text.windows(samples, length)
    except ProfilerError as error:
        raise PassError(f"the calibration text '{text.name}' is too short for length={length}: {error}") from None
    size = max(1, BATCH_TOKENS // length)
    return [windows[start : start + size] for start in range(0, len(windows), size)]
