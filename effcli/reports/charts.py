"""The charts of the HTML report, each drawn from the saved report as inline SVG.

Each function returns None where the report lacks the figures; the page then says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import HeatMap, Report, items, main_point, profile, ratio, where
from effcli.reports.sections.kv import bits_of, cache_bytes
from effcli.reports.svg import Labels, LogScale, Svg, decade_above, decade_below, linear_ticks

WIDTH = 760.0
LEFT, RIGHT = 78.0, 24.0
TITLED_CELLS = 6000  # heat maps with more cells get one hover text a layer instead of one a cell
HEAT_LEVELS = 10
MOST_CLASSES = 8
CURVE_POINTS = 96


def roofline(report: Report) -> str | None:
    """Draw measured roofs and a mark for each prefill and decode point, log–log."""
    intensity = profile(report, "intensity") or {}
    peaks = (report.get("environment") or {}).get("peaks") or {}
    bandwidth = intensity.get("peak_bytes_per_second") or peaks.get("memory_bytes_per_second")
    rates = {name: rate for name, rate in (peaks.get("flops_per_second") or {}).items() if rate}
    if not rates and intensity.get("peak_flops_per_second"):
        rates = {str(intensity.get("dtype")): intensity["peak_flops_per_second"]}
    marks = [mark for point in items(intensity, "points") if (mark := _mark(point)) is not None]
    if not marks or not bandwidth or not rates:
        return None
    height, top, bottom = 430.0, 20.0, 54.0
    ridges = [rate / bandwidth for rate in rates.values()]
    xs = [mark[0] for mark in marks] + ridges
    ys = [mark[1] for mark in marks] + list(rates.values())
    x = LogScale(decade_below(min(xs) / 1.5), decade_above(max(xs) * 1.5), LEFT, WIDTH - RIGHT)
    y = LogScale(decade_below(min(ys) / 1.5), decade_above(max(ys) * 1.2), height - bottom, top)
    drawing = Svg(
        "roofline",
        "Roofline of this device with the measured points",
        f"Log–log plot of FLOP/s against FLOP/byte. Memory roof {fmt.bandwidth(bandwidth)}; compute roofs "
        + ", ".join(f"{name} {fmt.flop_rate(rate)}" for name, rate in rates.items())
        + f". {len(marks)} points.",
        WIDTH,
        height,
    )
    grid_lines(drawing, x, y, fmt.short, lambda rate: fmt.large(rate, ""))
    drawing.text("axis", (LEFT + WIDTH - RIGHT) / 2, height - 12, "arithmetic intensity, FLOP/byte", "middle")
    drawing.text(
        "axis", 0, 0, "FLOP/s", "middle", transform=f"translate(16 {(top + height - bottom) / 2:.0f}) rotate(-90)"
    )
    labels = Labels(LEFT + 4, WIDTH - RIGHT - 2, top, height - bottom)
    for mark in marks:
        labels.occupy(x(mark[0]), y(mark[1]), 7)
    roofs(drawing, x, y, bandwidth, rates, str(intensity.get("dtype")), labels)
    main_rate = rates.get(str(intensity.get("dtype")), max(rates.values()))
    for flops_per_byte, rate, _ in marks:
        roof = y(min(flops_per_byte * bandwidth, main_rate))
        if y(rate) - roof > 8:
            drawing.line("headroom", x(flops_per_byte), y(rate) - 7, x(flops_per_byte), roof)
            labels.taken.append((x(flops_per_byte) - 1, roof, x(flops_per_byte) + 1, y(rate)))
    for flops_per_byte, rate, point in marks:
        _roofline_mark(drawing, x(flops_per_byte), y(rate), rate, point, labels)
    return drawing.render()


def _mark(point: Report) -> tuple[float, float, Report] | None:
    rate = ratio(point.get("flops"), point.get("time_seconds") or point.get("attainable_seconds"))
    return (point["flops_per_byte"], rate, point) if rate and point.get("flops_per_byte") else None


def rounded_tick(text: str) -> str:
    """Drop the zeros that a tick does not need: ``10.0 G`` is ``10 G``."""
    number, _, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".strip()


def grid_lines(
    drawing: Svg, x: LogScale, y: LogScale, x_label: Callable[[float], str], y_label: Callable[[float], str]
) -> None:
    """Draw the lines of both scales, the frame and the ticks' labels."""
    floor, top = y.start, y.end
    for tick in x.ticks():
        drawing.line("grid", x(tick), top, x(tick), floor)
    for tick in y.ticks():
        drawing.line("grid", x.start, y(tick), x.end, y(tick))
    drawing.line("frame", x.start, floor, x.end, floor)
    drawing.line("frame", x.start, top, x.start, floor)
    for tick in x.ticks():
        drawing.text("tick", x(tick), floor + 18, x_label(tick), "middle")
    for tick in y.ticks():
        drawing.text("tick", x.start - 8, y(tick) + 4, rounded_tick(y_label(tick)), "end")


