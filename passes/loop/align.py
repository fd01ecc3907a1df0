"""Put the hidden units of layers that will share in one order, so that less has to be made up for.

The hidden units of an MLP have no order of their own: with rows of the linears that give them and columns of the one
that takes them permuted alike, the layer computes the same. A unit of a linear branch (``up`` of a gated MLP) has no
sign either. Two trained layers have hardly anything in common unit by unit, and much more once each unit stands beside
the most similar one of the other layer: an assignment problem, solved exactly.

Which linears form such an MLP, and whether signs are free, is tried on the layer itself with random inputs, not read
off names: what changes the output is left alone.

Papers: Ainsworth et al., Git Re-Basin, ICLR 2023, arXiv:2209.04836, section 3.1 (matching by activations and weights).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from passes.loop.modeling_looped import sizes, weight_of
from passes.loop.targets import Shape, Structure

TOLERANCE = 1e-4
"""Relative distance of outputs below which two float32 computations are the same one."""
TRIED_ROWS = 4

Weighing = Callable[[int, str], tuple[torch.Tensor, torch.Tensor]]
"""Of a layer's linear: C, (in, in), how an error counts by input; G, (out,), by output. Float64."""


@dataclass(frozen=True)
class HiddenUnits:
    """Linears around one set of hidden units.

    Attributes
    ----------
    producers : tuple of str
        Give one output a unit; dotted names in the layer.
    consumer : str
        Takes one input a unit.
    signed : str or None
        A producer whose sign is free, together with the consumer's.
    """

    producers: tuple[str, ...]
    consumer: str
    signed: str | None


class Finder:
    """Finds hidden units, once for all layers of a kind.

    Parameters
    ----------
    structure : Structure
    """

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._found: dict[str, tuple[HiddenUnits, ...]] = {}

    def of(self, layer: nn.Module, index: int) -> tuple[HiddenUnits, ...]:
        """Return the hidden units of the layer at an index."""
        kind = self._structure.kinds[index]
        if kind not in self._found:
            self._found[kind] = find(layer, self._structure.linears[index])
        return self._found[kind]


def find(layer: nn.Module, shapes: Mapping[str, Shape]) -> tuple[HiddenUnits, ...]:
    """Return the hidden units of a layer whose order is free.

    Parameters
    ----------
    layer : nn.Module
        With weights; left as it is.
    shapes : mapping
        Its linears.
    """
    found = []
    for parent in sorted({name.rpartition(".")[0] for name in shapes if "." in name}):
        module = layer.get_submodule(parent)
        names = [name for name in shapes if name.rpartition(".")[0] == parent]
        for consumer in names:
            hidden, width = shapes[consumer].in_features, shapes[consumer].out_features
            producers = tuple(
                name for name in names if (shapes[name].out_features, shapes[name].in_features) == (hidden, width)
            )
            if hidden == width or not producers:
                continue
            order = torch.randperm(hidden, generator=torch.Generator().manual_seed(0))
            local = [name.rpartition(".")[2] for name in (*producers, consumer)]
            if not _same(module, width, local, order, None):
                continue
            signs = (name for name in producers if _same(module, width, local, order, name.rpartition(".")[2]))
            found.append(HiddenUnits(producers, consumer, next(signs, None)))
    return tuple(found)


@torch.no_grad()
def _same(module: nn.Module, width: int, local: Sequence[str], order: torch.Tensor, signed: str | None) -> bool:
    """Whether a module gives what it gave after its hidden units are permuted and some signs are turned."""
    import copy

    tried = copy.deepcopy(module).float().cpu().eval()
    inputs = torch.randn(1, TRIED_ROWS, width, generator=torch.Generator().manual_seed(1))
    try:
        before = tried(inputs)
        signs = torch.ones(len(order))
        if signed is not None:
            signs[::2] = -1
        _permute(tried, local[:-1], local[-1], signed, order, signs)
        after = tried(inputs)
    except (TypeError, ValueError, AttributeError, RuntimeError):  # no module of one input: an attention
        return False
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    return bool((after - before).norm() <= TOLERANCE * before.norm())


