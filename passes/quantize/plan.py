"""Predict what quantizing does on a device, from shapes, the measured profile and short timings of the products.

See ``docs/passes/quantize-plan.md`` for how each figure is arrived at and how far off it was.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.base import Figures, ModelProfile, PassError, Prediction
from passes.quantize import pass_cost, targets
from passes.quantize.parameters import QuantizeParameters
from passes.quantize.schemes import preset, stored_bits

if TYPE_CHECKING:
    import torch
    from torch import nn

    from passes.quantize.kernels import KernelChoice, Kind
    from passes.quantize.product_times import Product
    from passes.quantize.targets import TargetLayer

SLOWER_ABOVE = 1.03
"""TPOT after / before from which decode is said to become slower; less is within what a timing varies by."""
LARGEST_LINEAR_SHARE = 0.95
"""Of a forward's time that linear layers can take; a short timing on a busy machine may say more."""
HEAD_BITS = 8
PHASES = ("decode", "prefill")
MATMUL = "matmul"
"""How :mod:`profilers.intensity` calls the class of ops that linear layers run."""
ROUNDS_ACTIVATIONS = ("int-dynamic", "float", "float-block")
"""Kinds whose activations are rounded even where the weights are decompressed."""

_KINDS: dict[str, Kind] = {
    "w4a16": "int",
    "w8a16": "int",
    "auto": "int",
    "w8a8": "int-dynamic",
    "fp8": "float",
    "fp8-block": "float-block",
    "nvfp4": "float-group",
    "mxfp4": "float-group",
}


@dataclass(frozen=True)
class _Part:
    """Layers of one shape, and how they would be stored and run.

    ``share`` is less than 1 where only a part of these layers is stored so (mixed bits, before sensitivity is known).
    """

    layer: TargetLayer
    layers: int
    share: float
    bits: int | None
    group_size: int | None
    bias: bool
    choice: KernelChoice

    @property
    def count(self) -> float:
        return self.layers * self.share

    @property
    def packed(self) -> bool:
        return self.choice.reason is None

    @property
    def runs_otherwise(self) -> bool:
        """Whether it takes another time than before: packed, or rounding its activations in floating point."""
        return self.packed or (self.choice.kind in ROUNDS_ACTIVATIONS and not self.layer.expert)


def predict(parameters: QuantizeParameters, profile: ModelProfile) -> Prediction:
    """Predict bytes, times and memory after the pass, and what the pass itself needs.

    Parameters
    ----------
    parameters : QuantizeParameters
    profile : ModelProfile
        Its model is on the meta device. Without measured times the predicted ones are None and a note says so.

    Returns
    -------
    Prediction

    Raises
    ------
    PassError
        If the model has nothing that the parameters could quantize.
    """
    model = profile.model
    found = targets.find(model, parameters)
    group_size = targets.choose_group_size(found.layers, parameters)
    notes: list[str] = []
    parts = _parts(parameters, profile, found.layers, group_size, notes)

    itemsize = profile.dtype.itemsize
    quantized = sum(layer.parameters for layer in found.layers)
    total = _parameters(model)
    stored = sum(part.count * _stored_bits(parameters, part) for part in parts)
    bits_per_parameter = (stored + 8 * itemsize * (total - quantized)) / total
    notes.append(
        f"{len(found.layers)} linear layers hold {quantized / total:.0%} of the parameters; "
        f"{len(found.skipped)} others keep {_name(profile.dtype)}; "
        f"{round((stored / 8 + itemsize * (total - quantized)) / 1e6):,} MB on disk"
    )

    before_bytes = profile.figures.weight_bytes or total * itemsize
    timing = _Timing(profile, parts, _head(profile, parts), preset(parameters.scheme))
    after_bytes = round(before_bytes - itemsize * quantized + timing.held_bytes)
    notes += timing.notes
    tpot = timing.after("decode", profile.figures.tpot_seconds, notes)
    ttft = timing.after("prefill", profile.figures.ttft_seconds, notes)
    if profile.figures.tpot_seconds is None:
        notes.append("the profile holds no measured times, so none are predicted; profile the model with its weights")

    peak = profile.figures.peak_memory_bytes
    if peak is not None:
        peak = peak - before_bytes + after_bytes + timing.transient_bytes
        notes.append("peak memory: the measured one with the weights replaced, plus one layer unpacked in prefill")
    if parameters.kv_cache == "fp8":
        notes.append(
            "kv_cache=fp8: half the KV bytes in engines that read the scales (vLLM); transformers ignores them"
        )
    cost = pass_cost.estimate(parameters, profile, found.layers, before_bytes)
    slower = (
        None if tpot is None or not profile.figures.tpot_seconds else tpot > SLOWER_ABOVE * profile.figures.tpot_seconds
    )
    if slower:
        notes.append("decode is predicted to become slower on this device")
    return Prediction(
        figures=Figures(
            weight_bytes=after_bytes,
            kv_bytes_per_token=profile.figures.kv_bytes_per_token,
            ttft_seconds=ttft,
            tpot_seconds=tpot,
            peak_memory_bytes=peak,
        ),
        bits_per_parameter=bits_per_parameter,
        pass_seconds=cost.seconds,
        pass_memory_bytes=cost.memory_bytes,
        fits=cost.fits,
        slower=slower,
        notes=(*notes, *cost.notes),
    )


