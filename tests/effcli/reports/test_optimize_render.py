"""Optimize, plan, evaluation and comparison reports in every rendering."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from effcli import formatting as fmt
from effcli.comparison import compare
from effcli.errors import BadInputError
from effcli.recipes import from_mapping
from effcli.reports.blocks import Code, Facts, Table
from effcli.reports.documents import document
from effcli.reports.model import EVAL_SCHEMA, plain, read_report
from effcli.reports.model_card import model_card
from effcli.reports.render import render
from effcli.reports.sections.run import recipe_yaml
from effcli.reports.verdict import verdict

from . import optimize_samples, samples
from .test_render import ESCAPE, TEXT_FORMATS, page_of, shown, squeezed


def evaluation() -> dict[str, Any]:
    data: dict[str, Any] = plain(_evaluation())
    return data


def _evaluation() -> dict[str, Any]:
    return {
        "schema": EVAL_SCHEMA,
        "created": "2026-01-02T03:04:05Z",
        "command": "effcli eval out --against smollm2-135m",
        "seconds_spent": 40.0,
        "model": asdict(samples.model_info()),
        "against": asdict(samples.model_info()),
        "environment": asdict(samples.environment()),
        "quality": asdict(optimize_samples.quality()),
        "kernels": [asdict(use) for use in optimize_samples.optimized().kernels],
        "notes": ["16 of 40 windows"],
        "warnings": [],
    }


def comparison(folder: Path, build: str = "optimized") -> dict[str, Any]:
    path = folder / "report.json"
    path.write_text(optimize_samples.OPTIMIZED[build]().to_json(), encoding="utf-8")
    return json.loads(compare(path, anyway=True).to_json())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reports")
    built = {**optimize_samples.OPTIMIZED, **optimize_samples.PLANS}
    return {
        **{name: build().to_dict() for name, build in built.items()},
        "evaluation": evaluation(),
        "comparison": comparison(folder),
        "hostile_comparison": comparison(folder, "hostile"),
    }


NAMES = (*optimize_samples.OPTIMIZED, *optimize_samples.PLANS, "evaluation", "comparison", "hostile_comparison")


@pytest.mark.parametrize("format", TEXT_FORMATS)
@pytest.mark.parametrize("name", NAMES)
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


def test_the_figures_are_those_of_the_run(reports: dict[str, dict[str, Any]]) -> None:
    data = reports["optimized"]
    for format in TEXT_FORMATS:
        seen = shown(data, format)
        for figure in (
            fmt.data_size(data["size"]["before_bytes"]),
            fmt.data_size(data["size"]["after_bytes"]),
            "26.7",
            "57.1",
            "15.24",
            "17.05",
            "0.110",
            "1.31",
            "85 %",
            "no gain outside noise",
            "launching ops takes 6 ms a token",
            "tied to the embedding",
            "0.00310",
            "ppl<=+15%",
            "scheme: w4a16",
            "effcli optimize smollm2-135m --recipe recipe.yaml -o out",
            "missed",
            "0 of 270",
        ):
            assert squeezed(figure) in seen, figure
        assert "123.4" not in seen  # the check can fail


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_is_80_plain_columns_and_nothing_is_cut(reports: dict[str, dict[str, Any]], name: str) -> None:
    lines = render(reports[name], "human").splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(ESCAPE in line or line != line.rstrip() for line in lines)
    cut = [line for line in lines if "…" in line and "sha256" not in line and "more" not in line]
    assert cut == [] or "hostile" in name


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        assert not any(attribute.startswith("on") for attribute in attributes)
        assert "nan" not in (attributes.get("points") or "").lower()


def keys_of(node: Any, way: tuple[Any, ...] = (), depth: int = 9) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value; of a list, those of its first entry."""
    if depth == 0:
        return
    entries = node.items() if isinstance(node, dict) else enumerate(node[:1]) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*way, key)
        yield from keys_of(value, (*way, key), 2 if key in ("before", "after") and not way else depth - 1)


