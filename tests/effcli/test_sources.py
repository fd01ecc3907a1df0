import json
import subprocess
import sys
from pathlib import Path

import pytest

from effcli import sources
from effcli.errors import SourceError
from effcli.sources import check_seen
from tests.effcli import tiny_files


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    tiny_files.save(tmp_path / "model")
    return tmp_path / "model"


def refusal(spec, **options) -> str:
    with pytest.raises(SourceError) as caught:
        sources.resolve(str(spec), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_import_stays_light():
    code = "import sys, effcli.sources, effcli.loading; print('torch' in sys.modules, 'transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]


def test_folder(folder):
    assert sources.resolve(str(folder)) == sources.Source(str(folder), "folder", folder)


def test_folder_of_shards(tmp_path):
    tiny_files.save(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert sources.resolve(str(tmp_path)).kind == "folder"


def test_path_wins_over_built_in_name(folder, monkeypatch):
    folder.rename(folder.parent / "smollm2-135m")
    monkeypatch.chdir(folder.parent)
    assert sources.resolve("smollm2-135m").kind == "folder"


def test_config_file(folder):
    config = folder / "config.json"
    source = sources.resolve(str(config))
    assert (source.kind, source.path) == ("config", config)
    assert "without weights" in source.notes[0]


def test_config_only_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert sources.resolve(str(folder), config_only=True).kind == "folder"
    assert "--config-only" in refusal(folder)


def test_gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_files.write_gguf(path)
    assert sources.resolve(str(path)) == sources.Source(str(path), "gguf", path)
    path.write_bytes(b"not a model")
    assert "not a GGUF file" in refusal(path)


def test_diffusers_folder(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1"}')
    source = sources.resolve(str(tmp_path))
    assert source.kind == "diffusers"
    assert "a local folder" in source.notes[0]
    assert sources.resolve(str(tmp_path / "model_index.json")).kind == "diffusers"


def test_truncated_safetensors(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for kept in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:kept])
        message = refusal(folder)
        assert str(weights) in message
        assert "truncated or damaged" in message
    weights.write_bytes(whole + b"\0")
    assert str(weights) in refusal(folder)
    weights.write_bytes(whole)
    assert sources.resolve(str(folder)).kind == "folder"


def test_git_lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(folder)


def test_missing_shard_is_named(tmp_path):
    tiny_files.save(tmp_path, max_shard_size="20KB")
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    first.unlink()
    assert first.name in refusal(tmp_path)


def test_broken_index(tmp_path):
    tiny_files.save(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in refusal(tmp_path)


def test_pickles_are_refused_unless_allowed(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "--allow-pickle" in message
    assert sources.resolve(str(folder), allow_pickle=True).kind == "folder"


def test_stray_pickle_beside_safetensors_is_ignored(folder):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    assert sources.resolve(str(folder)).kind == "folder"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_pickle_under_another_name(folder, suffix):
    (folder / "model.safetensors").rename(folder / f"weights{suffix}")
    assert "--allow-pickle" in refusal(folder)
    assert "rename it" in refusal(folder, allow_pickle=True)


def test_safetensors_under_another_name(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "rename it to 'model.safetensors'" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON (line 1"), ("[]", "not an object"), ("\xff", "config")]
)
def test_broken_config(folder, text, said):
    (folder / "config.json").write_text(text, encoding="latin-1")
    message = refusal(folder)
    assert said in message
    assert str(folder / "config.json") in message


def test_folder_without_config(tmp_path):
    assert f"no config.json in folder '{tmp_path}'" in refusal(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "a.gguf" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(tmp_path)


def test_folder_above_the_model(folder):
    assert str(folder) in refusal(folder.parent)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.txt"])
def test_file_that_is_no_model(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_json_that_is_no_config(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    assert "no model_type" in refusal(tmp_path / "x.json")


def test_missing_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert f"did you mean '{folder}'?" in refusal(folder.parent / "modle")
    assert "no file or folder './modle'" in refusal("./modle")
    assert "no file or folder 'modle.gguf'; check the path" in refusal("modle.gguf")
    assert "there is no folder" in refusal(folder / "none" / "deeper")


def test_file_that_cannot_be_read(folder, monkeypatch):
    def closed(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(sources.Path, "open", closed)  # root may read anything, so modes prove nothing
    monkeypatch.setattr(sources.Path, "read_text", closed)
    assert "Permission denied" in refusal(folder)
    (folder / "x.gguf").touch()
    assert "Permission denied" in refusal(folder / "x.gguf")
    assert "cannot read" in refusal("x" * 5000)


def test_empty_name():
    assert "empty" in refusal(" ")


def test_typo_of_a_built_in_name():
    assert "did you mean 'smollm2-135m'?" in refusal("smolm2-135m")


def test_not_even_a_hub_id():
    assert "no hub id" in refusal("what is this?")
    assert "no hub id" in refusal("org/na--me")


@pytest.mark.parametrize("spec", ["gpt2", "some-org/some-model"])
def test_hub_id_offline(spec):
    message = refusal(spec)
    assert f"'{spec}'" in message
    assert "HF_HUB_OFFLINE" in message


def test_revision_is_for_hub_ids(folder):
    assert "--revision" in refusal(folder, revision="main")
    assert "--revision" in refusal("smollm2-135m", revision="main")


def test_a_node_that_does_not_see_a_model_names_its_path(tmp_path: Path) -> None:
    check_seen(tmp_path)
    with pytest.raises(SourceError, match=f"'{tmp_path}/gone' is not on .* into a folder that all nodes share"):
        check_seen(tmp_path / "gone")