def _parts(
    parameters: QuantizeParameters,
    profile: ModelProfile,
    layers: Sequence[TargetLayer],
    group_size: int | None,
    notes: list[str],
) -> list[_Part]:
    """Group the layers by shape and layout, and choose a kernel for each."""
    alike: Counter[tuple[str, int, int, bool, bool]] = Counter()
    first: dict[tuple[str, int, int, bool, bool], TargetLayer] = {}
    for layer in layers:
        bias = not layer.expert and profile.model.get_submodule(layer.name).bias is not None
        key = (layer.kind, layer.out_features, layer.in_features, layer.expert, bias)
        alike[key] += 1
        first.setdefault(key, layer)
    layouts = _layouts(parameters, layers, group_size, notes)
    parts = []
    for key, count in alike.items():
        layer, bias = first[key], key[-1]
        for bits, size, share in layouts:
            choice = _choose(parameters, profile, layer, bits, size)
            parts.append(_Part(layer, count, share, bits, size, bias, choice))
    for reason in sorted({part.choice.reason for part in parts if part.choice.reason is not None}):
        kinds = sorted({part.layer.kind for part in parts if part.choice.reason == reason})
        rounding = any(part.runs_otherwise for part in parts if part.choice.reason == reason)
        then = ", and rounding activations takes time" if rounding else ""
        notes.append(f"{', '.join(kinds)}: {reason}, so weights are decompressed while loading and run no faster{then}")
    return parts


def _layouts(
    parameters: QuantizeParameters, layers: Sequence[TargetLayer], group_size: int | None, notes: list[str]
) -> list[tuple[int | None, int | None, float]]:
    """Return (bits, group size, share of the weights); for mixed bits, the two shares that meet the budget."""
    if parameters.scheme != "auto":
        return [(parameters.kind.weight_bits, group_size, 1.0)]
    assert parameters.bits is not None
    weights = sum(layer.parameters for layer in layers)

    def average(bits: int, size: int | None) -> float:
        return sum(_layer_bits(parameters, layer, bits, size) for layer in layers) / weights

    low, high = average(4, group_size), average(8, None)
    if low > parameters.bits:
        raise PassError(
            f"bits={parameters.bits:g} is less than 4 bits and their scales take ({low:.3g}); give more bits"
        )
    share = min(1.0, (parameters.bits - low) / (high - low))
    notes.append(
        f"before sensitivity is measured: {share:.0%} of every layer class at 8 bits, the rest at 4 bits in groups of "
        f"{group_size}, which is {parameters.bits:g} bits on average"
    )
    return [(4, group_size, 1 - share), (8, None, share)] if share else [(4, group_size, 1.0)]