def roofs(
    drawing: Svg, x: LogScale, y: LogScale, bandwidth: float, rates: dict[str, float], main: str, labels: Labels
) -> None:
    """Draw the memory roof, and a compute roof for each dtype, ``main`` the strongest."""
    highest = max(rates.values())
    start = max(x.low, y.low / bandwidth)
    slant = [(x(start), y(start * bandwidth)), (x(highest / bandwidth), y(highest))]
    own = rates.get(main, highest)
    floor = y(y.low)
    below = [(slant[0][0], floor), slant[0], (x(own / bandwidth), y(own)), (x.end, y(own)), (x.end, floor)]
    drawing.polyline("under", below)
    drawing.polyline("roof main", slant, f"memory roof {fmt.bandwidth(bandwidth)}")
    for step in range(41):  # labels keep off the slanted line
        labels.occupy(
            slant[0][0] + step / 40 * (slant[1][0] - slant[0][0]),
            slant[0][1] + step / 40 * (slant[1][1] - slant[0][1]),
            3,
        )
    ridge = min(max(x(own / bandwidth), x.start + 66), x.end - 66)
    drawing.text("label", ridge, floor - 8, f"ridge {fmt.short(own / bandwidth)} FLOP/byte", "middle")
    drawing.line("limit", x(own / bandwidth), y(own), x(own / bandwidth), floor - 22)
    labels.occupy(ridge, floor - 12, 62)
    for name, rate in sorted(rates.items(), key=lambda item: item[0] != main):
        kind = "roof main" if name == main else "roof"
        text = f"{printable(name)} {fmt.flop_rate(rate)}"
        labels.taken.append((x(rate / bandwidth), y(rate) - 2, x.end, y(rate) + 2))
        drawing.polyline(kind, [(x(rate / bandwidth), y(rate)), (x.end, y(rate))], f"compute roof {text}")
        # Above the line; below where another roof's label is already there.
        for dy in (-7.0, 16.0):
            if labels.fits(x.end - 4, y(rate) + dy, text, "end"):
                drawing.text("label strong" if name == main else "label", x.end - 4, y(rate) + dy, text, "end")
                break
    text = f"memory {fmt.bandwidth(bandwidth)}"
    middle = (start * highest / bandwidth) ** 0.5
    spot = labels.place(x(middle), y(middle * bandwidth) - 6, text, gap=14)
    if spot is not None:
        drawing.text("label strong", spot[0], spot[1], text, spot[2])


def _roofline_mark(drawing: Svg, x: float, y: float, rate: float, point: Report, labels: Labels) -> None:
    phase, timed = str(point.get("phase")), point.get("time_seconds") is not None
    meaning = "reached" if timed else "attainable, not run"
    tip = (
        f"{phase}, {where(point)}: {fmt.flop_rate(rate)} {meaning}, {fmt.short(point['flops_per_byte'])} FLOP/byte"
        + (f", {point['bound']}-bound" if point.get("bound") else "")
    )
    kind = f"mark {phase if phase in ('prefill', 'decode') else 'other'}{'' if timed else ' hollow'}"
    if phase == "prefill":
        drawing.add("rect", kind, tip, x=x - 5, y=y - 5, width=10, height=10)
    else:
        drawing.add("circle", kind, tip, cx=x, cy=y, r=5.5)
    text = f"{phase} {point.get('batch')} × {point.get('context'):,}"
    spot = labels.place(x, y, text)
    if spot is not None:
        drawing.text("label", spot[0], spot[1], text, spot[2])


