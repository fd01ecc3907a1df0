from __future__ import annotations

import pytest
import torch

from profilers.flop_formulas import formula

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("op", "arguments", "multiply_adds"),
    [
        (aten.linear.default, (torch.ones(2, 3, 5), torch.ones(7, 5)), 2 * 3 * 7 * 5),
        (aten.mv.default, (torch.ones(3, 5), torch.ones(5)), 15),
        (aten.dot.default, (torch.ones(5), torch.ones(5)), 5),
        (aten.addmv.default, (torch.ones(3), torch.ones(3, 5), torch.ones(5)), 15),
        (aten.addbmm.default, (torch.ones(3, 4), torch.ones(2, 3, 5), torch.ones(2, 5, 4)), 2 * 3 * 5 * 4),
        (aten._int_mm.default, (torch.ones(17, 8).char(), torch.ones(8, 16).char()), 17 * 8 * 16),
    ],
)
def test_a_multiply_add_is_two_flops(op, arguments, multiply_adds):
    count = formula(op)
    assert count is not None
    assert count(arguments, {}, op(*arguments)) == 2 * multiply_adds


def test_grouped_products_cost_what_the_rows_cost_one_by_one():
    rows, experts, inner, outer = 6, 3, 16, 8
    offsets = torch.tensor([1, 1, 6], dtype=torch.int32)
    a, b = torch.ones(rows, inner), torch.ones(experts, inner, outer)
    out = aten._grouped_mm(a, b, offsets)
    each_row = sum(2 * inner * outer for _ in range(rows))
    assert formula(aten._grouped_mm.default)((a, b, offsets), {}, out) == each_row


def test_a_triangular_solve_costs_what_substitution_does():
    n, columns = 5, 3
    operations = sum(2 * i + 1 for i in range(n)) * columns  # i multiply-adds and one division for row i
    triangle, right = torch.eye(n), torch.ones(n, columns)
    op = aten.linalg_solve_triangular.default
    assert formula(op)((triangle, right), {}, op(triangle, right, upper=False)) == operations


def test_there_is_no_formula_for_elementwise_ops():
    assert formula(aten.exp.default) is None
