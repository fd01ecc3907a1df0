"""Which layers of a model are quantized, and why the others are not; from shapes alone, so also on the meta device.

Mixture-of-experts blocks, which transformers 5 keeps as 3-D parameters, are listed as the linear layers that
llm-compressor's ``linearize_moe`` turns them into: the same names before and after.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.base import PassError, Skipped
from passes.quantize.parameters import QuantizeParameters
from passes.quantize.schemes import BLOCK, KERNEL_GROUP_SIZES, PREFERRED_GROUP_SIZES

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# Layers that inference engines run as one matrix product, so that they must share one scheme.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)
ROUTERS = ("gate", "router", "shared_expert_gate")
# transformers reads all experts of a checkpoint with one scheme.
EXPERTS_GROUP = "experts"
_NAMED_WEIGHT = r"\bmodule\.(\w+)\.weight\b"
_EXPERT_NAME = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class TargetLayer:
    """A layer to be quantized.

    Attributes
    ----------
    name : str
        Dotted name of the linear module (of an expert: as it will be after linearization).
    kind : str
        Class for reports: the last part of the name, or ``experts``.
    out_features, in_features : int
    group : str
        Layers with the same value must share their scheme (bits and group size); a layer on its own has its name.
    expert : bool
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    group: str
    expert: bool

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Targets:
    """What :func:`find` found, in the model's order."""

    layers: tuple[TargetLayer, ...]
    skipped: tuple[Skipped, ...]

    @property
    def experts(self) -> bool:
        """Whether experts are among the layers."""
        return any(layer.expert for layer in self.layers)


def find(model: PreTrainedModel, parameters: QuantizeParameters) -> Targets:
    """Return the layers that the parameters select.

    Parameters
    ----------
    model : PreTrainedModel
        On any device, meta included; experts fused or linearized.
    parameters : QuantizeParameters

    Raises
    ------
    PassError
        If nothing is left to quantize, if an entry of ``ignore`` matches nothing, or if there are experts in a form
        that cannot be quantized and ``experts=skip`` was not asked for.
    """
    from torch import nn

    head = model.get_output_embeddings()
    shared = shared_weights(model)
    by_name = _initialized_by_name(model) if parameters.kind.packed else frozenset()
    small = KERNEL_GROUP_SIZES[0] if parameters.kind.scales == "group" else 1
    layers: list[TargetLayer] = []
    skipped: list[Skipped] = []
    unused = set(parameters.ignore)
    for name, module in model.named_modules():
        candidates = list(_candidates(name, module, model))
        if not candidates:
            if reason := _unreachable(name, module):
                if parameters.experts != "skip":
                    raise PassError(f"{reason}; leave the experts as they are with experts=skip")
                skipped.append(Skipped(name, f"{reason}; experts=skip was asked for"))
            continue
        for layer in candidates:
            entry = ignored_by(parameters.ignore, layer.name, module)
            if entry is not None:
                unused.discard(entry)
                skipped.append(Skipped(layer.name, f"ignore={entry} was asked for"))
            elif layer.expert and parameters.experts == "skip":
                skipped.append(Skipped(layer.name, "experts=skip was asked for"))
            elif module is head:
                skipped.append(Skipped(layer.name, "output head: its error goes straight into the logits"))
            elif layer.kind in ROUTERS:
                skipped.append(Skipped(layer.name, "router: small, and an error changes which expert runs"))
            elif isinstance(module, nn.Linear) and id(module.weight) in shared:
                skipped.append(Skipped(layer.name, f"shares its weight with {shared[id(module.weight)]}"))
            elif type(module) is not nn.Linear and not layer.expert:
                skipped.append(Skipped(layer.name, f"a {type(module).__name__}: the format holds plain nn.Linear only"))
            elif layer.kind in by_name:
                skipped.append(
                    Skipped(layer.name, "transformers sets its plain weight by name when it reads a checkpoint")
                )
            elif layer.in_features < small and not layer.expert:
                skipped.append(Skipped(layer.name, f"its {layer.in_features} input features are less than one group"))
            else:
                layers.append(layer)
    if unused:
        raise PassError(f"ignore={sorted(unused)[0]} matches no linear layer of the model; correct it or leave it out")
    if not layers:
        why = f": {skipped[0].name} {skipped[0].reason}" if skipped else ""
        raise PassError(
            f"{type(model).__name__} has no layer that scheme={parameters.scheme} could quantize "
            f"({len(skipped)} linear layers are skipped{why}); choose another model or other parameters"
        )
    _check_experts_whole(layers, skipped)
    return Targets(tuple(layers), tuple(skipped))


def _check_experts_whole(layers: list[TargetLayer], skipped: list[Skipped]) -> None:
    """Refuse to leave out some experts: readers of the checkpoint take all of them with one scheme."""
    if not any(layer.expert for layer in layers):
        return
    left_out = [item for item in skipped if _EXPERT_NAME.search(f"{item.name}.")]
    if left_out:
        raise PassError(
            f"{left_out[0].name} would be left out ({left_out[0].reason}) while other experts are quantized, but "
            "readers take all experts of a checkpoint with one scheme; leave all of them out with experts=skip"
        )


