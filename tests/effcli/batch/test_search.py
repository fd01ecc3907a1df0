"""A search against an engine with a known answer: its best and its front are those of brute force."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from effcli.batch.model import Job, Outcome
from effcli.batch.search import Search
from effcli.batch.search_space import SearchSpec
from effcli.errors import BadInputError

pytest.importorskip("optuna")

BASE = Job(name="base", kind="optimize", model="", model_name="tiny", part="")
SCHEMES = {"w4a16": 4, "w8a16": 8}
GROUPS = (8, 16, 32, 64)
SAMPLES = (16, 32, 48)
PASSES = [
    {
        "quantize": {
            "scheme": {"choose": [*SCHEMES]},
            "group_size": {"choose": [*GROUPS]},
            "samples": {"from": 16, "to": 48, "step": 16},
        }
    }
]
EVERYTHING = [*itertools.product(SCHEMES, GROUPS, SAMPLES)]


def figures(scheme: str, group: int, samples: int) -> dict[str, float | None]:
    bits = SCHEMES[scheme] + 16 / group
    return {"tpot": bits + samples / 100, "kl": 1 / bits**2 + group / 10_000, "size": bits, "ppl": 10 + 1 / bits}


class Engine:
    """Runs jobs at once; what each measures is a formula, and ``rung`` says what a first look would end."""

    def __init__(self, output: Path, rung: Callable[[Mapping[str, Any]], bool] = lambda _: False) -> None:
        self.output, self.rung = output, rung
        self.ran: list[str] = []
        self.recipes: list[str] = []

    def run(self, job: Job) -> Outcome:
        self.ran.append(job.name)
        self.recipes.append(json.dumps(job.settings["recipe"]["passes"]))
        given = job.settings["recipe"]["passes"][0]["quantize"]
        found = figures(given["scheme"], given["group_size"], given["samples"])
        gate = next(iter(job.settings["recipe"]["gates"]), None)
        if gate is not None and self.rung(found):
            return Outcome("gate-failed", "given up", 3, figures={"kl": found["kl"]})
        limit = float(gate.partition("<=")[2]) if gate else 1.0
        assert found["kl"] is not None
        passed = found["kl"] <= limit
        report = f"{job.name}/report.json" if passed else f"{job.name}.failed.json"
        path = self.output / report
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"gates": [{"gate": gate, "measured": found["kl"]}] if gate else []}))
        if passed:
            (path.parent / "model.safetensors").write_text("weights")
        return Outcome("passed" if passed else "gate-failed", "…", 0 if passed else 3, report=report, figures=found)


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep studies in memory: a commit to SQLite waits for the disk."""
    import optuna

    create = optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **given: create(**given | {"storage": None}))


def spec(**more: Any) -> SearchSpec:
    data = {"model": "tiny", "passes": PASSES, "minimize": "tpot", "trials": 24, "prune": False, **more}
    return SearchSpec.model_validate(data)


def run(search: Search, engine: Engine, stop_after: int | None = None) -> None:
    """Do what the driver does, one job at a time; stop as a killed driver does, with a job running."""
    count = 0
    while jobs := search.ask(0):
        for job in jobs:
            outcome = engine.run(job)
            count += 1
            if count == stop_after:
                return
            search.tell(job, outcome)
    assert search.finished()


def brute_front(limit: float = 1.0) -> set[tuple[float, float]]:
    points = {(found["kl"], found["tpot"]) for found in (figures(*item) for item in EVERYTHING)}
    points = {point for point in points if point[0] <= limit}
    return {
        point
        for point in points
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
    }


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize("sampler", ["grid", "tpe", "random"])
def test_a_whole_space_gives_the_best_and_the_front_of_brute_force(tmp_path: Path, sampler: str) -> None:
    search = Search("s", spec(sampler=sampler, subject_to=["kl<=0.035"]), BASE, str(tmp_path))
    engine = Engine(tmp_path)
    run(search, engine)
    result = search.result()
    assert sorted(engine.recipes) == sorted(set(engine.recipes))
    assert result.trials == len(EVERYTHING) == len(engine.ran)
    assert (result.quality, result.minimize, result.pruned, result.failed) == ("kl", "tpot", 0, 0)
    measured = {name: item.user_attrs["end"]["figures"] for name, item in search._jobs().items()}
    wanted = min(found["tpot"] for found in measured.values() if found["kl"] <= 0.035)
    assert result.best is not None
    assert measured[result.best]["tpot"] == wanted
    assert {(measured[name]["kl"], measured[name]["tpot"]) for name in result.front} == brute_front(0.035)
    assert {path.parent.name for path in tmp_path.glob("*/model.safetensors")} == set(result.front)
    passed = sum(figures(*item)["kl"] <= 0.035 for item in EVERYTHING)  # type: ignore[operator]
    assert len([*tmp_path.glob("*/report.json")]) == passed


