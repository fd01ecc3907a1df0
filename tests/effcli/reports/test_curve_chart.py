"""Curves of training: points where they belong, the table's rows, and records that hold something else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from effcli.reports import curve_chart

POINTS = [[0, 2.0], [1000, 1.0], [4000, 0.5]]


def record(**curve: Any) -> dict[str, Any]:
    series = [{"name": "loss", "points": POINTS}, {"name": "held out", "points": [[0, 1.5], [4000, 0.25]]}]
    return {"details": {"curves": [{"title": "Healing", "unit": "nats a token", "series": series} | curve]}}


def test_points_lie_on_linear_axes_from_zero() -> None:
    (found,) = curve_chart.curves(record())
    drawing = curve_chart.chart(found, "curve-0-0")
    assert drawing is not None
    lines = [
        [tuple(map(float, pair.split(","))) for pair in text.split()]
        for text in re.findall(r'points="([^"]+)"', drawing)
    ]
    (first, second, third), (start, end) = lines
    floor, top = 264.0, 34.0
    assert [y for _, y in (first, second, third)] == pytest.approx([top, (top + floor) / 2, floor - (floor - top) / 4])
    assert (second[0] - first[0]) / (third[0] - first[0]) == pytest.approx(0.25, abs=1e-3)
    assert (start[0], end[0]) == (first[0], third[0])
    assert "held out" in drawing and "nats a token" in drawing


def test_the_table_says_what_a_series_lacks_and_keeps_first_and_last() -> None:
    (found,) = curve_chart.curves(record())
    table = curve_chart.table(found)
    assert [column.title for column in table.columns] == ["tokens", "loss, nats a token", "held out, nats a token"]
    assert table.rows == (("0", "2.00", "1.50"), ("1,000", "1.00", "–"), ("4,000", "0.500", "0.250"))
    many = record(series=[{"name": "loss", "points": [[step, 1.0] for step in range(500)]}])
    rows = curve_chart.table(curve_chart.curves(many)[0]).rows
    assert len(rows) == curve_chart.MOST_ROWS and (rows[0][0], rows[-1][0]) == ("0", "499")


@pytest.mark.parametrize(
    "details",
    [None, {}, {"curves": 3}, {"curves": [3]}, {"curves": [{"series": [{"points": "x"}]}]}, {"curves": [{"series": 1}]}]
    + [
        record(series=[{"name": "loss", "points": points}])["details"] for points in ([[0, 1]], [[0, float("nan")]] * 3)
    ],
)
def test_what_is_no_curve_is_left_out(details: Any) -> None:
    assert curve_chart.curves({"details": details}) == []


def test_curves_of_zeros_are_not_drawn() -> None:
    (found,) = curve_chart.curves(record(series=[{"name": "<b>", "points": [[0, 0], [5, 0]]}]))
    assert curve_chart.chart(found, "curve-0-0") is None
