from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from effcli.reports import charts
from effcli.reports.blocks import HeatMap
from effcli.reports.sections.intensity import module_groups
from effcli.reports.sections.kv import bits_of, cache_bytes
from effcli.reports.shades import downsample, shade
from effcli.reports.svg import Labels, LogScale, linear_ticks
from profilers.kv_cache import KVLayer

from . import samples

SVG = "{http://www.w3.org/2000/svg}"
CHARTS = {"roofline": charts.roofline, "kv": charts.kv_curve, "breakdown": charts.breakdown}


def parsed(svg: str | None) -> ElementTree.Element:
    assert svg is not None
    return ElementTree.fromstring(svg)


def of_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if name in (element.get("class") or "").split()]


def tip(element: ElementTree.Element) -> str:
    found = element.find(f"{SVG}title")
    return (found.text or "") if found is not None else ""


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("report", ["full", "config_only", "hostile"])
def test_charts_are_well_formed_and_named(name: str, report: str) -> None:
    root = parsed(CHARTS[name](getattr(samples, report)().to_dict()))
    labelled = (root.get("aria-labelledby") or "").split()
    assert [child.get("id") for child in list(root)[:2]] == labelled
    assert all(child.text for child in list(root)[:2])
    assert "nan" not in ElementTree.tostring(root, encoding="unicode").lower()


@pytest.mark.parametrize("name", CHARTS)
def test_charts_without_figures_are_not_drawn(name: str) -> None:
    data = samples.full().to_dict()
    data["profiles"] = {}
    assert CHARTS[name](data) is None
    if name != "kv":
        assert CHARTS[name](samples.bare().to_dict()) is None


def test_roofline_marks_stand_where_the_figures_say() -> None:
    data = samples.full().to_dict()
    root = parsed(charts.roofline(data))
    # The axes, read from two ticks each, must put every mark at its own intensity and rate.
    ticks = {"".join(element.itertext()): element for element in of_class(root, "tick")}
    x1, x1000 = float(ticks["1"].get("x") or 0), float(ticks["1,000"].get("x") or 0)
    y10g, y1t = float(ticks["10 G"].get("y") or 0) - 4, float(ticks["1 T"].get("y") or 0) - 4
    for mark, point in zip(of_class(root, "mark"), data["profiles"]["intensity"]["points"], strict=True):
        if mark.tag == f"{SVG}circle":
            x, y = float(mark.get("cx") or 0), float(mark.get("cy") or 0)
        else:
            x, y = float(mark.get("x") or 0) + 5, float(mark.get("y") or 0) + 5
        assert 10 ** (3 * (x - x1) / (x1000 - x1)) == pytest.approx(point["flops_per_byte"], rel=0.02)
        rate = point["flops"] / point["time_seconds"]
        assert 1e10 * 10 ** (2 * (y - y10g) / (y1t - y10g)) == pytest.approx(rate, rel=0.02)
        assert "hollow" not in (mark.get("class") or "")


def test_points_that_were_not_run_are_hollow_and_on_the_roof() -> None:
    root = parsed(charts.roofline(samples.config_only().to_dict()))
    marks = of_class(root, "mark")
    assert len(marks) == 4
    assert all("hollow" in (mark.get("class") or "") and "attainable, not run" in tip(mark) for mark in marks)


def test_many_points_keep_their_labels_apart() -> None:
    points = tuple(
        samples.intensity_point(phase, context, batch=batch)
        for batch in (1, 2, 8)
        for context in (512, 2048, 8192)
        for phase in ("prefill", "decode")
    )
    report = replace(samples.full(), profiles={"intensity": replace(samples.intensity(), points=points)})
    root = parsed(charts.roofline(report.to_dict()))
    assert len(of_class(root, "mark")) == 18
    boxes = []
    for label in of_class(root, "label"):
        text, x, y = "".join(label.itertext()), float(label.get("x") or 0), float(label.get("y") or 0)
        width = 6 * len(text)
        start = {"start": x, "end": x - width, "middle": x - width / 2}[label.get("text-anchor") or "start"]
        boxes.append((start, y - 9, start + width, y, text))
    for first in boxes:
        for second in boxes:
            apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
            assert first is second or apart, f"{first[4]} covers {second[4]}"


