"""What quantizing itself needs: time from the FLOPs of calibration and the measured peaks, memory from the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.base import ModelProfile
from passes.quantize.parameters import QuantizeParameters

if TYPE_CHECKING:
    from passes.quantize.targets import TargetLayer

PRODUCT_EFFICIENCY = 0.5
"""Share of the measured matrix-product peak that calibration's products reach."""
COLUMN_OPS = 40
"""Tiny ops that GPTQ runs for each column of a weight: rounding it and spreading its error."""
COLUMN_VECTORS = 30
"""Times that GPTQ reads or writes a column's float32 values in memory or cache."""
AWQ_GRID = 20
"""Scales that AWQ tries for each group of layers."""
SENSITIVITY_SHARE = 0.5
"""Mean share of the model that is run again for a changed layer."""
PROCESS_BYTES = 900_000_000
"""Of the Python process on a CPU with PyTorch, transformers and llm-compressor imported, without a model."""


@dataclass(frozen=True)
class PassCost:
    """Time and memory of the pass, and whether that memory is free."""

    seconds: float | None
    memory_bytes: int
    fits: bool
    notes: tuple[str, ...]


def estimate(
    parameters: QuantizeParameters, profile: ModelProfile, layers: Sequence[TargetLayer], weight_bytes: int
) -> PassCost:
    """Estimate what the pass needs on this device.

    Parameters
    ----------
    parameters : QuantizeParameters
    profile : ModelProfile
    layers : sequence of TargetLayer
    weight_bytes : int
        Of the model before the pass.
    """
    from profilers.device import memory_available_bytes

    method = parameters.chosen_method
    tokens = parameters.samples * parameters.length if parameters.needs_calibration else 0
    weights = sum(layer.parameters for layer in layers)
    rate = _rate(profile)
    gptq = "gptq" in method
    forwards = 2 + (1 if "smoothquant" in method else 0) + (AWQ_GRID if method == "awq" else 0)
    flops: float = 2.0 * weights * tokens * forwards
    inputs = _inputs(layers)
    if gptq:
        flops += sum(2.0 * width**2 * tokens for width in inputs.values())
        flops += sum(2.0 * layer.in_features**3 + layer.out_features * layer.in_features**2 for layer in layers)
    columns = sum(layer.in_features for layer in layers) if gptq else 0
    overhead = columns * COLUMN_OPS * profile.peaks.op_overhead_seconds
    memory = profile.peaks.memory_bytes_per_second
    streamed = (4.0 * COLUMN_VECTORS * weights if gptq else 16.0 * weights) / memory
    seconds = None if rate is None else flops / rate + overhead + streamed
    notes = []
    if seconds is not None:
        notes.append(
            f"pass time: {flops:.2g} FLOP of calibration ({tokens} tokens) at {PRODUCT_EFFICIENCY:.0%} of the measured "
            f"peak, and {columns:,} columns one after another"
            if gptq
            else f"pass time: {flops:.2g} FLOP ({tokens} tokens) at {PRODUCT_EFFICIENCY:.0%} of the measured peak"
        )
    widest = max(layer.in_features for layer in layers)
    largest = max(layer.parameters for layer in layers)
    block = _block_hessians(layers) if gptq else 0
    needed = weight_bytes + block + 2 * 4 * widest**2 + 4 * 4 * largest
    if profile.device.type == "cpu":
        needed += PROCESS_BYTES
    available = memory_available_bytes(profile.device)
    notes.append(
        f"pass memory: the weights, {block / 1e6:.0f} MB of Hessians of one block, one layer in float32"
        + (" and the process itself" if profile.device.type == "cpu" else "")
        + f"; {available / 1e9:.3g} GB are free"
    )
    return PassCost(seconds, needed, needed <= available, tuple(notes))


def _rate(profile: ModelProfile) -> float | None:
    """FLOP/s that calibration is taken to reach: forwards run in the model's dtype, Hessians in float32."""
    name = str(profile.dtype).removeprefix("torch.")
    rates = [profile.peaks.flops_per_second[key] for key in (name, "float32") if key in profile.peaks.flops_per_second]
    return PRODUCT_EFFICIENCY * min(rates) if rates else None


def _inputs(layers: Sequence[TargetLayer]) -> dict[str, int]:
    """Width of each distinct input: fused layers read the same one."""
    return {(layer.name if layer.expert else layer.group): layer.in_features for layer in layers}


def _block_hessians(layers: Sequence[TargetLayer]) -> int:
    """Bytes of the float32 Hessians that live at a time: those of one decoder block, the largest."""
    blocks: dict[str, dict[str, int]] = {}
    for layer in layers:
        block = ".".join(part for part in layer.name.split(".")[: _block_depth(layer.name)])
        blocks.setdefault(block, {})[layer.name if layer.expert else layer.group] = layer.in_features
    return max(sum(4 * width**2 for width in block.values()) for block in blocks.values())


def _block_depth(name: str) -> int:
    """Parts of a dotted name up to and with the first number: ``model.layers.3`` of ``model.layers.3.mlp.up_proj``."""
    parts = name.split(".")
    return next((index + 1 for index, part in enumerate(parts) if part.isdigit()), len(parts))
