"""How many parameters a model has and how many bytes they take in memory, packed ones included."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from profilers.storages import address_of

PACKED = "packed_parameters"
"""A module that has this attribute holds that many parameters in its own buffers, in whatever form."""


@dataclass(frozen=True)
class WeightSize:
    """Size of a model's weights.

    Attributes
    ----------
    bytes : int
        In memory, each shared tensor once. Packed weights count as packed, with their scales.
    parameters : int
        Elements of the weights, each shared tensor once; scales and zero points are none.
    """

    bytes: int
    parameters: int


def weight_bytes_and_parameters(model: torch.nn.Module) -> WeightSize:
    """Count a model's weights: its parameters, and the buffers of modules that hold weights packed.

    Parameters
    ----------
    model : torch.nn.Module
        On any device, meta included. A module with an attribute ``packed_parameters`` says how many parameters its
        buffers stand for (0: a copy of some that are counted elsewhere).
    """
    seen: set[tuple[int, int, int]] = set()
    total = 0
    parameters = 0
    for tensor in model.parameters():
        if _first(tensor, seen):
            total += tensor.nbytes
            parameters += tensor.numel()
    for module in model.modules():
        if not hasattr(module, PACKED):
            continue
        parameters += int(getattr(module, PACKED))
        total += sum(buffer.nbytes for buffer in module.buffers(recurse=False) if _first(buffer, seen))
    return WeightSize(bytes=total, parameters=parameters)


def _first(tensor: torch.Tensor, seen: set[tuple[int, int, int]]) -> bool:
    """Whether this part of a storage is met for the first time."""
    place = (address_of(tensor), int(tensor.storage_offset()), tensor.numel())
    if place in seen:
        return False
    seen.add(place)
    return True