def test_heat_map_has_a_cell_for_each_head_coloured_by_its_value() -> None:
    heat = HeatMap("α", ((0.05, 0.95), None, (0.3, 0.31)), 0.3)
    root = parsed(charts.heat_map(heat))
    titled = {tip(cell): cell.get("class") for cell in of_class(root, "cell") if tip(cell)}
    assert titled == {
        "layer 0, head 0: 0.0500": "cell h0",
        "layer 0, head 1: 0.950, a sink": "cell h9",
        "layer 1: no softmax attention": "cell none",
        "layer 2, head 0: 0.300": "cell h3",
        "layer 2, head 1: 0.310, a sink": "cell h3",
    }
    assert charts.heat_map(HeatMap("none", (None, None), 0.3)) is None


def test_large_heat_maps_stay_small_files() -> None:
    heat = HeatMap("α", tuple(tuple(0.4 for _ in range(128)) for _ in range(126)), 0.3)
    svg = charts.heat_map(heat)
    assert len(of_class(parsed(svg), "cell")) == 126 * 128 + 10
    tips = [tip(layer) for layer in of_class(parsed(svg), "hover")]
    assert len(tips) == 126 and tips[0] == "layer 0: 128 of 128 heads are sinks, the strongest 0.400"
    assert svg is not None and len(svg) < 1_500_000


def test_kv_curve_marks_the_crossover_on_the_line_of_the_weights() -> None:
    root = parsed(charts.kv_curve(samples.full().to_dict()))
    (cross,) = of_class(root, "cross")
    weights = next(element for element in of_class(root, "weights") if element.tag == f"{SVG}line")
    assert cross.get("cy") == weights.get("y1") == weights.get("y2")
    assert "11,677 tokens" in tip(cross)
    native = next(element for element in of_class(root, "native"))
    points = [tuple(map(float, pair.split(","))) for pair in (native.get("points") or "").split()]
    above = next(index for index, (x, _) in enumerate(points) if x >= float(cross.get("cx") or 0))
    (xa, ya), (xb, yb) = points[above - 1], points[above]
    at_cross = ya + (yb - ya) * (float(cross.get("cx") or 0) - xa) / (xb - xa)
    assert at_cross == pytest.approx(float(cross.get("cy") or 0), abs=1)


def test_breakdown_bars_are_as_long_as_the_times() -> None:
    data = samples.full().to_dict()
    root = parsed(charts.breakdown(data))
    bars = [bar for bar in of_class(root, "bar") if "linear" in tip(bar)]
    decode = bars[:2]
    lengths = {(bar.get("class") or "").split()[1]: float(bar.get("width") or 0) for bar in decode}
    op = next(op for op in data["profiles"]["intensity"]["points"][1]["op_classes"] if op["name"] == "linear")
    assert lengths["attainable"] / lengths["measured"] == pytest.approx(
        op["attainable_seconds"] / op["measured_seconds"], rel=0.01
    )


def test_many_classes_are_summed_without_losing_time() -> None:
    classes = tuple(samples.op(f"class {n}", 1, 10, 10, 1e-3 * (n + 1), 2e-3 * (n + 1)) for n in range(20))
    point = replace(samples.intensity_point("decode", 512), op_classes=classes)
    found = charts._classes(replace_point(point))
    assert len(found) == charts.MOST_CLASSES + 1
    assert sum(measured or 0 for _, measured, _ in found) == pytest.approx(sum(2e-3 * (n + 1) for n in range(20)))


def replace_point(point: Any) -> dict[str, Any]:
    report = replace(samples.full(), profiles={"intensity": replace(samples.intensity(), points=(point,))})
    data: dict[str, Any] = report.to_dict()["profiles"]["intensity"]["points"][0]
    return data


# --- the figures behind the drawings ---


def test_cache_bytes_follow_windows_states_and_widths() -> None:
    window, per_token, state = 1024, 256, 5000
    layers = (
        KVLayer(0, "full", "DynamicLayer", float(per_token), 0, None, float(per_token), 0, 2),
        KVLayer(
            1, "sliding", "DynamicSlidingWindowLayer", 0.0, per_token * (window - 1), window, float(per_token), 0, 2
        ),
        KVLayer(2, "linear", "LinearAttentionLayer", 0.0, state, None, 0.0, state, None),
    )
    size = cache_bytes(
        replace(samples.full(), profiles={"kv": replace(samples.kv(), layers=layers)}).to_dict()["profiles"]["kv"]
    )
    for context in (1, 100, window - 1, window, 4 * window):
        kept = per_token * context + per_token * min(context, window - 1)
        assert size(context, 16) == pytest.approx(kept + state)
        assert size(context, 4) == pytest.approx(kept / 4 + state)