@pytest.mark.usefixtures("in_memory")
def test_infeasible_trials_guide_the_sampler_towards_what_keeps_the_gate(tmp_path: Path) -> None:
    passes = [{"quantize": {"scheme": "w4a16", "dampening": {"from": 1e-5, "to": 1.0, "log": True}}}]
    shares = {}
    for sampler in ("tpe", "random"):
        wanted = spec(
            passes=passes, trials=40, subject_to=["kl<=0.0001"], maximize="bits", minimize=None, sampler=sampler
        )
        search, values = Search("s", wanted, BASE, str(tmp_path)), []
        while jobs := search.ask(0):
            for job in jobs:
                value = job.settings["recipe"]["passes"][0]["quantize"]["dampening"]
                values.append(value)
                status = "passed" if value <= 1e-4 else "gate-failed"
                search.tell(job, Outcome(status, "…", figures={"kl": value, "bits": value}))
        shares[sampler] = sum(value <= 3e-4 for value in values[-20:]) / 20
        best = search.result().best
        assert best is not None
        assert max(value for value in values if value <= 1e-4) == values[int(best.partition(".")[2]) - 1]
    assert shares["tpe"] >= 0.6 > 0.45 >= shares["random"]


@pytest.mark.parametrize("stop_after", [1, 6])
def test_a_search_that_was_killed_goes_on_as_the_undisturbed_one(tmp_path: Path, stop_after: int) -> None:
    whole = Engine(tmp_path / "whole")
    run(Search("s", spec(trials=8, seed=3), BASE, str(tmp_path / "whole")), whole)
    first, second = Engine(tmp_path / "cut"), Engine(tmp_path / "cut")
    run(Search("s", spec(trials=8, seed=3), BASE, str(tmp_path / "cut")), first, stop_after)
    again = Search("s", spec(trials=8, seed=3), BASE, str(tmp_path / "cut"))
    kept = again.ask(0)
    assert [job.name for job in kept] == first.ran
    assert [json.dumps(job.settings["recipe"]["passes"]) for job in kept] == first.recipes
    for job in kept[:-1]:  # the driver keeps these
        again.tell(job, Outcome("passed", "kept"))
    again.tell(kept[-1], second.run(kept[-1]))
    run(again, second)
    assert first.recipes[:-1] + second.recipes == whole.recipes
    assert again.result().best == Search("s", spec(trials=8, seed=3), BASE, str(tmp_path / "whole")).result().best


def test_what_failed_is_tried_again_under_its_name(tmp_path: Path) -> None:
    first = Search("s", spec(trials=3), BASE, str(tmp_path))
    names = []
    while jobs := first.ask(0):
        for job in jobs:
            names.append(job.name)
            engine = Engine(tmp_path)
            first.tell(job, Outcome("failed", "the disk was full", 4) if len(names) == 2 else engine.run(job))
    assert first.result().failed == 1
    again = Search("s", spec(trials=3), BASE, str(tmp_path))
    engine = Engine(tmp_path)
    run(again, engine)
    assert "s.002" in engine.ran
    assert (again.result().failed, again.result().trials) == (0, 3)


@pytest.mark.usefixtures("in_memory")
def test_a_first_look_saves_what_it_ends(tmp_path: Path) -> None:
    search = Search("s", spec(subject_to=["kl<=0.035"], prune=True), BASE, str(tmp_path))
    job = search.ask(0)[0]
    assert job.settings["recipe"]["evaluation"]["first_look"] == 1024
    engine = Engine(tmp_path, rung=lambda found: found["kl"] > 0.04)
    search.tell(job, engine.run(job))
    run(search, engine)
    result = search.result()
    assert result.pruned == sum(figures(*item)["kl"] > 0.04 for item in EVERYTHING) > 0  # type: ignore[operator]
    assert len(result.front) == len(brute_front(0.035))


@pytest.mark.usefixtures("in_memory")
def test_what_a_pass_refuses_is_not_run(tmp_path: Path, tiny_folder: Path) -> None:
    """w8a8 takes no group size, and neither 32 nor any default size divides the 48 columns of a layer."""
    passes = [{"quantize": {"scheme": {"choose": ["w4a16", "w8a8"]}, "group_size": {"choose": [None, 16, 32]}}}]
    base = Job(name="base", kind="optimize", model=str(tiny_folder), model_name="tiny", part="")
    search = Search("s", spec(passes=passes, sampler="grid", trials=None), base, str(tmp_path))
    asked = []
    while jobs := search.ask(0):
        for job in jobs:
            asked.append(job.settings["recipe"]["passes"][0]["quantize"])
            search.tell(job, Outcome("passed", "…", figures={"tpot": 1.0, "kl": 0.1}))
    assert [(item["scheme"], item["group_size"]) for item in asked] == [("w4a16", 16), ("w8a8", None)]
    assert "; there is nothing new to try; 4 more cannot be run, the first because " in search.result().message


