"""Folders of ``effcli export`` are opened, checked and refused; ``effcli.load`` and ``effcli profile`` take them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import effcli
from effcli import loading, recipes, sources
from effcli.checkpoint_files import ONNX_EXPORT
from effcli.errors import BadInputError, SourceError
from effcli.export import opening
from effcli.export.generating import OnnxCausalLM

if TYPE_CHECKING:
    from tests.conftest import Run
    from tests.effcli.export.conftest import Exported


@pytest.fixture
def copied(text_export: Exported, tmp_path: Path) -> Path:
    """Return a copy of an export, to be damaged."""
    return Path(shutil.copytree(text_export.folder, tmp_path / "copied"))


def test_loads_as_a_pair_and_generates_by_itself(text_export: Exported) -> None:
    loaded = effcli.load(text_export.folder, device="cpu")
    model, tokenizer = loaded
    assert isinstance(model, OnnxCausalLM)
    assert tokenizer is not None
    prompt = "what follows this?"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = text_export.model.generate(ids, **options)
    assert torch.equal(loaded.generate(ids, **options), expected)
    assert torch.equal(loaded.generate({"input_ids": ids}, **options), expected)
    assert torch.equal(loaded.generate(input_ids=ids, **options), expected)
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert loaded.generate(prompt, **options) == text


def test_a_torch_model_that_is_loaded_generates_from_text_too(tiny_folder: Path) -> None:
    loaded = effcli.load(tiny_folder, device="cpu")
    found = loaded.generate("abc", max_new_tokens=4, do_sample=False)
    ids = loaded.tokenizer("abc", return_tensors="pt")["input_ids"]
    expected = loaded.model.generate(ids, max_new_tokens=4, do_sample=False)[0, 3:]
    assert found == loaded.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_text_needs_a_tokenizer(text_export: Exported) -> None:
    loaded = effcli.load(text_export.folder, device="cpu")._replace(tokenizer=None)
    with pytest.raises(BadInputError, match="no tokenizer"):
        loaded.generate("text")


def test_counts_what_torch_counts(text_export: Exported, copied: Path) -> None:
    found = opening.open(text_export.folder, device="cpu").weight_size
    parameters = sum(tensor.numel() for tensor in text_export.model.parameters())
    assert found.parameters == parameters
    (copied / "report.json").unlink()
    bare = opening.open(copied, device="cpu").weight_size
    assert bare.parameters == pytest.approx(parameters, rel=0.02)
    assert bare.bytes == found.bytes == pytest.approx(4 * parameters, rel=0.02)


def test_threads_are_torchs_and_can_be_chosen(text_export: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    from effcli.export import session

    asked = []
    inner = session._session

    def kept(path: Path, device: torch.device, threads: int, fold: bool) -> Any:
        asked.append(threads)
        return inner(path, device, threads, fold)

    monkeypatch.setattr(session, "_session", kept)
    opening.open(text_export.folder, device="cpu")
    opening.open(text_export.folder, device="cpu", threads=2)
    assert asked == [torch.get_num_threads(), 2]


def test_verifies_every_file(copied: Path) -> None:
    opening.open(copied, device="cpu", verify=True)
    data = bytearray((copied / "weights.bin").read_bytes())
    data[-1] ^= 1
    (copied / "weights.bin").write_bytes(data)
    opening.open(copied, device="cpu")
    with pytest.raises(SourceError, match="weights.bin' has sha256"):
        opening.open(copied, device="cpu", verify=True)


def _described(folder: Path, **changes: Any) -> None:
    path = folder / ONNX_EXPORT
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / ONNX_EXPORT).unlink(), "is no export"),
        (lambda folder: (folder / ONNX_EXPORT).write_text("{"), "not valid JSON"),
        (lambda folder: _described(folder, format="effcli.onnx/9"), "effcli.onnx/9.*update effcli"),
        (lambda folder: _described(folder, format="other"), "format 'other'"),
        (lambda folder: _described(folder, graphs=...), "damaged"),
        (lambda folder: _described(folder, graphs={"model": "decode.onnx"}), "no graph 'decode'"),
        (lambda folder: _described(folder, weights="../weights.bin"), "not in its folder"),
        (lambda folder: (folder / "weights.bin").unlink(), "lacks 'weights.bin'"),
        (lambda folder: (folder / "decode.onnx").write_bytes(b"\0"), "decode.onnx"),
    ],
    ids=["none", "json", "newer", "other", "no-graphs", "graphs", "outside", "weights", "graph"],
)
def test_refuses_what_is_damaged_in_one_line(copied: Path, change: Any, message: str) -> None:
    change(copied)
    with pytest.raises(SourceError, match=message) as caught:
        opening.open(copied, device="cpu")
    assert "\n" not in str(caught.value)


def test_says_what_to_install(text_export: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(BadInputError, match=r"pip install 'effcli\[onnx\]'"):
        opening.open(text_export.folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "bfloat16"}, "exported in float32"), ({"compile": True}, "compile"), ({"kernels": "plain"}, "kernels")],
)
def test_load_refuses_what_means_nothing(text_export: Exported, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        effcli.load(text_export.folder, **options)


def test_profile_times_an_export_with_the_same_instruments(
    text_export: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profilers.peaks.measure_peaks", lambda *_: None)  # takes seconds, and is tested elsewhere
    report = effcli.profile(text_export.folder, context=(24,), batch=(1, 2), device="cpu").to_dict()
    assert list(report["profiles"]) == ["latency", "energy"]
    assert "ONNX Runtime" in report["skipped"]["kv"]
    latency = report["profiles"]["latency"]
    assert latency["threads"] == torch.get_num_threads()
    assert latency["attention_implementation"] == "onnxruntime"
    for point in latency["points"]:
        assert 0 < point["tpot_seconds"]["p50"] <= point["tpot_seconds"]["p99"]
        assert point["decode_context"][0] == 24 + 2
    model = report["model"]
    assert (model["kind"], model["architecture"], model["layers"]) == ("onnx", "LlamaForCausalLM", 1)
    version = report["environment"]["versions"]["onnxruntime"]
    assert f"runs on ONNX Runtime {version}, CPUExecutionProvider" in model["notes"][0]
    assert model["notes"][1].startswith("exported from ")
    for name in ("kv", "intensity"):
        with pytest.raises(BadInputError, match=f"'{name}' needs the layers"):
            effcli.profile(text_export.folder, only=(name,))


def test_profile_times_one_forward_of_an_encoder(encoder_export: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profilers.peaks.measure_peaks", lambda *_: None)
    report = effcli.profile(encoder_export.folder, only=("latency",), context=(16,), device="cpu")
    (point,) = report.to_dict()["profiles"]["latency"]["points"]
    assert point["ttft_seconds"]["p50"] > 0
    assert point["tpot_seconds"] is None and point["tokens_per_second"] is None
    assert "does not generate" in point["tpot_reason"]


def test_the_command_profiles_an_export(text_export: Exported, effcli: Run) -> None:
    done = effcli("profile", text_export.folder, "--only", "latency", "--context", "16")
    assert done.returncode == 0, done.stderr
    assert "CPUExecutionProvider" in done.stdout


def test_what_needs_the_torch_model_says_what_to_give(text_export: Exported, tmp_path: Path) -> None:
    named = json.loads((text_export.folder / ONNX_EXPORT).read_text())["source"]["spec"]
    recipe = recipes.from_mapping({"version": 1, "passes": [{"quantize": {"scheme": "w8a16"}}]})
    folder = str(text_export.folder)
    for refused in (
        lambda: loading.load(sources.resolve(folder)),
        lambda: effcli.optimize(folder, recipe, tmp_path / "out"),
        lambda: effcli.profile(folder, config_only=True),
    ):
        with pytest.raises(BadInputError, match="ONNX export") as caught:
            refused()
        assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match=re.escape(named)):
        loading.load(sources.resolve(folder))