def heat_map(heat: HeatMap, number: int = 0) -> str | None:
    """Draw layers (left to right) × heads, or layers again, (top to bottom) with a colour scale."""
    heads = max((len(row) for row in heat.values if row is not None), default=0)
    if not heads:
        return None
    layers = len(heat.values)
    left, top = 52.0, 16.0
    wide = min(24.0, (WIDTH - left - RIGHT) / layers)
    tall = min(wide, 20.0) if layers < 100 else max(3.0, wide)
    floor = top + heads * tall
    name = "sinks" if heat.threshold is not None else f"{heat.row}s"
    drawing = Svg(
        f"{name}-{number}",
        heat.title,
        f"Heat map of {layers} layers by {heads} {heat.row}s, values 0 to 1{_above(heat)}.",
        WIDTH,
        floor + 84,
    )
    each = layers * heads <= TITLED_CELLS
    for layer, row in enumerate(heat.values):
        x = left + layer * wide
        if row is None:
            reason = f"layer {layer}: no softmax attention"
            drawing.add("rect", "cell none", reason, x=x, y=top, width=max(0.5, wide - 1), height=heads * tall)
            continue
        for head, value in enumerate(row):
            sink = ", a sink" if heat.threshold is not None and value > heat.threshold else ""
            tip = f"layer {layer}, {heat.row} {head}: {fmt.significant(value)}{sink}" if each else None
            kind = f"cell h{_level(value)}"
            drawing.add("rect", kind, tip, x=x, y=top + head * tall, width=_gap(wide), height=_gap(tall))
        if not each:
            drawing.add("rect", "hover", _of_layer(heat, layer, row), x=x, y=top, width=wide, height=heads * tall)
    step = max(1, round(layers / 12))
    for layer in range(0, layers, step):
        drawing.text("tick", left + (layer + 0.5) * wide, floor + 15, str(layer), "middle")
    for head in sorted({0, heads - 1}) if heat.row == "head" else range(0, heads, step):
        drawing.text("tick", left - 8, top + (head + 0.5) * tall + 4, str(head), "end")
    drawing.text("axis", left + layers * wide / 2, floor + 33, "layer", "middle")
    drawing.text("axis", 0, 0, heat.row, "middle", transform=f"translate(16 {(top + floor) / 2:.0f}) rotate(-90)")
    _legend(drawing, left, floor + 46, heat)
    return drawing.render()


def _of_layer(heat: HeatMap, layer: int, row: Sequence[float]) -> str:
    if heat.threshold is None:
        return f"layer {layer}: from {fmt.significant(min(row))} to {fmt.significant(max(row))}"
    sinks = sum(value > heat.threshold for value in row)
    return f"layer {layer}: {sinks} of {len(row)} heads are sinks, the strongest {fmt.significant(max(row))}"


def _gap(size: float) -> float:
    return size - 1 if size >= 6 else size


def _level(value: float) -> int:
    return min(HEAT_LEVELS - 1, max(0, int(value * HEAT_LEVELS)))


def _above(heat: HeatMap) -> str:
    if heat.threshold is None:
        return ""
    values = [value for row in heat.values if row is not None for value in row]
    above = sum(value > heat.threshold for value in values)
    return f"; {above} of {len(values)} heads above {fmt.short(heat.threshold)}"