def test_a_cache_that_is_quantized_already_is_as_it_is_at_every_width() -> None:
    layers = (KVLayer(0, "quantized", "PQLayer", 34.0, 500, None, 0.0, 0, None),)
    size = cache_bytes(
        replace(samples.full(), profiles={"kv": replace(samples.kv(), layers=layers)}).to_dict()["profiles"]["kv"]
    )
    assert size(1000, 16) == size(1000, 4) == 34_500


def test_cache_bytes_without_layers_use_the_totals() -> None:
    size = cache_bytes({"dtype": "float32", "bytes_per_token": 100.0, "fixed_bytes": 7})
    assert size(10, 32) == 1007
    assert size(10, 16) == pytest.approx(1007 / 2)


@pytest.mark.parametrize(
    ("name", "bits"), [("bfloat16", 16), ("float32", 32), ("float8_e4m3fn", 8), ("torch.float64", 64)]
)
def test_bits_of_a_dtype(name: str, bits: int) -> None:
    assert bits_of(name) == bits


@pytest.mark.parametrize("root", ["", "(model)"])
def test_module_groups_add_up_to_the_whole(root: str) -> None:
    modules = samples.full().to_dict()["profiles"]["intensity"]["points"][0]["modules"]
    whole = next(module for module in modules if module["name"] == "")
    whole["name"] = root
    groups = {group.name: group for group in module_groups(modules)}
    assert sum(group.flops for group in groups.values()) == whole["flops"]
    assert sum(group.bytes for group in groups.values()) == whole["bytes"]
    assert groups["model.layers.*.mlp"].count == samples.LAYERS
    own = groups["model.layers.*.self_attn (itself)"]
    q = groups["model.layers.*.self_attn.q_proj"]
    inclusive = sum(module["flops"] for module in modules if module["name"].endswith(".self_attn"))
    assert own.flops + q.flops == inclusive


def test_log_scale_and_ticks() -> None:
    scale = LogScale(0.1, 1000, 0, 400)
    assert [scale(value) for value in (0.1, 1, 10, 1000)] == pytest.approx([0, 100, 200, 400])
    assert scale.ticks() == pytest.approx([0.1, 1, 10, 100, 1000])
    assert len(LogScale(1e-9, 1e21, 0, 1).ticks()) <= 11
    for high in (1e-6, 0.37, 1.0, 26.7, 99_999.0):
        ticks = linear_ticks(high)
        assert ticks[0] == 0 and high * 0.5 < ticks[-1] <= high * (1 + 1e-9) and 2 <= len(ticks) <= 7
        steps = {round((after - before) / high, 9) for before, after in zip(ticks, ticks[1:], strict=False)}
        assert len(steps) == 1
        mantissa = ticks[1] / 10 ** math.floor(math.log10(ticks[1]) + 1e-9)
        assert min(abs(mantissa - good) for good in (1, 2, 5, 10)) < 1e-6


def test_a_label_without_room_is_left_out() -> None:
    labels = Labels(0, 40, 0, 20)
    assert labels.place(20, 10, "far too long for this") is None


def test_shades_and_downsampling_average() -> None:
    assert [shade(value) for value in (0.0, 0.19, 0.2, 0.5, 0.79, 0.8, 1.0, None)] == list("  ░▒▓██·")
    grid, note = downsample([(1.0, 0.0), None, (0.5, 0.5), None], 2, 2)
    assert grid == [[1.0, 0.0], [0.5, 0.5]]
    assert "4 layers × 2 heads shown as 2 × 2" in note
    assert downsample([(1.0,)], 2, 2) == ([[1.0]], "")
    assert downsample([None], 1, 1)[0] == [[]]


# --- colours ---


def luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_contrast_in_light_and_dark() -> None:
    style = (Path(charts.__file__).parent / "page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        pairs = [
            ("ink", "card"),
            ("ink", "page"),
            ("muted", "card"),
            ("muted", "page"),
            ("muted", "soft"),
            ("accent", "card"),
        ]
        pairs += [
            (bound, ground) for bound in ("memory", "compute", "overhead") for ground in (f"{bound}-soft", "card")
        ]
        for text, ground in pairs:
            high, low = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"
        ramp = [luminance(colours[f"h{level}"]) for level in range(charts.HEAT_LEVELS)]
        assert ramp == sorted(ramp, reverse=ramp[0] > ramp[-1])
