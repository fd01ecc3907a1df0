"""Fitting against closed forms, float64 and other ways to solve the same problem."""

from __future__ import annotations

import pytest
import torch

from passes.loop import tie


def problem(
    members: int = 3, outputs: int = 10, inputs: int = 14, rows: int = 60, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return weights, inputs (rows, in) and their second moments."""
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(outputs, inputs, generator=random, dtype=torch.float64) for _ in range(members)]
    mixing = [torch.randn(inputs, inputs, generator=random, dtype=torch.float64) for _ in range(members)]
    x = [torch.randn(rows, inputs, generator=random, dtype=torch.float64) @ mix for mix in mixing]
    return weights, x, [item.t() @ item / rows for item in x]


def output_error(weight: torch.Tensor, made: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (weight - made).t()).square().sum() / (x @ weight.t()).square().sum())


def total(fitted: tie.Fitted, weights: list[torch.Tensor], x: list[torch.Tensor]) -> float:
    """Return the summed squared error of outputs, a row of input."""
    return sum(
        float((item @ (weight - fitted.shared - (0 if d is None else d[0] @ d[1])).t()).square().sum()) / len(item)
        for weight, item, d in zip(weights, x, fitted.deltas, strict=True)
    )


def test_the_shared_weight_is_the_least_squares_solution_over_all_outputs() -> None:
    weights, x, moments = problem(rows=200)
    stacked = torch.cat(x)
    wanted = torch.cat([item @ weight.t() for item, weight in zip(x, weights, strict=True)])
    expected = torch.linalg.lstsq(stacked, wanted).solution.t()
    torch.testing.assert_close(tie.least_squares(weights, moments), expected, rtol=2e-3, atol=2e-3)


def test_where_no_input_was_seen_the_mean_is_kept() -> None:
    weights, _, _ = problem()
    nothing = [torch.zeros(14, 14, dtype=torch.float64)] * 3
    mean = torch.stack(weights).mean(0)
    torch.testing.assert_close(tie.least_squares(weights, nothing), mean)
    one = torch.zeros(14, 14, dtype=torch.float64)
    one[0, 0] = 1.0
    torch.testing.assert_close(tie.least_squares(weights, [one] * 3)[:, 1:], mean[:, 1:])


@pytest.mark.parametrize(("outputs", "inputs"), [(10, 14), (14, 10), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_delta_is_the_truncated_svd_of_the_weighted_residual(outputs: int, inputs: int, rank: int) -> None:
    (residual, *_), _, (moment, *_) = problem(1, outputs, inputs)
    root = torch.linalg.cholesky(moment)
    u, s, vh = torch.linalg.svd(residual @ root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    delta = tie.low_rank(residual, moment, rank)
    assert delta is not None
    assert delta[0].shape == (outputs, rank) and delta[1].shape == (rank, inputs)
    torch.testing.assert_close(delta[0] @ delta[1], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(delta[0].norm(dim=0), delta[1].norm(dim=1))
    torch.testing.assert_close(tie.spectrum(residual, moment), s.square(), rtol=1e-8, atol=1e-8)


def test_inputs_that_span_little_are_no_trouble() -> None:
    (residual, *_), (x, *_), _ = problem(1, rows=4)
    moment = x.t() @ x
    delta = tie.low_rank(residual, moment, 4)
    assert delta is not None
    torch.testing.assert_close(x @ (delta[0] @ delta[1]).t(), x @ residual.t(), rtol=1e-7, atol=1e-7)
    assert tie.low_rank(residual, moment, 0) is None


@pytest.mark.parametrize(("outputs", "inputs"), [(10, 14), (14, 10)])
def test_full_rank_reproduces_every_weight(outputs: int, inputs: int) -> None:
    weights, x, _ = problem(2, outputs, inputs, rows=5)  # most directions never seen
    moments = [item.t() @ item for item in x]
    fitted = tie.fit(weights, moments, [10, 10])
    for weight, delta in zip(weights, fitted.deltas, strict=True):
        assert delta is not None
        torch.testing.assert_close((fitted.shared + delta[0] @ delta[1]).double(), weight, rtol=1e-5, atol=1e-5)
    assert max(fitted.errors) < 1e-12


def test_errors_are_those_of_the_outputs() -> None:
    weights, x, moments = problem()
    fitted = tie.fit(weights, moments, [0, 2, 5])
    for weight, item, delta, error, alone in zip(
        weights, x, fitted.deltas, fitted.errors, fitted.shared_errors, strict=True
    ):
        made = fitted.shared.double() + (0 if delta is None else (delta[0] @ delta[1]).double())
        assert error == pytest.approx(output_error(weight, made, item), rel=1e-3)
        assert alone == pytest.approx(output_error(weight, tie.least_squares(weights, moments), item), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_further_rounds_never_raise_the_error_of_three_layers(seed: int) -> None:
    weights, x, moments = problem(3, seed=seed)
    errors = [total(tie.fit(weights, moments, [3, 3, 3], rounds=rounds), weights, x) for rounds in (1, 2, 4, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.99 * errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_two_layers_are_fitted_as_well_as_any_search_finds(seed: int) -> None:
    weights, x, moments = problem(2, 6, 7, seed=seed)
    found = total(tie.fit(weights, moments, [1, 2], rounds=1), weights, x)
    random = torch.Generator().manual_seed(seed)
    best = float("inf")
    for _ in range(3):
        free = [
            torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()
            for shape in ((6, 7), (6, 1), (1, 7), (6, 2), (2, 7))
        ]
        search = torch.optim.LBFGS(free, max_iter=400, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure(free: list[torch.Tensor] = free) -> torch.Tensor:
            search.zero_grad()  # noqa: B023 - called before the next one is made
            left = [weights[0] - free[0] - free[1] @ free[2], weights[1] - free[0] - free[3] @ free[4]]
            loss = sum(((e @ c) * e).sum() for e, c in zip(left, moments, strict=True))
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            return loss

        best = min(best, float(search.step(closure).detach()))
        best = min(best, float(closure().detach()))
    assert found <= best * (1 + 1e-2)


def test_two_layers_with_like_inputs_halve_the_error_of_one_delta() -> None:
    """W1 − W2 has to be of rank 2 r in both cases; a shared W between them halves the squared error."""
    weights, _, (moment, _) = problem(2, 12, 12)
    fitted = tie.fit(weights, [moment, moment], [3, 3], rounds=1)
    one_sided = tie.low_rank(weights[1] - weights[0], moment, 6)
    assert one_sided is not None
    left = weights[1] - weights[0] - one_sided[0] @ one_sided[1]
    expected = 0.5 * float(((left @ moment) * left).sum())
    wholes = [float(((weight @ moment) * weight).sum()) for weight in weights]
    assert sum(e * w for e, w in zip(fitted.errors, wholes, strict=True)) == pytest.approx(expected, rel=1e-3)


def test_importance_draws_the_shared_weight_to_what_matters() -> None:
    weights, x, moments = problem(2)
    even = tie.fit(weights, moments, [0, 0])
    drawn = tie.fit(weights, moments, [0, 0], importance=[100.0, 1.0])
    assert drawn.errors[0] < even.errors[0] and drawn.errors[1] > even.errors[1]
    assert drawn.errors[0] == pytest.approx(output_error(weights[0], drawn.shared.double(), x[0]), rel=1e-3)


def test_where_blocks_start_from() -> None:
    weights = {index: torch.full((2, 3), float(index)) for index in range(6)}
    cycle = ((0, 2, 4), (1, 3, 5))
    start = {
        init: [float(tie.initial_weight(init, number, cycle, weights)[0, 0]) for number in (0, 1)]  # type: ignore[index]
        for init in ("average", "lower", "stepwise")
    }
    assert start == {"average": [2.0, 3.0], "lower": [0.0, 1.0], "stepwise": [0.0, 5.0]}
    assert tie.initial_weight("least-squares", 0, cycle, weights) is None
    three = ((0, 1), (2, 3), (4, 5))
    assert [tie.step_layer(number, three) for number in range(3)] == [0, 2, 5]
    assert tie.step_layer(0, ((3, 4),)) == 3


def test_a_given_start_is_kept_and_only_deltas_are_fitted() -> None:
    weights, _, moments = problem()
    start = torch.stack(weights).mean(0)
    fitted = tie.fit(weights, moments, [2, 2, 2], initial=start)
    torch.testing.assert_close(fitted.shared.double(), start, rtol=1e-6, atol=1e-6)
    assert max(fitted.errors) < max(fitted.shared_errors)
