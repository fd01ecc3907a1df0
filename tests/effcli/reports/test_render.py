from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from effcli import formatting as fmt
from effcli.errors import BadInputError
from effcli.reports.blocks import Facts, Table
from effcli.reports.model import read_report
from effcli.reports.render import render
from effcli.reports.sections import sections
from effcli.reports.verdict import verdict

from . import samples

REPORTS = {
    "full": samples.full,
    "config_only": samples.config_only,
    "bare": samples.bare,
    "hostile": samples.hostile,
    "redundant": samples.redundant,
}
TEXT_FORMATS = ("human", "markdown", "html")
ESCAPE = "\x1b"


class PageText(HTMLParser):
    """What a reader of the page sees, and the elements it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:  # neither style nor script
            self.text.append(data)


def page_of(html: str) -> PageText:
    page = PageText()
    page.feed(html)
    page.close()
    return page


def squeezed(text: str) -> str:
    return "".join(text.split())


def shown(data: dict[str, Any], format: str) -> str:
    """Return what a reader sees, without white space (lines wrap) and without Markdown's backslashes."""
    text = render(data, format)
    if format == "html":
        text = "".join(page_of(text).text)
    elif format == "markdown":
        text = re.sub(r"\\(.)", r"\1", text).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return squeezed(text)


@pytest.mark.parametrize("format", TEXT_FORMATS)
@pytest.mark.parametrize("name", REPORTS)
def test_every_rendering_shows_every_figure_of_every_section(name: str, format: str) -> None:
    data = REPORTS[name]().to_dict()
    text = render(data, format, console=Console(file=io.StringIO(), width=120)) if format == "human" else None
    seen = squeezed(text) if text is not None else shown(data, format)
    for section in sections(data):
        assert squeezed(section.title) in seen
        for block in section.blocks:
            if isinstance(block, Table):
                # A cell that wraps is interleaved with its neighbours: look for its pieces.
                cells = [cell for row in block.rows for cell in row if len(cell) <= 14]
                assert [cell for cell in cells if squeezed(cell) not in seen] == []
            elif isinstance(block, Facts):
                assert [value for _, value in block.pairs if squeezed(value) not in seen] == []


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_the_figures_are_those_of_the_data(format: str) -> None:
    data = samples.full().to_dict()
    seen = shown(data, format)
    intensity, kv = data["profiles"]["intensity"], data["profiles"]["kv"]
    for point in intensity["points"]:
        for figure in (
            fmt.data_size(point["bytes"]),
            fmt.seconds(point["time_seconds"]),
            fmt.seconds(point["attainable_seconds"]),
            fmt.percent(point["mfu"]),
            fmt.percent(point["mbu"]),
            fmt.significant(point["flops_per_byte"]),
        ):
            assert squeezed(figure) in seen
    for figure in ("23,040 B", "11,677 tokens", "62 %", "71 %", "0.0741", "per-channel", samples.NO_NVML, "12,345"):
        if figure == "12,345":
            assert figure not in seen  # the check can fail
        else:
            assert squeezed(figure) in seen
    assert f"{kv['max_context']['4']:,}" in seen


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_verdict_comes_first(format: str) -> None:
    data = samples.full().to_dict()
    seen = shown(data, format)
    places = [seen.index(squeezed(sentence)) for sentence in verdict(data)]
    assert places == sorted(places)
    assert places[-1] < seen.index(squeezed("Work and bytes moved"))


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_a_missing_figure_is_a_dash_with_its_reason(format: str) -> None:
    seen = shown(samples.bare().to_dict(), format)
    assert fmt.MISSING in seen
    for reason in (
        "not measured with --no-peaks",
        "counted from the config alone",
        "the device's memory is not known",
        "state-space layer",
        "the tokenizer has no BOS token",
        samples.NO_NVML,
        "the machine was busy",
    ):
        assert squeezed(reason) in seen
    assert "None" not in seen.replace("Nonefound.", "")


@pytest.mark.parametrize("format", ("json", *TEXT_FORMATS))
@pytest.mark.parametrize("missing", ["model", "environment", "profiles", "skipped", "warnings", "command", "created"])
def test_a_missing_part_does_not_stop_the_rest(format: str, missing: str) -> None:
    data = samples.full().to_dict()
    del data[missing]
    assert render(data, format)


@pytest.mark.parametrize("format", ("json", *TEXT_FORMATS))
@pytest.mark.parametrize("name", ["intensity", "sinks", "kv", "latency", "energy", "outliers"])
def test_a_hollow_section_does_not_stop_the_rest(format: str, name: str) -> None:
    data = samples.full().to_dict()
    result = data["profiles"][name]
    for hollow in ({}, {key: [] if isinstance(value, list) else None for key, value in result.items()}):
        data["profiles"][name] = hollow
        assert render(data, format)


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_a_profiler_nobody_knows_is_shown(format: str) -> None:
    data = samples.full().to_dict()
    data["profiles"]["cache_lines"] = {
        "score": 0.125,
        "nested": {"deep": {"count": 4321}},
        "rows": [{"name": "first", "seconds": 2.5}, {"name": "second", "seconds": None}],
        "flag": True,
        "nothing": None,
        "list": [1, 2],
    }
    seen = shown(data, format)
    for figure in ("Cache lines", "0.125", "nested.deep.count", "4,321", "first", "second", "2.50", "[1, 2]"):
        assert squeezed(figure) in seen


