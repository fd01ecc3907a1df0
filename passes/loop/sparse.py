r"""Fit layers that share most of the entries of their linears: a shared weight and each further layer's sparse part.

For one linear, with weights W_l, mean squared inputs h_l (in,) and mean squared gradients g_l (out,) of the layers l::

    W_l ≈ W + B_l A_l + S_l          W shared; the first layer's own parts are zero

- Low-rank first: B A takes most off the error of W_l − W_0, by truncated SVD (:func:`passes.loop.tie.low_rank`).
- What it costs that l and the first layer have entry (i, j) in common, the value in between being the best for both:
  c (w_l − w_0)² with c = a_l a_0 / (a_l + a_0), a = g_i h_j. Shared is where that is least: half of all differences of
  two Gaussian weights hold 7 % of their squares, which no low-rank part of as many parameters comes near.
- W has the weighted mean of those who share an entry, and the first layer's value where none does; S_l has the rest.

Papers: the split of a difference into low-rank and sparse parts is that of Candès et al., Robust Principal Component
Analysis, J. ACM 2011, arXiv:0912.3599; that of a weight, Li et al., LoSparse, ICML 2023, arXiv:2306.11222; how a weight
counts is the diagonal of Optimal Brain Damage (LeCun et al., NeurIPS 1989). Departure: nothing is set to zero; entries
are shared between layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from passes.loop import tie


@dataclass(frozen=True)
class Linear:
    """One linear of the layers of a block.

    Attributes
    ----------
    weights : sequence of torch.Tensor
        W_l of each layer, shape (out, in), float64.
    inputs : sequence of torch.Tensor
        E[x xᵀ] of each, shape (in, in), float64.
    gradients : sequence of torch.Tensor
        E[g²] of each one's output, shape (out,).
    ranks : sequence of int
        Of each one's low-rank part; 0 for the first.
    """

    weights: Sequence[torch.Tensor]
    inputs: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor]
    ranks: Sequence[int]


def fit(
    linears: Mapping[str, Linear], entries: Mapping[str, Sequence[int]], *, even: bool = False
) -> dict[str, tie.Fitted]:
    """Return the shared weights and the layers' own parts of a block.

    Parameters
    ----------
    linears : mapping
        By name.
    entries : mapping
        For each linear, how many entries every layer's sparse part has.
    even : bool
        Keep to these counts; otherwise each layer's are shared out over its linears where sharing costs most, and
        only their sum is kept.
    """
    deltas = {name: _low_rank_parts(linear) for name, linear in linears.items()}
    count = len(next(iter(linears.values())).weights)
    masks: dict[str, list[torch.Tensor]] = {name: [] for name in linears}  # of the second layer, the third, …
    for member in range(1, count):
        costs = {name: _costs(linear, deltas[name], member) for name, linear in linears.items()}
        if even:
            for name, cost in costs.items():
                masks[name].append(_largest(cost.flatten(), entries[name][member]).view_as(cost))
            continue
        own = _largest(
            torch.cat([cost.flatten() for cost in costs.values()]), sum(entries[name][member] for name in linears)
        )
        for (name, cost), part in zip(
            costs.items(), own.split_with_sizes([cost.numel() for cost in costs.values()]), strict=True
        ):
            masks[name].append(part.view_as(cost))
    return {name: _fitted(linear, deltas[name], masks[name]) for name, linear in linears.items()}


def _low_rank_parts(linear: Linear) -> list[tie.Delta | None]:
    parts: list[tie.Delta | None] = [None]
    first = linear.weights[0]
    for weight, moment, rank in list(zip(linear.weights, linear.inputs, linear.ranks, strict=True))[1:]:
        parts.append(tie.low_rank(weight - first, moment + linear.inputs[0], rank))
    return parts


def _weighing(linear: Linear, member: int) -> torch.Tensor:
    """Return what a squared error of each entry counts, shape (out, in)."""
    return linear.gradients[member].to(linear.inputs[member])[:, None] * linear.inputs[member].diagonal()


def _target(linear: Linear, deltas: Sequence[tie.Delta | None], member: int) -> torch.Tensor:
    delta = deltas[member]
    return linear.weights[member] if delta is None else linear.weights[member] - delta[0] @ delta[1]


def _costs(linear: Linear, deltas: Sequence[tie.Delta | None], member: int) -> torch.Tensor:
    """Return what sharing each entry with the first layer costs, shape (out, in)."""
    one, two = _weighing(linear, 0), _weighing(linear, member)
    both = one * two / (one + two).clamp_min(torch.finfo(one.dtype).tiny)
    return both * (_target(linear, deltas, member) - linear.weights[0]).square()


def _largest(costs: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of so many of the largest entries."""
    mask = torch.zeros(costs.numel(), dtype=torch.bool, device=costs.device)
    mask[costs.argsort(descending=True, stable=True)[:count]] = True
    return mask


def _fitted(linear: Linear, deltas: Sequence[tie.Delta | None], masks: Sequence[torch.Tensor]) -> tie.Fitted:
    targets = [_target(linear, deltas, member) for member in range(len(linear.weights))]
    weighings = [_weighing(linear, member) for member in range(len(linear.weights))]
    floor = torch.finfo(targets[0].dtype).tiny
    total, weighed = weighings[0] + floor, (weighings[0] + floor) * targets[0]
    for target, weighing, mask in zip(targets[1:], weighings[1:], masks, strict=True):
        total = total + torch.where(mask, 0, weighing)
        weighed = weighed + torch.where(mask, 0, weighing * target)
    shared = weighed / total
    sparse: list[tie.Sparse | None] = [None]
    errors = [targets[0] - shared]
    for target, mask in zip(targets[1:], masks, strict=True):
        sparse.append((mask.cpu(), (target - shared)[mask].float().cpu()))
        errors.append(torch.where(mask, 0, target - shared))
    alone = [weight - shared for weight in linear.weights]
    return tie.Fitted(
        shared=shared.float().cpu(),
        deltas=tuple(None if delta is None else (delta[0].float().cpu(), delta[1].float().cpu()) for delta in deltas),
        errors=_relative(linear, errors),
        shared_errors=_relative(linear, alone),
        sparse=tuple(sparse),
    )


def _relative(linear: Linear, errors: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Return tr E C Eᵀ / tr W C Wᵀ of each layer."""
    return tuple(
        tie.energy(error, moment) / whole if (whole := tie.energy(weight, moment)) > 0 else 0.0
        for error, weight, moment in zip(errors, linear.weights, linear.inputs, strict=True)
    )
