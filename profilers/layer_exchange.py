"""Run a model with some layers' weights exchanged or some layers skipped, and leave it exactly as it was.

::

    layer_linears(layer)                 the matrices that layers may share
    unshareable(layer)                   why a layer cannot share: matrices that are no linear's
    layer_kinds(model)                   which layers are alike enough to share
    with_weights_of(model, {5: 4})       layer 5 runs with the matrices of layer 4, its own norms and biases
    skipping(model, (5,))                layer 5 passes its input on

Only references change hands: no weight is copied or written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from profilers.attention_capture import decoder_layers
from profilers.base import ProfilerError
from profilers.weights import PACKED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES_LISTED = 4
"""Matrices that a reason names, at most."""


def layer_linears(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a decoder layer by dotted name, in the order of its modules.

    ``nn.Linear`` and GPT-2's ``Conv1D`` (whose weight has its inputs first), as long as they hold their weight as a
    floating-point parameter.
    """
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and _holds_weight(module)
    }


def _holds_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.is_floating_point() and weight.itemsize > 1


def unshareable(layer: nn.Module) -> str | None:
    """Return why a layer cannot share its weights with another, None if it can.

    It cannot when it holds matrices, parameters of two or more dimensions, that are not the weight of one of its linear
    layers: fused experts, a router, a convolution, a state-space matrix, weights in packed form.
    """
    linears = layer_linears(layer)
    own = {f"{name}.weight" for name in linears}
    found = [
        f"{name} ({_shape(parameter)})"
        for name, parameter in layer.named_parameters(remove_duplicate=False)
        if parameter.dim() >= 2 and name not in own
    ]
    packed = [f"{name} (packed)" for name, module in layer.named_modules() if getattr(module, PACKED, 0)]
    if found or packed:
        names = found + packed
        more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
        return f"not the weight of a linear layer: {', '.join(names[:NAMES_LISTED])}{more}"
    return None if linears else "it has no linear layers"


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape)


def layer_kinds(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the kind of each decoder layer.

    Layers of one kind may share weights, provided that none of them is :func:`unshareable`: they have the same class,
    the same type of attention (``layer_types`` of the config, and whether it rotates positions, where the config says
    so), and linear layers of the same names and shapes.
    """
    config: Any = model.config.get_text_config(decoder=True)
    types, rotary = getattr(config, "layer_types", None), getattr(config, "no_rope_layers", None)
    kinds = []
    for index, layer in enumerate(decoder_layers(model)[1]):
        parts = [type(layer).__name__]
        if types and index < len(types):
            parts.append(str(types[index]))
        if rotary and index < len(rotary):
            parts.append("rotary positions" if rotary[index] else "no positions")
        parts += [f"{name} {_shape(linear.weight)}" for name, linear in _weighted(layer).items()]
        kinds.append(", ".join(parts))
    return tuple(kinds)


def _weighted(layer: nn.Module) -> dict[str, Any]:
    return dict(layer_linears(layer))


@contextlib.contextmanager
def with_weights_of(model: PreTrainedModel, sources: Mapping[int, int]) -> Iterator[None]:
    """Run layers with the linear weights of others; norms, biases and everything else stay their own.

    Parameters
    ----------
    model : PreTrainedModel
    sources : mapping of int to int
        By index of a layer, the index of the layer whose weights it takes. All are exchanged at once:
        ``{0: 1, 1: 0}`` swaps two layers.

    Raises
    ------
    ProfilerError
        If an index is not a layer's, a layer is :func:`unshareable`, two layers are of different kinds, or weights are
        kept elsewhere (offloaded).
    """
    check_shareable(model, [(index, other) for index, other in sources.items()])
    stack = decoder_layers(model)[1]
    replacements = {
        index: {name: linear.weight for name, linear in _weighted(stack[other]).items()}
        for index, other in sources.items()
    }
    with replaced_weights(model, replacements):
        yield


@contextlib.contextmanager
def replaced_weights(model: PreTrainedModel, replacements: Mapping[int, Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """Run layers with other linear weights.

    Parameters
    ----------
    model : PreTrainedModel
    replacements : mapping of int to mapping of str to torch.Tensor
        By index of a layer and name of its linear, the weight to use, of the same shape, dtype and device.
    """
    stack = decoder_layers(model)[1]
    before: list[tuple[nn.Module, nn.Parameter | None]] = []
    try:
        for index, weights in replacements.items():
            linears = layer_linears(stack[index])
            for name, weight in weights.items():
                linear = linears[name]
                before.append((linear, linear._parameters["weight"]))
                own = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
                linear._parameters["weight"] = own
        yield
    finally:
        for linear, parameter in before:
            linear._parameters["weight"] = parameter


def check_shareable(model: PreTrainedModel, groups: Sequence[Sequence[int]]) -> None:
    """Refuse groups of layers that cannot run with one set of weights.

    Raises
    ------
    ProfilerError
        If an index is not a layer's, a layer is :func:`unshareable`, two layers of a group are of different kinds, or
        weights are kept elsewhere (offloaded).
    """
    stack = decoder_layers(model)[1]
    check_layers(model, [index for group in groups for index in group])
    kinds = layer_kinds(model)
    for group in groups:
        for index in group:
            reason = unshareable(stack[index])
            if reason is not None:
                raise ProfilerError(f"layer {index} cannot share weights: {reason}")
            if kinds[index] != kinds[group[0]]:
                raise ProfilerError(
                    f"layers {group[0]} and {index} cannot share weights: they are of different kinds "
                    f"({_difference(kinds[group[0]], kinds[index])})"
                )
            if any(linear.weight.is_meta for linear in _weighted(stack[index]).values()):
                raise ProfilerError(f"the weights of layer {index} are not on the device; load the model where it fits")


def _difference(kind: str, other: str) -> str:
    """Return what only one of two kinds has, in few words."""
    parts, others = kind.split(", "), other.split(", ")
    own = [part for part in parts if part not in others][:NAMES_LISTED]
    theirs = [part for part in others if part not in parts][:NAMES_LISTED]
    return f"{', '.join(own) or 'nothing'} against {', '.join(theirs) or 'nothing'}"


def check_layers(model: PreTrainedModel, indices: Sequence[int]) -> None:
    """Refuse indices that are not those of decoder layers.

    Raises
    ------
    ProfilerError
    """
    count = len(decoder_layers(model)[1])
    for index in indices:
        if not 0 <= index < count:
            raise ProfilerError(f"there is no layer {index}; the model has layers 0 to {count - 1}")


@contextlib.contextmanager
def skipping(model: PreTrainedModel, indices: Sequence[int]) -> Iterator[None]:
    """Run the model as if some layers passed their input on unchanged.

    The layers are computed and what they would add is dropped, so that caches, and whatever else later layers read of
    them, stay in step.

    Parameters
    ----------
    model : PreTrainedModel
    indices : sequence of int

    Raises
    ------
    ProfilerError
        If an index is not a layer's.
    """
    check_layers(model, indices)
    stack = decoder_layers(model)[1]
    handles = []
    try:
        for index in dict.fromkeys(indices):
            handles.append(stack[index].register_forward_hook(_pass_on, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_on(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return with_states(output, layer_input(args, kwargs))


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states that a layer was called with."""
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def layer_output(output: Any) -> torch.Tensor:
    """Return the hidden states in what a layer returned."""
    states: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return states


def with_states(output: Any, states: torch.Tensor) -> Any:
    """Return what a layer returned with other hidden states in it."""
    return states if isinstance(output, torch.Tensor) else (states, *output[1:])
