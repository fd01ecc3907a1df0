"""The section of the redundancy instrument, in every rendering, from the same blocks."""

from __future__ import annotations

from dataclasses import replace

from effcli.reports.blocks import HeatMap, Table
from effcli.reports.render import render
from effcli.reports.sections import redundancy
from effcli.reports.verdict import verdict

from . import samples

REPORT = samples.redundant().to_dict()
RESULT = REPORT["profiles"]["redundancy"]
SENTENCE = (
    "Redundancy, before any healing: cheapest to tie are layers 2–3, 0.400 nats of KL a token; cheapest to skip is "
    "layer 3, 0.153 nats (dearest: layer 0, 8.62)."
)


def tables() -> dict[str, Table]:
    return {block.title: block for block in redundancy.section(RESULT, REPORT).blocks if isinstance(block, Table)}


def test_the_lead_says_what_is_cheapest_and_so_does_the_verdict() -> None:
    lead = redundancy.section(RESULT, REPORT).lead
    assert lead[0] == SENTENCE == verdict(REPORT)[0]
    assert "381 tokens in windows of 128 of: Python language reference" in lead[1]
    assert "the average of their linear weights" in lead[1]


def test_the_heat_map_is_layers_by_layers() -> None:
    (heat,) = [block for block in redundancy.section(RESULT, REPORT).blocks if isinstance(block, HeatMap)]
    assert len(heat.values) == 6 and heat.values[0] == tuple(RESULT["cka"][0])
    html = render(REPORT, "html")
    assert "Heat map of 6 layers by 6 layers, values 0 to 1." in html and "layer 0, layer 5: 0.167" in html
    assert "sink" not in html[html.index("<svg") : html.index("</svg>")]
    text = render(REPORT, "human")
    assert "6 layers left to right, layers top to bottom." in text and "layer 0 │" in text
    assert "Layers left to right, layers top to bottom" in render(REPORT, "markdown")


def test_a_row_for_each_layer_says_its_kind_and_why_it_cannot_be_shared() -> None:
    table = tables()["By layer"]
    assert table.rows[3] == ("3", "A", "0.940", "0.0800", "0.153", "0.138 to 0.168")
    assert [row[1] for row in table.rows] == ["A"] * 5 + ["B"]
    assert "Layer 5: cannot share weights: not the weight of a linear layer: experts (4×8×8)" in table.notes
    alike = replace(samples.redundancy(), kinds=("one",))
    plain = samples.replace(samples.redundant(), profiles={"redundancy": alike}).to_dict()
    section = redundancy.section(plain["profiles"]["redundancy"], plain)
    assert "kind" not in [
        column.title for block in section.blocks if isinstance(block, Table) for column in block.columns
    ]


def test_groups_are_listed_from_the_cheapest_on_for_each_size() -> None:
    table = tables()["Groups of adjacent layers, by damage"]
    assert [row[:3] for row in table.rows[:3]] == [("2", "2–3", "0.400"), ("2", "1–2", "0.900"), ("2", "3–4", "0.900")]
    assert [row[0] for row in table.rows] == ["2"] * 4 + ["3"] * 3 + ["4"] * 2
    assert "groups of 5 layers were not tied" in table.notes


def test_what_is_not_known_has_its_reason_and_no_sentence() -> None:
    result = samples.unknown_redundancy("not measured")
    report = samples.replace(samples.full(), profiles={"redundancy": result}).to_dict()
    section = redundancy.section(report["profiles"]["redundancy"], report)
    assert not any(isinstance(block, HeatMap) for block in section.blocks)
    notes = [note for block in section.blocks if isinstance(block, Table) for note in block.notes]
    assert "No CKA: not measured" in notes and "Layers 0–1: not measured" in notes
    assert "nothing here that a sentence sums up" in verdict(report)[0]
