"""``effcli optimize --export onnx``: what is published beside the checkpoint, its figures, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("onnxruntime")

import effcli
from effcli import onnx_stage, pipeline, pushing, signature
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError, GateFailedError, SourceError
from effcli.export import job as exports
from effcli.export import opening
from effcli.pipeline import DryRun, optimize
from effcli.recipes import Recipe, from_mapping
from effcli.staging import folder_for, open_staging
from effcli.verifying import verify

QUANTIZE = {"quantize": {"scheme": "w4a16", "group_size": 16, "method": "rtn"}}
OPTIONS: dict[str, Any] = {"device": "cpu", "context": 32, "export": "onnx"}


def recipe(**more: Any) -> Recipe:
    return from_mapping({"version": 1, "passes": [QUANTIZE], "evaluation": {"tokens": 512, "context": 64}, **more})


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a checkpoint with its export, and the report.

    It takes three runs: a gate stops the first, which exports nothing; the export of the second, which goes on with it,
    is further from torch than is let pass.
    """
    out = tmp_path_factory.mktemp("onnx") / "out"
    with pytest.raises(GateFailedError, match="size of the weights"):
        optimize(str(tiny_folder), recipe(gates=["size<=0.1x"]), out, **{**OPTIONS, "export": None})
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(exports.TOLERANCES, "float32", 1e-12)
        with pytest.raises(GateFailedError, match="differ from torch by .* at most 1e-12 is let pass") as refused:
            optimize(str(tiny_folder), recipe(), out, resume=True, **OPTIONS)
    assert refused.value.exit_code == 3
    assert f"'{folder_for(out)}': run again with --resume and without --export" in str(refused.value)
    assert not out.exists() and (folder_for(out) / "after" / "after.result.json").is_file()
    return out, optimize(str(tiny_folder), recipe(), out, resume=True, **OPTIONS)


@pytest.fixture
def copy(made: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "out"))


@pytest.mark.slow
def test_a_resumed_run_that_asks_for_the_export_does_only_that(made: tuple[Path, Any]) -> None:
    out, report = made
    first = json.loads(out.with_name("out.failed.json").read_text())
    assert first["after_onnx"] is None
    assert (report.before["created"], report.after["created"]) == (
        first["before"]["created"],
        first["after"]["created"],
    )
    seconds = [{stage["stage"]: stage["seconds"] for stage in data["stages"]} for data in (first, report.to_dict())]
    for stage in ("before", "pass: quantize", "after"):
        assert seconds[0][stage] == seconds[1][stage]
    assert {"export: onnx", "after-onnx", "after-onnx: quality"} <= seconds[1].keys() - seconds[0].keys()


@pytest.mark.slow
def test_figures_are_those_of_an_own_forward_pass_of_the_export(made: tuple[Path, Any], tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from effcli.evaluation import evaluation_windows

    out, report = made
    found, chosen = report.after_onnx, recipe()
    original = AutoModelForCausalLM.from_pretrained(tiny_folder)
    windows = evaluation_windows(
        AutoTokenizer.from_pretrained(tiny_folder), original.config.vocab_size, chosen.evaluation, chosen.calibration, 0
    ).windows
    export = opening.open(out / "onnx", device="cpu")
    with torch.inference_mode():
        ours, theirs = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in (export, original))
    loss = -ours.gather(-1, windows[:, 1:, None]).mean().item()
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert found.quality["perplexity"]["after"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.quality["kl"]["mean"] == pytest.approx(kl, rel=1e-2)  # of the order of float32's rounding
    assert found.quality["top1_agreement"] == pytest.approx(
        (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    )
    assert found.quality["perplexity"]["before"] == report.quality["perplexity"]["before"]
    assert 0 < found.max_absolute_error < 1e-4
    assert (found.provider, found.quantization, found.dtype) == ("CPUExecutionProvider", "int4", "float32")
    files = ("prefill.onnx", "decode.onnx", "weights.bin")
    assert found.file_bytes == sum((out / "onnx" / name).stat().st_size for name in files)


@pytest.mark.slow
def test_only_what_was_measured_on_onnx_runtime_is_in_its_profile(made: tuple[Path, Any]) -> None:
    _, report = made
    profile = report.after_onnx.profile
    (point,) = profile["profiles"]["latency"]["points"]
    assert (point["batch"], point["context"]) == (1, 32)
    assert point["peak_memory_bytes"] > 0 and point["ttft_seconds"]["p50"] > 0 and point["tpot_seconds"]["p50"] > 0
    assert set(profile["profiles"]) <= {"latency", "energy"}
    assert {"intensity", "kv", "sinks"} <= set(profile["skipped"])
    assert profile["model"]["kind"] == "onnx" and "onnxruntime" in profile["environment"]["versions"]


@pytest.mark.slow
def test_the_report_is_of_its_schema(made: tuple[Path, Any]) -> None:
    import jsonschema

    from effcli.reports.schema import optimize_schema

    data = json.loads((made[0] / "report.json").read_text())
    jsonschema.validate(data, optimize_schema())
    assert data["after_onnx"]["folder"] == "onnx"


@pytest.mark.slow
def test_the_published_folder_holds_and_is_pushed_whole(made: tuple[Path, Any]) -> None:
    out, _ = made
    found = verify(out)
    assert any(check.startswith("onnx: ") for check in found.checks)
    assert verify(out / "onnx").checks
    sums = signature.read(out)
    assert sums["onnx/weights.bin"] == sha256_of(out / "onnx" / "weights.bin")
    planned = pushing.push(out, "someone/model")
    assert {"onnx/weights.bin", "onnx/decode.onnx", "model.safetensors"} <= {name for name, _ in planned.files}
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.failed.html", "out.failed.json"]


@pytest.mark.slow
def test_the_export_generates_what_the_checkpoint_does(made: tuple[Path, Any]) -> None:
    out, _ = made
    ids = torch.arange(4, 20)[None]
    found = [
        effcli.load(folder, device="cpu").generate(ids, max_new_tokens=6, do_sample=False)
        for folder in (out, out / "onnx")
    ]
    assert torch.equal(*found)


def _flip(folder: Path) -> None:
    path = folder / "onnx" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))


