"""The pipeline on a tiny model: what it publishes, what its report says, and what it refuses before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from effcli import provenance
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError, GateFailedError
from effcli.pipeline import DryRun, optimize
from effcli.recipes import Recipe, from_mapping
from effcli.stage_times import Times
from effcli.staging import folder_for
from passes.base import Figures, PassError
from profilers.base import ProfilerError

QUANTIZE = {"quantize": {"scheme": "w4a16", "group_size": 16, "method": "rtn"}}
CARD = "---\nlicense: mit\nbase_model: someone/original\n---\n# A model\n"


def recipe(**more: Any) -> Recipe:
    return from_mapping({"version": 1, "passes": [QUANTIZE], "evaluation": {"tokens": 512, "context": 64}, **more})


@pytest.fixture(scope="module")
def source(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("source") / "model")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("MIT")
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("made") / "out"
    tasks = out.parent / "task.jsonl"
    tasks.write_text('{"query": "abc", "choices": ["d", "e"], "gold": 0}\n' * 3)
    report = optimize(
        str(source),
        recipe(
            gates=["ppl<=2x", "size<=0.6x", "accuracy>=0"],
            evaluation={"tokens": 512, "context": 64, "tasks": str(tasks)},
        ),
        out,
        context=32,
        command="effcli optimize …",
    )
    return out, report


@pytest.mark.slow
def test_the_folder_holds_what_is_promised(made: tuple[Path, Any], source: Path) -> None:
    out, _ = made
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "effcli.json", "report.json", "report.html", "README.md", "LICENSE", "SHA256SUMS",
    }  # fmt: skip
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "task.jsonl"]
    about = provenance.read(out)
    assert about is not None
    assert about.source["files"]["model.safetensors"] == sha256_of(source / "model.safetensors")
    assert about.files["model.safetensors"] == sha256_of(out / "model.safetensors")
    assert (about.source["licence"], about.source["base_model"]) == ("mit", "someone/original")
    assert about.passes[0].name == "quantize"
    assert set(about.versions) >= {"effcli", "torch", "transformers", "llmcompressor", "compressed-tensors"}
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "someone/original" in card


@pytest.mark.slow
def test_the_report_has_every_part(made: tuple[Path, Any]) -> None:
    out, returned = made
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(returned.to_json())
    assert report["schema"] == "effcli.optimize/1"
    assert report["status"] == "passed"
    assert report["before"]["schema"] == report["after"]["schema"] == "effcli.profile/1"
    for profile in (report["before"], report["after"]):
        assert {"latency", "intensity", "kv", "sinks"} <= {*profile["profiles"], *profile["skipped"]}
    quality = report["quality"]
    assert set(quality["perplexity"]) >= {"before", "after", "interval"}
    assert quality["kl"]["mean"] > 0
    assert 0 <= quality["top1_agreement"] <= 1
    assert quality["tasks"][0]["samples"] == 3
    size = report["size"]
    tensors = load_file(out / "model.safetensors")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert size["after_bytes"] == stored
    assert size["bits_per_parameter"] == pytest.approx(8 * stored / size["parameters"])
    assert size["before_bytes"] == 4 * size["parameters"]
    assert {row["dtype"] for row in report["audit"] if row["quantized"]} == {"int4"}
    assert [gate["passed"] for gate in report["gates"]] == [True] * 3
    assert {item["metric"] for item in report["predicted"]["metrics"]} == set(Figures.__dataclass_fields__)
    assert report["kernels"]


@pytest.mark.slow
def test_times_add_up_and_the_pipelines_own_are_marked(made: tuple[Path, Any]) -> None:
    _, report = made
    own = sum(stage.seconds for stage in report.stages if stage.own)
    assert report.seconds_spent == pytest.approx(sum(stage.seconds for stage in report.stages))
    assert report.overhead_fraction == pytest.approx(own / report.seconds_spent)
    labels = {stage.stage: stage.own for stage in report.stages}
    assert [labels[name] for name in ("before", "pass: quantize", "after")] == [False] * 3
    assert [labels[name] for name in ("check", "audit", "writing", "staging")] == [True] * 4


@pytest.mark.slow
def test_plain_transformers_reads_it_and_says_the_same(made: tuple[Path, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from effcli.checkpoint import load

    out, _ = made
    ids = torch.arange(4, 36)[None]
    ours = load(out, dtype="float32").model(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_weights_and_a_saved_profile_is_used(
    made: tuple[Path, Any], source: Path, tmp_path: Path
) -> None:
    out, first = made
    with pytest.raises(GateFailedError, match=r"size of the weights is .* x the original's") as refused:
        optimize(str(source), recipe(gates=["size<=0.1x"]), tmp_path / "again", context=32, before=first.before)
    assert refused.value.exit_code == 3
    assert not (tmp_path / "again").exists()
    failed = json.loads((tmp_path / "again.failed.json").read_text())
    assert failed["status"] == "gate failed"
    assert failed["before"] == json.loads(json.dumps(first.to_dict()["before"]))
    assert "again.failed.html" in str(refused.value)
    staged = folder_for(tmp_path / "again") / "pass-1" / "model.safetensors"
    assert sha256_of(staged) == sha256_of(out / "model.safetensors")
    written = staged.stat().st_mtime_ns
    report = optimize(
        str(source), recipe(gates=["size<=0.9x"]), tmp_path / "again", context=32, before=first.before, resume=True
    )
    assert report.status == "passed"
    assert (tmp_path / "again" / "model.safetensors").stat().st_mtime_ns == written  # not made again
    assert report.after["created"] == failed["after"]["created"]  # nor measured again
    assert not folder_for(tmp_path / "again").exists()


@pytest.mark.slow
def test_a_gguf_source_says_what_it_was_and_fast_kernels_are_held_against_plain_weights(tmp_path: Path) -> None:
    from tests.effcli.tiny_files import write_gguf

    write_gguf(tmp_path / "model.gguf")
    chosen = recipe(passes=[{"quantize": {"scheme": "w4a16", "group_size": 32, "method": "rtn"}}])
    report = optimize(str(tmp_path / "model.gguf"), chosen, tmp_path / "out", context=32, dtype="bfloat16")
    assert report.size.source_quantized is not None
    assert report.size.source_quantized.startswith("Q8_0")
    assert report.size.source_bits_per_parameter is not None
    assert report.size.source_bits_per_parameter > 8
    assert report.size.before_file_bytes == (tmp_path / "model.gguf").stat().st_size
    assert any("int4pack" in use.kernel for use in report.kernels)
    agreement = report.kernel_agreement
    assert agreement is not None
    assert agreement.tokens == 128
    assert 0 < agreement.relative_error < 0.02  # bfloat16 has 8 bits of mantissa
    assert (tmp_path / "out" / "tokenizer.json").is_file()  # the source has no such file


def test_a_dry_run_says_what_would_happen_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    said = optimize(str(source), recipe(gates=["kl<=1"]), tmp_path / "out", context=32, dry_run=True)
    assert isinstance(said, DryRun)
    assert said.planned[0].label == "quantize:scheme=w4a16,group_size=16,method=rtn"
    assert said.disk_needed_bytes > 37_000
    assert any("pass 1: quantize" in line for line in said.lines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"passes": ["quantise"]}, {}, PassError, "no pass named 'quantise'; did you mean 'quantize'"),
        ({"passes": [{"quantize": {"sheme": "w4a16"}}]}, {}, PassError, "no parameter 'sheme'"),
        ({"gates": ["perplexity<=+3%"]}, {}, BadInputError, "unknown metric 'perplexity'"),
        ({}, {"device": "cuda:9"}, BadInputError, "no device 'cuda:9'"),
        ({}, {"dtype": "fp9"}, BadInputError, "unknown dtype 'fp9'"),
        ({}, {"context": 10**6}, ProfilerError, "1,000,000|1000000"),
        ({"evaluation": {"text": "gone.txt"}}, {}, BadInputError, "no text file at 'gone.txt'"),
        ({"evaluation": {"tasks": "gone.jsonl"}}, {}, ProfilerError, "gone.jsonl"),
        ({"passes": [{"quantize": {"scheme": "w4a16"}}]}, {}, PassError, "do not divide the 48 input features"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    source: Path, tmp_path: Path, change: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimize(str(source), recipe(**change), tmp_path / "out", dry_run=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_short_is_refused_before_weights_are_loaded(source: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for part in ("calibration", "evaluation"):
        with pytest.raises(ProfilerError, match=f"the {part} text has 9 tokens"):
            optimize(str(source), recipe(**{part: {"text": str(short)}}), tmp_path / "out", dry_run=True)


def test_a_model_without_weights_has_nothing_to_optimize(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="has no weights to optimize"):
        optimize(str(source / "config.json"), recipe(), tmp_path / "out", dry_run=True)


def test_stage_times_are_kept_apart_by_owner() -> None:
    times = Times()
    with times.stage("a", own=True):
        pass
    earlier = times.copy()
    with times.stage("a", own=True):
        pass
    with times.stage("b", own=False):
        pass
    assert [(entry["stage"], entry["own"]) for entry in times.since(earlier)] == [("a", True), ("b", False)]
    assert len(times.stages) == 2


def test_weights_that_a_pass_does_not_change_are_carried_over(source: Path, tmp_path: Path) -> None:
    from effcli import loading, sources
    from effcli.pipeline import _carry_weights

    loaded = loading.load(sources.resolve(str(source)), device="cpu")
    first, second = tmp_path / "pass-1", tmp_path / "pass-2"
    first.mkdir()
    second.mkdir()
    _carry_weights(loaded, None, first)
    (first / "effcli.json").write_text("{}")
    original, written = (load_file(folder / "model.safetensors") for folder in (source, first))
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())
    _carry_weights(loaded, first, second)
    assert (second / "model.safetensors").samefile(first / "model.safetensors")  # no second copy on the disk
    assert not (second / "config.json").samefile(first / "config.json")  # a pass may write into its own
    assert not (second / "effcli.json").exists()
