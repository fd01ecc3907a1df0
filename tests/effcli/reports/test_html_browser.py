"""The HTML report in a real browser: charts have a size, nothing overflows, no console message, no request."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from effcli.reports.render import render
from tests.effcli.batch import states

from . import optimize_samples, pipeline_examples, samples

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update")
# What chromium's own services ask for has no page behind it.
NO_PAGE = "not an origin"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on the PATH"),
]

# A page around the report that measures it from outside: the report itself runs no script.
PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe src="%s" style="border:0;width:%dpx;height:20000px"></iframe><pre id="probe"></pre>
<script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const sizes = selector => [...page.querySelectorAll(selector)].map(element => {
    const box = element.getBoundingClientRect();
    return [box.width, box.height];
  });
  const view = page.documentElement;
  document.getElementById("probe").textContent = JSON.stringify({
    charts: Object.fromEntries([...page.querySelectorAll("svg.chart")].map(svg => {
      const box = svg.getBoundingClientRect();
      const drawing = svg.getBBox();
      return [svg.id, {
        size: [box.width, box.height],
        view: [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height],
        drawing: [drawing.x, drawing.y, drawing.x + drawing.width, drawing.y + drawing.height],
        marks: svg.querySelectorAll(".mark").length,
        cells: svg.querySelectorAll(".cell").length,
        curves: svg.querySelectorAll(".curve").length,
        roofs: svg.querySelectorAll(".roof").length,
        bars: svg.querySelectorAll(".bar").length,
      }];
    })),
    cards: sizes(".card").length,
    tables: sizes("table"),
    images: [...page.querySelectorAll("img")].map(image => [image.naturalWidth, ...sizes("img")[0]]),
    heads: sizes(".sheet .heads span"),
    sides: sizes(".sheet .sides span"),
    overflow: view.scrollWidth - view.clientWidth,
    font: getComputedStyle(page.body).fontFamily,
    background: getComputedStyle(page.body).backgroundColor,
    text: page.querySelector("h1").textContent,
  });
});
</script>"""


@dataclass
class Visit:
    """What the browser did with a page."""

    dom: str
    console: list[str]
    requests: list[str]


