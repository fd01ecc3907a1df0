"""The llm-compressor modifiers that a recipe's parameters stand for, and a GPTQ that does not repeat itself.

Imported only where llm-compressor is known to be there (:func:`passes.quantize.quiet.require_extra`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from pydantic import PrivateAttr
from torch import nn

from passes.base import Skipped
from passes.quantize import schemes
from passes.quantize.parameters import QuantizeParameters
from passes.quantize.smoothing import SpooledAWQ
from passes.quantize.targets import TargetLayer

SMOOTHING_STRENGTH = 0.8  # alpha of SmoothQuant; its authors' choice for LLaMA-like models
EXPERTS_TARGET = r"re:.*\.experts\.\d+\..*"
Layout = tuple[int | None, int | None]
"""Bits of a weight (None: the scheme's), and columns that share a scale (None: whole rows)."""


class InputsDivergedError(Exception):
    """Layers that shared one input in the first sample did not in a later one."""


class SharedGPTQ(GPTQModifier):  # type: ignore[misc]
    """GPTQ that accumulates one Hessian for layers with the same input, and keeps each layer's error.

    ``q_proj``, ``k_proj`` and ``v_proj`` are called with the same tensor, and so are ``gate_proj`` and ``up_proj`` and,
    where every expert is calibrated on every token, those of all experts. Their Hessians are equal; llm-compressor
    computes each. Here the first layer's is used for all, which changes nothing in the result.
    """

    _errors: dict[str, float] = PrivateAttr(default_factory=dict)
    _leaders: dict[nn.Module, nn.Module] = PrivateAttr(default_factory=dict)
    _inputs: dict[nn.Module, Any] = PrivateAttr(default_factory=dict)
    _by_input: dict[int, nn.Module] = PrivateAttr(default_factory=dict)
    _sharing: bool = PrivateAttr(default=True)

    @property
    def errors(self) -> dict[str, float]:
        """||(W - Q) X||^2 / ||W X||^2 by layer."""
        return self._errors

    @property
    def fallbacks(self) -> list[str]:
        """Layers whose Hessian could not be inverted, so that they were rounded to nearest."""
        return list(self._rtn_fallback_module_names)

    def begin_layer(self, *, sharing: bool = True) -> None:
        """Forget what was accumulated for layers that are not yet quantized."""
        self._hessians.clear()
        self._num_samples.clear()
        self._leaders.clear()
        self._sharing = sharing
        self.begin_sample()

    def begin_sample(self) -> None:
        """Forget the inputs of the sample before."""
        self._inputs.clear()
        self._by_input.clear()

    def calibrate_module(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Add a layer's input to its Hessian, unless a layer with the same input has done so."""
        if not self._sharing:
            super().calibrate_module(module, args, output)
            return
        received = args[0]
        leader = self._leaders.get(module)
        if leader is None:
            found = self._by_input.get(id(received))
            leader = found if found is not None and self._inputs[found]() is received else module
            if leader is not module and module not in self._hessians:
                self._hessians[module] = self._hessians[leader]
                self._num_samples[module] = self._num_samples[leader]
            self._leaders[module] = leader
        if leader is module:
            self._inputs[module] = weakref.ref(received)
            self._by_input[id(received)] = module
            super().calibrate_module(module, args, output)
        elif leader not in self._inputs or self._inputs[leader]() is not received:
            raise InputsDivergedError

    def compress_module_list(self, modules: Sequence[nn.Module]) -> None:
        """Quantize layers, and note the relative error of each one's output."""
        # A ratio of two sums over the same Hessian: its scale does not matter, so no normalized copy is made.
        weights = [module.get_parameter("weight") for module in modules]
        before = [(weight.detach().clone(), self._hessians[m]) for weight, m in zip(weights, modules, strict=True)]
        super().compress_module_list(modules)
        for module, (weight, hessian) in zip(modules, before, strict=True):
            rounded = module.get_parameter("weight").detach()
            self._errors[self._module_names[module]] = output_error(weight, rounded, hessian)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return ||(W - Q) X||^2 / ||W X||^2, with X X^T given up to a factor.

    Parameters
    ----------
    weight, rounded : torch.Tensor
        W and Q, shape (out, in).
    hessian : torch.Tensor
        Proportional to X X^T, shape (in, in), float32.
    """
    plain = weight.to(hessian.dtype)
    lost = plain - rounded.to(hessian.dtype)
    whole = float(((plain @ hessian) * plain).sum(dtype=torch.float64))
    return float(((lost @ hessian) * lost).sum(dtype=torch.float64)) / whole if whole > 0 else 0.0


def build(
    parameters: QuantizeParameters,
    layers: Sequence[TargetLayer],
    skipped: Sequence[Skipped],
    layouts: Mapping[str, Layout],
) -> list[Any]:
    """Return the modifiers of a recipe, in the order in which they act.

    Parameters
    ----------
    parameters : QuantizeParameters
    layers : sequence of TargetLayer
        To be quantized.
    skipped : sequence of Skipped
        Linear layers that are not.
    layouts : mapping
        Bits and group size by layer name.
    """
    groups = config_groups(parameters, layers, layouts)
    settings: dict[str, Any] = {"config_groups": groups, "ignore": [item.name for item in skipped]}
    if parameters.kv_cache == "fp8":
        settings["kv_cache_scheme"] = QuantizationArgs(
            num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True
        )
    method = parameters.chosen_method
    if method == "rtn":
        return [QuantizationModifier(**settings)]
    if method == "awq":
        return [SpooledAWQ(), QuantizationModifier(**settings)]
    actorder = None if parameters.actorder == "none" else parameters.actorder
    gptq = SharedGPTQ(**settings, actorder=actorder, dampening_frac=parameters.dampening)
    if method == "smoothquant+gptq":
        return [SmoothQuantModifier(smoothing_strength=SMOOTHING_STRENGTH), gptq]
    return [gptq]


def config_groups(
    parameters: QuantizeParameters, layers: Sequence[TargetLayer], layouts: Mapping[str, Layout]
) -> dict[str, QuantizationScheme]:
    """Return compressed-tensors' ``config_groups``: one for each layout, its layers by name where there are several."""
    by_layout: dict[Layout, list[TargetLayer]] = {}
    for layer in layers:
        by_layout.setdefault(layouts[layer.name], []).append(layer)
    groups = {}
    for index, ((bits, group_size), members) in enumerate(sorted(by_layout.items(), key=str)):
        if len(by_layout) == 1:
            targets = ["Linear"]
        else:
            targets = [layer.name for layer in members if not layer.expert]
            if any(layer.expert for layer in members):
                targets.append(EXPERTS_TARGET)
        groups[f"group_{index}"] = _scheme(parameters, targets, bits, group_size)
    return groups


def _scheme(
    parameters: QuantizeParameters, targets: list[str], bits: int | None, group_size: int | None
) -> QuantizationScheme:
    name = schemes.preset(parameters.scheme)
    if name is not None:
        return preset_name_to_scheme(name, targets)
    arguments = schemes.weight_arguments(
        parameters.scheme, bits=bits, group_size=group_size, symmetric=parameters.symmetric
    )
    return QuantizationScheme(targets=targets, weights=QuantizationArgs(**arguments))
