r"""Fit the weights of a shared block and each layer's own low-rank part.

For one linear, with weights W_l and second moments C_l = E[x xᵀ] of the layers l that share it, minimise the error of
the outputs::

    Σ_l tr (W_l − W − B_l A_l) C_l (W_l − W − B_l A_l)ᵀ      W shared, B_l (out, r_l), A_l (r_l, in) the layer's own

- W for given deltas is a least-squares problem: W = (Σ T_l C_l) (Σ C_l)⁻¹ with T_l = W_l − B_l A_l.
- One delta for given others, with W always the best, is a truncated SVD (Eckart and Young). Let W' be the least-squares
  fit of the other members alone, C' the sum of their moments. What is left of the error is
  tr (T_l − W') P (T_l − W')ᵀ with P = C_l (C_l + C')⁻¹ C'. With D = W_l − W' and U_r the leading eigenvectors of
  D P Dᵀ, B A = U_r U_rᵀ D. No inverse of a single C_l is needed, so each may be singular.
- Members in turn, no step raises the error. (Fitting each delta to W_l − W instead would be stuck at once where two
  layers share: both residuals are the same but for their sign, so both deltas would take the same directions.)

Where G tells how much an error counts in each direction of the output (one matrix for all members), everything is done
on Lᵀ W_l with G = L Lᵀ, and taken back: tr (Lᵀ E) C (Lᵀ E)ᵀ = tr G E C Eᵀ.

Papers: Bae et al., Relaxed Recursive Transformers, ICLR 2025, arXiv:2410.20672 (initial blocks, deltas by SVD of the
residual). Departures: errors are weighted by activations, and shared and own weights are fitted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

DAMPING = 1e-4
"""Of Σ C_l, as a share of its mean diagonal: draws W to the mean of the weights where inputs say nothing."""
OUTPUT_DAMPING = 0.1
"""Of G, as a share of its mean diagonal: it is an estimate, and small directions of it are noise."""
CONVERGED = 1e-3
"""Relative fall of the error in a round below which no other follows."""

Delta = tuple[torch.Tensor, torch.Tensor]
"""B, shape (out, r), and A, shape (r, in), float32."""
Sparse = tuple[torch.Tensor, torch.Tensor]
"""Which entries, bool, shape (out, in), and their values in the order of the entries, float32."""


@dataclass(frozen=True)
class Fitted:
    """One linear of one block.

    Attributes
    ----------
    shared : torch.Tensor
        W, shape (out, in), float32, on the CPU like the deltas.
    deltas : tuple of (Delta or None)
        Of each member.
    errors : tuple of float
        Of each member: tr E C Eᵀ / tr W_l C_l W_lᵀ, the relative squared error of its output.
    shared_errors : tuple of float
        The same without the deltas.
    sparse : tuple of (Sparse or None)
        Of each member, from :mod:`passes.loop.sparse`; empty where there are none.
    """

    shared: torch.Tensor
    deltas: tuple[Delta | None, ...]
    errors: tuple[float, ...]
    shared_errors: tuple[float, ...]
    sparse: tuple[Sparse | None, ...] = ()


def fit(
    weights: Sequence[torch.Tensor],
    moments: Sequence[torch.Tensor],
    ranks: Sequence[int],
    *,
    initial: torch.Tensor | None = None,
    rounds: int = 2,
    importance: Sequence[float] | None = None,
    outputs: torch.Tensor | None = None,
) -> Fitted:
    """Return the shared weight and the deltas of one linear.

    Parameters
    ----------
    weights, moments : sequence of torch.Tensor
        W_l, shape (out, in), and C_l, shape (in, in), of each member.
    ranks : sequence of int
        Of each member's delta; 0 for none.
    initial : torch.Tensor, optional
        W, shape (out, in), which is then taken as it is; default: the least-squares fit.
    rounds : int
        Over the members, at most; without ``initial`` only.
    importance : sequence of float, optional
        What a squared error of each member counts; default: 1.
    outputs : torch.Tensor, optional
        L of :func:`output_factor`, shape (out, out): how errors count by direction of the output; default: all alike.
    """
    plain = weights = [weight.double() for weight in weights]
    if outputs is not None:
        weights = [outputs.t() @ weight for weight in weights]
        initial = None if initial is None else outputs.t() @ initial.double()
    importance = importance or [1.0] * len(weights)
    moments = [moment.double() * factor for moment, factor in zip(moments, importance, strict=True)]
    wholes = [energy(weight, moment) for weight, moment in zip(weights, moments, strict=True)]
    if initial is None:
        alone = least_squares(weights, moments)
        shared = alone
        if any(ranks):
            shared = least_squares(_without(weights, joint_deltas(weights, moments, ranks, rounds)), moments)
    else:
        shared = alone = initial.double()
    deltas = [
        low_rank(weight - shared, moment, rank) for weight, moment, rank in zip(weights, moments, ranks, strict=True)
    ]
    none: list[Delta | None] = [None] * len(weights)
    if outputs is not None:
        shared, alone = _back(outputs, shared), _back(outputs, alone)
        deltas = [None if delta is None else (_back(outputs, delta[0]), delta[1]) for delta in deltas]
        weights = plain
        wholes = [energy(weight, moment) for weight, moment in zip(weights, moments, strict=True)]
    return Fitted(
        shared=shared.float().cpu(),
        deltas=tuple(None if delta is None else (delta[0].float().cpu(), delta[1].float().cpu()) for delta in deltas),
        errors=_relative(_errors(weights, shared, deltas, moments), wholes),
        shared_errors=_relative(_errors(weights, alone, none, moments), wholes),
    )


def output_factor(moments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return L, lower triangular, float64, with L Lᵀ = G: the mean of members' second moments of gradients, damped.

    Parameters
    ----------
    moments : sequence of torch.Tensor
        E[g gᵀ] of each member's output, shape (out, out).
    """
    total = torch.stack([moment.double() for moment in moments]).sum(0)
    scale = float(total.diagonal().mean())
    if scale <= 0:
        return torch.eye(len(total), dtype=torch.float64, device=total.device)
    total /= scale
    total.diagonal().add_(OUTPUT_DAMPING)
    factor: torch.Tensor = torch.linalg.cholesky(total)
    return factor