def test_an_optional_pass_is_left_out_with_its_parameters(tmp_path: Path) -> None:
    passes = [*PASSES, {"optional": {"kv-pq": {"bits": {"choose": [2, 4]}}}}]
    wanted = spec(passes=passes, sampler="grid", trials=None)
    combinations = [*wanted.combinations()]
    assert len(combinations) == 24 * 3
    chosen = [wanted.chosen(values) for values in combinations]
    assert sum(len(item) == 1 for item in chosen) == 24
    assert all("kv-pq" not in item[-1] or item[-1]["kv-pq"]["bits"] in (2, 4) for item in chosen)


def test_no_more_jobs_run_at_a_time_than_there_are_workers(tmp_path: Path) -> None:
    search = Search("s", spec(), BASE, str(tmp_path), parallel=3)
    assert len(search.ask(0)) == 3
    assert len(search.ask(2)) == 1
    assert len(search.ask(3)) == 0
    assert not search.finished()


@pytest.mark.usefixtures("in_memory")
def test_a_model_that_never_works_ends_the_search(tmp_path: Path) -> None:
    search, ran = Search("s", spec(), BASE, str(tmp_path)), 0
    while jobs := search.ask(0):
        for job in jobs:
            search.tell(job, Outcome("failed", "no such model", 2))
            ran += 1
    assert ran == 3
    assert "all failed: no such model" in search.result().message


def test_another_model_is_another_study(tmp_path: Path) -> None:
    run(Search("s", spec(trials=2), BASE, str(tmp_path), fingerprint=lambda: {"sha256": "a"}), Engine(tmp_path))
    other = Search("s", spec(trials=2), BASE, str(tmp_path), fingerprint=lambda: {"sha256": "b"})
    assert other.result().trials == 0
    assert other.result().message == "no trial was run"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passes": [{"quantise": {}}, "quantize"]}, "did you mean 'quantize'"),
        ({"passes": [{"quantize": {"shceme": "w4a16"}}]}, "has no parameter 'shceme' (did you mean 'scheme'?)"),
        ({"storage": "nosuch://me:secret@x/y"}, "cannot open its storage 'nosuch://me:…@x/y'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInputError) as refused:
        Search("s", spec(**change), BASE, str(tmp_path)).ask(0)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_missing_optuna_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BadInputError, match=r"pip install 'effcli\[search\]'"):
        Search("s", spec(), BASE, str(tmp_path))


@pytest.mark.slow
@pytest.mark.thorough
def test_a_search_over_schemes_of_a_real_model(tmp_path: Path, tiny_folder: Path) -> None:
    """8 bits keep the gate and 4 bits clearly do not: one is published, the other ends at its first look."""
    from effcli.batch import driver
    from effcli.batch.fingerprint import Fingerprints
    from effcli.batch.jobs_file import read
    from effcli.batch.local import LocalEngine
    from effcli.batch.search import searches

    (tmp_path / "jobs.yaml").write_text(f"""
version: 1
output: runs
models: {{tiny: {tiny_folder}}}
search:
  small:
    model: tiny
    passes: [{{quantize: {{scheme: {{choose: [w4a16, w8a16]}}, group_size: 16, method: rtn}}}}]
    minimize: size
    subject_to: ["kl<=0.000001"]
    sampler: grid
    prune_tokens: 128
    evaluation: {{tokens: 512, context: 64}}
    context: 32
""")
    output = str(tmp_path / "runs")
    for expected in (["gate-failed", "passed"], ["kept"]):
        hashes = Fingerprints()
        (search,) = searches(read(tmp_path / "jobs.yaml", {}), output, hashes)
        ran = driver.run([], output, LocalEngine(1, threads=1), fingerprints=hashes, sources=[search])
        assert [state.stage for state in ran.states] == expected
        assert ran.exit_code == 0
        result = search.result()
        assert (result.trials, result.pruned, result.best, result.front) == (2, 1, "small.002", ("small.002",))
    given_up = search._jobs()["small.001"].user_attrs["end"]
    assert "gate 'kl<=0.000001' will not hold" in given_up["message"]
    assert sorted(path.name for path in Path(output).iterdir() if path.name != ".effcli-batch") == ["small.002"]
