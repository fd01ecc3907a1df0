"""The decoder layers of a model as looping sees them: which linears they have, and which layers are of one kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from passes.base import PassError
from passes.loop.modeling_looped import TYPE_PREFIX, sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """Sizes of one linear.

    Attributes
    ----------
    out_features, in_features : int
    itemsize : int
        Bytes of one weight.
    """

    out_features: int
    in_features: int
    itemsize: int

    @property
    def parameters(self) -> int:
        """Number of weights, the bias not counted."""
        return self.out_features * self.in_features

    @property
    def rank_parameters(self) -> int:
        """Number of weights that one rank of a delta takes."""
        return self.out_features + self.in_features


@dataclass(frozen=True)
class Structure:
    """A model's decoder layers.

    Attributes
    ----------
    name : str
        Class of the model.
    stack : str
        Dotted name of its list of layers.
    kinds : tuple of str
        Of each layer; layers of equal kind may share weights.
    linears : tuple of mapping
        Of each layer, the shapes of its linears by dotted name, in the layer's order; none where it cannot share.
    unshareable : mapping of int to str
        Layers that cannot share, and why: matrices that are not those of linears.
    layer_parameters : tuple of int
        All parameters of each layer.
    parameters, stored_bytes : int
        Of the whole model as it is saved, each shared tensor once.
    """

    name: str
    stack: str
    kinds: tuple[str, ...]
    linears: tuple[Mapping[str, Shape], ...]
    unshareable: Mapping[int, str]
    layer_parameters: tuple[int, ...]
    parameters: int
    stored_bytes: int

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.kinds)


def find(model: PreTrainedModel) -> Structure:
    """Return a model's structure.

    Parameters
    ----------
    model : PreTrainedModel
        On any device, meta included.

    Raises
    ------
    PassError
        If it is no decoder with a list of layers, is looped already, or is not transformers' own architecture.
    """
    import transformers

    from profilers.attention_capture import decoder_layers
    from profilers.base import ProfilerError
    from profilers.layer_exchange import layer_kinds, layer_linears, unshareable

    name = type(model).__name__
    if getattr(model.config, "quantization_config", None) is not None:
        raise PassError("the model is quantized already (its config has a quantization_config); give the original")
    if str(model.config.model_type).startswith(TYPE_PREFIX):
        raise PassError(f"{name} is looped already; give the original")
    if model.config.is_encoder_decoder:
        raise PassError(f"{name} is an encoder-decoder; loop shares the layers of decoders only")
    if getattr(transformers, name, None) is not type(model):
        raise PassError(
            f"{name} comes with code of its own, and a looped checkpoint is written as a subclass of an architecture "
            "of transformers; give a model that transformers itself knows"
        )
    try:
        stack, layers = decoder_layers(model)
        kinds = layer_kinds(model)
    except ProfilerError as error:
        raise PassError(str(error)) from error
    reasons = {index: reason for index, layer in enumerate(layers) if (reason := unshareable(layer)) is not None}
    linears = tuple(
        {}
        if index in reasons
        else {
            path: Shape(*sizes(linear), linear.get_parameter("weight").element_size())
            for path, linear in layer_linears(layer).items()
        }
        for index, layer in enumerate(layers)
    )
    parameters, stored_bytes = stored(model)
    return Structure(
        name=name,
        stack=stack,
        kinds=kinds,
        linears=linears,
        unshareable=reasons,
        layer_parameters=tuple(sum(item.numel() for item in layer.parameters()) for layer in layers),
        parameters=parameters,
        stored_bytes=stored_bytes,
    )


def stored(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many parameters a model has, and the bytes of all tensors that saving it writes, buffers included."""
    import re

    ignored = [re.compile(pattern) for pattern in (getattr(model, "_keys_to_ignore_on_save", None) or ())]
    parameters = list(model.parameters())  # each shared one once
    held: list[Any] = list(parameters)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if name not in names and not any(pattern.search(name) for pattern in ignored):
            held.append(tensor)
    return sum(item.numel() for item in parameters), sum(item.numel() * item.element_size() for item in held)
