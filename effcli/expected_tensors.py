"""Which tensors a checkpoint of a model must hold, by name and shape, from the model on the meta device.

::

    state dict on meta ──> transformers' renaming for saving, undone conversions ──> names as on disk
                           (fused experts -> one tensor an expert and matrix)
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = "experts"


@dataclass(frozen=True)
class Expected:
    """One tensor that must be on disk.

    Attributes
    ----------
    shape : tuple of int
    linear : bool
        Whether it is the weight of a linear layer, an expert's included, and so could be quantized.
    modules : tuple of str
        Names of its module in the live model, where these differ from the name on disk.
    twins : frozenset of str
        Tensors that share its storage; one of them is enough.
    optional : bool
        Whether transformers leaves it out when it saves.
    """

    shape: tuple[int, ...]
    linear: bool
    modules: tuple[str, ...] = ()
    twins: frozenset[str] = frozenset()
    optional: bool = False


def expected_tensors(model: PreTrainedModel) -> dict[str, Expected]:
    """Return the tensors that a checkpoint of ``model`` holds, by name on disk.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    on_disk = revert_weight_conversion(model, dict(state))
    modules = dict(model.named_modules())
    twins = _twins(model)
    ignored = [re.compile(pattern) for pattern in (getattr(model, "_keys_to_ignore_on_save", None) or ())]
    origins = _origins(model, state, on_disk)
    expected: dict[str, Expected] = {}
    for name, tensor in on_disk.items():
        origin = origins.get(name, name)
        module = origin.rpartition(".")[0]
        linear = name.endswith(".weight") and isinstance(modules.get(module), torch.nn.Linear)
        linear = linear or (EXPERTS in origin.split(".") and tensor.ndim >= 2)
        expected[name] = Expected(
            shape=tuple(tensor.shape),
            linear=linear,
            modules=() if origin == name else (module,),
            twins=twins.get(name, frozenset()),
            optional=any(pattern.search(name) for pattern in ignored),
        )
    return expected


def _twins(model: PreTrainedModel) -> dict[str, frozenset[str]]:
    """Return, for each tensor that shares its storage, the names of the others."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: frozenset(group) - {name} for group in groups.values() if len(group) > 1 for name in group}


def _origins(model: PreTrainedModel, state: dict[str, Any], on_disk: dict[str, Any]) -> dict[str, str]:
    """Return the live tensor's name for each name on disk that differs from it."""
    from transformers.core_model_loading import revert_weight_conversion

    origins = {}
    for name, tensor in state.items():
        if name not in on_disk:
            for renamed in revert_weight_conversion(model, {name: tensor}):
                origins[renamed] = name
    return origins
