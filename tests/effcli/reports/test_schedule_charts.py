"""Strips of full steps and lines of PSNR: boxes and points where they belong."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from effcli.reports.pipeline_reading import Row, rows
from effcli.reports.schedule_charts import psnr_lines, strips
from effcli.reports.sections.diffusion_map import strip_rows

from . import pipeline_examples
from .pipeline_examples import PATHS, PSNR, comparison, optimized


def found() -> tuple[Row, ...]:
    return rows(optimized().to_dict())


def test_full_steps_are_filled_boxes() -> None:
    drawing = strips(found(), 50)
    assert drawing is not None
    tips = re.findall(r'<rect class="(box[^"]*)"[^>]*><title>([^<]+)</title>', drawing)
    filled = [tip for kind, tip in tips if kind == "box full chosen"]
    assert filled == [
        f"minimax, fitted reuse, step {step}: in full" for budget in (25, 17, 10) for step in PATHS[budget]
    ]
    of_uniform = [tip for kind, tip in tips if kind == "box full" and tip.startswith("uniform spacing")]
    assert len(of_uniform) == 25 + 17 + 10
    assert len([tip for _, tip in tips if tip.startswith("uniform spacing")]) == 3 * 50
    assert drawing.count("not the same steps for every sample") == 5  # two caches at three budgets, one of them not run


def test_schedules_that_nothing_was_compared_with_have_a_strip() -> None:
    report = pipeline_examples.published().to_dict()
    (row,) = strip_rows(report)
    assert row.full == PATHS[17] and row.chosen
    assert strips(strip_rows(report), 50) is not None
    assert len(strip_rows(optimized().to_dict())) == len(comparison())


def test_many_steps_have_no_empty_boxes() -> None:
    report = pipeline_examples.wide().to_dict()
    drawing = strips(strip_rows(report), 250)
    assert drawing is not None and "reused" not in drawing
    assert drawing.count(": in full</title>") == len(report["schedules"][0]["full"])


def test_no_steps_no_strips() -> None:
    assert strips((), 50) is None
    assert strips(tuple(replace(row, full=None) for row in found()), 50) is None


def test_points_lie_where_their_figures_are() -> None:
    drawing = psnr_lines(found())
    assert drawing is not None
    label = "<title>minimax, fitted reuse</title>"
    points = next(re.findall(r'points="([^"]+)"', line)[0] for line in drawing.split("<polyline") if label in line)
    placed = [tuple(map(float, pair.split(","))) for pair in points.split()]
    scale = [(10, PSNR["fitted"][2]), (17, PSNR["fitted"][1]), (25, PSNR["fitted"][0])]
    (x0, y0), (x1, y1), (x2, y2) = placed
    assert (x1 - x0) / (x2 - x0) == pytest.approx(7 / 15, abs=1e-3)
    rise = [value for _, value in scale]
    assert (y0 - y1) / (y0 - y2) == pytest.approx((rise[1] - rise[0]) / (rise[2] - rise[0]), abs=2e-3)  # type: ignore[operator]
    assert drawing.count('class="whisker"') == 3  # of the chosen way alone
    assert drawing.count("<polyline") == len(PSNR)


def test_one_budget_is_no_line() -> None:
    assert psnr_lines(tuple(row for row in found() if row.budget == 17)) is None
    assert psnr_lines(()) is None
    psnrless = tuple(replace(row, likeness={}) for row in found())
    assert psnr_lines(psnrless) is None
