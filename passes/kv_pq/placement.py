"""Codebooks where the keys are, and the stream that encoding runs on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from passes.kv_pq.codebooks import LayerCodebooks

_moved: WeakKeyDictionary[LayerCodebooks, dict[torch.device, LayerCodebooks]] = WeakKeyDictionary()


def on_device(codebooks: LayerCodebooks, device: torch.device) -> LayerCodebooks:
    """Return codebooks on a device: the same object each time, since kernels prepare tables by it."""
    if codebooks.keys.centroids.device == device:
        return codebooks
    there = _moved.setdefault(codebooks, {})
    if device not in there:
        there[device] = codebooks.to(device)
    return there[device]


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the CUDA stream on which caches of a device encode while tokens go on being generated."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
