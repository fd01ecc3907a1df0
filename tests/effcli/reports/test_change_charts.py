from __future__ import annotations

import math
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

from effcli.reports.change_charts import change_bars, error_level, grouped_bars, layer_cells, layer_chart, roofline_pair
from effcli.reports.changes import optimize_changes
from effcli.reports.documents import document
from passes.base import LayerRecord

from . import optimize_samples, samples
from .test_charts import of_class, parsed, tip


def drawn(name: str) -> dict[str, ElementTree.Element]:
    built = document({**optimize_samples.OPTIMIZED, **optimize_samples.PLANS}[name]().to_dict())
    return {key: parsed(svg) for key, figure in built.figures.items() if (svg := figure.draw()) is not None}


@pytest.mark.parametrize("name", [*optimize_samples.OPTIMIZED, *optimize_samples.PLANS])
def test_charts_are_well_formed_named_and_inside_their_frame(name: str) -> None:
    for root in drawn(name).values():
        assert all(child.text for child in list(root)[:2])
        assert "nan" not in ElementTree.tostring(root, encoding="unicode").lower().replace("name", "")
        width, height = map(float, (root.get("viewBox") or "").split()[2:])
        for element in root.iter():
            x, y = float(element.get("x") or 0), float(element.get("y") or 0)
            assert -1 <= x <= width and -1 <= y <= height
            assert x + float(element.get("width") or 0) <= width + 1


def test_every_chart_of_a_full_report_is_drawn() -> None:
    assert set(drawn("optimized")) == {"changes", "roofline-pair", "layers-0"}
    assert set(drawn("plan")) == {"plan"}
    assert set(drawn("partial")) == {"changes"}  # of its sizes


def bars(root: ElementTree.Element, kind: str, label: str) -> list[float]:
    return [float(bar.get("width") or 0) for bar in of_class(root, kind) if tip(bar).startswith(label)]


def test_bars_are_as_long_as_the_figures_say() -> None:
    root = drawn("optimized")["changes"]
    for label, before, after in (
        ("weights on disk", 269_030_016, 98_400_000),
        ("time per token", 0.0375, 0.0175),
        ("time to first token", 0.8, 0.79),
        ("peak memory", 700e6, 510e6),
    ):
        (one,), (other,) = bars(root, "attainable", label), bars(root, "measured", label)
        assert other / one == pytest.approx(after / before, abs=1e-3)


def test_the_mark_of_the_plan_stands_at_its_figure() -> None:
    root = drawn("optimized")["changes"]
    (measured,) = [bar for bar in of_class(root, "measured") if tip(bar).startswith("time per token")]
    (mark,) = [line for line in of_class(root, "threshold") if tip(line).startswith("time per token")]
    left = float(measured.get("x") or 0)
    share = (float(mark.get("x1") or 0) - left) / float(measured.get("width") or 1)
    assert share == pytest.approx(0.0125 / 0.0175, abs=1e-3)


def test_nothing_to_draw_is_no_chart() -> None:
    assert grouped_bars("x", "x", [], []) is None
    assert change_bars(optimize_changes(optimize_samples.partial().to_dict()), {}, "before", "after") is not None
    assert change_bars((), {}, "before", "after") is None
    assert layer_chart([]) is None
    bare = samples.bare().to_dict()
    assert roofline_pair(bare, samples.full().to_dict()) is None


def test_both_sides_stand_on_the_roofline_where_their_figures_say() -> None:
    before, after = (optimize_samples.profiled(f).to_dict() for f in (optimize_samples.BEFORE, optimize_samples.AFTER))
    root = parsed(roofline_pair(before, after))
    marks = {(tip(mark).split(",")[0], tip(mark).split(",")[1].strip()): mark for mark in of_class(root, "mark")}
    assert set(marks) == {(side, phase) for side in ("before", "after") for phase in ("prefill", "decode")}
    first, second = marks["before", "decode"], marks["after", "decode"]
    # Positions are logarithmic: the axes' own ticks give the pixels of a decade.
    ticks = {
        text.text: float(text.get("x") or 0) for text in of_class(root, "tick") if text.get("text-anchor") == "middle"
    }
    decade = ticks["10"] - ticks["1"]
    points = [
        next(p for p in report["profiles"]["intensity"]["points"] if p["phase"] == "decode")
        for report in (before, after)
    ]
    expected = decade * math.log10(points[1]["flops_per_byte"] / points[0]["flops_per_byte"])
    assert float(second.get("cx") or 0) - float(first.get("cx") or 0) == pytest.approx(expected, abs=0.2)
    assert float(second.get("cy") or 0) < float(first.get("cy") or 0)  # more FLOP/s after
    assert len(of_class(root, "arrowhead")) >= 1
    assert all("faded" in (marks["before", phase].get("class") or "") for phase in ("prefill", "decode"))


def test_layers_are_sorted_by_kind_and_depth() -> None:
    found = [asdict(layer) for layer in optimize_samples.layers()]
    kinds, depths, cells = layer_cells(found)
    assert kinds == [*optimize_samples.KINDS, "lm_head"]
    assert depths == [*range(samples.LAYERS), None]
    assert len(cells) == samples.LAYERS * len(optimize_samples.KINDS) + 1
    experts = [asdict(LayerRecord(f"model.layers.2.mlp.experts.{n}.up", "up", 4.0, 64, 0.01 * n)) for n in range(1, 5)]
    _, _, cells = layer_cells(experts)
    (cell,) = cells.values()
    assert (cell.count, cell.error, cell.bits) == (4, 0.04, 4.0)


def test_a_cell_has_the_colour_of_its_error_and_the_text_of_its_bits() -> None:
    root = drawn("mixed")["layers-0"]
    cells = of_class(root, "cell")
    layers = optimize_samples.layers((3.0, 4.0, 8.0))
    assert len([cell for cell in cells if tip(cell)]) == len(layers)
    worst = max((layer for layer in layers if layer.error), key=lambda layer: layer.error or 0)
    depth = worst.name.split(".")[2]
    (found,) = [cell for cell in cells if tip(cell).startswith(f"{worst.kind}, layer {depth}:")]
    assert "h9" in (found.get("class") or "")
    assert {text.text for text in of_class(root, "bits")} == {"3", "4", "8"}
    (head,) = [cell for cell in cells if tip(cell).startswith("lm_head")]
    assert "none" in (head.get("class") or "") and "error not known" in tip(head)


def test_the_colour_scale_of_errors_is_logarithmic() -> None:
    assert [error_level(error, 1e-4, 1.0) for error in (1e-5, 1e-4, 1.1e-2, 1.0, 5.0)] == [0, 0, 5, 9, 9]
    assert error_level(0.5, 0.5, 0.5) == 0
