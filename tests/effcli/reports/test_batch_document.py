"""A saved batch as terminal text, Markdown and HTML."""

from __future__ import annotations

import re
from typing import Any

import pytest

from effcli.reports.blocks import Link
from effcli.reports.documents import document
from effcli.reports.render import render
from tests.effcli.batch import states

from .test_render import page_of


def test_the_verdict_says_how_many_and_which() -> None:
    sentences = document(states.report().to_dict()).verdict
    assert sentences[0] == ("2 of 5 jobs passed, 1 failed a gate (smol.w3), 1 failed (gone.w4), 1 skipped (gone.onnx).")
    assert sentences[1:] == (
        "Search smallest, 12 trials, 5 given up early, 1 failed: smol.w4 has tpot 12.3 ms.",
        "Kept from an earlier run, as nothing that they depend on has changed: 1.",
        "Took 3 min 07 s on 2 workers for 2 min 45 s of work.",
    )


def test_a_trial_counts_only_where_it_failed() -> None:
    data = states.report().to_dict()
    for job in data["jobs"][2:]:
        job |= {"name": f"smallest.{job['name']}", "part": "smallest"}
    assert document(data).verdict[0] == "2 of 3 jobs passed, 1 failed (smallest.gone.w4)."
    data["jobs"] = [job for job in data["jobs"] if job["part"] == "smallest" and job["stage"] != "failed"]
    assert document(data).verdict[0].startswith("Search smallest, 12 trials")


def test_a_front_is_drawn_over_every_trial() -> None:
    data = states.report().to_dict()
    data["jobs"] = [
        data["jobs"][0] | {"name": f"smallest.{number:03}", "part": "smallest", "figures": {"ppl": ppl, "tpot": tpot}}
        for number, (ppl, tpot) in enumerate([(17.0, 0.020), (18.0, 0.012), (19.0, 0.015), (None, 0.01)], 1)
    ]
    data["searches"][0] |= {"front": ["smallest.001", "smallest.002"], "best": "smallest.002"}
    page = page_of(render(data, "html"))
    circles = [attributes["class"] for tag, attributes in page.tags if tag == "circle"]
    assert circles == ["mark decode", "mark decode", "mark other faded"]
    text = "".join(page.text)
    assert "smallest.002: 18.00 at 12.0 ms" in text and text.count("best that keeps the gates") == 1
    data["jobs"] = data["jobs"][:1]
    assert "No chart: fewer than two trials have both figures." in render(data, "html")


def test_many_names_are_cut_and_jobs_that_were_not_reached_are_named() -> None:
    waiting = states.batch()[-1]
    report = states.report([waiting] * 7).to_dict()
    names = ", ".join(["big.quick"] * 5)
    assert document(report).verdict[0] == f"0 of 7 jobs passed, 7 not reached ({names} and 2 more)."


@pytest.mark.parametrize("format", ["human", "markdown", "html"])
def test_every_rendering_holds_every_figure(format: str) -> None:
    text = " ".join(render(states.report().to_dict(), format).replace("\u00a0", " ").split())
    for figure in ("84.2 s", "1.24 GB", "17.25", "84.0 MB", "12.3 ms", "failed a gate", "best that keeps the gates"):
        assert figure in text
    assert "Tried more than once: smol.w4 (2)." in text


def test_markdown_and_html_link_reports_and_logs() -> None:
    data = states.report().to_dict()
    row = "| [smol.w4](./smol.w4/report.html) | [passed](./.effcli-batch/logs/smol.w4.log) |"
    assert row in render(data, "markdown")
    targets = [attributes["href"] for tag, attributes in page_of(render(data, "html")).tags if tag == "a"]
    assert "./smol.w4/report.html" in targets and "./smol.w3.failed.html" in targets


@pytest.mark.parametrize("format", ["human", "markdown", "html"])
def test_hostile_texts_and_links_do_nothing(format: str) -> None:
    text = render(states.hostile().to_dict(), format)
    assert "\x1b" not in text
    if format != "human":
        outside_data = text.partition('id="effcli-report"')[0]
        assert "<script>alert" not in outside_data
    if format == "html":
        targets = [attributes["href"] or "" for tag, attributes in page_of(text).tags if tag == "a"]
        assert all(target.startswith(("#", "./")) for target in targets)
        assert "./javascript%3Aalert%281%29" in targets
        assert "./evil.example/x/report.html" in targets
    if format == "markdown":
        assert all(target.startswith("./") for target in re.findall(r"(?<!\\)\]\(([^)]*)\)", text))


@pytest.mark.parametrize("path", ["/etc/passwd", "../../x", "a//b/./c", "x y?#%", "javascript:alert(1)"])
def test_a_link_stays_below_its_report(path: str) -> None:
    target = Link("x", path).target
    assert target.startswith("./") and ".." not in target
    assert not set(target) & set(" ?#:()") and "//" not in target


@pytest.mark.parametrize(
    "broken",
    [
        {"jobs": None},
        {"jobs": [None, {}, {"name": 3, "figures": [], "report": 7, "log": {}, "attempts": "x", "seconds": "y"}]},
        {"searches": [None, {}, {"front": [1, "gone"], "subject_to": None}], "workers": 3, "versions": []},
        {"seconds_spent": None},
    ],
)
@pytest.mark.parametrize("format", ["human", "markdown", "html"])
def test_a_report_that_others_wrote_renders(broken: dict[str, Any], format: str) -> None:
    assert render(states.report().to_dict() | broken, format)
