"""Codebooks where the keys are, and encoding beside the stream that generates tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
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


class Aside:
    """Work on a CUDA stream beside the current one, so that tokens go on being generated meanwhile.

    Parameters
    ----------
    device : torch.device
        A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._done: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Aside:
        """Return one with nothing to wait for: who copies waits first."""
        return type(self)(self.device)

    def run(self, work: Callable[[], None]) -> None:
        """Start work on what the current stream has done so far."""
        stream = _stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            work()
            self._done = stream.record_event()

    def wait(self) -> None:
        """Let the current stream go on only when the work is done; the host does not wait."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)
            self._done = None


def aside(device: torch.device) -> Aside | None:
    """Return where a device can work beside its current stream, None where that gains nothing."""
    return Aside(device) if device.type == "cuda" else None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that all layers of a device share: they encode one after the other."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
