"""Mixed bits to a budget: how much each group of layers matters, and the exact allocation that follows.

::

    calibration text ── model as it is ───────────────────────────── final states ─┐
          │                                                                        ├─ KL(model || changed), nats a token
          └── blocks before the changed one: not run again ── one group rounded ───┘
                                                                       │
      KL of one layout, scaled to the others by their weighted squared error ──> passes.quantize.allocation.solve

What the figures capture and what they do not: ``docs/passes/mixed-bits.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import PassContext, PassError
from passes.quantize import allocation
from passes.quantize.schemes import PREFERRED_GROUP_SIZES, stored_bits, weight_arguments

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from passes.quantize.parameters import QuantizeParameters
    from passes.quantize.targets import TargetLayer
    from profilers.base import Progress
    from profilers.reference import Head

WINDOWS = 8
WINDOW_LENGTH = 64
"""Tokens; the first of a window are predicted from little, so they weigh what they do in a short prompt."""
FILE = "sensitivity.json"
FORMAT = 1
SHAPE_BITS = 2 * 64
"""Of ``weight_shape``, two int64 beside each packed weight."""
IDENTICAL_KL = 1e-9
"""Nats a token; a model that skips unchanged blocks and changes nothing may be this far from itself."""

_Layout = tuple[int, int | None]


@dataclass(frozen=True)
class LayerChoice:
    """How one layer is to be stored."""

    bits: int
    group_size: int | None


@dataclass(frozen=True)
class GroupSensitivity:
    """What was measured for layers that are stored alike, and what they got.

    Attributes
    ----------
    name : str
    layers : tuple of str
    parameters : int
    measured_kl : float
        KL divergence from the unchanged model in nats a token, with only these layers rounded to ``measured_as``.
    measured_as : LayerChoice
    choices : tuple of Choice
        Every layout with its stored bits and predicted loss in nats a token.
    chosen : int
        Index into ``choices``.
    """

    name: str
    layers: tuple[str, ...]
    parameters: int
    measured_kl: float
    measured_as: LayerChoice
    choices: tuple[allocation.Choice, ...]
    chosen: int


@dataclass(frozen=True)
class Allocation:
    """The bits of every layer.

    Attributes
    ----------
    choices : dict
        By layer name.
    bits_per_parameter : float
        Stored, scales included, over the layers of ``choices``.
    predicted_loss : float
        Sum of the losses of the layouts chosen, in nats a token: rounded to nearest, as if losses added up.
    table : tuple of GroupSensitivity
        In the model's order.
    tokens : int
        Of calibration text that sensitivities were measured on.
    seconds : float
        Time of measuring; what an earlier run had measured not counted.
    notes : tuple of str
    """

    choices: dict[str, LayerChoice]
    bits_per_parameter: float
    predicted_loss: float
    table: tuple[GroupSensitivity, ...]
    tokens: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def layouts(self) -> dict[str, tuple[int, int | None]]:
        """(bits, group size) by layer name."""
        return {name: (choice.bits, choice.group_size) for name, choice in self.choices.items()}

    def plain(self) -> dict[str, Any]:
        """Return everything but the layers' choices, which the table implies, as JSON-ready data."""
        data = asdict(self)
        del data["choices"]
        return data