def _legend(drawing: Svg, left: float, y: float, heat: HeatMap) -> None:
    size = 22.0
    for level in range(HEAT_LEVELS):
        drawing.add("rect", f"cell h{level}", x=left + level * size, y=y, width=size, height=10)
    for value in (0.0, 0.5, 1.0):
        drawing.text("tick", left + value * HEAT_LEVELS * size, y + 25, fmt.short(value), "middle")
    right, threshold = left + HEAT_LEVELS * size + 14, heat.threshold
    if threshold is None:
        drawing.text("label", right, y + 9, heat.value)
        return
    mark = left + threshold * HEAT_LEVELS * size
    drawing.line("threshold", mark, y - 3, mark, y + 13)
    if min(abs(threshold - value) for value in (0.0, 0.5, 1.0)) > 0.12:
        drawing.text("tick", mark, y + 25, f"ε {fmt.short(threshold)}", "middle")
    drawing.text("label", right, y + 9, f"{heat.value}; {_plural(threshold)}")


def _plural(threshold: float) -> str:
    return f"a head above ε = {fmt.short(threshold)} counts as a sink"


def kv_curve(report: Report) -> str | None:
    """Draw cache bytes against context for each KV width, with the weights, the memory and the crossover."""
    kv = profile(report, "kv") or {}
    size, native = cache_bytes(kv), bits_of(kv.get("dtype"))
    limit, crossover = kv.get("model_context_limit"), kv.get("crossover_context")
    points = [point for point in items(kv, "points") if point.get("batch") == 1]
    ends = [limit, crossover, *(kv.get("max_context") or {}).values(), *(point.get("context") for point in points)]
    known = [end for end in ends if end]
    if not known or size(1024, native) <= 0:
        return None
    first = 128.0
    last = max(4096.0, max(known) * 1.5)
    widths = sorted({native, *(int(bits) for bits in kv.get("max_context") or {"16": 0, "8": 0, "4": 0})}, reverse=True)
    weights, memory = kv.get("weight_bytes"), kv.get("memory_bytes")
    sizes = [size(context, bits) for context in (first, last) for bits in widths if size(context, bits) > 0]
    sizes += [value for value in (weights, memory) if value]
    height, top, bottom, right = 400.0, 22.0, 54.0, 64.0
    x = LogScale(first, last, LEFT, WIDTH - right)
    y = LogScale(decade_below(min(sizes)), max(sizes) * 2, height - bottom, top)
    drawing = Svg(
        "kv-curve",
        "KV cache bytes of one sequence against context",
        f"Log–log lines for {', '.join(f'{bits} bits' for bits in widths)}; weights {fmt.data_size(weights)}, "
        f"device memory {fmt.data_size(memory)}; as large as the weights at {fmt.integer(crossover)} tokens.",
        WIDTH,
        height,
    )
    grid_lines(drawing, x, y, fmt.integer, fmt.data_size)
    drawing.text("axis", (LEFT + WIDTH - right) / 2, height - 12, "context, tokens", "middle")
    for value, kind, name in ((weights, "weights", "weights"), (memory, "memory", "device memory")):
        if value:
            drawing.line(f"level {kind}", x.start, y(value), x.end, y(value))
            drawing.text(f"label {kind}", x.start + 8, y(value) - 6, f"{name} {fmt.data_size(value)}")
    if limit and first < limit < last:
        drawing.line("limit", x(limit), top, x(limit), height - bottom)
        drawing.text("label", x(limit) - 6, height - bottom - 8, f"model limit {limit:,}", "end")
    contexts = [first * (last / first) ** (step / CURVE_POINTS) for step in range(CURVE_POINTS + 1)]
    for bits in widths:
        curve = [(x(context), y(size(context, bits))) for context in contexts if size(context, bits) > 0]
        drawing.polyline(f"curve b{bits}{' native' if bits == native else ''}", curve, f"KV in {bits} bits")
        drawing.text("label", x.end + 6, curve[-1][1] + 4, f"{bits} bits")
    if crossover and weights and first < crossover < last:
        drawing.add(
            "circle",
            "mark cross",
            f"as large as the weights at {crossover:,} tokens",
            cx=x(crossover),
            cy=y(weights),
            r=6,
        )
        drawing.text("label strong", x(crossover) - 8, y(weights) - 9, f"{crossover:,} tokens", "end")
    for point in points:
        held = point.get("measured_bytes")
        value = held if held is not None else point.get("predicted_bytes")
        if value and first <= point["context"] <= last:
            tip = f"{where(point)}: {'held' if held is not None else 'predicted'} {fmt.data_size(value)}"
            kind = "mark decode" if held is not None else "mark decode hollow"
            drawing.add("circle", kind, tip, cx=x(point["context"]), cy=y(value), r=4.5)
    return drawing.render()


