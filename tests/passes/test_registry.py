"""Passes are found by name, their parameters checked, their order enforced."""

import subprocess
import sys
import textwrap

import pytest

from passes import registry
from passes.base import Figures, Pass, PassError, PassParameters, PassRecord, Prediction


@pytest.fixture(autouse=True)
def fresh_entry_points():
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a tiny distribution for this test: a module and the metadata that pip would write."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(distribution, entry_points, module="", code=""):
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {value}" for name, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[effcli.passes]\n{lines}\n")
        if module:
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
            monkeypatch.delitem(sys.modules, module, raising=False)
        registry._entry_points.cache_clear()

    return make


class Parameters(PassParameters):
    bits: int = 4
    groups: list[int] = []


def make_pass(pass_name, **rules):
    class Made(Pass):
        name = pass_name
        title = pass_name
        parameters_type = Parameters
        changes = frozenset({"weights"})

        def plan(self, profile):
            return Prediction(figures=Figures())

        def apply(self, model, context):
            return PassRecord(self.name, {}, "")

        def save(self, model, folder):
            return None

    for rule, value in rules.items():
        setattr(Made, rule, value)
    return Made


def test_the_built_in_pass_is_found_like_any_other():
    assert "quantize" in registry.names()


def test_listing_names_imports_nothing_heavy():
    code = "import sys; from passes import registry; registry.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unknown_pass_gets_a_suggestion():
    with pytest.raises(PassError, match="no pass named 'quantise'; did you mean 'quantize'"):
        registry.load("quantise")
    with pytest.raises(PassError, match="no pass named 'zzz'; known: .*quantize"):
        registry.load("zzz")


def test_two_packages_with_one_name_are_an_error(install):
    install("first", {"same": "module_a:A"})
    install("second", {"same": "module_b:B"})
    with pytest.raises(PassError, match=r"two installed packages provide a pass named 'same' \(.*\); uninstall one"):
        registry.names()


def test_what_is_no_pass_is_refused(install):
    install("wrong", {"wrong": "effcli_wrong:THING"}, "effcli_wrong", "THING = 3\n")
    with pytest.raises(PassError, match="entry point 'effcli_wrong:THING' does not hold a Pass named 'wrong'"):
        registry.load("wrong")


def test_unknown_parameter_gets_a_suggestion():
    made = make_pass("made")
    with pytest.raises(PassError, match="pass 'made' has no parameter 'bit'; did you mean 'bits'?"):
        made.from_mapping({"bit": 3})
    with pytest.raises(PassError, match="pass 'made' has no parameter 'xyzzy'; known: bits, groups"):
        made.from_mapping({"xyzzy": 3})


def test_a_value_of_the_wrong_type_is_named():
    with pytest.raises(PassError, match=r"pass 'made', parameter 'bits': .*valid integer.*\(given: 'four'\)"):
        make_pass("made").from_mapping({"bits": "four"})


def test_defaults_and_given_values():
    made = make_pass("made")
    assert made.from_mapping({}).parameters == Parameters(bits=4)
    assert made.from_mapping({"bits": 3, "groups": [1, 2]}).parameters == Parameters(bits=3, groups=[1, 2])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"after": ("b",)}, {}, "pass 'a' must come after 'b'; give --pass b before --pass a"),
        ({}, {"before": ("a",)}, "pass 'a' must come after 'b'"),
        ({"excludes": ("b",)}, {}, "passes 'a' and 'b' cannot be combined"),
        ({}, {"excludes": ("a",)}, "passes 'a' and 'b' cannot be combined"),
    ],
)
def test_forbidden_orders(first, second, message):
    chain = [make_pass("a", **first).from_mapping({}), make_pass("b", **second).from_mapping({})]
    with pytest.raises(PassError, match=message):
        registry.check_order(chain)


def test_allowed_orders_and_a_pass_that_runs_once():
    early, late = make_pass("early", before=("late",)), make_pass("late", after=("early",), excludes=("late",))
    registry.check_order([early.from_mapping({}), early.from_mapping({}), late.from_mapping({})])
    with pytest.raises(PassError, match="pass 'late' can run only once"):
        registry.check_order([late.from_mapping({}), late.from_mapping({})])


def test_weights_are_not_changed_after_something_was_made_for_them():
    cache, weights = make_pass("cache", changes=frozenset({"kv-cache"})), make_pass("weights")
    registry.check_order([weights.from_mapping({}), cache.from_mapping({})])
    with pytest.raises(PassError, match="pass 'cache' must come after 'weights'; give --pass weights before"):
        registry.check_order([cache.from_mapping({}), weights.from_mapping({})])