def allocate(
    model: PreTrainedModel,
    parameters: QuantizeParameters,
    context: PassContext,
    layers: Sequence[TargetLayer],
) -> Allocation:
    """Measure what rounding each group of layers costs, and choose the bits of each to meet ``parameters.bits``.

    The model is left as it was. What was measured is kept in ``context.work`` and not measured again for the same
    weights, text and layouts, whatever the budget.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder, in evaluation mode; experts linearized.
    parameters : QuantizeParameters
        With ``scheme="auto"``.
    context : PassContext
    layers : sequence of TargetLayer
        To be quantized.

    Raises
    ------
    PassError
        If the budget is below what the layers need, the calibration text is too short, or the model's head reads more
        than the final hidden states.
    """
    from passes.quantize import spreading

    assert parameters.bits is not None
    members = _members(layers)
    layouts = {name: _layouts(group, parameters) for name, group in members.items()}
    _solve(members, {name: dict.fromkeys(found, 0.0) for name, found in layouts.items()}, parameters)  # does it fit?
    started = time.perf_counter()
    ids = _windows(context)
    notes: list[str] = []
    store = Store(context.work / FILE, _identity(model, parameters, ids, layouts))
    spreading.merge(context.work, store)
    missing = [name for name in members if name not in store.found]
    if missing and context.spread is not None:
        notes += spreading.run(model, parameters, context, ids, missing, store)
        missing = [name for name in missing if name not in store.found]
    if missing:
        measure_groups(model, parameters, context.device, ids, layers, missing, store, notes, context.progress)
    losses = {name: _losses(store.found[name], layouts[name]) for name in members}
    groups, solution = _solve(members, losses, parameters)
    table: list[GroupSensitivity] = []
    choices: dict[str, LayerChoice] = {}
    for (name, group), solved, chosen in zip(members.items(), groups, solution.chosen, strict=True):
        bits, size = layouts[name][0]
        table.append(
            GroupSensitivity(
                name,
                tuple(layer.name for layer in group),
                solved.parameters,
                store.found[name]["kl"],
                LayerChoice(bits, size),
                solved.choices,
                chosen,
            )
        )
        taken = solved.choices[chosen]
        choices |= {layer.name: LayerChoice(taken.bits, taken.group_size) for layer in group}
    return Allocation(
        choices,
        solution.bits_per_parameter,
        solution.loss,
        tuple(table),
        ids.numel(),
        time.perf_counter() - started,
        tuple(notes),
    )


def _members(layers: Sequence[TargetLayer]) -> dict[str, list[TargetLayer]]:
    members: dict[str, list[TargetLayer]] = {}
    for layer in layers:
        members.setdefault(layer.group, []).append(layer)
    return members


def _layouts(group: Sequence[TargetLayer], parameters: QuantizeParameters) -> list[_Layout]:
    """Return (bits, group size), the coarsest first: 4 bits in groups that kernels take, and 8 bits by row.

    Raises
    ------
    PassError
        If no group size divides the layers' input features.
    """
    widths = {layer.in_features for layer in group}
    sizes = (parameters.group_size,) if parameters.group_size else PREFERRED_GROUP_SIZES
    suited = [size for size in sizes if all(width % size == 0 for width in widths)]
    if not suited:
        raise PassError(
            f"groups of {', '.join(map(str, sizes))} columns do not divide the {group[0].in_features} input features "
            f"of {group[0].name}; leave it out with ignore={group[0].name}"
        )
    return [*((4, size) for size in sorted(suited, reverse=True)), (8, None)]


def _solve(
    members: Mapping[str, Sequence[TargetLayer]],
    losses: Mapping[str, Mapping[_Layout, float]],
    parameters: QuantizeParameters,
) -> tuple[list[allocation.Group], allocation.Solution]:
    assert parameters.bits is not None
    groups = [
        allocation.Group(
            name,
            sum(layer.parameters for layer in group),
            tuple(
                allocation.Choice(bits, size, _stored(group, parameters, bits, size), loss)
                for (bits, size), loss in losses[name].items()
            ),
        )
        for name, group in members.items()
    ]
    return groups, allocation.solve(groups, parameters.bits)


def _stored(group: Sequence[TargetLayer], parameters: QuantizeParameters, bits: int, size: int | None) -> int:
    """Return the stored bits without the few that hold a tensor's shape, so that groups of 32 take 4.5."""
    total = 0.0
    for layer in group:
        whole = stored_bits(
            "auto",
            layer.out_features,
            layer.in_features,
            bits=bits,
            group_size=size,
            symmetric=parameters.symmetric,
        )
        total += whole - SHAPE_BITS
    return round(total)


def _windows(context: PassContext) -> torch.Tensor:
    from profilers.base import ProfilerError

    if context.calibration is None:
        raise PassError("scheme=auto measures sensitivity on calibration text; give one")
    try:
        return context.calibration.windows(WINDOWS, WINDOW_LENGTH)
    except ProfilerError as error:
        raise PassError(f"the calibration text is too short to measure sensitivity on: {error}") from None


def _identity(
    model: PreTrainedModel, parameters: QuantizeParameters, ids: torch.Tensor, layouts: Mapping[str, list[_Layout]]
) -> str:
    """Return a sha256 over the weights and all else that the measurements depend on; the budget is not part of it."""
    import torch

    digest = hashlib.sha256(repr((FORMAT, parameters.symmetric, ids.tolist(), sorted(layouts.items()))).encode())
    for name, tensor in model.named_parameters():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Store:
    """Measurements so far, in a JSON file that is replaced whole."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self.identity = path, identity
        self.found: dict[str, Any] = {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none, or cut off where the system does not replace at once
            return
        if isinstance(data, dict) and data.get("identity") == identity:
            self.found = data["groups"]

    def add(self, name: str, kl: float, errors: Sequence[float]) -> None:
        """Keep the KL of a group's first layout, and the weighted squared error of each of its layouts."""
        self.found[name] = {"kl": kl, "errors": list(errors)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps({"identity": self.identity, "groups": self.found}), encoding="utf-8")
        os.replace(beside, self._path)