def align(
    layers: Sequence[nn.Module], members: Sequence[int], units: HiddenUnits, weighing: Weighing
) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], float, float]:
    """Permute the hidden units of all layers but the first to stand beside the most similar ones of the first.

    Two units are as similar as the inner product of their weights, counted as errors in them count.

    Parameters
    ----------
    layers : sequence of nn.Module
        Changed in place; what they compute stays the same.
    members : sequence of int
        Their indices.
    units : HiddenUnits
    weighing : callable

    Returns
    -------
    orders : dict
        By index of the layer, the order, (hidden,) int64, and the signs, (hidden,) of ±1.
    before, after : float
        Similarity of the others to the first, as a share of their own squared length.
    """
    from scipy.optimize import linear_sum_assignment

    orders = {}
    before = after = whole = 0.0
    for index, layer in list(zip(members, layers, strict=True))[1:]:
        plain, turned, length = _similarity(layers[0], layer, members[0], index, units, weighing)
        best = plain + turned.abs()
        rows, columns = linear_sum_assignment(best.cpu().numpy(), maximize=True)
        order = torch.as_tensor(columns)
        signs = torch.where(turned[torch.as_tensor(rows), order] < 0, -1.0, 1.0)
        before += float((plain + turned).diagonal().sum())
        after += float(best[torch.as_tensor(rows), order].sum())
        whole += length
        _permute(layer, units.producers, units.consumer, units.signed, order, signs)
        orders[index] = order, signs
    return orders, before / whole if whole else 0.0, after / whole if whole else 0.0


@torch.no_grad()
def _similarity(
    one: nn.Module, two: nn.Module, first: int, second: int, units: HiddenUnits, weighing: Weighing
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the inner products of units, shape (hidden, hidden): those of fixed and of free sign; and their length."""
    hidden = sizes(one.get_submodule(units.consumer))[1]
    plain, turned, length = torch.zeros(hidden, hidden).double(), torch.zeros(hidden, hidden).double(), 0.0
    for name in (*units.producers, units.consumer):
        mine, other = (weight_of(layer.get_submodule(name)).double().cpu() for layer in (one, two))
        (c_one, g_one), (c_two, g_two) = (
            [part.double().cpu() for part in weighing(index, name)] for index in (first, second)
        )
        if name == units.consumer:
            g = (g_one * g_two).sqrt()[:, None]
            mine = mine * g.sqrt() * c_one.diagonal().clamp_min(0).sqrt()
            other = other * g.sqrt() * c_two.diagonal().clamp_min(0).sqrt()
            product = mine.t() @ other
            lengths = (mine.square().sum(), other.square().sum())
        else:
            mine, other = mine * g_one.sqrt()[:, None], other * g_two.sqrt()[:, None]
            c = (c_one + c_two) / 2
            product = mine @ c @ other.t()
            lengths = (((mine @ c) * mine).sum(), ((other @ c) * other).sum())
        length += float(lengths[0] + lengths[1]) / 2
        # The consumer's sign turns with the producers' of free sign; without any, none turns.
        if units.signed is not None and name in (units.signed, units.consumer):
            turned += product
        else:
            plain += product
    return plain, turned, length


@torch.no_grad()
def _permute(
    module: nn.Module,
    producers: Sequence[str],
    consumer: str,
    signed: str | None,
    order: torch.Tensor,
    signs: torch.Tensor,
) -> None:
    """Give hidden units another order, and other signs where those are free."""
    for name in producers:
        linear = module.get_submodule(name)
        weight = weight_of(linear)
        where = order.to(weight.device)
        sign = signs.to(weight) if name == signed else torch.ones_like(signs).to(weight)
        weight.copy_(weight[where] * sign[:, None])
        bias = getattr(linear, "bias", None)
        if bias is not None:
            bias.copy_(bias[where] * sign)
    weight = weight_of(module.get_submodule(consumer))
    sign = signs.to(weight) if signed is not None else torch.ones_like(signs).to(weight)
    weight.copy_(weight[:, order.to(weight.device)] * sign)