def _choose(
    parameters: QuantizeParameters, profile: ModelProfile, layer: TargetLayer, bits: int | None, size: int | None
) -> KernelChoice:
    from passes.quantize.kernels import PLAIN, choose

    choice = choose(
        bits or 8,
        _KINDS[parameters.scheme],
        size,
        layer.out_features,
        layer.in_features,
        profile.device,
        profile.dtype,
    )
    if layer.expert:
        return dataclasses.replace(choice, kernel=PLAIN, reason="experts run as one fused product of plain weights")
    if not parameters.symmetric and (bits or 8) > 4:
        return dataclasses.replace(choice, kernel=PLAIN, reason="the int8 kernel has no zero points")
    return choice


def _stored_bits(parameters: QuantizeParameters, part: _Part) -> float:
    return _layer_bits(parameters, part.layer, part.bits, part.group_size)


def _layer_bits(parameters: QuantizeParameters, layer: TargetLayer, bits: int | None, size: int | None) -> float:
    return stored_bits(
        parameters.scheme,
        layer.out_features,
        layer.in_features,
        bits=bits,
        group_size=size,
        symmetric=parameters.symmetric,
    )


def _head(profile: ModelProfile, parts: Sequence[_Part]) -> KernelChoice | None:
    """Return the kernel of an int8 copy of the output head, where loading makes one (see ``kernels.repack``)."""
    from torch import nn

    from passes.quantize.kernels import choose

    head = profile.model.get_output_embeddings()
    packed = any(part.choice.reason is None for part in parts)
    if type(head) is not nn.Linear or not packed or profile.device.type != "cpu":
        return None
    choice = choose(HEAD_BITS, "int", None, head.out_features, head.in_features, profile.device, profile.dtype)
    return choice if choice.reason is None else None


class _Timing:
    """Times of the linear layers that change, now and after, by phase, and the bytes that all targets hold after."""

    def __init__(
        self, profile: ModelProfile, parts: Sequence[_Part], head: KernelChoice | None, scheme_preset: str | None
    ) -> None:
        from passes.quantize.product_times import time_products

        self._profile = profile
        self.notes: list[str] = []
        self._seconds: dict[str, tuple[float, float]] = {}
        self._share: dict[str, float | None] = {}
        itemsize = profile.dtype.itemsize
        changed = [part for part in parts if part.runs_otherwise]
        self.held_bytes: float = sum(p.count * p.layer.parameters for p in parts if not p.packed) * itemsize
        self.transient_bytes = max((p.layer.parameters for p in changed if p.packed), default=0) * itemsize
        if not changed:
            return
        for phase in PHASES:
            rows = profile.batch * (profile.context if phase == "prefill" else 1)
            now = [_product(part, _plain(part.choice), rows) for part in changed]
            then = [_product(part, part.choice, rows, scheme_preset) for part in changed]
            if head is not None:
                now.append(_head_product(_plain(head), profile.batch))
                then.append(_head_product(head, profile.batch))
            before, after = time_products((now, then), profile.device, profile.dtype)
            self._seconds[phase] = before.total_seconds, after.total_seconds
            self._share[phase] = _measured_share(profile, phase, changed, head)
        packed = {_key(part, part.choice) for part in changed if part.packed}
        self.held_bytes += sum(p.layers * after.held_bytes[p.key] for p in then if p.key in packed)
        if head is not None:
            self.held_bytes += after.held_bytes["head", head.kernel]
            tied = _tied(profile.model)
            if not tied:
                self.held_bytes -= head.out_features * head.in_features * itemsize
            place = "beside the embedding that it is tied to" if tied else "in place of the stored one"
            self.notes.append(f"loading makes an int8 copy of the output head, {place}")

    def after(self, phase: str, measured: float | None, notes: list[str]) -> float | None:
        """Return the time of a phase with its linear layers' time replaced."""
        if measured is None:
            return None
        if phase not in self._seconds:
            notes.append(f"{phase}: as it is, since every linear layer runs as before")
            return measured
        before, after = self._seconds[phase]
        share = self._share[phase]
        origin = "as timed op by op in the profile"
        if share is None:
            share, origin = before / measured, "as timed apart"
        share = min(share, LARGEST_LINEAR_SHARE)
        notes.append(
            f"{phase}: {share:.0%} of the {measured * 1e3:.3g} ms go to the linear layers that change ({origin}); with "
            f"their new kernels these take {after / before:.2f} x as long, timed in turn on random weights"
        )
        return measured * (1 - share + share * after / before)