def _back(factor: torch.Tensor, weighed: torch.Tensor) -> torch.Tensor:
    """Return X of Lᵀ X."""
    solved: torch.Tensor = torch.linalg.solve_triangular(factor.t(), weighed, upper=True)
    return solved


def joint_deltas(
    weights: Sequence[torch.Tensor], moments: Sequence[torch.Tensor], ranks: Sequence[int], rounds: int
) -> list[Delta | None]:
    """Return deltas that are best together with the best W for them, member by member, for some rounds.

    Parameters
    ----------
    weights, moments : sequence of torch.Tensor
        Float64.
    ranks : sequence of int
    rounds : int
        At most; the first is always done, and with two members it is the best there is.
    """
    deltas: list[Delta | None] = [None] * len(weights)
    before = float("inf")
    rounds = 1 if len(weights) == 2 else max(1, rounds)  # for two, P is the same: the second takes what the first left
    for number in range(rounds):
        for member, rank in enumerate(ranks):
            residual, weighing = _left(weights, moments, deltas, member)
            deltas[member] = low_rank(residual, weighing, rank)
        if number + 1 < rounds:
            shared = least_squares(_without(weights, deltas), moments)
            error = sum(_errors(weights, shared, deltas, moments))
            if error > (1 - CONVERGED) * before:
                break
            before = error
    return deltas


def spectra(
    weights: Sequence[torch.Tensor], moments: Sequence[torch.Tensor], deltas: Sequence[Delta | None]
) -> list[torch.Tensor]:
    """Return, for each member, what every further rank of its delta takes off the error, the others' deltas given."""
    found = []
    for member in range(len(weights)):
        residual, weighing = _left(weights, moments, deltas, member)
        found.append(spectrum(residual, weighing))
    return found


