"""The error map: cells where their segments are, logarithmic colours, paths through the cells of their segments."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from effcli.reports.charts import HEAT_LEVELS, LEFT, RIGHT, WIDTH
from effcli.reports.pipeline_reading import ErrorMap, error_map
from effcli.reports.schedule_map import draw

from .pipeline_examples import PATHS, graph

NAMESPACE = "{http://www.w3.org/2000/svg}"


def errors_of(weights: dict[tuple[int, int], float], steps: int = 8, max_gap: int = 4) -> ErrorMap:
    return ErrorMap(steps, max_gap, weights, 1, "latent", "last", None, None)


def rectangles(svg: str) -> list[tuple[str, str, float, float, float, float]]:
    """Return class, tip, x, y, width and height."""
    found = []
    for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}rect"):
        tip = element.find(f"{NAMESPACE}title")
        box = [float(element.get(key, "0")) for key in ("x", "y", "width", "height")]
        found.append((element.get("class", ""), "" if tip is None else tip.text or "", *box))
    return found  # type: ignore[return-value]


def test_a_cell_lies_at_its_step_and_length() -> None:
    errors = errors_of({(0, 2): 0.1, (3, 7): 0.2, (5, 7): 0.3})
    svg = draw(errors, ())
    cells = {tip: (x, y) for _, tip, x, y, _, _ in rectangles(svg) if tip}
    wide = (WIDTH - LEFT - RIGHT) / 7
    (first, long, late) = (
        cells[f"full at {i} and {j}, reuse between: {w}"]
        for i, j, w in ((0, 2, "0.100"), (3, 7, "0.200"), (5, 7, "0.300"))
    )
    assert first[0] == pytest.approx(LEFT, abs=0.1)
    assert long[0] - first[0] == pytest.approx(3 * wide, abs=0.1)
    assert late[0] - first[0] == pytest.approx(5 * wide, abs=0.1)
    assert first[1] == late[1] and first[1] - long[1] == pytest.approx(2 * 26.0, abs=0.1)  # two steps longer


def test_colours_are_logarithmic_and_zero_is_the_lightest() -> None:
    weights = {(0, 2): 1e-3, (1, 3): 10**-2.01, (2, 4): 10**-1.99, (3, 5): 0.1, (4, 6): 0.0}
    levels = {tip[8:15]: kind for kind, tip, *_ in rectangles(draw(errors_of(weights), ())) if tip}
    # Two decades over ten colours: the middle one starts at 10^-2.
    assert levels == {
        "0 and 2": "cell h0",
        "1 and 3": "cell h4",
        "2 and 4": "cell h5",
        "3 and 5": "cell h9",
        "4 and 6": "cell h0",
    }


def test_the_legend_has_its_ends_in_numbers() -> None:
    svg = draw(errors_of({(0, 2): 1e-3, (3, 5): 0.1}), ())
    ticks = re.findall(r'class="tick"[^>]*>([^<]+)<', svg)
    assert ticks[-3:] == ["0.001", "0.01", "0.1"]
    assert len([1 for kind, tip, *_ in rectangles(svg) if not tip]) == HEAT_LEVELS
    assert "≤ 0.001" in draw(errors_of({(0, 2): 1e-3, (1, 3): 0.0, (3, 5): 0.1}), ())


def test_errors_that_are_all_the_same_are_drawn() -> None:
    assert "nan" not in draw(errors_of({(0, 2): 0.5, (1, 3): 0.5}), ())


def test_a_path_runs_through_the_cells_of_its_segments() -> None:
    errors = error_map(graph().model_dump(mode="json"))
    assert errors is not None
    full = PATHS[17]
    svg = draw(errors, (("medium (17)", full), ("fast (10)", PATHS[10])))
    cells = {tip: (x, y, w, h) for kind, tip, x, y, w, h in rectangles(svg) if kind.startswith("cell") and tip}
    lines = {
        element.get("class"): [tuple(map(float, pair.split(","))) for pair in (element.get("points") or "").split()]
        for element in ElementTree.fromstring(svg).iter(f"{NAMESPACE}polyline")
    }
    assert [len(lines[kind]) for kind in ("path main", "path")] == [16, 9]
    for (x, y), (i, j) in zip(lines["path main"], pairwise(full), strict=True):
        if j - i > 1:
            left, top, wide, tall = next(box for tip, box in cells.items() if tip.startswith(f"full at {i} and {j},"))
            assert left <= x <= left + wide and top <= y <= top + tall
    framed = [tip for kind, tip, *_ in rectangles(svg) if kind == "stop"]
    assert framed == [f"medium (17): full at {i} and {j}" for i, j in pairwise(full) if j - i > 1]


@pytest.mark.parametrize("count", [0, 1, 3, 12])
@pytest.mark.parametrize(("steps", "max_gap"), [(2, 2), (4, 3), (50, 8), (250, 16)])
def test_nothing_lies_outside_the_drawing(steps: int, max_gap: int, count: int) -> None:
    weights = {(i, j): 0.1 + i for i in range(steps) for j in range(i + 2, min(steps, i + max_gap + 1))} or {
        (0, 1): 1.0
    }
    svg = draw(errors_of(weights, steps, max_gap), [(f"schedule {index} (9)", (0, 1)) for index in range(count)])
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    for _, _, x, y, wide, tall in rectangles(svg):
        assert x >= 0 and x + wide <= width + 0.1 and y >= 0 and y + tall <= height
    labels = [element for element in root.iter(f"{NAMESPACE}text") if element.get("class") == "label"]
    assert len(labels) == count + 1
    assert all(float(label.get("x", "0")) + 7 * len(label.text or "") <= width for label in labels)
