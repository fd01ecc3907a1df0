from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from effcli import recipes
from effcli.batch import matrix
from effcli.batch.jobs_schema import jobs_schema
from effcli.batch.model import Job, Limits
from effcli.errors import BadInputError

from .jobs_files import BASE, read_text

DOCS = Path(__file__).parents[3] / "docs" / "batch.md"
(EXAMPLE,) = re.findall(r"```yaml\n(# yaml-language-server.*?)```", DOCS.read_text(encoding="utf-8"), re.S)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def swapped(old: str, new: str) -> str:
    assert old in BASE
    return BASE.replace(old, new)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HOME", "/somewhere")
    (tmp_path / "w4.yaml").write_text(
        'version: 1\nseed: 3\npasses: [{quantize: {scheme: w4a16}}]\ngates: ["bits<=5"]\n'
    )
    return EXAMPLE


def test_the_documented_example_makes_the_documented_jobs(example: str, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    file = read_text(tmp_path, example)
    made = {job.name: job for job in matrix.jobs(file)}
    (sentence,) = re.findall(r"This file has eight jobs and a search: (.*?)\.\n", DOCS.read_text(encoding="utf-8"))
    assert set(made) == set(re.findall(r"`(.*?)`", sentence)) and len(made) == 8
    assert (file.output, file.workers, [*file.search], file.path) == ("runs", 2, ["smallest"], tmp_path / "jobs.yaml")

    tiny = made["tiny.w8"]
    assert (tiny.model, tiny.dtype, tiny.kind, tiny.part) == (str(tmp_path / "tiny"), "float32", "optimize", "w8")
    assert tiny.limits == Limits(1800, 20_000_000_000, 1)
    assert tiny.environment == {"HF_HOME": "/somewhere"}
    assert tiny.settings["context"] == 512
    assert tiny.settings["recipe"]["gates"] == ["size<=0.6x", "ppl<=+3%"]
    careful = made["careful"]
    assert careful.settings["recipe"]["gates"] == ["bits<=5", "ppl<=+3%", "kl<=0.05"]
    assert recipes.from_mapping(careful.settings["recipe"]).seed == 3
    assert (careful.needs, careful.device, careful.gpus) == (("smol.quick",), "auto", 0.0)
    assert (made["w4-again"].model_from, made["w4-again"].needs, made["w4-again"].model) == (
        "smol.w4",
        ("smol.w4",),
        "",
    )
    assert made["smol.quick"].settings == {"only": ["latency", "kv"], "context": [512], "batch": [1]}
    assert made["smol-w4.onnx"].settings == {"format": "onnx"}
    assert made["smol-w4.onnx"].labels == {"zone": "a"}
    for job in made.values():
        assert Job.from_mapping(json.loads(job.to_json())) == job

    on_gpu = {job.name: job for job in matrix.jobs(read_text(tmp_path, example, {"GPU": "cuda:1"}))}["careful"]
    assert (on_gpu.device, on_gpu.gpus) == ("cuda:1", 1.0)

    base = matrix.search_job(file, "smallest")
    assert (base.name, base.model, base.kind, base.limits.time_seconds) == (
        "smallest",
        "smollm2-135m",
        "optimize",
        7200,
    )


def test_the_schema_takes_the_documented_example_and_refuses_typos(example: str) -> None:
    schema = jobs_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    data = yaml.safe_load(example)
    validator.validate(data)
    for text in ("workers: ${N}", "limits: {time: 90, memory: 1000000}", "profiles: {all: {}}", "exports: {o: onnx}"):
        validator.validate({**data, **yaml.safe_load(text.replace("${N}", '"${N}"'))})

    def wrong(change: Any) -> bool:
        return not validator.is_valid({**data, **yaml.safe_load(change)})

    for text in [
        "outptu: runs",
        "workers: 0",
        "workers: two",
        "version: 2",
        "models: {}",
        "models: {smol: {sourc: x}}",
        "profiles: {quick: {onyl: [kv]}}",
        "recipes: {w: {passes: [{quantize: {schem: w4a16}}]}}",
        "recipes: {w: {passes: [{quantize: {scheme: w4a61}}]}}",
        "recipes: {w: {passes: []}}",
        "recipes: {w: {passes: [quantize], evaluation: {token: 1}}}",
        "exports: {o: {format: onx}}",
        "matrix: {model: [smol]}",
        "exclude: [{modle: smol}]",
        "jobs: [{recipe: w4}]",
        "limits: {tiem: 2h}",
        "search: {s: {model: smol, passes: [{quantize: {schem: {choose: [w4a16]}}}], minimize: tpot}}",
        "search: {s: {model: smol, passes: [{quantize: {scheme: {chose: [w4a16]}}}], minimize: tpot}}",
        "search: {s: {model: smol, passes: [quantize], minimise: tpot}}",
    ]:
        assert wrong(text), text
    for text in [
        "search: {s: {model: smol, passes: [{optional: {kv-pq: {}}}, {quantize: {bits: {from: 3, to: 5}}}], time: 2h}}",
        "recipes: {w: {passes: [quantize, {of-another-package: {any: 1}}]}}",
    ]:
        assert not wrong(text), text


def test_the_documented_search_is_read_and_valid(tmp_path: Path) -> None:
    page = (DOCS.parent / "batch-search.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(version: 1.*?)```", page, re.S)
    assert [*read_text(tmp_path, text).search] == ["smallest"]
    jsonschema.Draft202012Validator(jobs_schema()).validate(yaml.safe_load(text))


# What is wrong, where, and words of the message.
BAD: list[tuple[str, tuple[int, int], str]] = [
    ("", (1, 1), "the file is empty; it starts with: version: 1"),
    ("[]", (1, 1), "the file holds no mapping"),
    ("version: 2\nworkers: what\n", (1, 10), "version 2 is newer than the 1 that this release reads; pip install -U"),
    ("output: x\n", (1, 1), "the file has no version; add the line: version: 1"),
    ("version: '1'\n", (1, 10), "version is '1'; this release reads version 1"),
    ("version: true\n", (1, 10), "version is True"),
    ("version: 1\n", (1, 1), "the file has no 'output'; add it"),
    ("version: 1\noutput: r\nmodels: {}\n", (3, 9), "'models' is empty; write at least one"),
    ("version: 1\noutput: r\nmodles: {m: x}\n", (3, 1), "'modles' is an unknown key (did you mean 'models'?)"),
    (swapped("./n", "{source: x, dtyp: y}"), (3, 42), "'models.n.dtyp' is an unknown key (did you mean 'dtype'?)"),
    (swapped("./n", "{source: x, dtype: flot32}"), (3, 49), "unknown dtype 'flot32' (did you mean 'float32'?)"),
    (swapped("./n", "7"), (3, 30), "'models.n' is 7, not a mapping"),
    (swapped("./n", "''"), (3, 30), "'models.n' is empty; write one"),
    (swapped("./n", "{dtype: auto}"), (3, 30), "needs one of source and output_of"),
    (swapped("./n", "{output_of: m.w, source: x}"), (3, 30), "needs one of source and output_of"),
    (swapped("./n", "{output_of: m.w, revision: x}"), (3, 30), "has a revision"),
    (swapped("./n", "{source: x, allow_pickle: yes}"), (3, 56), "is 'yes', not true or false"),
    ("version: 1\noutput: r\nmodels:\n  m:\n", (4, 5), "'models.m' is empty, not a mapping; write {}"),
    ("version: 1\noutput: r\nmodels:\n\tm: x\n", (4, 1), "YAML takes no tab here; indent with spaces"),
    ("version: 1\noutput: r: x\n", (2, 10), "a ':' stands where no key can be"),
    ("version: 1\noutput: [a\nmodels: x\n", (3, 7), "is not valid YAML"),
    (BASE + "output: again\n", (6, 1), "'output' stands here a second time (first on line 2); leave one out"),
    (swapped("n: ./n", "m: ./n"), (3, 27), "'m' stands here a second time (first on line 3)"),
    (BASE + "workers: 0\n", (6, 10), "'workers' is 0; it has to be greater than or equal to 1"),
    (BASE + "workers: two\n", (6, 10), "'workers' is 'two', not a whole number"),
    (BASE + "workers: true\n", (6, 10), "'workers' is true, not a whole number"),
    (BASE + "workers: 1.5\n", (6, 10), "'workers' is 1.5, not a whole number"),
    (BASE + "workers: 1e-4\n", (6, 10), "'workers' is 0.0001, not a whole number"),
    (BASE + "workers: &a [*a]\n", (6, 10), "an anchor that contains itself has no value"),
    (BASE + "workers: *b\n", (6, 10), "undefined alias"),
    (BASE + "workers: !!python/object:os.system 1\n", (6, 10), "the tag '!!python/object:os.system' is not read"),
    (BASE + "workers: !env X\n", (6, 10), "the tag '!env' is not read here; write the value without it"),
    (BASE + "workers: !!binary eA==\n", (6, 10), "the tag '!!binary' is not read here"),
    (BASE + "workers: \x07\n", (6, 10), "has the control character 0x7; remove it"),
    (BASE + "---\nversion: 1\n", (6, 1), "a second document begins"),
    (BASE + "? [a]\n: b\n", (6, 3), "a key is text, not a list or a mapping"),
    (BASE + "limits: {<<: [7]}\n", (6, 15), "'<<' takes a mapping"),
    (BASE + "limits: 2h\n", (6, 9), "'limits' is '2h', not a mapping"),
    (BASE + "limits: {time: 2 hours}\n", (6, 16), "write e.g. 90s, 30m or 2h"),
    (BASE + "limits: {time: 1:30}\n", (6, 16), "write e.g. 90s, 30m or 2h"),
    (BASE + "limits: {time: 0}\n", (6, 16), "'limits.time' is 0; it has to be greater than 0"),
    (BASE + "limits: {time: true}\n", (6, 16), "'limits.time' is true, not a number"),
    (BASE + "limits: {memory: 20}\n", (6, 18), "is 20, less than 1 MB; write the unit, e.g. 20GB"),
    (BASE + "limits: {memory: lots}\n", (6, 18), "is 'lots', no amount of memory; write e.g. 20GB"),
    (BASE + "limits: {memory: -20GB}\n", (6, 18), "is '-20GB', no amount of memory"),
    (BASE + "limits: {memory: true}\n", (6, 18), "no amount of memory"),
    (BASE + "limits: {retries: -1}\n", (6, 19), "'limits.retries' is -1; it has to be greater than or equal to 0"),
    (BASE + "layout: '{modle}'\n", (6, 9), "the unknown field '{modle}' (did you mean 'model'?)"),
    (BASE + "layout: all\n", (6, 9), "is 'all', which names no job"),
    (BASE + "layout: '{model'\n", (6, 9), "which names no job"),
    (BASE + "layout: '{model!r}'\n", (6, 9), "the unknown field '{model!r}'"),
    (BASE + "layout: '.{kind}'\n", (6, 9), "two jobs are called 'profile'"),
    (BASE + "layout: '{part}'\n", (6, 9), "put {model} into the layout"),
    (BASE + "environment: [NOT_SET_ANYWHERE]\n", (6, 15), "'NOT_SET_ANYWHERE' is not set; set it, or leave it out"),
    (BASE + "environment: [JOBS_TEST_HOEM]\n", (6, 15), "is not set (did you mean 'JOBS_TEST_HOME'?)"),
    (BASE + "environment: HOME\n", (6, 14), "'environment' is 'HOME', not a list; write [HOME]"),
    (BASE + "gates: ['pl<=3%']\n", (6, 9), "names the unknown metric 'pl' (did you mean 'ppl'?)"),
    (BASE + "gates: ['ppl<=+3%', size]\n", (6, 21), "gate 'size' is not METRIC OP LIMIT"),
    (BASE + "matrix: {models: [mm]}\n", (6, 19), "no model is called 'mm' (did you mean 'm'?); known: m, n"),
    (BASE + "matrix: {recipes: [q]}\n", (6, 20), "no recipe is called 'q'; known: w"),
    (BASE + "matrix: {exports: [onnx]}\n", (6, 20), "no export is called 'onnx'; the file has no exports"),
    (BASE + "matrix: {models: m}\n", (6, 18), "is 'm', not a list; write [m]"),
    (BASE + "matrix: {models: [7]}\n", (6, 19), 'is 7, not a text; write it in quotes: "7"'),
    (BASE + "matrix: {models: [m, m]}\n", (6, 22), "'m' stands in 'matrix.models' twice; leave one out"),
    (BASE + "matrix: {devices: [gpu]}\n", (6, 20), "is 'gpu', no device (did you mean 'cpu'?)"),
    (BASE + "matrix: {devices: []}\n", (6, 1), "the matrix is empty: 'matrix.devices' is an empty list"),
    (BASE + "matrix: {models: []}\n", (6, 1), "the matrix is empty: 'matrix.models' is an empty list"),
    (
        BASE + "matrix: {profiles: [], recipes: []}\n",
        (6, 1),
        "the matrix is empty: no profile, recipe or export is left",
    ),
    (BASE + "matrix: {model: [m]}\n", (6, 10), "'matrix.model' is an unknown key (did you mean 'models'?)"),
    (BASE + "matrix:\n", (6, 8), "'matrix' is empty, not a mapping; write {}, or leave the key out"),
    ("version: 1\noutput: r\nmodels: {m: x}\n", (1, 1), "nothing is to be done: there are no profiles"),
    (BASE + "exclude: [{model: k}]\n", (6, 19), "no model is called 'k'"),
    (BASE + "exclude: [{model: [m, k]}]\n", (6, 23), "no model is called 'k'"),
    (BASE + "exclude: [{modle: m}]\n", (6, 12), "'exclude.0.modle' is an unknown key (did you mean 'model'?)"),
    (BASE + "exclude: [{}]\n", (6, 11), "is an empty rule, which would exclude everything"),
    (BASE + "exclude:\n  - {model: m}\n  - {model: n}\n", (6, 1), "takes all of them (line 7 takes 2, line 8 takes 2)"),
    (BASE + "exclude: [{profile: q, recipe: w}]\n", (6, 11), "no job has a profile and a recipe at once"),
    (BASE + "exclude: [{device: cpu}]\n", (6, 11), "{device: cpu} excludes nothing"),
    (BASE + "matrix: {models: [m]}\nexclude: [{model: n}]\n", (7, 11), "{model: n} excludes nothing"),
    (BASE + "jobs: [{model: m}]\n", (6, 8), "says nothing to do; give one of profile, recipe and export"),
    (BASE + "jobs: [{recipe: w}]\n", (6, 8), "'jobs.0' has no 'model'; add it"),
    (BASE + "jobs: [{model: m, recipe: w, profile: q}]\n", (6, 8), "has profile and recipe; give one of"),
    (BASE + "jobs: [{model: m, recipe: w}]\n", (6, 8), "two jobs are called 'm.w'"),
    (BASE + "jobs: [{model: m, recipe: w, name: M.W}]\n", (6, 8), "two jobs are called 'M.W'"),
    (
        BASE + "jobs: [{model: m, recipe: w, name: a/b}]\n",
        (6, 36),
        "'a/b' is no name; use letters, digits, '.', '_' and",
    ),
    (BASE + "jobs: [{model: m, recipe: w, name: ..}]\n", (6, 36), "'..' is no name"),
    (BASE + "jobs: [{model: m, recipe: w, name: batch.json}]\n", (6, 36), "as a file of the batch's own is"),
    (BASE + "jobs: [{model: m, recipe: w, name: %s}]\n" % ("x" * 200), (6, 36), "a job's name has 200 characters"),
    (BASE + "jobs: [{model: m, recipe: v}]\n", (6, 27), "no recipe is called 'v'"),
    (BASE + "jobs: [{model: m, profile: q, gates: ['ppl<=+3%']}]\n", (6, 8), "has gates, which hold a recipe's result"),
    (
        BASE + "jobs: [{name: x, model: m, profile: q, after: [m.u]}]\n",
        (6, 48),
        "no job is called 'm.u' (did you mean 'm.",
    ),
    (BASE + "jobs: [{name: x, model: m, profile: q, after: [x]}]\n", (6, 47), "in a circle: x needs x"),
    (
        BASE + "jobs: [{name: x, model: m, profile: q, labels: {zone: 1}}]\n",
        (6, 55),
        "is 1, not a text; write it in quotes",
    ),
    (
        BASE + "jobs: [{name: x, model: m, profile: q, gpus: -1}]\n",
        (6, 46),
        "is -1; it has to be greater than or equal",
    ),
    (swapped("./n", "{output_of: m.q}"), (3, 42), "job 'm.q' is a profile and makes no model"),
    (swapped("./n", "{output_of: m.x}"), (3, 42), "no job is called 'm.x' (did you mean 'm.w'?)"),
    (swapped("./n", "{output_of: n.w}"), (3, 30), "in a circle: n.w needs n.w"),
    (
        swapped("./n", "{output_of: m.w}") + "exclude: [{model: m, recipe: w}]\n",
        (3, 42),
        "job 'm.w' is needed, and line 6 excludes it",
    ),
    (swapped("w4a16", "w4a61"), (5, 44), "parameter 'scheme'"),
    (swapped("scheme:", "schem:"), (5, 43), "no parameter 'schem'; did you mean 'scheme'?"),
    (swapped("{quantize:", "{quantise:"), (5, 24), "no pass named 'quantise'; did you mean 'quantize'?"),
    (swapped("[{quantize: {scheme: w4a16}}]", "[loop]"), (5, 24), "loop needs blocks and loops"),
    (swapped("[{quantize: {scheme: w4a16}}]", "[quantize, quantize]"), (5, 23), "'quantize' can run only once"),
    (swapped("[{quantize: {scheme: w4a16}}]", "[]"), (5, 23), "'recipes.w.passes' is empty; name at least one pass"),
    (swapped("[{quantize: {scheme: w4a16}}]", "quantize"), (5, 23), "is 'quantize', not a list; write [quantize]"),
    (swapped("{passes: [{quantize: {scheme: w4a16}}]}", "{}"), (5, 14), "needs one of file and passes"),
    (swapped("{passes: [{quantize: {scheme: w4a16}}]}", "{file: w, seed: 1}"), (5, 14), "has a file and seed"),
    (swapped("{passes: [{quantize: {scheme: w4a16}}]}", "w5.yaml"), (5, 14), "'w5.yaml' (did you mean 'w4.yaml'?)"),
    (swapped("{passes: [{quantize: {scheme: w4a16}}]}", "bad.yaml"), (5, 14), "unknown key 'pases' (did you mean"),
    (swapped("{passes: [{quantize: {scheme: w4a16}}]}", "typo.yaml"), (5, 14), "no parameter 'schem'"),
    (swapped("{passes: [{quantize: {scheme: w4a16}}]}", "gate.yaml"), (5, 14), "names the unknown metric 'pl'"),
    (swapped("w4a16}}]", "w4a16}}], evaluation: {token: 300}"), (5, 67), "is an unknown key (did you mean 'tokens'?)"),
    (
        swapped("w4a16}}]", "w4a16}}], evaluation: {tokens: 3}"),
        (5, 75),
        "is 3; it has to be greater than or equal to 256",
    ),
    (swapped("w4a16}}]", "w4a16}}], evaluation: {text: no.txt}"), (5, 73), "no file 'no.txt'"),
    (swapped("[{quantize: {scheme: w4a16}}]", "[{lemica: {prompts: no.txt}}]"), (5, 43), "no file 'no.txt'"),
    (swapped("[kv]", "[kvv]"), (4, 23), "no profiler is called 'kvv' (did you mean 'kv'?)"),
    (swapped("[kv]", "kv"), (4, 22), "is 'kv', not a list; write [kv]"),
    (swapped("[kv]", "[kv], text: no.txt"), (4, 34), "no file 'no.txt'"),
    (swapped("[kv]", "[kv], context: 512"), (4, 37), "is 512, not a list; write [512]"),
    (swapped("[kv]", "[kv], context: [0]"), (4, 38), "is 0; it has to be greater than or equal to 1"),
    (swapped("[kv]", "[kv], epsilon: [2]"), (4, 38), "is 2; it has to be less than 1"),
    (BASE + "exports: {o: {format: onx}}\n", (6, 23), "is 'onx', which is not known (did you mean 'onnx'?)"),
    (
        BASE + "search: {s: {model: k, passes: [quantize], minimize: tpot}}\n",
        (6, 21),
        "no model is called 'k'; known: m, n",
    ),
    (
        BASE + "search: {s: {model: m, passes: [{quantise: {}}], minimize: tpot}}\n",
        (6, 33),
        "no pass named 'quantise'; did you mean 'quantize'?",
    ),
    (
        BASE + "search: {s: {model: m, passes: [{quantize: {schem: {choose: [w4a16]}}}], minimize: tpot}}\n",
        (6, 52),
        "no parameter of quantize is called 'schem' (did you mean 'scheme'?)",
    ),
    (
        BASE
        + "search: {s: {model: m, passes: [{optional: {quantize: {scheme: {chose: [x]}}}}, loop], minimize: tpot}}\n",
        (6, 64),
        "is no choice (did you mean 'choose'?)",
    ),
    (
        BASE + "search: {s: {model: m, passes: [quantize], minimise: tpot}}\n",
        (6, 44),
        "'search.s.minimise' is an unknown key (did you mean 'minimize'?)",
    ),
    (
        BASE + "search: {m.q: {model: m, passes: [quantize], minimize: tpot}}\n",
        (6, 10),
        "job 'm.q' is called as a trial of search 'm.q' is; rename one",
    ),
    (
        BASE + "search: {s: {model: m, passes: [quantize], minimize: tpot, calibration: {text: no.txt}}}\n",
        (6, 80),
        "no file 'no.txt'",
    ),
    (
        BASE + "search: {s: {model: m, passes: [{lemica: {prompts: no.txt}}], minimize: tpot}}\n",
        (6, 52),
        "no file 'no.txt'",
    ),
    (BASE + "layout: ${NOPE}\n", (6, 9), "${NOPE} has no value; give it with --set NOPE=VALUE"),
    (BASE + "workers: ${N\n", (6, 10), "'${' is not ${NAME} or ${NAME:-default}"),
]


@pytest.mark.parametrize(("text", "place", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_what_is_wrong_is_named_with_its_line_and_column(
    text: str, place: tuple[int, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBS_TEST_HOME", "x")
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    (tmp_path / "w4.yaml").write_text("version: 1\npasses: [quantize]\n")
    (tmp_path / "bad.yaml").write_text("version: 1\npases: [quantize]\n")
    (tmp_path / "typo.yaml").write_text("version: 1\npasses: [{quantize: {schem: w4a16}}]\n")
    (tmp_path / "gate.yaml").write_text("version: 1\npasses: [quantize]\ngates: ['pl<=1']\n")
    with pytest.raises(BadInputError) as caught:
        matrix.jobs(read_text(tmp_path, text))
    said = str(caught.value)
    assert message in said
    assert said.startswith(f"'{tmp_path / 'jobs.yaml'}', line {place[0]}, column {place[1]}: ")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ("{time: 2h}", Limits(7200)),
        ("{time: 90s}", Limits(90)),
        ("{time: 1.5d}", Limits(129600)),
        ("{time: 45}", Limits(45)),
        ("{time: 0.5}", Limits(0.5)),
        ("{memory: 20GB}", Limits(memory_bytes=20 * 10**9)),
        ("{memory: 1.5 GiB}", Limits(memory_bytes=3 * 2**29)),
        ("{memory: 512mb}", Limits(memory_bytes=512 * 10**6)),
        ("{memory: 2000000}", Limits(memory_bytes=2_000_000)),
        ("{retries: 0}", Limits(retries=0)),
        ("{}", Limits()),
    ],
)
def test_limits(limits: str, expected: Limits, tmp_path: Path) -> None:
    assert {job.limits for job in matrix.jobs(read_text(tmp_path, f"{BASE}limits: {limits}\n"))} == {expected}


def test_the_narrowest_limit_that_is_given_holds(tmp_path: Path) -> None:
    text = swapped("m: smollm2-135m", "m: {source: smollm2-135m, limits: {time: 20s, retries: 2}}") + (
        "limits: {time: 10s, memory: 1GB, retries: 3}\n"
        "jobs: [{name: x, model: m, profile: q, limits: {retries: 0}}, {name: y, model: n, profile: q}]\n"
    )
    made = {job.name: job.limits for job in matrix.jobs(read_text(tmp_path, text))}
    assert (made["x"], made["m.q"]) == (Limits(20, 10**9, 0), Limits(20, 10**9, 2))
    assert made["y"] == Limits(10, 10**9, 3)


def test_paths_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, files = tmp_path / "here", tmp_path / "files"
    here.mkdir()
    files.mkdir()
    (files / "w.yaml").write_text("version: 1\npasses: [quantize]\nevaluation: {text: eval.txt}\n")
    (here / "eval.txt").write_text("text")
    (here / "model").mkdir()
    monkeypatch.chdir(here)
    text = """version: 1
output: runs
models: {a: model, b: ./missing, c: org/name}
recipes: {w: w.yaml}
profiles: {p: {text: eval.txt}}
search:
  s: {model: a, passes: [{lemica: {prompts: eval.txt}}], minimize: tpot, evaluation: {text: eval.txt}}
"""
    file = read_text(files, text)
    assert file.search["s"].evaluation.text == here / "eval.txt"
    assert file.search["s"].passes[0].parameters == {"prompts": str(here / "eval.txt")}
    assert file.path == files / "jobs.yaml"
    made = {job.name: job for job in matrix.jobs(file)}
    assert made["a.w"].model == str(here / "model")
    assert (made["b.w"].model, made["c.w"].model) == ("./missing", "org/name")
    assert made["a.w"].settings["recipe"]["evaluation"]["text"] == str(here / "eval.txt")
    assert made["a.p"].settings["text"] == str(here / "eval.txt")


def test_what_yaml_is_known_for_is_read_as_it_looks(tmp_path: Path) -> None:
    text = """version: 1
output: runs
models: {on: a/no, 7: b/x, 1.10: "c/x", 2026-01-01: d/x}
profiles: {no: {epsilon: [1e-4, 5.e-1], context: &c [512], batch: *c}, null: {<<: {seed: 1}, seed: 0o7}}
"""
    with pytest.raises(BadInputError, match="'profiles.null.seed' is '0o7', not a whole number"):
        read_text(tmp_path, text)
    file = read_text(tmp_path, text.replace("0o7", "12"))
    assert [*file.models] == ["on", "7", "1.10", "2026-01-01"]
    assert file.profiles["no"].epsilon == (0.0001, 0.5)
    assert file.profiles["no"].batch == (512,)
    assert file.profiles["null"].seed == 12
    assert [job.name for job in matrix.jobs(file)][:3] == ["on.no", "on.null", "7.no"]


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    plain = matrix.jobs(read_text(tmp_path, BASE))
    (tmp_path / "jobs.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())
    from effcli.batch import jobs_file

    assert matrix.jobs(jobs_file.read(tmp_path / "jobs.yaml", {})) == plain


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    from effcli.batch import jobs_file

    (tmp_path / "jobs.yaml").write_bytes(b"version: 1\noutput: \xff\n")
    with pytest.raises(BadInputError, match="is not UTF-8 .byte 19.; save it as UTF-8"):
        jobs_file.read(tmp_path / "jobs.yaml", {})
    with pytest.raises(BadInputError, match="no jobs file at .*did you mean 'jobs.yaml'"):
        jobs_file.read(tmp_path / "job.yaml", {})
    with pytest.raises(BadInputError, match="cannot read"):
        jobs_file.read(tmp_path, {})


def test_anchors_that_grow_without_end_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(BadInputError, match="has more than 100,000 values, anchors expanded"):
        read_text(tmp_path, BASE + "\n".join(lines))
    with pytest.raises(BadInputError, match="nested too deeply"):
        read_text(tmp_path, BASE + "workers: " + "[" * 1500 + "]" * 1500)


def test_reading_loads_none_of_the_heavy_packages(tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(BASE + "search: {s: {model: m, passes: [quantize], minimize: tpot}}\n")
    code = (
        "import sys, pathlib; from effcli.batch import jobs_file, matrix, fingerprint, jobs_schema;"
        "matrix.jobs(jobs_file.read(pathlib.Path(sys.argv[1]), {})); jobs_schema.jobs_schema();"
        "print([name for name in ('torch', 'transformers', 'ray', 'optuna', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "jobs.yaml")],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.stdout == "[]\n"
