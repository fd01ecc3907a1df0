"""A decoder some of whose layers run with the same linear weights, each stored once.

::

    model.layers.0 … 3     norms, biases and a LoopedLinear in the place of every shared linear
    model.looped_blocks.0  the linears of layers 0 and 1, once       W
    model.looped_blocks.1  the linears of layers 2 and 3, once

    LoopedLinear of a layer:  y = W x + B (A x) + S x + bias         A: delta_in, B: delta_out, the layer's own
                              S: delta_values in the entries whose bit in delta_mask is set, zero elsewhere

A LoopedLinear looks its shared linear up by name when it runs, so whoever replaces that module (a quantizer, a kernel)
replaces it for every layer of the block. Attention, norms and the index into the KV cache stay the layer's own.

The config's ``loop`` says which layers share, at which rank each layer's own part is, and how many entries S has::

    {"format": "effcli.loop/1", "stack": "model.layers", "layers": 4,
     "blocks": [{"layers": [0, 1], "ranks": {"self_attn.q_proj": [8, 8], …}}, …], …}
                                   "sparse": {"self_attn.q_proj": [0, 1024], …}: only where there are any

Needs torch and transformers only; a checkpoint holds this file with the classes of its architecture added at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers import initialization as init

FORMAT = "effcli.loop/1"
FILE = "modeling_looped.py"
PREFIX = "Looped"
TYPE_PREFIX = "looped_"
BLOCKS = "looped_blocks"
_ADDED = "\n# --- the classes of this checkpoint ---\n"


class LoopedLinear(nn.Module):
    """A layer's linear: the block's shared weight, the layer's own low-rank and sparse parts and its own bias.

    Parameters
    ----------
    parent : nn.Module
        Module that holds the shared linear. It is not registered here: its weights belong to the block.
    name : str
        Of the shared linear in ``parent``.
    own : nn.Module
        The linear that this one replaces; its bias is kept.
    rank : int
        Of the layer's own low-rank part; 0 for none.
    sparse : int
        Entries of the layer's own sparse part; 0 for none.
    """

    delta_mask: torch.Tensor | None
    dense: torch.Tensor | None

    def __init__(self, parent: nn.Module, name: str, own: nn.Module, rank: int, sparse: int = 0) -> None:
        super().__init__()
        self._block = (parent, name)
        weight, bias = own.get_parameter("weight"), getattr(own, "bias", None)
        self.out_features, self.in_features = sizes(own)
        self.rank = rank
        like: Any = {"dtype": weight.dtype, "device": weight.device}
        if rank:
            self.delta_in = nn.Parameter(torch.empty(rank, self.in_features, **like))
            self.delta_out = nn.Parameter(torch.empty(self.out_features, rank, **like))
        else:
            self.register_parameter("delta_in", None)
            self.register_parameter("delta_out", None)
        self.delta_values = nn.Parameter(torch.empty(sparse, **like)) if sparse else None
        self.register_buffer("delta_mask", None)
        if sparse:
            entries = torch.arange(self.out_features * self.in_features, device=weight.device)
            self.delta_mask = pack_bits(entries < sparse)
        self.reset()
        self.register_buffer("dense", None, persistent=False)
        self.bias = bias

    @property
    def shared(self) -> nn.Module:
        """The block's linear, as it is now."""
        parent, name = self._block
        shared: nn.Module = getattr(parent, name)
        return shared

    def reset(self) -> None:
        """Make the layer's own parts zero in effect, the low-rank one random."""
        if self.delta_in is not None:
            init.normal_(self.delta_in, std=self.in_features**-0.5)
            init.zeros_(self.delta_out)
        if self.delta_values is not None:
            init.zeros_(self.delta_values)

    def sparse(self) -> torch.Tensor:
        """Return the sparse part unpacked, shape (out_features, in_features)."""
        assert self.delta_values is not None and self.delta_mask is not None
        mask = unpack_bits(self.delta_mask, self.out_features * self.in_features)
        entries = torch.zeros(len(mask), dtype=self.delta_values.dtype, device=mask.device)
        return entries.masked_scatter(mask, self.delta_values).view(self.out_features, self.in_features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return ``W x + B (A x) + S x + bias``, shape (..., out_features)."""
        shared = self.shared
        if self.dense is not None and not self.training:
            return self._with_low_rank(F.linear(inputs, self.dense), inputs)
        if self.delta_values is not None and _can_merge(shared, inputs):
            return self._with_low_rank(F.linear(inputs, shared.get_parameter("weight") + self.sparse()), inputs)
        output: torch.Tensor = shared(inputs)
        if output.device != inputs.device:
            output = output.to(inputs.device)
        return self.with_own(output, inputs)

    @torch.no_grad()
    def unpack(self) -> None:
        """Hold W + S as one matrix from now on, if S is there and W is not quantized: faster, in more memory.

        It is of the weights as they are, not saved, and not used in training.
        """
        if self.delta_values is not None and _can_merge(self.shared, self.delta_values):
            self.dense = self.shared.get_parameter("weight") + self.sparse()

    def with_own(self, output: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return ``W x`` with the layer's own parts and bias added."""
        if self.delta_values is not None:
            output = output + F.linear(inputs, self.sparse())
        return self._with_low_rank(output, inputs)

    def _with_low_rank(self, output: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        if self.delta_in is not None:
            return output + F.linear(F.linear(inputs, self.delta_in), self.delta_out, self.bias)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Return sizes, for printing."""
        own = f", sparse={len(self.delta_values)}" if self.delta_values is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{own}"


def _can_merge(shared: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether a linear's weight may be used without calling it: nobody watches the call or has replaced it."""
    watched = shared._forward_hooks or shared._forward_pre_hooks or "forward" in vars(shared)
    return type(shared) is nn.Linear and not watched and shared.get_parameter("weight").device == inputs.device


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask, of any shape, as uint8 with eight entries each, the first in the lowest bit."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) * _bits(mask)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, entries: int) -> torch.Tensor:
    """Return the mask that was packed, shape (entries,)."""
    return ((packed[:, None] & _bits(packed)) != 0).flatten()[:entries]


def _bits(like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=like.device)


class LoopedModelMixin:
    """What makes a transformers model a looped one; goes before the architecture's class."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        share_blocks(self, config.loop)

    def unpack(self) -> None:
        """Hold the weights of layers with sparse parts unpacked: the original's speed, in the original's memory."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, LoopedLinear):
                module.unpack()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LoopedLinear):
            module.reset()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, with the modelling file beside the weights."""
        self.config.auto_map = auto_map(type(self))  # type: ignore[attr-defined]
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / FILE).write_text(modelling_source(type(self)), encoding="utf-8")
        return saved


def share_blocks(model: Any, loop: Any) -> None:
    """Turn a model that was just built into the looped one, in place.

    Each shared linear takes the weight of its block's first layer; the layers' own parts are zero in effect.

    Parameters
    ----------
    model : PreTrainedModel
    loop : dict
        The config's ``loop``.

    Raises
    ------
    ValueError
        If the plan is missing, of another format, or not of this model.
    """
    if not isinstance(loop, dict) or loop.get("format") != FORMAT:
        found = loop.get("format") if isinstance(loop, dict) else loop
        raise ValueError(f"the config's 'loop' has format {found!r}; this code reads {FORMAT!r}")
    stack = model.get_submodule(loop["stack"])
    if len(stack) != loop["layers"]:
        raise ValueError(f"the config's 'loop' is of {loop['layers']} layers, the model has {len(stack)}")
    blocks = nn.ModuleList()
    for block in loop["blocks"]:
        members, ranks, sparse = block["layers"], block["ranks"], block.get("sparse", {})
        container = nn.Module()
        for name in ranks:
            where, _, last = name.rpartition(".")
            parent = _descend(container, where)
            parent.add_module(last, _without_bias(stack[members[0]].get_submodule(name)))
            entries = sparse.get(name, [0] * len(members))
            for index, rank, count in zip(members, ranks[name], entries, strict=True):
                holder = stack[index].get_submodule(where)
                setattr(holder, last, LoopedLinear(parent, last, holder.get_submodule(last), rank, count))
        blocks.append(container)
    model.get_submodule(loop["stack"].rpartition(".")[0]).add_module(BLOCKS, blocks)


def _descend(module: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path, making what is missing."""
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Return output and input features of an ``nn.Linear`` or of transformers' transposed ``Conv1D``."""
    first, second = linear.get_parameter("weight").shape
    return (first, second) if isinstance(linear, nn.Linear) else (second, first)


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Return the weight of an ``nn.Linear`` or a ``Conv1D``, shape (out_features, in_features)."""
    weight = linear.get_parameter("weight")
    return weight if isinstance(linear, nn.Linear) else weight.t()


def _without_bias(linear: nn.Module) -> nn.Linear:
    """Return a plain linear with this one's weight."""
    outputs, inputs = sizes(linear)
    weight = linear.get_parameter("weight")
    plain = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=weight.dtype)
    plain.weight = nn.Parameter(weight_of(linear).detach().contiguous(), requires_grad=weight.requires_grad)
    return plain