def _losses(found: Mapping[str, Any], layouts: Sequence[_Layout]) -> dict[_Layout, float]:
    """Scale the measured KL to every layout: near the unchanged weights it grows with the squared error."""
    kl, errors = found["kl"], found["errors"]
    return {
        layout: kl * (error / errors[0]) if errors[0] else 0.0 for layout, error in zip(layouts, errors, strict=True)
    }


@contextlib.contextmanager
def _on_device(model: PreTrainedModel, device: torch.device, notes: list[str]) -> Iterator[None]:
    """Run the model on ``device`` inside the block if it fits there whole; otherwise where it is."""
    from profilers.device import memory_available_bytes

    home = model.device
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if home.type == device.type or 2 * needed > memory_available_bytes(device):
        if home.type != device.type:
            notes.append(f"sensitivity was measured on {home}: the whole model does not fit {device}")
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def measure_groups(
    model: PreTrainedModel,
    parameters: QuantizeParameters,
    device: torch.device,
    ids: torch.Tensor,
    layers: Sequence[TargetLayer],
    names: Sequence[str],
    store: Store,
    notes: list[str],
    progress: Progress,
) -> None:
    """Measure some groups of layers into a store; the model is left as it was.

    Parameters
    ----------
    layers : sequence of TargetLayer
        All that are to be quantized.
    names : sequence of str
        Of the groups.
    notes : list of str
        Takes what the reader should know.
    model, parameters, device, ids, store, progress
    """
    members = _members(layers)
    with _on_device(model, device, notes):
        _measure(model, parameters, ids, {name: members[name] for name in names}, store, notes, progress)


def _measure(
    model: PreTrainedModel,
    parameters: QuantizeParameters,
    ids: torch.Tensor,
    members: Mapping[str, Sequence[TargetLayer]],
    store: Store,
    notes: list[str],
    progress: Progress,
) -> None:
    import torch

    from profilers.base import NotApplicableError
    from profilers.reference import checked_head

    try:
        head = checked_head(model, ids)
    except NotApplicableError as error:
        raise PassError(f"scheme=auto cannot measure sensitivity: {error}; use scheme=w4a16") from None
    with torch.inference_mode(), contextlib.closing(_Replay(model, head, ids)) as replay:
        if not replay.skipping:
            notes.append("every measurement ran the whole model: its blocks depend on more than the one before them")
        ordered = sorted(members.items(), key=lambda item: replay.first_block([layer.name for layer in item[1]]))
        with progress.task("sensitivity", total=len(ordered)) as task:
            for name, group in ordered:
                modules = {layer.name: model.get_submodule(layer.name) for layer in group}
                layouts = _layouts(group, parameters)
                weights = replay.column_weights(modules)
                errors = [
                    sum(_error(module, weights[key], parameters, layout) for key, module in modules.items())
                    for layout in layouts
                ]
                with _rounded(modules.values(), parameters, layouts[0]):
                    kl = replay.divergence()
                store.add(name, kl, errors)
                task.advance()


