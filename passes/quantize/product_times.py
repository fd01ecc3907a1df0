"""Time the matrix products of a model's linear layers, as they are and with the kernels that would replace them.

::

    distinct shapes x how often each occurs ──> copies that fill more than the last-level cache ──> walk through them
                                                                                                    as a forward does

One token's products read every weight once a step, so weights come from wherever they do in the model: the walk goes
through as many bytes as the model holds, or, of a larger model, through enough to exceed the last-level cache.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from profilers.device import memory_available_bytes, synchronize
from profilers.peaks import last_level_cache_bytes

CACHE_MULTIPLE = 2
"""Of a larger model, the copies walked through exceed the last-level cache this many times."""
SMALLEST_WALK = 128 << 20
"""Bytes walked through where the cache is small or not known."""
MEMORY_PART = 6
"""No more than one part in this many of the available memory is filled with copies."""
WALKS = 5
WALK_SECONDS = 1.0
"""No further walk is started after this long."""
LONGEST_ROWS = 2048
"""Rows of activations that are timed at most; more are extrapolated in proportion."""


@dataclass(frozen=True)
class Product:
    """One kind of linear layer.

    Attributes
    ----------
    key : hashable
        Names it in the result.
    make : callable
        Returns one such layer, with random weights.
    layers : float
        How many the model has; a fraction where a share of the layers is of this kind.
    rows : int
        Rows of activations that it multiplies.
    in_features : int
    """

    key: object
    make: Callable[[], nn.Module]
    layers: float
    rows: int
    in_features: int


@dataclass(frozen=True)
class ProductTimes:
    """Median time of one product by key, and what was walked through."""

    seconds: dict[object, float]
    held_bytes: dict[object, int]
    walked_bytes: int

    def total(self, products: Sequence[Product]) -> float:
        """Seconds of all layers of these products."""
        return sum(product.layers * self.seconds[product.key] for product in products)


@torch.inference_mode()
def time_products(products: Sequence[Product], device: torch.device, dtype: torch.dtype) -> ProductTimes:
    """Time one forward of each kind of layer, weights as cold as they are in the model.

    Parameters
    ----------
    products : sequence of Product
        Those of one forward of the model, interleaved as they come.
    device : torch.device
    dtype : torch.dtype
        Of activations.
    """
    first = {product.key: product.make() for product in products}
    held = {key: _bytes(layer) for key, layer in first.items()}
    copies = _copies(products, held, device)
    layers = {key: [layer, *(copy.deepcopy(layer) for _ in range(copies[key] - 1))] for key, layer in first.items()}
    inputs = {
        product.key: torch.randn(min(product.rows, LONGEST_ROWS), product.in_features).to(device, dtype)
        for product in products
    }
    samples = _walk(products, layers, inputs, device)
    seconds = {
        product.key: statistics.median(samples[product.key]) * max(1.0, product.rows / LONGEST_ROWS)
        for product in products
    }
    return ProductTimes(seconds, held, sum(held[key] * count for key, count in copies.items()))


def _walk(
    products: Sequence[Product],
    layers: dict[object, list[nn.Module]],
    inputs: dict[object, torch.Tensor],
    device: torch.device,
) -> dict[object, list[float]]:
    """Go through all copies, kinds interleaved; the first walk warms up.

    On a GPU each kind is launched back to back instead, since the host runs ahead of it.
    """
    rounds = max(len(members) for members in layers.values())
    samples: dict[object, list[float]] = {product.key: [] for product in products}
    started = time.perf_counter()
    for walk in range(WALKS + 1):
        if device.type == "cpu":
            elapsed = _interleaved(products, layers, inputs, rounds)
        else:
            elapsed = {
                product.key: _back_to_back(layers[product.key], inputs[product.key], device) for product in products
            }
        if walk == 0:
            continue
        for key, seconds in elapsed.items():
            samples[key].append(seconds)
        if time.perf_counter() - started > WALK_SECONDS:
            break
    return samples


def _interleaved(
    products: Sequence[Product],
    layers: dict[object, list[nn.Module]],
    inputs: dict[object, torch.Tensor],
    rounds: int,
) -> dict[object, float]:
    """Return the mean seconds of one product of each kind."""
    spent: dict[object, float] = dict.fromkeys(layers, 0.0)
    for index in range(rounds):
        for product in products:
            members = layers[product.key]
            if index >= len(members):
                continue
            member, rows = members[index], inputs[product.key]
            before = time.perf_counter()
            member(rows)
            spent[product.key] += time.perf_counter() - before
    return {key: seconds / len(layers[key]) for key, seconds in spent.items()}


def _back_to_back(members: list[nn.Module], rows: torch.Tensor, device: torch.device) -> float:
    synchronize(device)
    before = time.perf_counter()
    for member in members:
        member(rows)
    synchronize(device)
    return (time.perf_counter() - before) / len(members)


def _copies(products: Sequence[Product], held: dict[object, int], device: torch.device) -> dict[object, int]:
    """Return how many copies of each kind to walk through: in proportion to how often the model has it."""
    if all(product.rows >= LONGEST_ROWS for product in products):
        return dict.fromkeys(held, 1)  # compute hides where weights come from
    whole = sum(product.layers * held[product.key] for product in products)
    wanted = max(SMALLEST_WALK, CACHE_MULTIPLE * (last_level_cache_bytes(device) or 0))
    limit = min(wanted, memory_available_bytes(device) // MEMORY_PART)
    share = min(1.0, limit / whole)
    return {product.key: max(1, round(product.layers * share)) for product in products}


def _bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