_made: dict[type, tuple[type, type]] = {}


def looped_classes(config_class: type, model_class: type) -> tuple[Any, Any]:
    """Return the looped config and model class of an architecture; always the same for the same one.

    Parameters
    ----------
    config_class : type of PreTrainedConfig
        ``LlamaConfig``
    model_class : type of PreTrainedModel
        ``LlamaForCausalLM``

    Returns
    -------
    config_class, model_class : type
        ``LoopedLlamaConfig`` with model_type ``looped_llama``, and ``LoopedLlamaForCausalLM``.
    """
    if model_class not in _made:
        config = type(
            PREFIX + config_class.__name__,
            (config_class,),
            {
                "__module__": __name__,
                "__doc__": f"A {config_class.__name__} with a plan of which layers share their linears.",
                "__annotations__": {"loop": "dict | None"},
                "loop": None,
                "model_type": TYPE_PREFIX + config_class.model_type,  # type: ignore[attr-defined]
                # Splitting a layer's linears over devices would need the shared ones split alike.
                "base_model_tp_plan": None,
                "base_model_pp_plan": None,
            },
        )
        model = type(
            PREFIX + model_class.__name__,
            (LoopedModelMixin, model_class),
            {
                "__module__": __name__,
                "__doc__": f"A {model_class.__name__} whose blocks are stored once.",
                "config_class": config,
            },
        )
        _made[model_class] = config, model
    return _made[model_class]


def register(config_class: Any, model_class: Any) -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know two looped classes; again is no error."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def architecture(model_class: type) -> tuple[type, type]:
    """Return the config and the model class that a looped model class was made from."""
    for config, model in _made.values():
        if issubclass(model_class, model):  # transformers may put a class of its own in between
            return config.__bases__[0], model.__bases__[1]
    raise TypeError(f"{model_class.__name__} was not made by looped_classes")


def auto_map(model_class: type) -> dict[str, str]:
    """Return what makes transformers take the classes from the checkpoint's own file."""
    module = FILE.removesuffix(".py")
    return {
        "AutoConfig": f"{module}.{model_class.config_class.__name__}",  # type: ignore[attr-defined]
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }


def modelling_source(model_class: type) -> str:
    """Return the text of a checkpoint's own modelling file: this module, and the classes of its architecture."""
    config, model = (base.__name__ for base in architecture(model_class))
    common = Path(__file__).read_text(encoding="utf-8").split(_ADDED)[0].rstrip("\n")
    return (
        f"{common}\n{_ADDED}from transformers import {config}, {model}  # noqa: E402\n\n"
        f"{PREFIX}{config}, {PREFIX}{model} = looped_classes({config}, {model})\n"
    )
