"""AWQ and SmoothQuant, which move scales between a norm and the layers that it feeds: bounded in memory, and checked.

Imported only where llm-compressor is known to be there (:func:`passes.quantize.quiet.require_extra`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from pydantic import PrivateAttr
from torch import nn
from transformers import PreTrainedModel

from passes.base import PassError
from passes.quantize.spool import Spool

PROBE_TOKENS = 16


class SpooledAWQ(AWQModifier):  # type: ignore[misc]
    """AWQ whose cached inputs and reference outputs lie on disk, so that memory does not grow with the samples."""

    _folder: Path = PrivateAttr()
    _device: torch.device = PrivateAttr()
    _searching: bool = PrivateAttr(default=False)

    def keep_in(self, folder: Path, device: torch.device) -> None:
        """Say where cached values go, and on which device they are needed."""
        self._folder = folder
        self._device = device

    def _setup_activation_cache_hooks(self) -> None:
        super()._setup_activation_cache_hooks()
        for index, module in enumerate(list(self._parent_args_cache)):
            self._parent_args_cache[module] = _Arguments(Spool(self._folder / f"inputs-{index}"), self._device)

    def _run_samples(self, module: nn.Module) -> Sequence[torch.Tensor]:
        outputs = _Outputs(module, self._parent_args_cache[module])
        if self._searching:
            return outputs  # consumed once, before the weights change again
        reference = _Arguments(Spool(self._folder / "reference"), self._device)
        for output in outputs:
            reference.append({"output": output})
        return _Reference(reference)

    def _compute_best_scale(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._searching = True
        try:
            best: torch.Tensor = super()._compute_best_scale(*args, **kwargs)
        finally:
            self._searching = False
        return best


class _Arguments:
    """What llm-compressor's ``IntermediatesCache`` is to AWQ, on disk."""

    def __init__(self, spool: Spool, device: torch.device) -> None:
        spool.delete(("arguments",))
        self._spool = spool
        self._device = device
        self._count = 0

    def append(self, values: Mapping[str, Any]) -> None:
        self._spool.write(self._count, {"arguments": dict(values)})
        self._count += 1

    def fetch(self, index: int) -> dict[str, Any]:
        values: dict[str, Any] = self._spool.read(index, ("arguments",), self._device)["arguments"]
        return values

    def pin_memory(self, index: int) -> None:
        """Do nothing: values come through a memory map."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.fetch(index) for index in range(self._count))

    def __len__(self) -> int:
        return self._count


class _Outputs(Sequence[torch.Tensor]):
    """A module's output for each sample, computed when it is asked for."""

    def __init__(self, module: nn.Module, arguments: _Arguments) -> None:
        self._module = module
        self._arguments = arguments

    def __len__(self) -> int:
        return len(self._arguments)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        output = self._module(**self._arguments.fetch(index))
        return output[0] if isinstance(output, tuple) else output


class _Reference(Sequence[torch.Tensor]):
    """Outputs that were computed before."""

    def __init__(self, outputs: _Arguments) -> None:
        self._outputs = outputs

    def __len__(self) -> int:
        return len(self._outputs)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._outputs.fetch(index)["output"]


@torch.no_grad()
def check_identity(model: PreTrainedModel, modifiers: Sequence[Any], ids: torch.Tensor) -> None:
    """Refuse mappings that would change what the model computes.

    Norms are divided, and the layers said to read them multiplied, by powers of two, which is exact in floating point:
    if the mappings are right, what comes out is the same to the bit. llm-compressor guesses mappings from names. Where
    something else reads the norm too (a router), or the norm is another one (Gemma's), smoothing would destroy the
    model.

    Parameters
    ----------
    model : PreTrainedModel
        With quantization disabled; unchanged afterwards, to the bit.
    modifiers : sequence of Modifier
        After the start of calibration, when mappings are resolved.
    ids : torch.Tensor
        Token ids, shape (1, T), on the model's device.

    Raises
    ------
    PassError
        If no mapping was found, or they change the logits.
    """
    mappings = [mapping for modifier in modifiers for mapping in _mappings(modifier)]
    name = type(model).__name__
    if not mappings:
        raise PassError(f"llm-compressor knows no norm of {name} that could be smoothed; use method=gptq")
    with HooksMixin.disable_hooks():
        before = _hidden(model, ids)
        _scale(mappings, inverse=False)
        after = _hidden(model, ids)
        _scale(mappings, inverse=True)
    if not torch.equal(before, after):
        raise PassError(
            f"llm-compressor's guess of which norms of {name} feed which layers is wrong: smoothing them would change "
            "what the model computes; use method=gptq"
        )


def _hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _mappings(modifier: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    if isinstance(modifier, SmoothQuantModifier):
        return [(item.smooth_layer, item.balance_layers) for item in modifier.resolved_mappings_]
    if isinstance(modifier, AWQModifier):
        return [(item.smooth_layer, item.balance_layers) for item in modifier._resolved_mappings]
    return []


def _scale(mappings: Sequence[tuple[nn.Module, list[nn.Module]]], *, inverse: bool) -> None:
    for smooth, balance in mappings:
        width = balance[0].get_parameter("weight").shape[-1]
        exponents = torch.arange(width, device=smooth.get_parameter("weight").device) % 3 - 1
        factors = torch.exp2(exponents if inverse else -exponents).to(smooth.get_parameter("weight").dtype)
        for key, tensor in smooth.named_parameters(recurse=False):
            if key in ("weight", "bias"):
                part = tensor.data[-width:]
                part.mul_(factors.view(-1, *[1] * (tensor.ndim - 1)))
        for layer in balance:
            layer.get_parameter("weight").data.div_(factors)
