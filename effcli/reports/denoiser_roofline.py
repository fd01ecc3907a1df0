"""Where one call of the denoiser stands on the device's roofline."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report
from effcli.reports.changes import mapping, number
from effcli.reports.charts import LEFT, RIGHT, WIDTH, grid_lines, roofs
from effcli.reports.svg import Labels, LogScale, Svg, decade_above, decade_below

HEIGHT, TOP, BOTTOM = 380.0, 20.0, 54.0


def draw(report: Report, name: str) -> str | None:
    """Draw the roofs of the denoiser's dtype and a mark for its call, called ``name``; None without their figures."""
    cost = mapping(mapping(report.get("denoising")).get("cost"))
    keys = ("peak_bytes_per_second", "peak_flops_per_second", "flops_per_byte", "flops_per_second")
    bandwidth, peak, intensity, rate = (number(cost.get(key)) for key in keys)
    if not (bandwidth and peak and intensity and rate):
        return None
    if min(bandwidth, peak, intensity, rate) <= 0:
        return None
    dtype = printable(cost.get("dtype") or "dtype not known")
    ridge = peak / bandwidth
    x = LogScale(
        decade_below(min(intensity, ridge) / 1.5), decade_above(max(intensity, ridge) * 1.5), LEFT, WIDTH - RIGHT
    )
    y = LogScale(decade_below(min(rate, peak) / 1.5), decade_above(max(rate, peak) * 1.2), HEIGHT - BOTTOM, TOP)
    drawing = Svg(
        "denoiser-roofline",
        "One call of the denoiser on the roofline of this device",
        f"Log–log plot of FLOP/s against FLOP/byte. Memory roof {fmt.bandwidth(bandwidth)}, compute roof "
        f"{fmt.flop_rate(peak)}; {name} at {fmt.short(intensity)} FLOP/byte reaches {fmt.flop_rate(rate)}.",
        WIDTH,
        HEIGHT,
    )
    grid_lines(drawing, x, y, fmt.short, lambda value: fmt.large(value, ""))
    drawing.text("axis", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "arithmetic intensity, FLOP/byte", "middle")
    turned = f"translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)"
    drawing.text("axis", 0, 0, "FLOP/s", "middle", transform=turned)
    labels = Labels(LEFT + 4, WIDTH - RIGHT - 2, TOP, HEIGHT - BOTTOM)
    labels.occupy(x(intensity), y(rate), 7)
    roofs(drawing, x, y, bandwidth, {dtype: peak}, dtype, labels)
    roof = y(min(intensity * bandwidth, peak))
    if y(rate) - roof > 8:
        drawing.line("headroom", x(intensity), y(rate) - 7, x(intensity), roof)
    tip = f"{name}: {fmt.flop_rate(rate)} reached, {fmt.short(intensity)} FLOP/byte"
    drawing.add("circle", "mark prefill", tip, cx=x(intensity), cy=y(rate), r=5.5)
    spot = labels.place(x(intensity), y(rate), name)
    if spot is not None:
        drawing.text("label strong", spot[0], spot[1], name, spot[2])
    return drawing.render()
