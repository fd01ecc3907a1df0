"""Reports of diffusion pipelines in every rendering."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from effcli import formatting as fmt
from effcli.reports.blocks import SEE_PAGE, Code, Facts, Picture, Table
from effcli.reports.documents import document
from effcli.reports.html import shown_pixels
from effcli.reports.model import read_report
from effcli.reports.render import render
from effcli.reports.verdict import verdict

from . import pipeline_examples
from .test_optimize_render import keys_of, without
from .test_render import ESCAPE, TEXT_FORMATS, page_of, shown, squeezed

BUILDERS = {**pipeline_examples.OPTIMIZED, **pipeline_examples.PROFILED}
SCHEMAS = ("effcli.pipeline-profile/1", "effcli.pipeline-optimize/1")


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    return {name: build().to_dict() for name, build in BUILDERS.items()}


@pytest.mark.parametrize("format", TEXT_FORMATS)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_rendering_shows_the_verdict_and_every_figure(
    reports: dict[str, dict[str, Any]], name: str, format: str
) -> None:
    data = reports[name]
    console = Console(file=io.StringIO(), width=120)
    seen = squeezed(render(data, "human", console)) if format == "human" else shown(data, format)
    built = document(data)
    if "hostile" not in name:  # bullets and wrapped marks come between the pieces of a hostile sentence
        places = [seen.index(squeezed(sentence)) for sentence in built.verdict]
        assert places == sorted(places)
    for section in built.sections:
        assert squeezed(section.title) in seen
        for block in section.blocks:
            if isinstance(block, Table):
                cells = [cell for row in block.rows for cell in row if len(cell) <= 14]
                assert [cell for cell in cells if squeezed(cell) not in seen] == []
            elif isinstance(block, Facts):
                assert [value for _, value in block.pairs if squeezed(value) not in seen] == []
            elif isinstance(block, Code) and "hostile" not in name:
                assert squeezed(block.text) in seen


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_the_figures_are_those_of_the_run(reports: dict[str, dict[str, Any]], format: str) -> None:
    seen = shown(reports["pipeline"], format)
    for figure in (
        "2.5× as fast",  # 3.12 s before; 0.22 s + 2.9 s × 17/50 / 0.96 after
        "2.82× as fast",
        "2.94×",  # 50 / 17
        "34.1",
        "33.0 to 35.2",
        "0–8, 10, 13, 18, 25, 32, 39, 46, 49",
        "145 full runs a sample",  # 7,259 calls / 50 steps
        "46 % of the 315",
        pipeline_examples.NOT_RUN,
        pipeline_examples.NO_LPIPS,
        "minimax, fitted reuse (chosen)",
        "uniform spacing at the same budget",
    ):
        assert squeezed(figure) in seen, figure
    assert "123.4" not in seen  # the check can fail


@pytest.mark.parametrize("name", BUILDERS)
def test_a_pipe_is_80_plain_columns_and_nothing_is_cut(reports: dict[str, dict[str, Any]], name: str) -> None:
    lines = render(reports[name], "human").splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(ESCAPE in line or line != line.rstrip() for line in lines)
    assert [line for line in lines if "…" in line and "sha256" not in line] == [] or "hostile" in name


@pytest.mark.parametrize("name", BUILDERS)
def test_markdown_holds_no_markup_of_others_and_rectangular_tables(
    reports: dict[str, dict[str, Any]], name: str
) -> None:
    text = render(reports[name], "markdown")
    assert ESCAPE not in text
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.M | re.S)  # what stands in a code block is inert
    assert "<script" not in outside and "<img" not in outside
    widths: list[int] = []
    for line in [*outside.splitlines(), ""]:
        if line.startswith("|"):
            widths.append(len(re.split(r"(?<!\\)\|", line)))
        elif widths:
            assert len(set(widths)) == 1
            widths = []


@pytest.mark.parametrize("name", BUILDERS)
def test_the_page_holds_the_report_and_nothing_active(reports: dict[str, dict[str, Any]], name: str) -> None:
    html = render(reports[name], "html")
    page = page_of(html)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "effcli-report"}]
    found = re.search(r'id="effcli-report">(.*?)</script>', html, re.DOTALL)
    assert found is not None and json.loads(found.group(1)) == reports[name]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert not any(attribute.startswith("on") for attribute in attributes)
        assert "nan" not in (attributes.get("points") or "").lower()
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,iVBORw0KGgo")
            assert attributes["alt"]


def pictures(data: dict[str, Any]) -> list[Picture]:
    return [block for section in document(data).sections for block in section.blocks if isinstance(block, Picture)]


def test_pictures_are_on_the_page_with_labels_and_named_in_text(reports: dict[str, dict[str, Any]]) -> None:
    data = reports["pipeline"]
    (picture,) = pictures(data)
    page = page_of(render(data, "html"))
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    width, height = shown_pixels(picture)
    assert (image["width"], image["height"]) == (str(8 * width), str(5 * height))
    assert image["src"] == "data:image/png;base64," + data["sheets"][0]["png_base64"]
    tips = [attributes["title"] for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert len(tips) == 40 and tips[9] == "slow (25) · class 1, seed 101"
    for label in (*picture.rows, *picture.columns):
        assert label in page.text
    for format in ("human", "markdown"):
        text = render(data, format)
        assert squeezed(SEE_PAGE) in squeezed(text) and "base64" not in text and "iVBOR" not in text


@pytest.mark.parametrize(
    ("columns", "cell", "expected"),
    [(1, (32, 32), (208, 208)), (8, (32, 32), (100, 100)), (20, (32, 32), (88, 88)), (2, (512, 256), (208, 104))],
)
def test_small_pictures_are_enlarged_and_large_ones_shrunk(
    columns: int, cell: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert shown_pixels(Picture("", ("a",), tuple("b" * columns), cell, "")) == expected


def resized(text: str, width: int) -> str:
    data = bytearray(base64.b64decode(text))
    data[16:20] = struct.pack(">I", width)
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "change",
    [
        {"png_base64": "no base64!"},
        {"png_base64": '"><script>alert(1)</script>'},
        {"png_base64": base64.b64encode(b"GIF89a" + bytes(40)).decode()},
        {"png_base64": None},
        {"rows": []},
        {"columns": 3},
        {"cell_pixels": [32]},
        {"cell_pixels": [0, 32]},
        {"columns": ["one"]},
        {"columns": ["c"] * 401},
    ],
)
def test_a_damaged_sheet_is_left_out_and_said(reports: dict[str, dict[str, Any]], change: dict[str, Any]) -> None:
    data = reports["pipeline"]
    data = {**small(data), "sheets": [data["sheets"][0] | change]}
    (section,) = [section for section in document(data).sections if section.name == "pictures"]
    assert section.lead == ("1 sheet of pictures cannot be read.",) and section.blocks == ()
    assert "<img" not in render(data, "html")


def test_a_sheet_of_another_size_than_its_cells_is_damaged(reports: dict[str, dict[str, Any]]) -> None:
    data = copy.deepcopy(reports["pipeline"])
    data["sheets"][0]["png_base64"] = resized(data["sheets"][0]["png_base64"], 17)
    assert pictures(data) == []


def small(data: dict[str, Any]) -> dict[str, Any]:
    """Return a report with a small map and no pictures, which can be rendered hundreds of times."""
    graph = pipeline_examples.graph(50, 2).model_dump(mode="json")
    if "error_map" in data:
        return {**data, "error_map": graph}
    lemica = data["lemica"]
    return {**data, "sheets": [], "lemica": {**lemica, "graph": lemica["graph"] and graph}}


@pytest.mark.parametrize("name", ["pipeline_slow", "pipeline_published", "pipeline_profile"])
def test_a_report_that_lacks_something_is_rendered_all_the_same(reports: dict[str, dict[str, Any]], name: str) -> None:
    data = small(reports[name])
    ways = [way for way in keys_of(data) if way != ("schema",)]
    assert len(ways) > 30
    for way in ways:
        for value in (..., None):
            text = render(without(data, way, value), "markdown")
            assert "None" not in text or "versions" in way, way


@pytest.mark.parametrize("name", ["pipeline_slow", "pipeline_profile"])
def test_a_part_of_the_wrong_kind_is_no_traceback(reports: dict[str, dict[str, Any]], name: str) -> None:
    data = small(reports[name])
    for key in data.keys() - {"schema", "environment", "seconds_spent", "created"}:
        for value in ([], {}, "text", 3, [None], ["text"], [{}], {"text": "text"}):
            if isinstance(value, int) and key == "warnings":
                continue
            assert render({**data, key: value}, "html" if value == [None] else "markdown")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 10**9},
        {"steps": 1},
        {"max_gap": -1},
        {
            "edges": [[0, 2], [2, 0], [0, 99], "text", [0], [0.5, 2]],
            "errors": [[0.1], [0.1], [0.1], [0.1], [0.1], [0.1]],
        },
        {"edges": [[0, 2]], "errors": [[]]},
        {"edges": [[0, 2], [1, 3]], "errors": [[0.0], [0.0]]},
        {"edges": [[0, 2], [1, 3]], "errors": [[0.2], [0.2]]},
        {"errors": "text"},
        {"forwards": None, "noise": None},
    ],
)
def test_odd_error_maps_are_no_traceback(reports: dict[str, dict[str, Any]], change: dict[str, Any]) -> None:
    data = copy.deepcopy(reports["pipeline"])
    data["lemica"]["graph"] |= change
    profile = {**reports["pipeline_profile"], "error_map": data["lemica"]["graph"]}
    for format in TEXT_FORMATS:
        assert "nan" not in render(data, format).partition("<script")[0].lower().replace("enan", "")
        assert render(profile, format)


@pytest.mark.parametrize("format", TEXT_FORMATS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_empty_report_is_rendered(schema: str, format: str) -> None:
    assert verdict({"schema": schema})
    assert render({"schema": schema}, format)


@pytest.mark.parametrize("name", ["pipeline", "pipeline_profile"])
def test_a_saved_report_is_read_back(reports: dict[str, dict[str, Any]], name: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(BUILDERS[name]().to_json(), encoding="utf-8")
    assert read_report(tmp_path) == reports[name]


def test_sections_are_in_reading_order(reports: dict[str, dict[str, Any]]) -> None:
    order = [section.name for section in document(reports["pipeline"]).sections]
    assert order[:7] == ["pictures", "schedules", "comparison", "map", "steps", "calibration", "denoising"]


def test_a_way_that_could_not_run_has_its_reason_and_no_figures(reports: dict[str, dict[str, Any]]) -> None:
    (section,) = [section for section in document(reports["pipeline"]).sections if section.name == "comparison"]
    table = next(block for block in section.blocks if isinstance(block, Table) and block.title.startswith("10 of 50"))
    (row,) = [row for row in table.rows if row[0] == "First Block Cache"]
    assert set(row[1:]) == {fmt.MISSING}
    assert f"First Block Cache: {pipeline_examples.NOT_RUN}." in table.notes


def test_a_column_that_nothing_was_measured_for_is_left_out(reports: dict[str, dict[str, Any]]) -> None:
    data = copy.deepcopy(reports["pipeline"])
    for row in data["comparison"]:
        row["run_seconds"] = None
        if row["likeness"]:
            row["likeness"]["lpips"] = {"mean": 0.0123, "low": 0.01, "high": 0.015}
    (section,) = [section for section in document(data).sections if section.name == "comparison"]
    table = next(block for block in section.blocks if isinstance(block, Table))
    titles = [column.title for column in table.columns]
    assert "run" not in titles and table.rows[0][titles.index("LPIPS")] == "0.0123"


def test_the_minimax_path_is_held_against_the_shortest_sum(reports: dict[str, dict[str, Any]]) -> None:
    data = copy.deepcopy(reports["pipeline"])
    data["lemica"]["graph"] |= {"steps": 50, "max_gap": 49, "edges": [[0, 48], [0, 2], [2, 49]]}
    data["lemica"]["graph"]["errors"] = [[0.25], [0.125], [0.1875]]

    def notes(ours: list[int], psnr: float) -> str:
        for row in data["comparison"]:
            if row["budget"] == 10 and row["method"] in ("lemica", "shortest-sum"):
                row["full"] = ours if row["method"] == "lemica" else [0, 48, 49]
            if row["budget"] == 10 and row["method"] == "lemica":
                row["likeness"]["psnr_db"]["mean"] = psnr
        (section,) = [section for section in document(data).sections if section.name == "comparison"]
        tables = [block for block in section.blocks if isinstance(block, Table)]
        return " ".join(next(table for table in tables if table.title.startswith("10 of 50")).notes)

    near, far, same = notes([0, 2, 49], 23.98), notes([0, 2, 49], 24.98), notes([0, 48, 49], 23.68)
    behind = notes([0, 2, 49], 22.38)
    assert "+0.3 dB; worst segment 0.188 against 0.250, all segments 0.312 against 0.250. What it saves" in near
    assert "+1.3 dB; worst segment" in far and "What it saves" not in far
    assert "-1.3 dB; worst segment" in behind and "about the same" not in behind
    assert "choose the same steps" in same


def test_a_path_that_was_asked_for_is_named(reports: dict[str, dict[str, Any]]) -> None:
    data = copy.deepcopy(reports["pipeline"])
    data["passes"][0]["parameters"]["path"] = "greedy"
    assert "greedy, fitted reuse (chosen)" in render(data, "markdown")
    assert "minimax, fitted" not in render(data, "markdown")
    data["passes"][0]["parameters"]["published"] = "wan2.1-t2v-1.3b:17"
    assert "published, fitted reuse (chosen)" in render(data, "markdown")
    data["schedules"][0]["reuse"] = "{of another release}"
    assert "between them {of another release} stands for" in render(data, "markdown")
