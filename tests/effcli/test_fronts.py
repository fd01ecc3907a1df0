"""Reports side by side: the front against brute force, what is refused, and what the renderings say."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effcli.cli.main import main
from effcli.errors import BadInputError
from effcli.fronts import FrontReport, front
from effcli.reports.render import FORMATS, render
from tests.effcli.reports import optimize_samples, pipeline_examples, samples
from tests.effcli.reports.optimize_samples import AFTER, BEFORE, profiled


def run(folder: Path, name: str, *, ppl: float, tpot: float, size: int, relative: float = 0.06) -> Path:
    """Save an optimize report with these figures as ``folder/name/report.json``."""
    base = optimize_samples.optimized()
    figures = replace(AFTER, tpot_seconds=tpot, weight_bytes=size)
    report = replace(
        base,
        after=profiled(figures, relative=relative).to_dict(),
        figures_after=figures,
        quality=optimize_samples.quality(after=ppl),
        size=replace(base.size, after_bytes=size, bits_per_parameter=8 * size / base.size.parameters),
    )
    path = folder / name / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(report.to_json(), encoding="utf-8")
    return path


def by_target(found: FrontReport) -> dict[str, Any]:
    return {item.target: item for item in found.fronts}


def test_the_front_is_what_brute_force_finds(tmp_path: Path) -> None:
    draw = random.Random(5)
    known = {
        f"run{number}": {
            "ppl": round(draw.uniform(14, 20), 1),
            "tpot": round(draw.uniform(0.01, 0.04), 3),
            "size": draw.randrange(50, 250) * 1_000_000,
        }
        for number in range(25)
    }
    paths = [run(tmp_path, name, **figures) for name, figures in known.items()]
    found = front(paths, sort="ppl")
    base = optimize_samples.optimized()
    known["smollm2-135m (original)"] = {
        "ppl": 15.24,
        "tpot": base.before["profiles"]["latency"]["points"][0]["tpot_seconds"]["p50"],
        "size": base.size.before_bytes,
    }
    assert {entry.name for entry in found.entries} == set(known)  # the original once, though 25 reports hold it
    assert [e.figures["ppl"] for e in found.entries] == sorted(figures["ppl"] for figures in known.values())
    for target in ("tpot", "size"):
        expected = {
            name
            for name, mine in known.items()
            if not any(
                other["ppl"] <= mine["ppl"] and other[target] <= mine[target] and other != mine
                and (other["ppl"], other[target]) != (mine["ppl"], mine[target])
                for other in known.values()
            )
        }  # fmt: skip
        assert set(by_target(found)[target].members) == expected


def test_beaten_within_noise_is_said_apart(tmp_path: Path) -> None:
    paths = [
        run(tmp_path, "best", ppl=17.05, tpot=0.0175, size=90_000_000),
        run(tmp_path, "near", ppl=17.05, tpot=0.0176, size=90_000_000),
        run(tmp_path, "far", ppl=17.05, tpot=0.0350, size=90_000_000),
    ]
    found = by_target(front(paths))["tpot"]
    assert "best" in found.members and found.near == ("near",)


def test_an_original_that_took_another_time_is_named(tmp_path: Path) -> None:
    paths = [run(tmp_path, name, ppl=17.0, tpot=0.0175, size=90_000_000) for name in ("quiet", "same", "busy")]
    assert front(paths).warnings == ()
    for path, ratio in zip(paths[1:], (1.2, 1.3), strict=True):
        data = json.loads(path.read_text())
        (point,) = data["before"]["profiles"]["latency"]["points"]
        point["tpot_seconds"]["p50"] *= ratio
        path.write_text(json.dumps(data))
    found = front(paths)
    (line,) = found.warnings
    assert f"in '{paths[0]}' and " in line and f"in '{paths[2]}'" in line
    assert "their times do not compare" in " ".join(render(found.to_dict(), "markdown").split())


def test_what_lacks_a_figure_is_left_out_and_named(tmp_path: Path) -> None:
    other = profiled(BEFORE)
    lone = tmp_path / "lone.json"
    lone.write_text(replace(other, model=replace(other.model, fingerprint="0" * 64)).to_json(), encoding="utf-8")
    found = front([run(tmp_path, "a", ppl=16, tpot=0.02, size=10**8), lone])
    assert by_target(found)["tpot"].left_out == ("lone",)
    assert found.entries[-1].reasons["ppl"] == "quality was not measured"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device_name": "Example GPU"}, "device differs: Example CPU"),
        ({"text": "another text"}, "evaluation text differs"),
    ],
)
def test_other_conditions_are_refused_by_name(tmp_path: Path, change: dict[str, str], says: str) -> None:
    first = run(tmp_path, "a", ppl=16, tpot=0.02, size=10**8)
    second = run(tmp_path, "b", ppl=17, tpot=0.01, size=10**8)
    data = json.loads(second.read_text())
    for side in ("before", "after"):
        data[side]["environment"].update({k: v for k, v in change.items() if k != "text"})
    data["quality"].update({k: v for k, v in change.items() if k == "text"})
    second.write_text(json.dumps(data))
    with pytest.raises(BadInputError, match=says) as refused:
        front([first, second], sort="ppl")
    assert str(second) in str(refused.value) and "--anyway" in str(refused.value)
    assert front([first, second], anyway=True).mismatches


def test_schedules_of_pipelines_stand_side_by_side(tmp_path: Path) -> None:
    saved = tmp_path / "dit" / "report.json"
    saved.parent.mkdir()
    saved.write_text(pipeline_examples.optimized().to_json())
    found = front([saved])
    assert [entry.name for entry in found.entries] == ["dit:slow", "dit:medium", "dit:fast"]
    assert set(by_target(found)["time"].members) == {"dit:slow", "dit:medium", "dit:fast"}
    with pytest.raises(BadInputError, match="compare them apart"):
        front([saved, run(tmp_path, "a", ppl=16, tpot=0.02, size=10**8)])


@pytest.mark.parametrize(("option", "value"), [("sort", "pppl"), ("quality", "tpot")])
def test_an_unknown_metric_is_refused(tmp_path: Path, option: str, value: str) -> None:
    path = run(tmp_path, "a", ppl=16, tpot=0.02, size=10**8)
    with pytest.raises(BadInputError, match=f"--{option} '{value}' is not known"):
        front([path], **{option: value})


@pytest.mark.parametrize("format", FORMATS)
def test_every_rendering_names_every_entry(tmp_path: Path, format: str) -> None:
    names = ["one", "two<script>", "three"]
    paths = [run(tmp_path, name, ppl=15 + i, tpot=0.03 - i / 100, size=10**8 - i) for i, name in enumerate(names)]
    text = render(front(paths).to_dict(), format)
    assert all(name.partition("<")[0] in text for name in names) and ("<script>two" not in text)
    assert format != "html" or ('id="front-tpot"' in text and "two<script>" not in text)


@pytest.mark.parametrize("damage", [{}, {"entries": 3}, {"fronts": [{"target": "x"}]}, {"entries": [{"name": None}]}])
def test_a_damaged_report_is_rendered_all_the_same(damage: dict[str, Any]) -> None:
    for format in ("human", "markdown", "html", "csv"):
        render({"schema": "effcli.front/1", "quality": "ppl", **damage}, format)


def test_csv_holds_the_figures(tmp_path: Path) -> None:
    rows = list(
        csv.DictReader(
            io.StringIO(render(front([run(tmp_path, "a,b", ppl=16.5, tpot=0.02, size=10**8)]).to_dict(), "csv"))
        )
    )
    (row,) = [row for row in rows if row["original"] == "no"]
    assert (row["name"], float(row["ppl"]), float(row["tpot"])) == ("a,b", 16.5, 0.02)
    with pytest.raises(BadInputError, match="only a comparison of several"):
        render(samples.full().to_dict(), "csv")


def test_the_command_writes_page_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [run(tmp_path, f"r{i}", ppl=15 + i, tpot=0.03 - i / 100, size=10**8) for i in range(3)]
    page, table = tmp_path / "pareto.html", tmp_path / "front.csv"
    assert main(["compare", *map(str, paths), "--sort", "ppl", "--pareto", "-o", str(page), "-o", str(table)]) == 0
    assert "nothing beats" in capsys.readouterr().out and page.is_file()
    assert table.read_text().startswith("name,path,original,ppl,")
    assert main(["compare", str(paths[0]), str(paths[1])]) == 0  # two: held against each other, as ever
    assert "A against B" in capsys.readouterr().out


def test_the_report_is_valid_by_its_schema(tmp_path: Path) -> None:
    import jsonschema

    from effcli.reports.schema import front_schema

    found = front([run(tmp_path, "a", ppl=16, tpot=0.02, size=10**8)]).to_dict()
    jsonschema.Draft202012Validator(front_schema()).validate(found)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(front_schema()).validate(found | {"entries": [{"name": "a"}]})
