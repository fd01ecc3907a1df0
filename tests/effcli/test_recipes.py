"""Recipes: what is written, read back, refused."""

import pytest

from effcli import recipes
from effcli.cli.options import chosen_recipe
from effcli.errors import BadInputError


def test_a_recipe_survives_yaml(tmp_path):
    recipe = recipes.from_options(
        ["quantize:scheme=auto,bits=4.5,ignore=lm_head+re:.*gate", "kv-pq"],
        seed=7,
        gates=["ppl<=+3%"],
        evaluation={"tokens": 1024, "text": "some.txt"},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert recipes.read(path) == recipe
    first = recipe.passes[0]
    assert first.parameters == {"scheme": "auto", "bits": 4.5, "ignore": ["lm_head", "re:.*gate"]}
    assert recipes.parse_step(first.label) == first


def test_the_forms_of_a_pass(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("version: 1\npasses:\n  - a\n  - b: {x: 1}\n  - c:\n  - {name: d, parameters: {y: [2]}}\n")
    read = recipes.read(path)
    assert [(step.name, step.parameters) for step in read.passes] == [
        ("a", {}),
        ("b", {"x": 1}),
        ("c", {}),
        ("d", {"y": [2]}),
    ]
    assert (read.seed, read.gates, read.evaluation.tokens) == (0, (), 8192)


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("p", {}),
        ("p:a=1", {"a": 1}),
        ("p:a=1.5,b=true,c=null,d=word", {"a": 1.5, "b": True, "c": None, "d": "word"}),
        ("p:a=x+y", {"a": ["x", "y"]}),
        ("p:a=1e3", {"a": "1e3"}),  # YAML 1.1 reads no number here; a float parameter converts it
        ("p:a=re:.*=x", {"a": "re:.*=x"}),
        ("p:a=+3", {"a": 3}),
    ],
)
def test_values_on_the_command_line(text, parameters):
    assert recipes.parse_step(text).parameters == parameters


@pytest.mark.parametrize("text", ["", ":a=1", "p:", "p:a", "p:a=", "p:=1", "p:a=1,", "p:a=1,a=2"])
def test_what_is_no_pass_option_is_refused(text):
    with pytest.raises(BadInputError, match="--pass"):
        recipes.parse_step(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"version": 2, "passes": ["a"]}, "version 2, newer than the 1 that this release reads; pip install -U effcli"),
        ({"passes": ["a"]}, "has no version; add the line: version: 1"),
        ({"version": "1", "passes": ["a"]}, "has version '1'"),
        ({"version": True, "passes": ["a"]}, "has version True"),
        ({"version": 1}, "'passes': Field required"),
        ({"version": 1, "passes": []}, "'passes': is empty"),
        ({"version": 1, "passes": "a"}, "'passes': is a list"),
        ({"version": 1, "passes": [{"a": {}, "b": {}}]}, "which is not a pass"),
        ({"version": 1, "pases": ["a"], "passes": ["a"]}, "unknown key 'pases'.*did you mean 'passes'"),
        ({"version": 1, "passes": ["a"], "evaluation": {"token": 9}}, "'evaluation.token'.*did you mean 'tokens'"),
        ({"version": 1, "passes": ["a"], "evaluation": {"tokens": 9}}, "'evaluation.tokens': .*256"),
        (["a"], "holds no mapping"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(data, message):
    with pytest.raises(BadInputError, match=message) as caught:
        recipes.from_mapping(data)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(BadInputError, match="no recipe at"):
        recipes.read(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: [1\npasses")
    with pytest.raises(BadInputError, match="is not valid YAML at line"):
        recipes.read(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="cannot read recipe"):
        recipes.read(bad)


def test_the_command_line_goes_over_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("version: 1\nseed: 3\npasses: [a]\ngates: ['kl<=1']\nevaluation: {tokens: 1024, context: 64}\n")
    chosen = chosen_recipe(None, path, seed=5, gates=["size<=0.5x"], evaluation={"tokens": 2048})
    assert (chosen.seed, chosen.gates) == (5, ("kl<=1", "size<=0.5x"))
    assert (chosen.evaluation.tokens, chosen.evaluation.context) == (2048, 64)
    assert chosen_recipe(None, path) == recipes.read(path)
    with pytest.raises(BadInputError, match="--pass and --recipe are both given"):
        chosen_recipe(["a"], path)
    with pytest.raises(BadInputError, match="no pass given"):
        chosen_recipe(None, None)
