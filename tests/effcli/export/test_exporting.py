"""``effcli export``: what is written, that it computes what torch does, and that nothing else is published."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError, GateFailedError, NoRoomError
from effcli.export import exporting
from effcli.export.exporting import export
from effcli.export.graphs import NotExportableError
from effcli.export.job import DryRun
from effcli.export.report import ExportReport
from effcli.reports.model import read_report
from effcli.reports.render import render
from effcli.reports.schema import export_schema
from effcli.reports.verdict import verdict
from tests.conftest import Run
from tests.effcli.export import small
from tests.effcli.export.conftest import Exported

CPU = ["CPUExecutionProvider"]


def session(folder: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=CPU)


def inputs(batch: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch whose first sequence starts with padding."""
    torch.manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.randint(3, 90, (batch, length)), "attention_mask": mask, "position_ids": positions}


def arrays(feed: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in feed.items()}


def test_what_is_written_is_named_in_its_record(text_export: Exported) -> None:
    folder = text_export.folder
    record = json.loads((folder / "effcli-onnx.json").read_text())
    assert record["format"] == "effcli.onnx/1"
    assert record["graphs"] == {"prefill": "prefill.onnx", "decode": "decode.onnx"}
    assert (record["task"], record["opset"], record["dtype"]) == ("text-generation", 23, "float32")
    assert record["quantization"] is None
    assert record["files"] == {
        path.name: sha256_of(path) for path in folder.iterdir() if path.name not in ("effcli-onnx.json", "SHA256SUMS")
    }
    assert {"config.json", "generation_config.json", "tokenizer.json", "weights.bin"} <= set(record["files"])
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_names_and_sizes_are_those_that_runtimes_expect(text_export: Exported) -> None:
    prefill, decode = (session(text_export.folder, name) for name in ("prefill", "decode"))
    shapes = {item.name: item.shape for item in decode.get_inputs()}
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        "past_key_values.0.key": ["batch", 2, "past", 8],
        "past_key_values.0.value": ["batch", 2, "past", 8],
    }
    assert [item.name for item in prefill.get_inputs()] == ["input_ids", "attention_mask", "position_ids"]
    for graph in (prefill, decode):
        assert [item.name for item in graph.get_outputs()] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.parametrize(("batch", "length", "padding"), [(1, 1, 0), (1, 57, 0), (3, 8, 0), (2, 33, 5)])
def test_prefill_gives_torchs_logits(text_export: Exported, batch: int, length: int, padding: int) -> None:
    feed = inputs(batch, length, padding)
    found = session(text_export.folder, "prefill").run(["logits"], arrays(feed))[0]
    with torch.inference_mode():
        expected = text_export.model(**feed).logits.numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, padding:], expected[:, padding:], atol=1e-5)


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 4)])
def test_decode_goes_on_from_any_cache(text_export: Exported, batch: int, padding: int) -> None:
    feed = inputs(batch, 20, padding)
    with torch.inference_mode():
        expected = text_export.model(**feed).logits.numpy()
    prefill, decode = (session(text_export.folder, name) for name in ("prefill", "decode"))
    present = prefill.run(None, arrays({name: tensor[:, :11] for name, tensor in feed.items()}))[1:]
    for first, last in ((11, 12), (12, 13), (13, 19), (19, 20)):
        past = {f"past_key_values.0.{part}": value for part, value in zip(("key", "value"), present, strict=True)}
        part = {name: tensor[:, first:last] for name, tensor in feed.items()}
        part["attention_mask"] = feed["attention_mask"][:, :last]
        logits, *present = decode.run(None, arrays(part) | past)
        np.testing.assert_allclose(logits, expected[:, first:last], atol=1e-5)
    assert present[0].shape == (batch, 2, 20, 8)


