from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import yaml

from effcli.batch import matrix
from effcli.errors import BadInputError

from .jobs_files import BASE, read_text

KINDS = {"profile": "profiles", "recipe": "recipes", "export": "exports"}
SECTIONS = {
    "profiles": {"p0": {}, "p1": {"only": ["kv"]}},
    "recipes": {"r0": {"passes": ["quantize"]}, "r1": {"passes": [{"quantize": {"scheme": "w8a16"}}]}},
    "exports": {"e0": {"format": "onnx"}},
}
MODELS = ["a", "b", "c"]
DEVICES = ["cpu", "cuda", "cuda:1"]


def expected_names(chosen: dict[str, list[str]], rules: list[dict[str, list[str]]]) -> tuple[list[str], list[int]]:
    """Work out the matrix the long way round: every combination, then every rule on it."""
    parts = [(kind, name) for kind, section in KINDS.items() for name in chosen[section]]
    everything = [
        {"model": model, kind: part, "device": device}
        for model, (kind, part), device in itertools.product(chosen["models"], parts, chosen["devices"])
    ]

    def hit(rule: dict[str, list[str]], cell: dict[str, str]) -> bool:
        return all(cell.get(key) in names for key, names in rule.items())

    kept = [cell for cell in everything if not any(hit(rule, cell) for rule in rules)]
    several = len(chosen["devices"]) > 1
    names = []
    for cell in kept:
        part = next(cell[kind] for kind in KINDS if kind in cell)
        names.append(".".join([cell["model"], part, *([cell["device"].replace(":", "-")] if several else [])]))
    return names, [sum(hit(rule, cell) for cell in everything) for rule in rules]


def some(generator: random.Random, names: list[str], least: int = 0) -> list[str]:
    return generator.sample(names, generator.randint(least, len(names)))