def visit(path: Path, folder: Path) -> Visit:
    """Open a file, with the network log on and every host name unresolvable."""
    log = folder / "net.json"
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *OFFLINE,
            "--allow-file-access-from-files",
            *("--enable-logging=stderr", "--v=0", f"--log-net-log={log}", f"--user-data-dir={folder / 'profile'}"),
            *("--window-size=1400,1000", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [
        event["params"]["url"]
        for event in events
        if isinstance(event.get("params"), dict) and event["params"].get("initiator", NO_PAGE) != NO_PAGE
    ]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(done.stdout, console, [url for url in asked if not url.startswith(("file:", "data:"))])


def probe(report: Path, folder: Path, width: int) -> tuple[dict[str, Any], Visit]:
    """Measure the report at a width in pixels."""
    outer = folder / "probe.html"
    outer.write_text(PROBE % (report.name, width), encoding="utf-8")
    seen = visit(outer, folder)
    found = re.search(r'<pre id="probe">(.+?)</pre>', seen.dom, re.DOTALL)
    assert found is not None, f"the probe did not run: {seen.console}"
    measured: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return measured, seen


def saved(report: Any, folder: Path) -> Path:
    path = folder / "report.html"
    path.write_text(render(report.to_dict(), "html"), encoding="utf-8")
    return path


def test_charts_are_drawn_and_the_page_is_silent(tmp_path: Path) -> None:
    measured, seen = probe(saved(samples.full(), tmp_path), tmp_path, 1200)
    assert seen.console == []
    assert seen.requests == []
    charts = measured["charts"]
    assert set(charts) == {"roofline", "breakdown", "kv-curve", "sinks-0", "sinks-1"}
    for name, chart in charts.items():
        assert chart["size"][0] > 500 and chart["size"][1] > 150, name
        left, top, right, bottom = chart["drawing"]
        assert left >= -1 and top >= -1, f"{name} is cut at the left or the top"
        assert right <= chart["view"][0] + 1 and bottom <= chart["view"][1] + 1, f"{name} is cut"
    legend = 10
    assert charts["roofline"]["marks"] == len(samples.intensity().points)
    assert charts["roofline"]["roofs"] == 1 + len(samples.peaks().flops_per_second)
    assert charts["sinks-0"]["cells"] == samples.LAYERS * samples.HEADS + legend
    assert charts["kv-curve"]["curves"] == 3
    assert charts["kv-curve"]["marks"] == len(samples.kv().points) + 1  # and the crossover
    assert charts["breakdown"]["bars"] == 2 * (4 * 2 + 2)  # two phases; four classes and the key, two bars each
    assert measured["overflow"] == 0
    assert all(width > 0 and height > 0 for width, height in measured["tables"])


@pytest.mark.parametrize("name", ["full", "config_only", "bare", "hostile"])
def test_narrow_page_does_not_scroll_sideways(name: str, tmp_path: Path) -> None:
    measured, seen = probe(saved(getattr(samples, name)(), tmp_path), tmp_path, 390)
    assert measured["overflow"] == 0
    assert measured["cards"] >= 4
    assert seen.console == [] and seen.requests == []


@pytest.mark.parametrize("name", ["mixed", "hostile", "partial", "plan", "hostile_plan"])
@pytest.mark.parametrize("width", [1200, 390])
def test_optimize_and_plan_pages_fit_and_are_silent(name: str, width: int, tmp_path: Path) -> None:
    build = {**optimize_samples.OPTIMIZED, **optimize_samples.PLANS}[name]
    measured, seen = probe(saved(build(), tmp_path), tmp_path, width)
    assert seen.console == [] and seen.requests == []
    assert measured["overflow"] == 0
    assert "alert(1)" in seen.dom or "hostile" not in name
    for chart, drawn in measured["charts"].items():
        left, top, right, bottom = drawn["drawing"]
        assert left >= -1 and top >= -1, f"{chart} is cut at the left or the top"
        assert right <= drawn["view"][0] + 1 and bottom <= drawn["view"][1] + 1, f"{chart} is cut"
    if name == "mixed":
        assert set(measured["charts"]) == {"changes", "layers-0", "roofline-pair", "sinks-0", "sinks-1"}
        assert measured["charts"]["roofline-pair"]["marks"] == 4
        assert measured["charts"]["layers-0"]["cells"] == samples.LAYERS * 7 + 1 + 10  # and the colour scale


@pytest.mark.parametrize("name", [*pipeline_examples.OPTIMIZED, *pipeline_examples.PROFILED])
@pytest.mark.parametrize("width", [1200, 390])
def test_pages_of_pipelines_fit_and_are_silent(name: str, width: int, tmp_path: Path) -> None:
    build: Any = {**pipeline_examples.OPTIMIZED, **pipeline_examples.PROFILED}[name]
    measured, seen = probe(saved(build(), tmp_path), tmp_path, width)
    assert seen.console == [] and seen.requests == []
    assert measured["overflow"] == 0
    for chart, drawn in measured["charts"].items():
        left, top, right, bottom = drawn["drawing"]
        assert left >= -1 and top >= -1, f"{chart} is cut at the left or the top"
        assert right <= drawn["view"][0] + 1 and bottom <= drawn["view"][1] + 1, f"{chart} is cut"
    if name == "pipeline":
        assert set(measured["charts"]) == {"psnr", "error-map", "strips", "denoiser-roofline"}
        assert measured["charts"]["error-map"]["cells"] == 315 + 10  # and the colour scale
        assert measured["charts"]["psnr"]["curves"] == 8 * 2  # and the legend
        ((natural, shown, tall),) = measured["images"]
        assert (natural, shown, tall) == (8 * 32, 800, 500)
        assert len(measured["heads"]) == 8 and len(measured["sides"]) == 5
        # Labels lie beside and above their pictures.
        assert all(abs(wide - 100) < 1 for wide, _ in measured["heads"])


@pytest.mark.parametrize("build", [states.report, states.hostile])
def test_pages_of_batches_fit_and_are_silent(build: Any, tmp_path: Path) -> None:
    measured, seen = probe(saved(build(), tmp_path), tmp_path, 390)
    assert measured["overflow"] == 0
    assert len(measured["tables"]) == 3 and all(width > 0 for width, _ in measured["tables"])
    assert seen.console == [] and seen.requests == []


def test_hostile_names_do_nothing_in_a_browser(tmp_path: Path) -> None:
    seen = visit(saved(samples.hostile(), tmp_path), tmp_path)
    assert seen.console == [] and seen.requests == []
    assert "alert(1)" in seen.dom
    assert "<script>alert" not in seen.dom and "<img" not in seen.dom


def test_the_checks_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.invalid/x.png"><script>console.error("loud")</script>', encoding="utf-8")
    seen = visit(page, tmp_path)
    assert any("example.invalid" in url for url in seen.requests)
    assert any("loud" in line for line in seen.console)


def test_the_policy_of_the_page_blocks_what_gets_past_the_escaping(tmp_path: Path) -> None:
    path = saved(samples.full(), tmp_path)
    injected = '<img src="http://example.invalid/x.png"><script>document.title = "taken"</script></main>'
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", injected), encoding="utf-8")
    seen = visit(path, tmp_path)
    assert seen.requests == []
    assert "<title>taken</title>" not in seen.dom
    assert len(seen.console) == 2 and all("Content Security Policy" in line for line in seen.console)