class _Replay:
    """Runs a model again from the first changed block on.

    Blocks before it return what the last of them returned in the unchanged model. Whether that is right for this
    model is checked once; if it is not, every run is whole.
    """

    def __init__(self, model: PreTrainedModel, head: Head, ids: torch.Tensor) -> None:
        self._model, self._head, self._ids = model, head, ids
        self._name, self._blocks = _find_blocks(model)
        self._kept: Any = None
        self._at = 0  # blocks before this one are skipped
        self._reference = self._states()
        self.skipping = bool(self._blocks) and self._skips_well()

    def first_block(self, names: Sequence[str]) -> int:
        """Return the first block that one of these layers is in; 0 where one is outside."""
        found = [
            int(name[len(self._name) + 1 :].split(".", 1)[0]) if name.startswith(f"{self._name}.") else 0
            for name in names
        ]
        return min(found, default=0) if self._blocks else 0

    def column_weights(self, modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Return the mean squared input of each column, shape (in,), and move on to the first block of these layers."""
        import torch

        if self.skipping:
            self._go_to(self.first_block(list(modules)))
        sums: dict[str, torch.Tensor] = {}

        def note(key: str, received: torch.Tensor) -> None:
            found = received.detach().flatten(0, -2).float().square().sum(0)
            sums[key] = sums[key] + found if key in sums else found

        hooks = [
            module.register_forward_pre_hook(lambda _module, args, key=key: note(key, args[0]))
            for key, module in modules.items()
        ]
        try:
            self._states()
        finally:
            for hook in hooks:
                hook.remove()
        count = self._ids.numel()
        return {  # an expert that no token reached counts as if its inputs were those of the others: by its weights
            key: sums[key] / count
            if key in sums
            else torch.ones(module.get_parameter("weight").shape[1], device=self._model.device)
            for key, module in modules.items()
        }

    def divergence(self) -> float:
        """Return the mean KL divergence, in nats a token, of the model as it is now from the unchanged one."""
        import torch

        from profilers.reference import log_probabilities, positions_at_once

        states = self._states()
        at_once = positions_at_once(self._head)
        total = 0.0
        for mine, theirs in zip(torch.split(states, at_once), torch.split(self._reference, at_once), strict=True):
            p, q = log_probabilities(self._head.logits(theirs)), log_probabilities(self._head.logits(mine))
            total += float(torch.sum(p.exp() * (p - q), dtype=torch.float64))
        return max(0.0, total / states.shape[0])  # the sum of a model with itself may round to less than nothing

    def close(self) -> None:
        """Give the blocks their own forward back."""
        for block in self._blocks:
            block.__dict__.pop("forward", None)

    def _states(self) -> torch.Tensor:
        from profilers.reference import final_states

        return final_states(self._model, self._ids).flatten(0, 1)

    def _go_to(self, block: int) -> None:
        """Skip the blocks before this one from now on; never goes back."""
        if block <= self._at:
            return
        found: list[Any] = []
        hook = self._blocks[block - 1].register_forward_hook(lambda _module, _args, output: found.append(output))
        try:
            self._states()
        finally:
            hook.remove()
        self._kept, self._at = found[0], block
        for item in self._blocks[:block]:
            item.__dict__["forward"] = lambda *args, **kwargs: self._kept

    def _skips_well(self) -> bool:
        """Whether the model gives the same with blocks skipped, seen at the middle one."""
        middle = len(self._blocks) // 2
        if middle == 0:
            return True
        try:
            self._go_to(middle)
            same = self.divergence() <= IDENTICAL_KL
        except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError):
            same = False
        self.close()
        self._kept, self._at = None, 0
        return same


def _find_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Return the name and members of the longest list of modules that are called one after another."""
    from torch import nn

    lists = [(name, list(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [item for item in lists if not any(item[0].startswith(f"{other}.") for other, _ in lists)]
    name, blocks = max(outer, key=lambda item: len(item[1]), default=("", []))
    return name, blocks if all("forward" not in block.__dict__ for block in blocks) else []


@contextlib.contextmanager
def _rounded(modules: Any, parameters: QuantizeParameters, layout: _Layout) -> Iterator[None]:
    """Give layers their weights rounded to nearest inside the block."""
    originals = [(module, module.weight.data) for module in modules]
    try:
        for module, weight in originals:
            module.weight.data = round_to_nearest(weight, parameters, layout).to(weight.dtype)
        yield
    finally:
        for module, weight in originals:
            module.weight.data = weight


def _error(module: Any, column_weights: torch.Tensor, parameters: QuantizeParameters, layout: _Layout) -> float:
    """Return sum over the weight of (rounding error)^2 times the column's mean squared input."""
    import torch

    weight = module.weight.data
    lost = round_to_nearest(weight, parameters, layout).sub_(weight).square_().sum(0)
    return float(torch.dot(lost, column_weights.to(lost.device)))


def round_to_nearest(weight: torch.Tensor, parameters: QuantizeParameters, layout: _Layout) -> torch.Tensor:
    """Return the weight in float32, rounded to nearest as compressed-tensors does."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    bits, size = layout
    arguments = QuantizationArgs(**weight_arguments("auto", bits=bits, group_size=size, symmetric=parameters.symmetric))
    exact = weight.float()
    grouped = exact.reshape(exact.shape[0], -1, size or exact.shape[1])
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    rounded: torch.Tensor = fake_quantize(exact, scale.to(weight.dtype).float(), zero, arguments)
    return rounded
