from __future__ import annotations

from pathlib import Path

import pytest

from effcli.batch import yaml_places
from effcli.batch.yaml_places import Document, Place
from effcli.errors import BadInputError

FILE = Path("jobs.yaml")


def parsed(text: str, **variables: str) -> Document:
    return yaml_places.parse(text, variables, FILE)


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        ("a: ${A}", {"A": "x"}, {"a": "x"}),
        ("a: ${A}", {"A": "4"}, {"a": 4}),
        ("a: '${A}'", {"A": "4"}, {"a": "4"}),
        ("a: ${A}", {"A": "true"}, {"a": True}),
        ("a: ${A}", {"A": ""}, {"a": None}),
        ("a: {b: ${A}, c: [${A}, ${B:-z}]}", {"A": "1"}, {"a": {"b": 1, "c": [1, "z"]}}),
        ("a: ${A:-b, c: {d} }", {}, {"a": "b, c: {d }"}),
        ("a: ${A:-}", {}, {"a": None}),
        ("a: x${A}y${A}", {"A": "-"}, {"a": "x-y-"}),
        ("a: ${A}${B}", {"A": "1", "B": "2"}, {"a": 12}),
        ("${A}: 1", {"A": "key"}, {"key": 1}),
        ("a: $${A} $A $$ {}".replace("{}", "x"), {}, {"a": "${A} $A $$ x"}),
        ("a: ${A}", {"A": "${B} b: [1]"}, {"a": "${B} b: [1]"}),
        ("a: ${A}", {"A": "b\nc: 1"}, {"a": "b\nc: 1"}),
        ('a: "${A:-#, x}"', {}, {"a": "#, x"}),
        ("a: |\n  one ${A}\n  two\n", {"A": "x"}, {"a": "one x\ntwo\n"}),
        ("# ${NOT} asked for\na: 1", {}, {"a": 1}),
        ("a: &x [${A}]\nb: *x", {"A": "1"}, {"a": [1], "b": [1]}),
    ],
)
def test_values(text: str, variables: dict[str, str], expected: object) -> None:
    assert parsed(text, **variables).data == expected


def test_the_environment_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "x")
    with pytest.raises(BadInputError, match="A} has no value"):
        parsed("a: ${A}")


def test_columns_are_those_of_the_file() -> None:
    document = parsed("a: {b: ${LONG_NAME}, c: ${A}d}\nf: 1", LONG_NAME="x", A="y" * 50)
    assert document.values["a", "c"] == Place(1, 25)
    assert document.keys["a", "c"] == Place(1, 22)
    assert document.values["f",] == Place(2, 4)


@pytest.mark.parametrize(
    ("text", "variables", "message"),
    [
        ("a: 1\nbc: x ${NMAE}", {"NAME": "x"}, r"line 2, column 7: \$\{NMAE\} has no value \(did you mean 'NAME'\?\)"),
        ("a: ${}", {}, r"line 1, column 4: '\$\{\}' is not"),
        ("a: ${A-b}", {}, r"column 4: '\$\{A-b\}' is not \$\{NAME\}"),
        ("a: ${1A}", {}, "column 4: .* is not"),
        ("a: 'x ${A'", {}, r"column 7: '\$\{' is not"),
        ("a: ${A}", {"A": "1", "B": "2"}, r"has no \$\{B\}.*; leave out --set B=…; it asks for: A"),
        ("a: 1 # ${B}", {"B": "2"}, r"has no \$\{B\}.*it asks for none"),
        ("a: ${NAME}", {"NAME": "1", "NMAE": "2"}, r"has no \$\{NMAE\} \(did you mean 'NAME'\?\)"),
        ("a: 1", {"a b": "2"}, "variable 'a b' is no name"),
        ("a: \U000f0000", {}, "column 4: has a private-use character; remove it"),
        (
            "${A}: 1\n${B}: 2",
            {"A": "x", "B": "x"},
            r"line 2, column 1: 'x' stands here a second time \(first on line 1\)",
        ),
    ],
)
def test_what_cannot_be_replaced(text: str, variables: dict[str, str], message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        parsed(text, **variables)
    assert "\n" not in str(caught.value)


def test_what_is_merged_keeps_its_places_and_gives_way() -> None:
    document = parsed("base: &b {x: 1, y: {z: 2}}\na:\n  y: 3\n  <<: *b\nc: {<<: [{x: 5}, *b]}\n")
    assert document.data["a"] == {"y": 3, "x": 1}
    assert document.data["c"] == {"x": 5, "y": {"z": 2}}
    assert document.values["a", "x"] == Place(1, 14)
    assert document.values["c", "y", "z"] == Place(1, 24)
    assert document.values["a", "y"] == Place(3, 6)
    with pytest.raises(BadInputError, match="an anchor that contains itself"):
        parsed("a: &a\n  <<: *a\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            (word, word)
            for word in ("on", "yes", "No", "1:30", "2026-01-01", "0o7", "007", "0x1f", "1_000", ".inf", "=")
        ],
        *[("1e-4", 1e-4), ("5.", 5.0), (".5", 0.5), ("-3", -3), ("+3", 3), ("1E3", 1000.0), ("-0.0", -0.0)],
        *[("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None), ("'true'", "true"), ('"1"', "1")],
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parsed(f"a: {text}").data["a"]
    assert read == value and type(read) is type(value)
