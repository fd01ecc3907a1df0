"""Which storage a tensor lies in, and whether that storage is still alive; on meta too, where all pointers are 0."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef


def address_of(tensor: torch.Tensor) -> int:
    """Return what tells one live storage from another."""
    return int(tensor.untyped_storage()._cdata)


def weak_storage(tensor: torch.Tensor) -> StorageWeakRef:
    """Return a weak reference to the tensor's storage: the data can be freed, its address is not given to another."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def is_gone(storage: StorageWeakRef) -> bool:
    """Return whether nothing but weak references holds the storage any more."""
    return bool(storage.expired())  # type: ignore[no-untyped-call]
