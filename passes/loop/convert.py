"""Turn a live transformers model into its looped class, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from passes.loop.layout import LoopPlan
from passes.loop.modeling_looped import BLOCKS, LoopedLinear, looped_classes, pack_bits, share_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes.loop.tie import Fitted


def convert(model: PreTrainedModel, plan: LoopPlan, loop: Mapping[str, Any] | None = None) -> None:
    """Give a model and its config their looped classes, and share the blocks of a plan.

    Each block's shared weights are those of its first layer until others are put in place (:func:`fill`).

    Parameters
    ----------
    model : PreTrainedModel
        Of an architecture of transformers. Its config object stays the same one, with another class.
    plan : LoopPlan
    loop : mapping, optional
        What the config's ``loop`` shall be; default: the plan as JSON.
    """
    config_class, model_class = looped_classes(type(model.config), type(model))
    model.config.__class__ = config_class
    model.__class__ = model_class
    model.config.loop = dict(loop or plan.to_json())
    share_blocks(model, model.config.loop)


@torch.no_grad()
def fill(model: PreTrainedModel, plan: LoopPlan, fitted: Mapping[tuple[int, str], Fitted]) -> None:
    """Put fitted weights into a looped model.

    Parameters
    ----------
    model : PreTrainedModel
        Converted with the same plan.
    plan : LoopPlan
    fitted : mapping
        For each block, by number, and each of its linears, by dotted name in a layer.
    """
    parent = model.get_submodule(plan.stack.rpartition(".")[0])
    stack, blocks = model.get_submodule(plan.stack), parent.get_submodule(BLOCKS)
    for number, block in enumerate(plan.blocks):
        for name in block.ranks:
            found = fitted[number, name]
            blocks[number].get_submodule(name).weight.copy_(found.shared)
            sparse = found.sparse or (None,) * len(block.layers)
            for index, delta, own in zip(block.layers, found.deltas, sparse, strict=True):
                layer = stack[index].get_submodule(name)
                assert isinstance(layer, LoopedLinear)
                if delta is not None:
                    layer.delta_out.copy_(delta[0])
                    layer.delta_in.copy_(delta[1])
                if own is not None and layer.delta_values is not None and layer.delta_mask is not None:
                    layer.delta_mask.copy_(pack_bits(own[0]))
                    layer.delta_values.copy_(own[1])


def on_meta(model: PreTrainedModel, plan: LoopPlan) -> PreTrainedModel:
    """Return the looped model of a model on the meta device; the model is left as it is."""
    config_class, model_class = looped_classes(type(model.config), type(model))
    config = config_class.from_dict({**model.config.to_dict(), "loop": plan.to_json()})
    config._attn_implementation_internal = model.config._attn_implementation_internal
    with torch.device("meta"):
        looped: PreTrainedModel = model_class._from_config(config, dtype=model.dtype)
    return looped.to("meta").eval()