def breakdown(report: Report) -> str | None:
    """Draw measured and attainable time by op class for the main decode and prefill points."""
    points = items(profile(report, "intensity"), "points")
    panels = []
    for phase in ("decode", "prefill"):
        point = main_point(points, phase)
        classes = _classes(point) if point is not None else []
        if point is not None and classes:
            panels.append((point, classes))
    if not panels:
        return None
    row, head, left = 34.0, 34.0, 150.0
    height = sum(head + row * len(classes) + 40 for _, classes in panels)
    drawing = Svg(
        "breakdown",
        "Time by class of op: measured against attainable",
        "; ".join(
            f"{point.get('phase')}: "
            + ", ".join(f"{name} {fmt.seconds(measured or best)}" for name, measured, best in classes)
            for point, classes in panels
        ),
        WIDTH,
        height,
    )
    y = 0.0
    for point, classes in panels:
        y = _panel(drawing, y, point, classes, (left, row, head))
    return drawing.render()


def _classes(point: Report) -> list[tuple[str, float | None, float | None]]:
    """Return name, measured and attainable seconds of each op class, the longest first, small ones summed."""
    found = [
        (printable(op.get("name")), op.get("measured_seconds"), op.get("attainable_seconds"))
        for op in items(point, "op_classes")
    ]
    found = [entry for entry in found if entry[1] or entry[2]]
    found.sort(key=lambda entry: (entry[1] or 0.0, entry[2] or 0.0), reverse=True)
    rest = found[MOST_CLASSES:]
    if not rest:
        return found
    return [*found[:MOST_CLASSES], (f"{len(rest)} others", _sum([e[1] for e in rest]), _sum([e[2] for e in rest]))]


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _panel(
    drawing: Svg,
    y: float,
    point: Report,
    classes: list[tuple[str, float | None, float | None]],
    geometry: tuple[float, float, float],
) -> float:
    left, row, head = geometry
    longest = max(value or 0.0 for _, measured, best in classes for value in (measured, best))
    scale = (WIDTH - left - 150) / longest
    drawing.text("label strong", 8, y + 20, f"{str(point.get('phase')).capitalize()}, {where(point)}")
    keys = [("measured", "measured")] if any(measured is not None for _, measured, _ in classes) else []
    for number, (kind, text) in enumerate([*keys, ("attainable", "roofline")]):
        drawing.add("rect", f"bar {kind}", x=WIDTH - 220 + 100 * number, y=y + 10, width=12, height=12, rx=2)
        drawing.text("label", WIDTH - 202 + 100 * number, y + 20, text)
    first, y = y + head, y + head
    for tick in linear_ticks(longest):
        drawing.line("grid", left + tick * scale, first, left + tick * scale, first + row * len(classes))
        drawing.text(
            "tick", left + tick * scale, first + row * len(classes) + 16, rounded_tick(fmt.seconds(tick)), "middle"
        )
    for name, measured, best in classes:
        shown = name if len(name) <= 22 else name[:21] + "…"
        drawing.text("tick name", left - 10, y + row / 2 + 4, shown, "end")
        for offset, value, kind in ((5.0, measured, "measured"), (17.0, best, "attainable")):
            if value is not None:
                tip = f"{name}: {fmt.seconds(value)} {kind}"
                drawing.add(
                    "rect", f"bar {kind}", tip, x=left, y=y + offset, width=max(1.0, value * scale), height=11, rx=2
                )
        end = left + max(measured or 0.0, best or 0.0) * scale + 8
        share = ratio(best, measured)
        text = fmt.seconds(measured if measured is not None else best)
        drawing.text(
            "label", end, y + row / 2 + 4, f"{text}, {fmt.percent(share)} of roof" if share is not None else text
        )
        y += row
    return y + 40