def _measured_share(
    profile: ModelProfile, phase: str, changed: Sequence[_Part], head: KernelChoice | None
) -> float | None:
    """Return the part of a phase's measured time that the changed layers take, or None where it was not measured.

    The profile times matrix products op by op. Layers that change take their part of it by weights multiplied: bytes
    read in decode, FLOPs in prefill, where the head multiplies a single token.
    """
    points = (profile.report["profiles"].get("intensity") or {}).get("points") or ()
    point = next(
        (p for p in points if (p["phase"], p["batch"], p["context"]) == (phase, profile.batch, profile.context)), None
    )
    if point is None or not point["time_seconds"] or any(part.layer.expert for part in changed):
        return None
    matmul = next((ops["measured_seconds"] for ops in point["op_classes"] if ops["name"] == MATMUL), None)
    linear = _linear_weights(profile.model)
    if matmul is None or linear is None:
        return None
    weights = sum(part.count * part.layer.parameters for part in changed)
    blocks, of_head = linear
    if phase == "decode":
        weights += 0 if head is None else of_head
        blocks += of_head
    return float(matmul / point["time_seconds"] * min(1.0, weights / blocks))


def _linear_weights(model: Any) -> tuple[int, int] | None:
    """Return the weights of all linear layers but the head, and of the head; None where there are fused experts."""
    from torch import nn

    head = model.get_output_embeddings()
    if any(targets.is_fused_experts(module) for module in model.modules()):
        return None
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return sum(layer.weight.numel() for layer in layers), 0 if head is None else head.weight.numel()


def _key(part: _Part, choice: KernelChoice) -> tuple[Any, ...]:
    return (
        choice.kernel,
        part.layer.kind,
        choice.out_features,
        choice.in_features,
        part.bits,
        part.group_size,
        part.bias,
    )


def _product(part: _Part, choice: KernelChoice, rows: int, preset: str | None = None) -> Product:
    from passes.quantize.kernels import random_linear
    from passes.quantize.product_times import Product

    def make() -> nn.Module:
        if preset is not None and not part.packed:
            return _rounding_linear(choice, preset, bias=part.bias)
        return random_linear(choice, bias=part.bias)

    return Product(_key(part, choice), make, part.count, rows, choice.in_features)


def _head_product(choice: KernelChoice, rows: int) -> Product:
    from passes.quantize.kernels import random_linear
    from passes.quantize.product_times import Product

    return Product(("head", choice.kernel), lambda: random_linear(choice), 1, rows, choice.in_features)


def _rounding_linear(choice: KernelChoice, preset: str, *, bias: bool) -> nn.Module:
    """Return a decompressed layer that rounds its activations with compressed-tensors, as loading leaves it."""
    from compressed_tensors.quantization import (
        QuantizationStatus,
        initialize_module_for_quantization,
        preset_name_to_scheme,
    )

    from passes.quantize.kernels import random_linear

    layer: Any = random_linear(choice, bias=bias)
    initialize_module_for_quantization(layer, preset_name_to_scheme(preset, ["Linear"]))
    for name in [name for name, _ in layer.named_parameters() if name.startswith("weight_")]:
        delattr(layer, name)
    layer.quantization_status = QuantizationStatus.DECOMPRESSED
    module: nn.Module = layer
    return module


def _plain(choice: KernelChoice) -> KernelChoice:
    from passes.quantize.kernels import PLAIN

    return dataclasses.replace(choice, kernel=PLAIN, reason="as it is")


def _tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is getattr(embedding, "weight", None)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