def test_decode_takes_a_prompt_with_an_empty_cache(text_export: Exported) -> None:
    feed = inputs(2, 12, 3)
    past = {f"past_key_values.0.{part}": np.zeros((2, 2, 0, 8), np.float32) for part in ("key", "value")}
    decode, prefill = (session(text_export.folder, name) for name in ("decode", "prefill"))
    found, expected = decode.run(None, arrays(feed) | past), prefill.run(None, arrays(feed))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_graphs_share_each_weight_once(text_export: Exported) -> None:
    folder, report = text_export.folder, text_export.report
    weights = sum(parameter.nbytes for parameter in text_export.model.parameters())  # tied: the embedding once
    assert report.weight_bytes == weights
    assert (folder / "weights.bin").stat().st_size <= 1.02 * weights
    places: list[dict[str, tuple[str, str]]] = []
    for name in ("prefill", "decode"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        stored = {item.name: {entry.key: entry.value for entry in item.external_data} for item in graph.initializer}
        places.append({key: (value["offset"], value["length"]) for key, value in stored.items() if value})
        assert {value["location"] for value in stored.values() if value} == {"weights.bin"}
    assert places[0] == places[1]
    assert len(set(places[0].values())) == len(places[0]) >= 8


def test_the_report_says_how_far_from_torch_and_how_fast(text_export: Exported) -> None:
    report = text_export.report
    assert [item.phase for item in report.agreement] == ["prefill", "decode", "padded batch"]
    assert 0 < report.max_absolute_error < 1e-4
    assert all(item.top1_agreement == 1 for item in report.agreement)
    assert report.speed is not None
    assert report.speed.onnx_tpot_seconds
    assert report.provider == "CPUExecutionProvider"
    saved = read_report(text_export.folder)
    assert saved["schema"] == "effcli.export/1"
    assert "within" in verdict(saved)[0]
    assert "1e-" in verdict(saved)[0] or "0.0" in verdict(saved)[0]
    jsonschema.Draft202012Validator(export_schema()).validate(saved)


@pytest.mark.parametrize("kind", ["json", "markdown", "html", "human"])
def test_the_report_renders(text_export: Exported, kind: str) -> None:
    from rich.console import Console

    saved = read_report(text_export.folder)
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    text = render(saved, kind, console=console) if kind == "human" else render(saved, kind)
    console.file.close()
    text = text or console.export_text()
    assert "prefill" in text
    assert "opset" in text


def test_a_target_that_is_there_is_left(text_export: Exported) -> None:
    source = text_export.folder.parent / "source"
    with pytest.raises(BadInputError, match="exists; add --force"):
        export(str(source), text_export.folder)
    assert (text_export.folder / "decode.onnx").is_file()


def test_an_export_is_not_exported_again(text_export: Exported, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is an ONNX export already"):
        export(str(text_export.folder), tmp_path / "out")


def test_a_dry_run_reads_no_weights(text_export: Exported, tmp_path: Path) -> None:
    found = export(str(text_export.folder.parent / "source"), tmp_path / "out", dry_run=True)
    assert isinstance(found, DryRun)
    assert "prefill.onnx, decode.onnx" in found.lines()[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onix"}, r"--format 'onix' is not known \(did you mean 'onnx'\?\)"),
        ({"task": "text-generatoin"}, r"--task 'text-generatoin' is not known \(did you mean 'text-generation'\?\)"),
        ({"opset": 17}, "--opset 17 cannot be written; the exporter knows 18 to 23"),
        ({"tolerance": 0.0}, "--tolerance 0.0 lets nothing pass"),
        ({"dtype": "bfloat16", "device": "cpu"}, "--dtype bfloat16 cannot run on a CPU"),
    ],
)
def test_wrong_options_name_the_value(
    text_export: Exported, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        export(str(text_export.folder.parent / "source"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_gives_torchs_outputs(encoder_export: Exported) -> None:
    assert encoder_export.report.task == "feature-extraction"
    feed = inputs(2, 9)
    del feed["position_ids"]
    feed["attention_mask"][1, 6:] = 0
    feed["token_type_ids"] = torch.zeros_like(feed["input_ids"])
    graph = session(encoder_export.folder, "model")
    names = [item.name for item in graph.get_outputs()]
    found = dict(zip(names, graph.run(None, arrays(feed)), strict=True))
    with torch.inference_mode():
        expected = encoder_export.model(**feed)
    np.testing.assert_allclose(found["last_hidden_state"][1, :6], expected.last_hidden_state[1, :6].numpy(), atol=1e-5)
    np.testing.assert_allclose(found["pooler_output"], expected.pooler_output.numpy(), atol=1e-5)
    record = json.loads((encoder_export.folder / "effcli-onnx.json").read_text())
    assert record["graphs"] == {"model": "model.onnx"}


def test_what_differs_by_more_than_the_tolerance_is_not_published(
    encoder_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx_ir.load(encoder_export.folder / "model.onnx")  # tracing it again would take seconds
    monkeypatch.setattr(exporting.graphs, "encoder_graph", lambda *_, **__: graph)
    with pytest.raises(
        GateFailedError, match=r"differ from torch by .* \(encode\), at most 1e-12 is let pass; nothing"
    ):
        export(str(encoder_export.folder.parent / "source"), tmp_path / "out", tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(encoder_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting.graphs, "encoder_graph", full)
    with pytest.raises(NoRoomError, match="is full"):
        export(str(encoder_export.folder.parent / "source"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_models_without_a_plain_cache_are_refused_by_name(name: str, tmp_path: Path) -> None:
    source = small.save(small.build(name), tmp_path / "source")
    with pytest.raises(BadInputError, match="Mamba|T5"):
        export(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantized_cache_is_refused_by_the_name_of_its_pass(text_export: Exported, tmp_path: Path) -> None:
    source = small.save(text_export.model, tmp_path / "source")
    made = {
        "format": "effcli.checkpoint/1", "created": "", "source": {}, "recipe": {}, "dtype": "float32", "device": "cpu",
        "versions": {}, "files": {},
        "passes": [{"name": "kv-pq", "parameters": {}, "summary": "", "layers": [], "skipped": [], "notes": []}],
    }  # fmt: skip
    (source / "effcli.json").write_text(json.dumps(made))
    with pytest.raises(BadInputError, match="made by the pass kv-pq"):
        export(str(source), tmp_path / "out")


def test_the_module_of_an_op_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    class Bessel(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(values)

    from effcli.export import graphs

    model = small.build_encoder()
    model.encoder.layer[0].intermediate.intermediate_act_fn = Bessel()
    feed = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    with pytest.raises(
        NotExportableError, match=r"encoder\.layer\.0\.intermediate\.intermediate_act_fn \(Bessel\).*bes"
    ):
        graphs.encoder_graph(model, feed, opset=23)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.thorough
def test_the_command_says_what_it_wrote(tmp_path: Path, effcli: Run) -> None:
    small.save(small.build_encoder(), tmp_path / "source")
    done = effcli("export", "source", "--format", "onnx", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "onnxruntime gives torch's outputs within" in done.stdout
    assert "wrote out" in done.stdout
    assert effcli("export", "source", "-o", "out").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "mistral", "falcon", "gpt_oss", "mixtral", "diffllama"])
@pytest.mark.thorough
def test_architectures(name: str, tmp_path: Path) -> None:
    report = export(str(small.save(small.build(name), tmp_path / "source")), tmp_path / "out")
    assert isinstance(report, ExportReport)
    assert report.max_absolute_error < 1e-4
    if name == "gemma3":
        assert any("sliding window" in note for note in report.notes)