def without(data: dict[str, Any], way: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return the report with one value replaced; with ``...``, left out."""
    changed = copy.copy(data)
    node: Any = changed
    for key in way[:-1]:
        node[key] = copy.copy(node[key])
        node = node[key]
    if value is ...:
        del node[way[-1]]
    else:
        node[way[-1]] = value
    return changed


@pytest.mark.parametrize("name", ["optimized", "plan", "evaluation", "comparison"])
def test_a_report_that_lacks_something_is_rendered_all_the_same(reports: dict[str, dict[str, Any]], name: str) -> None:
    data = reports[name]
    ways = [way for way in keys_of(data) if way != ("schema",)]
    assert len(ways) > 30
    for way in ways:
        for value in (..., None):
            broken = without(data, way, value)
            text = render(broken, "markdown")
            assert "None" not in text or "versions" in way, way
            if name == "optimized":
                assert model_card(broken, licence=None, base_model=None, original_card=None)


@pytest.mark.parametrize("name", ["optimized", "plan", "evaluation", "comparison"])
def test_a_part_of_the_wrong_kind_is_no_traceback(reports: dict[str, dict[str, Any]], name: str) -> None:
    data = {**reports[name], **({"before": {}, "after": {}} if name == "optimized" else {})}
    for key in data.keys() - {"schema", "before", "after", "model", "environment", "seconds_spent", "created"}:
        for value in ([], {}, "text", 3, [None], ["text"], [{}], {"text": "text"}):
            if isinstance(value, int) and key == "warnings":
                continue
            assert render({**data, key: value}, "html" if value == [None] else "markdown")


@pytest.mark.parametrize("format", TEXT_FORMATS)
@pytest.mark.parametrize("schema", ["effcli.optimize/1", "effcli.plan/1", "effcli.eval/1", "effcli.compare/1"])
def test_an_empty_report_is_rendered(schema: str, format: str) -> None:
    assert verdict({"schema": schema})
    assert render({"schema": schema}, format)


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_an_export_stands_beside_torch_and_shows_nothing_that_was_not_measured(format: str) -> None:
    data = optimize_samples.exported().to_dict()
    section = next(item for item in document(data).sections if item.name == "onnx")
    table = section.blocks[0]
    assert isinstance(table, Table)
    rows = {row[0]: row[1:5] for row in table.rows}
    assert rows["weights on disk"] == ("269 MB", "98.4 MB", "102 MB", "+3.7 %")
    assert rows["perplexity"][:3] == ("15.24", "17.05", "17.07")
    assert rows["time to first token"][1:3] == ("790 ms", "1.19 s")
    assert set(rows) == {
        "weights on disk", "perplexity", "KL to original, mean", "KL to original, p99", "same top token",
        "time to first token", "time per token", "decode, tokens/s", "peak memory",
    }  # fmt: skip
    assert [column.title for column in table.columns][1:4] == ["before", "after (torch)", "after (ONNX Runtime)"]
    seen = squeezed(render(data, format))
    assert "OnONNXRuntime" in seen and "slowerthantorch" in seen
    assert all(item.name != "onnx" for item in document(optimize_samples.optimized().to_dict()).sections)


def test_a_recorded_recipe_comes_out_as_the_recipe_that_it_was() -> None:
    recipe = from_mapping(optimize_samples.RECIPE)
    text = recipe_yaml(recipe.model_dump(mode="json"))
    assert from_mapping(yaml.safe_load(text)) == recipe
    assert "name:" not in text and "null" not in text


def test_a_folder_means_the_report_in_it(tmp_path: Path) -> None:
    report = optimize_samples.optimized()
    (tmp_path / "report.json").write_text(report.to_json(), encoding="utf-8")
    assert read_report(tmp_path) == report.to_dict()
    with pytest.raises(BadInputError, match=r"has no report\.json"):
        read_report(make(tmp_path / "empty"))


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("effcli.optimize/2", r"from a newer release; this one reads effcli\.optimize/1: pip install -U effcli"),
        ("else/1", r"this version reads effcli\.profile/1, effcli\.opt"),
        (None, "has schema None"),
    ],
)
def test_a_schema_that_nobody_knows_is_refused(tmp_path: Path, schema: str | None, says: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"schema": schema}))
    with pytest.raises(BadInputError, match=says):
        read_report(path)


def test_words_of_loss_and_gain_are_coloured_in_a_terminal(reports: dict[str, dict[str, Any]]) -> None:
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard", _environ={})
    text = render(reports["slower"], "human", console=terminal)
    assert re.search(r"\x1b\[1;31mslower", text) and re.search(r"\x1b\[32msmaller", text)
    page = render(reports["slower"], "html")
    assert '<span class="bad">slower than before' in page and '<span class="good">smaller' in page
