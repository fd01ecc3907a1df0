"""What to do when a batch needs more memory than there is."""

from __future__ import annotations

import gc

_CPU_MESSAGES = ("not enough memory", "can't allocate memory")
"""In the RuntimeError of torch's allocator of main memory."""


def ran_out(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, of the device or of the machine."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)
    )


def free() -> None:
    """Give back what a failed batch left; call it outside of the ``except``, whose error holds on to tensors."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