def _sign(folder: Path) -> None:
    """Make all sums anew, as someone does who changes a file and knows of them."""
    record = json.loads((folder / "onnx" / "effcli-onnx.json").read_text())
    record["files"]["weights.bin"] = sha256_of(folder / "onnx" / "weights.bin")
    (folder / "onnx" / "effcli-onnx.json").write_text(json.dumps(record))
    signature.write(folder / "onnx")
    signature.write(folder)


@pytest.mark.slow
def test_a_changed_byte_of_the_export_is_found_even_under_new_sums(copy: Path) -> None:
    _flip(copy)
    with pytest.raises(SourceError, match=r"onnx/weights.bin' has sha256"):
        verify(copy)
    _sign(copy)
    with pytest.raises(SourceError, match="not what was measured"):
        verify(copy)


@pytest.mark.slow
def test_an_export_that_the_report_does_not_know_is_found_and_so_is_one_that_is_gone(copy: Path) -> None:
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps({**report, "after_onnx": None}))
    signature.write(copy)
    with pytest.raises(SourceError, match="do not belong together"):
        verify(copy)
    (copy / "report.json").write_text(json.dumps(report))
    shutil.rmtree(copy / "onnx")
    signature.write(copy)
    with pytest.raises(SourceError, match="do not belong together"):
        verify(copy)


def test_an_export_made_by_other_packages_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = SimpleNamespace(options=SimpleNamespace(export="onnx"))
    with open_staging(tmp_path / "out", {}, resume=False, force=False) as staging:
        for name in ("after", "onnx", "after-onnx"):
            staging.begin(name)
            staging.finish(name, {"made_with": onnx_stage.made_with(job)})
        onnx_stage.forget_other(job, staging)
        assert staging.finished("onnx") is not None
        monkeypatch.setattr(exports, "installed_version", lambda package: "other")
        onnx_stage.forget_other(job, staging)
        assert [staging.finished(name) is None for name in ("after", "onnx", "after-onnx")] == [False, True, True]


def test_a_dry_run_counts_the_export(tiny_folder: Path, tmp_path: Path) -> None:
    plain, said = (
        optimize(str(tiny_folder), recipe(), tmp_path / "out", **{**OPTIONS, "export": export}, dry_run=True)
        for export in (None, "onnx")
    )
    assert isinstance(plain, DryRun) and isinstance(said, DryRun)
    tensors = load_file(tiny_folder / "model.safetensors").values()
    assert said.export_bytes >= sum(4 * tensor.numel() for tensor in tensors)
    assert said.disk_needed_bytes == plain.disk_needed_bytes + said.export_bytes
    (line,) = (line for line in said.lines() if line.startswith("export: "))
    assert str(tmp_path / "out" / "onnx") in line and "more on the disk" in line
    assert not any(line.startswith("export") for line in plain.lines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"export": "onxx"}, r"--export 'onxx' is not known \(did you mean 'onnx'\?\); known: onnx"),
        ({"passes": ["kv-pq"]}, {}, "made by the pass kv-pq"),
        ({"passes": [QUANTIZE, "kv-pq"]}, {}, "made by the pass kv-pq"),
        ({"passes": [{"quantize": {"scheme": "w8a8"}}]}, {}, "cannot keep quantize:scheme=w8a8; it keeps"),
        ({"passes": [{"quantize": {**QUANTIZE["quantize"], "kv_cache": "fp8"}}]}, {}, "kv_cache=fp8"),
        ({}, {"dtype": "bfloat16"}, "bfloat16 cannot run on a CPU"),
    ],
    ids=["format", "kv-pq", "chain", "w8a8", "fp8-cache", "dtype"],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_measured(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(pipeline.Run, "run", lambda self: pytest.fail("measured"))
    with pytest.raises(BadInputError, match=message):
        optimize(str(tiny_folder), recipe(**change), tmp_path / "out", **{**OPTIONS, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named_with_its_remedy(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "onnxruntime" else find(name, *more)
    )
    with pytest.raises(BadInputError, match=r"--export onnx needs onnxruntime; pip install 'effcli\[onnx\]'"):
        optimize(str(tiny_folder), recipe(), tmp_path / "out", **OPTIONS, dry_run=True)


def test_a_pipeline_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(
        BadInputError, match="takes a language model and .* is a diffusers pipeline; leave --export out"
    ):
        optimize(str(folder), recipe(), tmp_path / "out", **OPTIONS)
