from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from effcli import dit_tiny
from effcli.batch import fingerprint, machine, matrix
from effcli.batch.fingerprint import Fingerprints, difference
from effcli.batch.model import Job
from effcli.errors import SourceError
from profilers.device import device_name

from .jobs_files import read_text

TEXT = """version: 1
output: runs
models: {m: ./model}
profiles: {q: {only: [kv], text: text.txt}}
recipes:
  w: {passes: [{quantize: {scheme: w4a16}}], calibration: {text: text.txt}, gates: ["ppl<=+3%"], context: 64}
"""


@pytest.fixture
def files(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "text.txt").write_text("some text")
    return tmp_path


def jobs(folder: Path, text: str = TEXT) -> dict[str, Job]:
    return {job.name: job for job in matrix.jobs(read_text(folder, text))}


def taken(folder: Path, text: str = TEXT) -> dict[str, Any]:
    """Return the fingerprints of a file, as a journal gives them back."""
    prints = Fingerprints()
    made: dict[str, Any] = json.loads(json.dumps({name: prints.of(job) for name, job in jobs(folder, text).items()}))
    return made


def test_reading_a_file_twice_gives_equal_fingerprints(files: Path) -> None:
    first, second = taken(files), taken(files)
    assert first == second
    assert all(difference(first[name], second[name]) == "" for name in first)
    source = first["m.w"]["source"]
    assert source["model.safetensors"] == sha256((files / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert set(source) >= {"config.json", "model.safetensors"}
    assert first["m.q"]["texts"] == {str(files / "text.txt"): sha256(b"some text").hexdigest()} == first["m.w"]["texts"]
    assert first["m.w"]["device"]["name"] and first["m.w"]["versions"]["torch"]


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return rewrite


@pytest.mark.parametrize(
    ("change", "only", "said"),
    [
        (
            rewritten("model/model.safetensors", lambda data: data[:-1] + b"!"),
            None,
            "source file 'model.safetensors' ch",
        ),
        (rewritten("model/config.json", lambda data: data + b" "), None, "source file 'config.json' changed"),
        (rewritten("text.txt", lambda data: b"same size"), None, "/text.txt' changed"),
        (lambda folder: (folder / "model" / "vocab.txt").write_text("new"), None, "source file 'vocab.txt' changed"),
        (("w4a16", "w8a16"), "m.w", "recipe 'passes' was "),
        (("w4a16}", "w4a16, group_size: 32}"), "m.w", "'group_size': 32"),
        (("+3%", "+2%"), "m.w", "option 'gates' was ['ppl<=+3%'], is ['ppl<=+2%']"),
        (("context: 64", "context: 128"), "m.w", "option 'context' was 64, is 128"),
        (("context: 64", "seed: 1, context: 64"), "m.w", "recipe 'seed' was 0, is 1"),
        (("[kv]", "[kv, latency]"), "m.q", "option 'only' was ['kv'], is ['kv', 'latency']"),
        (("./model", "{source: ./model, dtype: float32}"), None, "option 'dtype' was 'auto', is 'float32'"),
        (("./model", "{source: ./model, allow_pickle: true}"), None, "option 'allow_pickle' was False, is True"),
    ],
)
def test_what_changed_is_said(files: Path, change: Any, only: str | None, said: str) -> None:
    before = taken(files)
    text = TEXT
    if isinstance(change, tuple):
        assert change[0] in TEXT
        text = TEXT.replace(*change)
    else:
        change(files)
    after = taken(files, text)
    for name in before:
        expected = only in (None, name)
        assert (before[name] != after[name]) is expected
        found = difference(before[name], after[name])
        assert (said in found) is expected
        assert "\n" not in found


def test_versions_and_device_count(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs(files)["m.w"]
    here = Fingerprints().of(job)
    there = Fingerprints(device_class=lambda name: {"type": "cuda", "name": "NVIDIA H100"}).of(job)
    said = difference(here, there)
    assert f"device 'name' was '{here['device']['name']}', is 'NVIDIA H100'" in said and "version" not in said
    monkeypatch.setattr(fingerprint, "installed_versions", lambda: {**here["versions"], "torch": "99.0"})
    fingerprint._versions.cache_clear()
    later = Fingerprints().of(job)
    fingerprint._versions.cache_clear()
    assert difference(here, later) == f"version of 'torch' was '{here['versions']['torch']}', is '99.0'"


def test_devices_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: ())
    here = environment_device_name()
    assert machine.local_device("auto") == machine.local_device("cpu") == {"type": "cpu", "name": here}
    assert machine.local_device("cuda:1") == {"type": "cuda", "name": "not in this machine"}
    assert machine.local_device("mps") == {"type": "mps", "name": "mps"}
    two = (machine.Gpu(0, "0", "A100", 1, 1), machine.Gpu(1, "1", "H100", 1, 1))
    monkeypatch.setattr(machine, "gpus", lambda: two)
    names = {name: machine.local_device(name)["name"] for name in ("auto", "cpu", "cuda", "cuda:1", "cuda:2")}
    assert names == {"auto": "A100", "cpu": here, "cuda": "A100", "cuda:1": "H100", "cuda:2": "not in this machine"}


def environment_device_name() -> str:
    import torch

    return device_name(torch.device("cpu"))


def test_where_and_when_a_job_runs_does_not_count(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    before = taken(files)
    text = TEXT.replace("[{quantize: {scheme: w4a16}}]", "[{name: quantize, parameters: {scheme: w4a16}}]")
    text += "environment: [A_SECRET]\nlimits: {time: 1h, memory: 1GB, retries: 3}\nworkers: 1\n"
    after = taken(files, text)
    assert after == before
    assert "hunter2" not in json.dumps(after)
    job = jobs(files)["m.w"]
    moved = replace(job, name="x", needs=("m.q",), gpus=1.0, labels={"zone": "a"})
    assert Fingerprints().of(moved) == Fingerprints().of(job)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    hashed: list[Path] = []
    real = fingerprint.sha256_each

    def count(paths: Any) -> Any:
        hashed.extend(paths)
        return real(paths)

    monkeypatch.setattr(fingerprint, "sha256_each", count)
    return hashed


def age(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 60,) * 2)


def test_files_are_hashed_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(files)
    hashed = counted(monkeypatch)
    cache = files / "sha256.json"
    prints = Fingerprints(cache)
    made = [prints.of(job) for job in jobs(files).values()]
    assert len(hashed) == len(set(hashed)) >= 3
    hashed.clear()
    again = Fingerprints(cache)
    assert [again.of(job) for job in jobs(files).values()] == made
    assert hashed == []
    os.utime(files / "text.txt")
    (files / "model" / "config.json").write_text((files / "model" / "config.json").read_text() + "\n")
    [again.of(job) for job in jobs(files).values()]
    assert {path.name for path in hashed} == {"text.txt", "config.json"}
    for damaged in ("", "[]", '{"a": 1}', '{"a": [1, 2, 3, 4]}'):
        cache.write_text(damaged)
        assert [Fingerprints(cache).of(job) for job in jobs(files).values()][0]["texts"] == made[0]["texts"]


def test_a_change_right_after_another_is_seen(files: Path) -> None:
    prints, job = Fingerprints(), jobs(files)["m.q"]
    found = set()
    for number in range(10):
        (files / "text.txt").write_text(f"text {number}")
        found.add(prints.of(job)["texts"][str(files / "text.txt")])
    assert len(found) == 10


def test_a_hub_model_is_known_by_its_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    job = Job("x", "profile", "some-org/some-model", "x", "q", {})
    unknown = Fingerprints().of(job)
    assert unknown["source"] == {"some-org/some-model@main": None}

    def fetched(commit: str) -> Mapping[str, Any]:
        repository = tmp_path / "models--some-org--some-model"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        return Fingerprints().of(job)

    first, second = fetched("1" * 40), fetched("2" * 40)
    assert first["source"] == {"some-org/some-model@main": "1" * 40}
    assert difference(unknown, first) == difference(first, unknown) == ""
    assert "source file 'some-org/some-model@main' changed" in difference(first, second)
    pinned = Fingerprints().of(replace(job, revision="1" * 40))
    assert pinned["source"] == {f"some-org/some-model@{'1' * 40}": "1" * 40}


def test_other_kinds_of_sources(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints, job = Fingerprints(), jobs(files)["m.q"]
    built_in = prints.of(replace(job, model="smollm2-135m"))["source"]
    assert [*built_in] == ["smollm2-135m"]
    made = prints.of(replace(job, model="", model_from="other"))["source"]
    assert [*made] == ["output of other"]
    called = Job("c", "call", "", "", "", {"function": "a:b", "arguments": {"n": 1}})
    assert prints.of(called)["options"]["arguments"] == {"n": 1}
    shipped = prints.of(replace(job, model=dit_tiny.NAME))
    assert "transformer/config.json" in shipped["source"] and "diffusers" in shipped["versions"]

    (files / "model" / "model.safetensors").unlink()
    counting = replace(job, settings={"config_only": True})
    assert "config.json" in prints.of(counting)["source"]
    with pytest.raises(SourceError, match="no weights"):
        prints.of(job)
    with pytest.raises(SourceError, match="no file or folder './gone'"):
        prints.of(replace(job, model="./gone"))
    with pytest.raises(SourceError, match="cannot read .*gone.txt"):
        prints.of(replace(counting, settings={"config_only": True, "text": str(files / "gone.txt")}))


def test_a_pass_that_makes_its_source_depends_on_the_config_and_its_text(files: Path) -> None:
    (files / "model" / "model.safetensors").unlink()
    text = TEXT.replace(
        "[{quantize: {scheme: w4a16}}]",
        "[{loop: {blocks: 1, loops: 2, from_scratch: true, train_text: text.txt, train_tokens: 5000}}]",
    ).replace("profiles:", "exclude: [{profile: q}]\nprofiles:")
    (files / "text.txt").write_text("some text " * 2000)
    before = taken(files, text)["m.w"]
    assert before["recipe"]["passes"][0]["parameters"]["train_text"] == str(files / "text.txt")
    assert str(files / "text.txt") in before["texts"]
    (files / "text.txt").write_text("other text " * 2000)
    assert "text.txt' changed" in difference(before, taken(files, text)["m.w"])
