"""Second moments of what linears are given, over calibration text: E[x xᵀ], streamed.

Memory is one matrix (in, in) in float32 for each distinct input, however much text there is: linears that are called
with one and the same tensor (q, k and v; gate and up) share one. Layers can be taken a few at a time where all would
not fit; each such part is one more run over the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from passes.base import PassError
from passes.loop.targets import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from profilers.base import Task

MOMENT_BYTES = 4
Key = tuple[int, str]
"""A layer's index and the dotted name of a linear in it."""


class _Enough(Exception):
    """Every layer that is watched has run."""


@dataclass
class Moments:
    """Second moments by layer and linear.

    Attributes
    ----------
    sums : dict
        Σ x xᵀ, shape (in, in), float32, by the first linear of each distinct input.
    leaders : dict
        For each linear, the one whose sum is its own too.
    tokens : int
    """

    sums: dict[Key, torch.Tensor] = field(default_factory=dict)
    leaders: dict[Key, Key] = field(default_factory=dict)
    tokens: int = 0

    def of(self, layer: int, name: str) -> torch.Tensor:
        """Return E[x xᵀ] of a linear, shape (in, in), float64, where it was summed if there is float64."""
        return exact(self.sums[self.leaders[layer, name]]) / self.tokens

    def permute(self, layer: int, name: str, order: torch.Tensor, signs: torch.Tensor) -> None:
        """Put the inputs of a linear, which no other one reads, in another order and under other signs."""
        key = self.leaders[layer, name]
        self.sums[key] = permuted(self.sums[key], order, signs)


def permuted(moment: torch.Tensor, order: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return E[x xᵀ], (n, n), with x in another order and under other signs, (n,) each."""
    where, sign = order.to(moment.device), signs.to(moment)
    return moment[where][:, where] * sign[:, None] * sign


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64: on its device, or on the CPU where the device has none."""
    return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).double()


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    structure: Structure,
    layers: Sequence[int],
    batches: Sequence[torch.Tensor],
    task: Task | None = None,
) -> Moments:
    """Run text through a model and return the second moments of the inputs of some layers' linears.

    Parameters
    ----------
    model : PreTrainedModel
    structure : Structure
    layers : sequence of int
        What follows the last of them is not run.
    batches : sequence of torch.Tensor
        Token ids, shape (B, T) each.
    task : Task, optional
        Advanced by one a batch.

    Raises
    ------
    PassError
        If a linear is not called for every token, or its inputs are not finite.
    """
    found = Moments()
    stack = model.get_submodule(structure.stack)
    wanted = sorted(layers)
    latest: list[tuple[torch.Tensor, Key]] = []  # holds the tensor, so that no other gets its identity
    seen: dict[Key, int] = {}

    def watch(key: Key) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs = args[0]
            rows = inputs.reshape(-1, inputs.shape[-1])
            seen[key] = seen.get(key, 0) + rows.shape[0]
            if key not in found.leaders:
                same = latest[0][1] if latest and latest[0][0] is inputs else key
                found.leaders[key] = same
                if same == key:
                    found.sums[key] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            if found.leaders[key] == key:
                latest[:] = [(inputs, key)]
                rows = rows.float()
                found.sums[key].addmm_(rows.t(), rows)

        return hook

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Enough

    handles = [stack[wanted[-1]].register_forward_hook(stop)]
    try:
        for index in wanted:
            for name in structure.linears[index]:
                handles.append(stack[index].get_submodule(name).register_forward_pre_hook(watch((index, name))))
        for batch in batches:
            latest.clear()
            with contextlib.suppress(_Enough):
                model.base_model(input_ids=batch.to(model.device), use_cache=False)
            found.tokens += batch.numel()
            if task is not None:
                task.advance()
    finally:
        for handle in handles:
            handle.remove()
    for index in wanted:
        for name in structure.linears[index]:
            if seen.get((index, name)) != found.tokens:
                raise PassError(
                    f"{structure.stack}.{index}.{name} ran on {seen.get((index, name), 0)} of {found.tokens} tokens, "
                    "so its inputs cannot be fitted; give init=average"
                )
    for (index, name), total in found.sums.items():
        if not bool(torch.isfinite(total.sum())):
            raise PassError(f"the inputs of {structure.stack}.{index}.{name} are not finite; the source is damaged")
    return found


def moment_bytes(structure: Structure, layer: int) -> int:
    """Return the bytes that one layer's moments take at most: one matrix a linear."""
    return sum(MOMENT_BYTES * shape.in_features**2 for shape in structure.linears[layer].values())
