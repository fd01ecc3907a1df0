"""kv-pq through the whole pipeline, after quantize: the folder, the report, and what is measured with the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import effcli
from effcli import provenance
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError
from effcli.evaluation import evaluate
from effcli.pipeline import optimize
from effcli.recipes import Evaluation, Recipe, from_mapping
from passes.base import PassError
from passes.kv_pq import PQCache
from passes.kv_pq.codebooks import FILE

QUANTIZE = {"quantize": {"scheme": "w4a16", "group_size": 16, "method": "rtn"}}
KV_PQ = {"kv-pq": {"bits": 2, "samples": 24, "length": 64, "recent": 16, "iterations": 4}}


def recipe(*passes: dict[str, Any]) -> Recipe:
    return from_mapping({"version": 1, "passes": list(passes), "evaluation": {"tokens": 512, "context": 64}})


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kv-pq") / "out"
    optimize(str(tiny_folder), recipe(QUANTIZE, KV_PQ), out, context=200)
    return out


@pytest.mark.slow
def test_the_folder_has_codebooks_beside_weights_that_are_left_as_they_were(made: Path) -> None:
    about = provenance.read(made)
    assert about is not None
    assert [record.name for record in about.passes] == ["quantize", "kv-pq"]
    assert about.files[FILE] == sha256_of(made / FILE)
    assert any(name.endswith("weight_packed") for name in load_file(made / "model.safetensors"))
    assert "layers.0.keys.centroids" not in load_file(made / "model.safetensors")


@pytest.mark.slow
def test_the_report_has_the_cache_before_and_after(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    before, after = (report[side]["profiles"]["kv"] for side in ("before", "after"))
    (point,) = after["points"]
    assert before["bytes_per_token"] == 256  # float32
    assert after["bytes_per_token"] == 8 * 2
    assert (point["context"], point["difference_bytes"]) == (200, 0)
    assert point["measured_bytes"] < before["points"][0]["measured_bytes"] / 3
    assert after["shared_bytes"] == report["passes"][1]["details"]["codebook_bytes"]
    row = next(row for row in report["audit"] if row["tensor_class"] == FILE)
    assert row["stored_bytes"] >= after["shared_bytes"]
    weights = load_file(made / "model.safetensors")
    assert report["size"]["after_bytes"] == sum(tensor.nbytes for tensor in weights.values())
    said = {metric["metric"]: metric for metric in report["predicted"]["metrics"]}
    assert said["kv_bytes_per_token"]["measured"] == after["bytes_per_token"]
    assert said["tpot_seconds"]["predicted"] > 0
    page = (made / "report.html").read_text()
    for words in ("KV cache held", "layers.0.keys", "in full precision", "stricter than generation"):
        assert words in page, words


@pytest.mark.slow
def test_quality_is_that_of_the_quantized_cache(made: Path, tiny_folder: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    model, _ = effcli.load(made)
    ids = torch.randint(3, 90, (1, 40))
    output = model.generate(ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    assert type(output.past_key_values) is PQCache
    asked = Evaluation(tokens=512, context=64)
    ours = evaluate(made, against=tiny_folder, evaluation=asked, dtype="float32")
    assert ours.quality.perplexity.after == pytest.approx(report["quality"]["perplexity"]["after"], rel=1e-3)
    (made.parent / "plain").mkdir()
    for path in made.iterdir():  # the same weights, and nobody told of the codebooks
        if path.name not in (FILE, provenance.FILE):
            (made.parent / "plain" / path.name).write_bytes(path.read_bytes())
    plain = evaluate(made.parent / "plain", against=tiny_folder, evaluation=asked, dtype="float32")
    assert ours.quality.kl is not None and plain.quality.kl is not None
    assert ours.quality.kl.mean != pytest.approx(plain.quality.kl.mean, rel=1e-3)


@pytest.mark.slow
def test_a_checkpoint_with_codebooks_is_no_source_for_another_run(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="was made by kv-pq, and what that put beside the weights would be lost"):
        optimize(str(made), recipe(KV_PQ), tmp_path / "out", dry_run=True)


def test_the_other_order_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="pass 'kv-pq' must come after 'quantize'"):
        optimize(str(tiny_folder), recipe(KV_PQ, QUANTIZE), tmp_path / "out", dry_run=True)


def test_a_dry_run_predicts_the_cache(tiny_folder: Path, tmp_path: Path) -> None:
    said = optimize(str(tiny_folder), recipe(KV_PQ), tmp_path / "out", context=32, dry_run=True)
    (planned,) = said.planned  # type: ignore[union-attr]
    assert planned.prediction is not None
    assert planned.prediction.figures.kv_bytes_per_token == 8 * 2
    assert planned.prediction.figures.tpot_seconds is None
    assert any(line.startswith("pass 1: kv-pq:bits=2") for line in said.lines())  # type: ignore[union-attr]
