import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from effcli import checkpoint_files
from effcli.checkpoint_files import bytes_when_loaded, check_safetensors, check_trust, fingerprint, stored_dtype
from effcli.errors import SourceError


def test_elements_and_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(
        {
            "a": torch.zeros(3, 5),
            "b": torch.zeros(7, dtype=torch.bfloat16),
            "c": torch.zeros(11, dtype=torch.int64),
            "d": torch.zeros((), dtype=torch.float32),
            "e": torch.zeros(13, dtype=torch.uint8),
        },
        path,
    )
    elements = check_safetensors([path])
    assert elements == {"F32": 16, "BF16": 7, "I64": 11, "U8": 13}
    assert bytes_when_loaded(elements, 2) == 2 * 16 + 2 * 7 + 8 * 11 + 13
    assert bytes_when_loaded(elements, 4, keep_stored=True) == 4 * 16 + 2 * 7 + 8 * 11 + 13
    assert stored_dtype(elements) == "float32"


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64, torch.int8, torch.bool, torch.int32]
)
def test_every_stored_type_has_its_size(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10, dtype=dtype)}, path)
    assert bytes_when_loaded(check_safetensors([path]), 99, keep_stored=True) == 10 * dtype.itemsize


def test_fingerprint_sees_any_change_and_nothing_else(tmp_path):
    files = [tmp_path / "model-00002.safetensors", tmp_path / "model-00001.safetensors"]
    files[0].write_bytes(bytes(1000))
    files[1].write_bytes(b"abc")
    whole = fingerprint(files)
    assert whole == fingerprint(reversed(files))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert whole == fingerprint([shutil.copy(path, elsewhere / path.name) for path in files])
    for index in (0, 500, 999):
        data = bytearray(1000)
        data[index] = 1
        files[0].write_bytes(data)
        assert fingerprint(files) != whole
    files[0].write_bytes(bytes(1000))
    assert fingerprint(files) == whole
    assert fingerprint(files[:1]) != whole


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_fingerprint_is_what_the_docs_say(tmp_path):
    files = [tmp_path / name for name in ("model-00001.safetensors", "model-00002.safetensors")]
    for path in files:
        path.write_bytes(path.name.encode())
    command = "LC_ALL=C sha256sum model*.safetensors | sha256sum"
    shown = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.split()[0] == fingerprint(files)


@pytest.mark.parametrize("auto_map", [{"AutoConfig": "a.B"}, {"AutoTokenizer": ["a.B", None]}])
def test_trust(auto_map):
    known, unknown = {"model_type": "llama"}, {"model_type": "own_thing"}
    assert check_trust(known, "x", trust_remote_code=False) is None
    assert "not run" in check_trust(known | {"auto_map": auto_map}, "x", trust_remote_code=False)
    with pytest.raises(SourceError, match=r"a\.B.*--trust-remote-code"):
        check_trust(unknown | {"auto_map": auto_map}, "x", trust_remote_code=False)
    assert "runs the code" in check_trust(unknown | {"auto_map": auto_map}, "x", trust_remote_code=True)


def test_unknown_architecture_names_type_and_version():
    import transformers

    with pytest.raises(SourceError) as caught:
        check_trust({"model_type": "lama"}, "'x'", trust_remote_code=False)
    assert "'lama'" in str(caught.value)
    assert "llama" in str(caught.value)
    assert transformers.__version__ in str(caught.value)
    with pytest.raises(SourceError, match="no model_type"):
        check_trust({}, "'x'", trust_remote_code=False)


def test_unreadable_json(tmp_path):
    with pytest.raises(SourceError, match="cannot read"):
        checkpoint_files.read_json(tmp_path / "none.json")
