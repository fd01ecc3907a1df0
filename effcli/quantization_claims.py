"""What ``quantization_config`` of a compressed-tensors checkpoint claims about a layer, read without that library."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effcli.expected_tensors import Expected

_REGEX = "re:"


@dataclass(frozen=True)
class Claim:
    """How one weight is said to be quantized.

    Attributes
    ----------
    bits : int
    kind : str
        ``int`` or ``float``.
    strategy : str
        ``tensor``, ``channel``, ``group``, ``tensor_group`` or ``block``.
    group_size : int or None
        Weights of a row that share a scale.
    block : tuple of int or None
        Rows and columns that share a scale.
    symmetric : bool
    """

    bits: int
    kind: str
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool

    @property
    def described(self) -> str:
        """In words, for messages."""
        if self.strategy in ("group", "tensor_group"):
            return f"groups of {self.group_size}"
        return f"scales by {self.strategy}"

    def scale_shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes that the scales of a weight may have, the usual one first."""
        if self.strategy in ("group", "tensor_group") and self.group_size:
            return ((rows, math.ceil(columns / self.group_size)),)
        if self.strategy == "block" and self.block:
            return ((math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1])),)
        if self.strategy == "channel":
            return ((rows, 1),)
        return ((1,), (), (1, 1))


@dataclass(frozen=True)
class Claims:
    """The whole ``quantization_config``.

    Attributes
    ----------
    present : bool
    groups : tuple of (targets, claim)
    ignore : tuple of str
    kv_cache : bool
        Whether the KV cache is said to be quantized.
    """

    present: bool
    groups: tuple[tuple[tuple[str, ...], Claim], ...]
    ignore: tuple[str, ...]
    kv_cache: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Claims:
        """Read a checkpoint's ``config.json``."""
        raw = config.get("quantization_config")
        if raw is None:
            return cls(False, (), (), False)
        groups = tuple(
            (tuple(group["targets"]), _claim(group["weights"]))
            for group in raw.get("config_groups", {}).values()
            if group.get("weights") is not None
        )
        return cls(True, groups, tuple(raw.get("ignore") or ()), raw.get("kv_cache_scheme") is not None)

    def of(self, module: str, expected: Expected) -> Claim | None:
        """Return what is claimed about a linear layer, None where it is left as it is.

        A target or ignored name is a module's name, ``re:`` and a pattern that matches it from its start, or the
        class ``Linear``. Exact names come before patterns and these before the class, in every group.
        """
        names = (module, *expected.modules)
        if not expected.linear or any(_rank(pattern, names) is not None for pattern in self.ignore):
            return None
        ranked = [
            (rank, position)
            for position, (targets, _) in enumerate(self.groups)
            for target in targets
            if (rank := _rank(target, names)) is not None
        ]
        return self.groups[min(ranked)[1]][1] if ranked else None


def _rank(target: str, names: Sequence[str]) -> int | None:
    """Return how closely a target names a linear layer, 0 the closest; None where it does not."""
    if target in names:
        return 0
    if target.startswith(_REGEX):
        pattern = target.removeprefix(_REGEX)
        return 1 if any(re.match(pattern, name) for name in names) else None
    return 2 if target == "Linear" else None


def _claim(weights: Mapping[str, Any]) -> Claim:
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("group" if size and size > 0 else "channel" if size == -1 else "tensor")
    return Claim(
        bits=int(weights["num_bits"]),
        kind=str(weights["type"]),
        strategy=str(strategy),
        group_size=size,
        block=None if not block else (int(block[0]), int(block[1])),
        symmetric=bool(weights.get("symmetric", True)),
    )