@pytest.mark.parametrize("seed", range(60))
def test_matrix_and_exclude_are_what_itertools_says(seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    chosen = {key: some(generator, list(names)) for key, names in SECTIONS.items()}
    chosen |= {"models": some(generator, MODELS, 1), "devices": some(generator, DEVICES, 1)}
    known = {"model": MODELS, "device": DEVICES} | {kind: list(SECTIONS[section]) for kind, section in KINDS.items()}
    rules = []
    for _ in range(generator.randint(0, 3)):
        keys = generator.sample(sorted(known), generator.randint(1, 3))
        rules.append({key: some(generator, known[key], 1) for key in keys})
    names, hits = expected_names(chosen, rules)
    data = {
        **{"version": 1, "output": "runs", "models": {name: "smollm2-135m" for name in MODELS}, "matrix": chosen},
        **SECTIONS,
        "exclude": [{key: value[0] if len(value) == 1 else value for key, value in rule.items()} for rule in rules],
    }
    file = read_text(tmp_path, yaml.safe_dump(data, sort_keys=False))
    if 0 in hits:
        with pytest.raises(BadInputError, match="excludes nothing"):
            matrix.jobs(file)
    elif not names:
        with pytest.raises(BadInputError, match="the matrix is empty"):
            matrix.jobs(file)
    else:
        made = matrix.jobs(file)
        assert [job.name for job in made] == names
        assert all(job.gpus == float(job.device != "cpu") for job in made)


def test_without_a_matrix_everything_runs_with_everything(tmp_path: Path) -> None:
    made = matrix.jobs(read_text(tmp_path, BASE))
    assert [(job.name, job.kind, job.device) for job in made] == [
        ("m.q", "profile", "auto"),
        ("m.w", "optimize", "auto"),
        ("n.q", "profile", "auto"),
        ("n.w", "optimize", "auto"),
    ]


def test_a_matrix_may_be_left_out_where_there_are_jobs_or_a_search(tmp_path: Path) -> None:
    none = BASE + "matrix: {models: []}\n"
    assert [job.name for job in matrix.jobs(read_text(tmp_path, none + "jobs: [{model: m, recipe: w}]\n"))] == ["m.w"]
    search = "search: {s: {model: m, passes: [{quantize: {scheme: {choose: [w4a16, w8a16]}}}], minimize: tpot}}\n"
    assert matrix.jobs(read_text(tmp_path, none + search)) == ()


def test_names_hold_only_what_folders_may_be_called(tmp_path: Path) -> None:
    text = BASE.replace("m: smollm2-135m", '"../org/mödel 1": smollm2-135m').replace("{q:", '{"a b":')
    made = matrix.jobs(read_text(tmp_path, text + "matrix: {devices: [cpu, 'cuda:0']}\n"))
    assert made[0].name == "org-m-del-1.a-b.cpu"
    assert made[1].name == "org-m-del-1.a-b.cuda-0"
    assert made[0].model_name == "../org/mödel 1"


def test_a_layout_orders_fields_as_it_likes(tmp_path: Path) -> None:
    made = matrix.jobs(read_text(tmp_path, BASE + "layout: '{kind}-{part}_of_{model}'\n"))
    assert [job.name for job in made] == ["profile-q_of_m", "optimize-w_of_m", "profile-q_of_n", "optimize-w_of_n"]


def test_a_job_that_names_its_device_is_named_after_it(tmp_path: Path) -> None:
    made = matrix.jobs(read_text(tmp_path, BASE + "jobs: [{model: m, recipe: w, device: 'cuda:1', gpus: 0.5}]\n"))
    assert (made[-1].name, made[-1].gpus) == ("m.w.cuda-1", 0.5)


def test_what_is_needed_comes_first_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    text = """version: 1
output: runs
models: {late: {output_of: b.r}, b: x/y, later: {output_of: late.r}}
recipes: {r: {passes: [quantize]}}
profiles: {p: {}}
jobs: [{name: first, model: b, profile: p, after: [last]}, {name: last, model: b, profile: p}]
"""
    made = matrix.jobs(read_text(tmp_path, text))
    names = [job.name for job in made]
    for job in made:
        assert all(names.index(need) < names.index(job.name) for need in job.needs)
    assert names == ["b.p", "b.r", "late.p", "late.r", "later.p", "later.r", "last", "first"]
    assert {job.name: job.model_from for job in made}["later.p"] == "late.r"


def test_a_circle_is_named_whole(tmp_path: Path) -> None:
    text = """version: 1
output: runs
models: {a: {output_of: c.r}, b: {output_of: a.r}, c: {output_of: b.r}}
recipes: {r: {passes: [quantize]}}
"""
    with pytest.raises(BadInputError, match="in a circle: ") as caught:
        matrix.jobs(read_text(tmp_path, text))
    circle = str(caught.value).partition("circle: ")[2].partition(";")[0].split(" needs ")
    needs = {"a.r": "c.r", "b.r": "a.r", "c.r": "b.r"}
    assert len(circle) == 4 and circle[0] == circle[-1]
    assert all(needs[one] == other for one, other in itertools.pairwise(circle))


def test_a_long_chain_is_no_circle(tmp_path: Path) -> None:
    jobs = ", ".join(f"{{name: j{n}, model: m, profile: q, after: [j{n + 1}]}}" for n in range(1200))
    made = matrix.jobs(read_text(tmp_path, f"{BASE}jobs: [{jobs}, {{name: j1200, model: m, profile: q}}]\n"))
    assert [job.name for job in made[-3:]] == ["j2", "j1", "j0"]


def test_a_job_is_not_called_as_what_another_makes_beside_its_output(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text " * 2000)
    scratch = f"{{blocks: 1, loops: 2, from_scratch: true, train_text: {tmp_path}/text.txt, train_tokens: 5000}}"
    text = BASE.replace("[{quantize: {scheme: w4a16}}]", f"[{{loop: {scratch}}}]")
    twin = "jobs: [{name: m.w-twin, model: n, profile: q}]\n"
    with pytest.raises(BadInputError, match="job 'm.w' also makes 'm.w-twin', which is a job's name; rename one"):
        matrix.jobs(read_text(tmp_path, text + twin))
    assert len(matrix.jobs(read_text(tmp_path, BASE + twin))) == 5