def test_json_is_the_saved_report(tmp_path: Path) -> None:
    report = samples.full()
    path = tmp_path / "report.json"
    path.write_text(report.to_json(), encoding="utf-8")
    data = read_report(path)
    assert data == report.to_dict()
    assert render(data, "json") == report.to_json()


def test_unknown_format_says_what_was_meant() -> None:
    with pytest.raises(BadInputError, match=r"no report format 'htlm' \(did you mean 'html'\?\); known: human, json"):
        render({}, "htlm")


def test_pipe_is_80_plain_columns() -> None:
    for build in REPORTS.values():
        lines = render(build().to_dict(), "human").splitlines()
        assert max(map(len, lines)) <= 80
        assert not any(ESCAPE in line for line in lines)
        assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_nothing_is_cut_from_80_columns_on(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    text = render(samples.full().to_dict(), "human", console=console)
    assert max(map(len, text.splitlines())) <= width
    assert console.file.getvalue() == text  # type: ignore[attr-defined]
    # A shortened fingerprint is the only ellipsis that is meant.
    cut = [line for line in text.splitlines() if "…" in line and "sha256" not in line]
    assert cut == [] or width < 80


def test_colour_only_in_a_terminal() -> None:
    data = samples.full().to_dict()
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard", _environ={})
    plain = Console(file=io.StringIO(), width=100, force_terminal=False)
    coloured, uncoloured = render(data, "human", console=terminal), render(data, "human", console=plain)
    assert ESCAPE in coloured and ESCAPE not in uncoloured
    without = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in without.splitlines()] == uncoloured.splitlines()


def test_a_terminal_without_unicode_is_no_error() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    render(samples.full().to_dict(), "human", console=Console(file=stream, width=80))
    stream.flush()
    assert b"Decode is memory-bound: 38 % of this device's bandwidth reached" in raw.getvalue()


def test_heat_map_reads_without_colour() -> None:
    values = tuple(tuple(0.9 if head == 0 else 0.05 for head in range(4)) for _ in range(10))
    point = replace(samples.sinks().points[0], alpha=values)
    report = replace(samples.full(), profiles={"sinks": replace(samples.sinks(), points=(point,))})
    text = render(report.to_dict(), "human")
    assert "head 1 │" + "█" * 20 + "│" in text
    assert text.count("│" + " " * 20 + "│") == 3


def test_wide_models_are_shrunk_and_say_so() -> None:
    values = tuple(tuple(0.5 for _ in range(128)) for _ in range(126))
    point = replace(samples.sinks().points[0], alpha=values)
    report = replace(samples.full(), profiles={"sinks": replace(samples.sinks(), points=(point,))}).to_dict()
    text = render(report, "human")
    assert max(map(len, text.splitlines())) <= 80
    assert "126 layers × 128 heads" in " ".join(text.split())
    assert "126 layers × 128 heads" in render(report, "markdown")


def test_hostile_names_stay_text_in_a_terminal() -> None:
    text = render(
        samples.hostile().to_dict(), "human", console=Console(file=io.StringIO(), width=120, force_terminal=False)
    )
    assert ESCAPE not in text
    assert "[bold red]" in text


def test_hostile_names_stay_text_in_markdown() -> None:
    text = render(samples.hostile().to_dict(), "markdown")
    assert "<script" not in text and "<img" not in text and ESCAPE not in text
    for line in text.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)
            assert cells[0] == "" and cells[-1] == ""


def test_markdown_tables_are_rectangular() -> None:
    for build in REPORTS.values():
        widths: list[int] = []
        for line in [*render(build().to_dict(), "markdown").splitlines(), ""]:
            if line.startswith("|"):
                widths.append(len(re.split(r"(?<!\\)\|", line)))
            elif widths:
                assert len(set(widths)) == 1 and len(widths) >= 3
                widths = []


@pytest.mark.parametrize("name", REPORTS)
def test_page_holds_the_report_and_nothing_active(name: str) -> None:
    data = REPORTS[name]().to_dict()
    html = render(data, "html")
    page = page_of(html)
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "effcli-report"}
    ]
    embedded = re.search(r'<script type="application/json" id="effcli-report">(.*?)</script>', html, re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded.group(1)) == data
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "embed", "video", "audio", "base", "form")
        for attribute, value in attributes.items():
            assert not attribute.startswith("on"), f"{tag} has an event handler"
            if attribute in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None and value.startswith(("#", "data:,"))


def test_page_style_loads_nothing() -> None:
    style = Path(__file__).parents[3].joinpath("effcli", "reports", "page.css").read_text(encoding="utf-8")
    assert "url(" not in style and "@import" not in style and "@font-face" not in style


def test_page_ids_are_unique_and_links_lead_somewhere() -> None:
    page = page_of(render(samples.full().to_dict(), "html"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        href = attributes.get("href") or ""
        if tag == "a":
            assert href.removeprefix("#") in ids
        for named in (attributes.get("aria-labelledby") or "").split():
            assert named in ids


def test_rendering_needs_no_torch() -> None:
    code = (
        "import json, sys\n"
        "from effcli.reports.render import render\n"
        "assert 'rich' not in sys.modules and 'jinja2' not in sys.modules, 'imported before it is needed'\n"
        "data = json.load(sys.stdin)\n"
        "for format in ('human', 'json', 'markdown', 'html'): render(data, format)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=samples.full().to_json(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
