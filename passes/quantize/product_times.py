"""Time the matrix products of a model's linear layers, as they are and with the kernels that would replace them.

::

    set 1 (now)   ─┐                                  walk 1: set 1, set 2; walk 2: set 1, set 2; ...
    set 2 (after) ─┴─> copies of each kind of layer ──> kinds interleaved as they come in a forward ──> median a product

One token's products read every weight once a step, so weights come from wherever they do in the model: a walk goes
through as many bytes as the model holds, or, of a larger model, through enough to exceed the last-level cache. Sets are
walked through in turn, so that whatever else the machine does slows both.
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
WALKS = 7
WALK_SECONDS = 1.5
"""No further walk is started after this long."""
MANY_ROWS = 64
"""Rows of activations from which computing hides where weights come from: few copies suffice."""
FEW_COPIES = 2
LONGEST_ROWS = 2048
"""Rows that are timed at most; more are extrapolated in proportion."""


@dataclass(frozen=True)
class Product:
    """One kind of linear layer.

    Attributes
    ----------
    key : hashable
        Names it within its set.
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
    """Of one set of products.

    Attributes
    ----------
    seconds : dict
        Median of one product, by key.
    held_bytes : dict
        Of one layer, weights and scales as its kernel holds them, by key.
    total_seconds : float
        Of all layers of the set.
    """

    seconds: dict[object, float]
    held_bytes: dict[object, int]
    total_seconds: float


@torch.inference_mode()
def time_products(
    sets: Sequence[Sequence[Product]], device: torch.device, dtype: torch.dtype
) -> tuple[ProductTimes, ...]:
    """Time sets of products in turn, weights as cold as they are in the model.

    Parameters
    ----------
    sets : sequence of sequence of Product
        Each holds the products of one forward of the model.
    device : torch.device
    dtype : torch.dtype
        Of activations.

    Returns
    -------
    tuple of ProductTimes
        One for each set.
    """
    rings = [_Ring(products, device, dtype, memory_available_bytes(device) // MEMORY_PART) for products in sets]
    started = time.perf_counter()
    for walk in range(WALKS + 1):
        for ring in rings:
            ring.walk(keep=walk > 0)  # the first warms up
        if walk > 0 and time.perf_counter() - started > WALK_SECONDS:
            break
    return tuple(ring.times() for ring in rings)


class _Ring:
    """Copies of the layers of one set."""

    def __init__(
        self, products: Sequence[Product], device: torch.device, dtype: torch.dtype, memory_bytes: int
    ) -> None:
        self._products, self._device = products, device
        first = {product.key: product.make() for product in products}
        self._held = {key: _bytes(layer) for key, layer in first.items()}
        copies = self._copies(memory_bytes)
        self._layers = {
            key: [layer, *(copy.deepcopy(layer) for _ in range(copies[key] - 1))] for key, layer in first.items()
        }
        self._inputs = {
            product.key: torch.randn(min(product.rows, LONGEST_ROWS), product.in_features).to(device, dtype)
            for product in products
        }
        self._samples: dict[object, list[float]] = {product.key: [] for product in products}

    def walk(self, *, keep: bool) -> None:
        """Go through all copies once."""
        # A GPU runs behind the host, so there each kind is launched back to back and waited for once.
        elapsed = self._interleaved() if self._device.type == "cpu" else self._back_to_back()
        if keep:
            for key, seconds in elapsed.items():
                self._samples[key].append(seconds / len(self._layers[key]))

    def times(self) -> ProductTimes:
        """Return the median over the walks."""
        seconds = {
            product.key: statistics.median(self._samples[product.key]) * max(1.0, product.rows / LONGEST_ROWS)
            for product in self._products
        }
        total = sum(product.layers * seconds[product.key] for product in self._products)
        return ProductTimes(seconds, self._held, total)

    def _interleaved(self) -> dict[object, float]:
        spent: dict[object, float] = dict.fromkeys(self._layers, 0.0)
        for index in range(max(map(len, self._layers.values()))):
            for key, members in self._layers.items():
                if index < len(members):
                    rows = self._inputs[key]
                    before = time.perf_counter()
                    members[index](rows)
                    spent[key] += time.perf_counter() - before
        return spent

    def _back_to_back(self) -> dict[object, float]:
        spent: dict[object, float] = {}
        for key, members in self._layers.items():
            synchronize(self._device)
            before = time.perf_counter()
            for member in members:
                member(self._inputs[key])
            synchronize(self._device)
            spent[key] = time.perf_counter() - before
        return spent

    def _copies(self, memory_bytes: int) -> dict[object, int]:
        """Return how many copies of each kind to walk through: in proportion to how often the model has it."""
        whole = sum(product.layers * self._held[product.key] for product in self._products)
        wanted = max(SMALLEST_WALK, CACHE_MULTIPLE * (last_level_cache_bytes(self._device) or 0))
        share = min(1.0, min(wanted, memory_bytes) / whole)
        return {
            product.key: max(
                1, min(round(product.layers * share), FEW_COPIES if product.rows >= MANY_ROWS else 1 << 20)
            )
            for product in self._products
        }


def _bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