def choose_group_size(layers: tuple[TargetLayer, ...], parameters: QuantizeParameters) -> int | None:
    """Return the columns that share a scale; None for schemes with whole rows or blocks.

    Raises
    ------
    PassError
        If a group size that was asked for does not divide every layer's input features (the message names those that
        do), or none does.
    """
    kind = parameters.kind
    widths = {layer.in_features for layer in layers}
    if kind.fixed_group is not None:
        _check_divides(kind.fixed_group, layers, f"scheme={parameters.scheme} has groups of {kind.fixed_group}")
        return kind.fixed_group
    if kind.scales == "block":
        _check_divides(BLOCK, layers, f"scheme={parameters.scheme} scales activations by {BLOCK} columns")
        return None
    if not parameters.takes_group_size or (kind.scales == "row" and parameters.group_size is None):
        return None
    suitable = [size for size in KERNEL_GROUP_SIZES if all(width % size == 0 for width in widths)]
    if parameters.group_size is not None:
        if any(width % parameters.group_size for width in widths):
            odd = next(layer for layer in layers if layer.in_features % parameters.group_size)
            instead = f"use {' or '.join(map(str, suitable))}" if suitable else f"ignore {odd.name}"
            raise PassError(
                f"group_size={parameters.group_size} does not divide the {odd.in_features} input features of "
                f"{odd.name}; {instead}"
            )
        return parameters.group_size
    for size in PREFERRED_GROUP_SIZES:
        if size in suitable:
            return size
    smallest = min(PREFERRED_GROUP_SIZES)
    divides = next((size for size in (16, 8) if all(width % size == 0 for width in widths)), None)
    _check_divides(
        smallest,
        layers,
        "fast kernels take groups of 32, 64 or 128 columns",
        f", or ask for group_size={divides}, which no fast kernel takes" if divides else "",
    )
    return smallest


def _check_divides(size: int, layers: tuple[TargetLayer, ...], why: str, otherwise: str = "") -> None:
    odd = [layer for layer in layers if layer.in_features % size]
    if odd:
        leave_out = "experts=skip" if odd[0].expert else f"ignore=re:.*{odd[0].name.rpartition('.')[2]}$"
        raise PassError(
            f"{why}, which do not divide the {odd[0].in_features} input features of {odd[0].name} "
            f"({len(odd)} such layers); leave them out with {leave_out}, use scheme=fp8{otherwise}"
        )


def _candidates(name: str, module: nn.Module, model: PreTrainedModel) -> Iterator[TargetLayer]:
    """Yield the linear layers that a module is, or that its fused experts stand for."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, Conv1D)):
        rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        expert = _EXPERT_NAME.search(f"{name}.") is not None
        kind = EXPERTS_GROUP if expert else name.rpartition(".")[2]
        group = EXPERTS_GROUP if expert else _fused_group(name, model)
        yield TargetLayer(name, kind, rows, columns, group, expert)
    elif is_fused_experts(module):
        yield from _experts(name, module)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as 3-D parameters in a form that llm-compressor can linearize."""
    has = {key for key, value in module.named_parameters(recurse=False) if value.ndim == 3}
    return "down_proj" in has and bool({"gate_up_proj", "up_proj"} & has) and hasattr(module, "has_gate")


def _experts(name: str, module: nn.Module) -> Iterator[TargetLayer]:
    down: torch.Tensor = module.get_parameter("down_proj")
    count, first, second = down.shape
    out_features, inner = (second, first) if module.is_transposed else (first, second)
    for index in range(count):
        parts = {
            "up_proj": (inner, out_features),
            "gate_proj": (inner, out_features),
            "down_proj": (out_features, inner),
        }
        if not module.has_gate:
            del parts["gate_proj"]
        for part, (rows, columns) in parts.items():
            yield TargetLayer(f"{name}.{index}.{part}", EXPERTS_GROUP, rows, columns, EXPERTS_GROUP, True)


def _unreachable(name: str, module: nn.Module) -> str | None:
    """Say why a module's weights cannot be quantized, where it holds experts in an unknown form."""
    for key, value in module.named_parameters(recurse=False):
        if value.ndim == 3 and "expert" in f"{name} {type(module).__name__}".lower():
            return f"{name}.{key} holds experts of shape {tuple(value.shape)} in a form that cannot be quantized"
    return None


def _initialized_by_name(model: PreTrainedModel) -> frozenset[str]:
    """Return last names of layers whose weight the model's ``_init_weights`` reaches through their parent.

    transformers calls it on every module that a checkpoint did not fill plainly, and a packed layer has no ``weight``.
    """
    from transformers import PreTrainedModel

    own = [base.__dict__["_init_weights"] for base in type(model).__mro__ if "_init_weights" in base.__dict__]
    own = [item for item in own if item is not PreTrainedModel.__dict__["_init_weights"]]
    return frozenset(name for item in own for name in re.findall(_NAMED_WEIGHT, inspect.getsource(item)))


def _fused_group(name: str, model: PreTrainedModel) -> str:
    parent_name, _, part = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    for group in FUSED:
        if part in group and all(hasattr(parent, other) for other in group):
            return f"{parent_name}.{'+'.join(group)}"
    return name


def shared_weights(model: nn.Module) -> dict[int, str]:
    """Return, by id, the weights that more than one module holds, and the first module's name."""
    first: dict[int, str] = {}
    shared: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if id(weight) in first:
            shared[id(weight)] = first[id(weight)]
        first.setdefault(id(weight), name)
    return shared


def ignored_by(entries: tuple[str, ...], name: str, module: nn.Module) -> str | None:
    """Return the first entry of ``ignore`` that matches a layer, None if none does."""
    for entry in entries:
        matched = re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
        if matched or any(base.__name__ == entry for base in type(module).__mro__):
            return entry
    return None
