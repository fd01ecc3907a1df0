import subprocess
import sys
import textwrap

import pytest

from profilers import registry
from profilers.base import Profiler, ProfilerError

BUILT_IN = {"intensity", "sinks", "kv", "latency", "energy", "outliers", "redundancy"}


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
        (info / "entry_points.txt").write_text(f"[effcli.profilers]\n{lines}\n")
        if module:
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
            monkeypatch.delitem(sys.modules, module, raising=False)
        registry._entry_points.cache_clear()

    return make


def test_built_in_profilers_are_found_like_any_other():
    assert set(registry.names()) >= BUILT_IN
    for name in BUILT_IN:
        assert registry.load(name).name == name


def test_listing_names_imports_no_torch():
    code = "import sys; from profilers import registry; registry.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_typo_gets_a_suggestion():
    with pytest.raises(ProfilerError, match="no profiler named 'latancy'; did you mean 'latency'"):
        registry.load("latancy")


def test_name_like_no_other_gets_the_list():
    with pytest.raises(ProfilerError, match="no profiler named 'zzz'; known: .*energy.*sinks"):
        registry.load("zzz")


def test_third_party_profiler_is_found_loaded_and_run(install):
    install(
        "wheelworks",
        {"wheels": "wheelworks_profilers:PROFILER"},
        "wheelworks_profilers",
        """
        from dataclasses import dataclass
        from profilers.base import Profiler

        @dataclass(frozen=True)
        class Wheels:
            count: int

        PROFILER = Profiler("wheels", "Wheels", run=lambda context: Wheels(4), result_type=Wheels)
        """,
    )
    assert "wheels" in registry.names()
    assert "wheelworks_profilers" not in sys.modules  # listing imports nothing
    profiler = registry.load("wheels")
    assert isinstance(profiler, Profiler)
    assert profiler.run(None).count == 4


def test_two_distributions_with_one_name_are_refused(install):
    install("first", {"wheels": "first_profilers:PROFILER"})
    install("second", {"wheels": "second_profilers:PROFILER"})
    with pytest.raises(ProfilerError, match="'wheels'.*uninstall one") as caught:
        registry.names()
    assert "first_profilers:PROFILER" in str(caught.value) and "second_profilers:PROFILER" in str(caught.value)


def test_taking_a_built_in_name_is_refused(install):
    install("impostor", {"latency": "impostor_profilers:PROFILER"})
    with pytest.raises(ProfilerError, match="'latency'.*impostor_profilers"):
        registry.load("latency")


@pytest.mark.parametrize("code", ["PROFILER = 3", "from profilers.latency import PROFILER"])
def test_entry_point_that_holds_something_else_is_refused(install, code):
    install("odd", {"odd": "odd_profilers:PROFILER"}, "odd_profilers", code)
    with pytest.raises(ProfilerError, match="'odd_profilers:PROFILER' does not hold a Profiler named 'odd'"):
        registry.load("odd")


def needing(install, **requires):
    code = "from profilers.base import Profiler\n" + "\n".join(
        f"{name} = Profiler('{name}', '{name}', run=lambda context: None, result_type=dict, requires={tuple(needed)!r})"
        for name, needed in requires.items()
    )
    install("chain", {name: f"chain_profilers:{name}" for name in requires}, "chain_profilers", code)


def test_what_others_read_runs_first(install):
    needing(install, top=["middle", "base"], middle=["base"], base=[], alone=[])
    ordered = [profiler.name for profiler in registry.in_order(("alone", "top", "base", "middle"))]
    assert ordered == ["alone", "base", "middle", "top"]


def test_requirements_that_were_not_selected_do_not_run(install):
    needing(install, top=["middle"], middle=[])
    assert [profiler.name for profiler in registry.in_order(("top",))] == ["top"]


def test_requiring_each_other_is_refused(install):
    needing(install, one=["two"], two=["three"], three=["one"])
    with pytest.raises(ProfilerError, match="circle through 'one'"):
        registry.in_order(("one", "two", "three"))


def test_selecting_twice_runs_once():
    assert [profiler.name for profiler in registry.in_order(("latency", "latency"))] == ["latency"]
