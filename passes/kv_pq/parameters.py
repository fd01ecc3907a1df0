"""Parameters of the kv-pq pass, checked before anything is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from passes.base import PassParameters

MIN_BITS, MAX_BITS = 1.0, 8.0
EXTRA_BITS = 0.25
"""Stored bits a value on top of ``bits`` that gains, or codes shared out unevenly, may take."""


class KVPQParameters(PassParameters):
    """What ``--pass kv-pq:…`` takes; see ``docs/passes/kv-pq.md``."""

    bits: float = Field(
        default=4.0,
        ge=MIN_BITS,
        le=MAX_BITS,
        description=f"Stored bits a cached value; gains and uneven shares may add {EXTRA_BITS:g} on average.",
    )
    kept: int = Field(default=4, ge=0, description="First tokens of each sequence that stay in full precision.")
    recent: int = Field(default=128, ge=1, description="Latest tokens that stay in full precision, at most.")
    samples: int = Field(default=32, ge=1, description="Calibration windows.")
    length: int = Field(default=512, ge=16, description="Tokens of one calibration window.")
    random: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description="Share of calibration windows that are random tokens: what has seen one text serves others worse.",
    )
    per_head: bool = Field(
        default=True,
        description="Codebooks by layer and KV head; false: one for all keys and one for all values.",
    )
    keys: Literal["auto", "before-rope", "after-rope"] = Field(
        default="auto",
        description="Whether keys are stored before or after rotary embedding; auto: before, where that can be undone.",
    )
    pairing: Literal["auto", "neighbours", "rope", "correlation"] = Field(
        default="auto", description="Which channels share a code; auto: what has the lowest error, layer by layer."
    )
    rotation: Literal["none", "hadamard", "opq"] = Field(
        default="none", description="Turn values, and keys without rotary embedding, before they are encoded."
    )
    gains: bool = Field(default=True, description="Divide each vector by its size, which takes one more code.")
    weighting: Literal["attention", "none"] = Field(
        default="attention", description="Weigh errors by what attention does with them, or all alike."
    )
    allocation: Literal["auto", "even"] = Field(
        default="auto", description="Share codes out over layers, keys and values by their error, or evenly."
    )
    iterations: int = Field(default=8, ge=1, description="Rounds of k-means, at most.")

    @property
    def budget_bits(self) -> float:
        """Most stored bits a value, gains included, over all compressed layers; codebooks not counted."""
        return self.bits + EXTRA_BITS if self.gains or self.allocation == "auto" else self.bits

    def codes(self, head_dim: int) -> int:
        """Return how many codes a vector of ``head_dim`` channels has, on average over layers, keys and values."""
        return int(self.budget_bits * head_dim / 8 + 1e-9)