def spectrum(residual: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return what each further rank takes off tr D C Dᵀ, shape (min(out, in),), descending, float64."""
    values: torch.Tensor = torch.linalg.eigvalsh(_gram(residual, moment)[0])
    return values.flip(0).clamp_min(0)


def _left(
    weights: Sequence[torch.Tensor], moments: Sequence[torch.Tensor], deltas: Sequence[Delta | None], member: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D and P of one member: what its delta is to make up for, and how an error in it counts."""
    others = [index for index in range(len(weights)) if index != member]
    targets = _without(weights, deltas)
    fitted = least_squares([targets[index] for index in others], [moments[index] for index in others])
    rest = torch.stack([moments[index] for index in others]).sum(0)
    total = rest + moments[member]
    scale = float(total.diagonal().mean())
    if scale <= 0:
        return weights[member] - fitted, total
    total.diagonal().add_(DAMPING * scale)
    weighing = moments[member] @ torch.cholesky_solve(rest, torch.linalg.cholesky(total))
    return weights[member] - fitted, 0.5 * (weighing + weighing.t())


def _without(weights: Sequence[torch.Tensor], deltas: Sequence[Delta | None]) -> list[torch.Tensor]:
    """Return W_l − B_l A_l of each member."""
    return [
        weight if delta is None else weight - delta[0] @ delta[1] for weight, delta in zip(weights, deltas, strict=True)
    ]


def least_squares(weights: Sequence[torch.Tensor], moments: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the W of least Σ_l tr (W_l − W) C_l (W_l − W)ᵀ, shape (out, in), float64.

    Solved for W − M with M the mean of the weights, so that directions in which no input was seen keep the mean.
    """
    mean = torch.stack([weight.double() for weight in weights]).mean(0)
    total = torch.stack([moment.double() for moment in moments]).sum(0)
    right = sum((weight.double() - mean) @ moment.double() for weight, moment in zip(weights, moments, strict=True))
    scale = float(total.diagonal().mean())
    if scale <= 0:
        return mean
    total.diagonal().add_(DAMPING * scale)
    assert isinstance(right, torch.Tensor)
    # W T = R with T symmetric: solve T Wᵀ = Rᵀ.
    solved: torch.Tensor = mean + torch.cholesky_solve(right.t(), torch.linalg.cholesky(total)).t()
    return solved


def low_rank(residual: torch.Tensor, moment: torch.Tensor, rank: int) -> Delta | None:
    """Return B and A of the given rank with the least tr (D − B A) C (D − B A)ᵀ.

    Parameters
    ----------
    residual : torch.Tensor
        D, shape (out, in), float64.
    moment : torch.Tensor
        C, shape (in, in), float64.
    rank : int
    """
    if rank == 0:
        return None
    basis = _leading(residual, moment, rank)
    inner = basis.t() @ residual
    # Split each direction's size between both factors: alike in size they round and train alike.
    sizes = inner.norm(dim=1).clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
    return basis * sizes, inner / sizes[:, None]


def _gram(residual: torch.Tensor, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the smaller of M Mᵀ and Mᵀ M for M = D C^½; with the latter, M."""
    outputs, inputs = residual.shape
    if outputs <= inputs:
        return residual @ moment @ residual.t(), None
    values, vectors = torch.linalg.eigh(moment)
    scaled = residual @ (vectors * values.clamp_min(0).sqrt())
    return scaled.t() @ scaled, scaled


def _leading(residual: torch.Tensor, moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the leading left singular vectors of D C^½, shape (out, rank), orthonormal."""
    gram, scaled = _gram(residual, moment)
    basis: torch.Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    if scaled is not None:
        # With all directions, those that no input takes count too: D must then be reproduced exactly.
        basis = torch.linalg.qr(scaled @ basis if rank < gram.shape[0] else residual).Q
    return basis


def _product(delta: Delta | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if delta is None else delta[0] @ delta[1]


def energy(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """Return tr W C Wᵀ."""
    return float(((weight @ moment) * weight).sum())


def _errors(
    weights: Sequence[torch.Tensor],
    shared: torch.Tensor,
    deltas: Sequence[Delta | None],
    moments: Sequence[torch.Tensor],
) -> list[float]:
    return [
        max(0.0, energy(weight - shared - _product(delta, weight), moment))
        for weight, delta, moment in zip(weights, deltas, moments, strict=True)
    ]


def _relative(errors: Sequence[float], wholes: Sequence[float]) -> tuple[float, ...]:
    return tuple(error / whole if whole > 0 else 0.0 for error, whole in zip(errors, wholes, strict=True))


def initial_weight(
    init: str, number: int, blocks: Sequence[Sequence[int]], weights: dict[int, torch.Tensor]
) -> torch.Tensor | None:
    """Return the shared weight that a block starts from, shape (out, in), float64; None for the least-squares fit.

    Parameters
    ----------
    init : str
        ``average``: the mean of the members. ``lower``: that of the first member. ``stepwise``: that of a layer taken
        at equal steps over all layers that share, the first and the last of them included.
    number : int
        Of the block among those whose layers are of one kind.
    blocks : sequence of sequence of int
        The layers of each of these.
    weights : dict
        W_l of every layer that shares, by index.
    """
    members = sorted(blocks[number])
    if init == "average":
        return torch.stack([weights[index].double() for index in members]).mean(0)
    if init == "lower":
        return weights[members[0]].double()
    if init == "stepwise":
        return weights[step_layer(number, blocks)].double()
    return None


def step_layer(number: int, blocks: Sequence[Sequence[int]]) -> int:
    """Return the layer that a block takes its weights from with ``init=stepwise``."""
    layers = sorted(index for block in blocks for index in block)
    if len(blocks) == 1:
        return layers[0]
    return layers[round(number * (len(layers) - 1) / (len(blocks) - 1))]
