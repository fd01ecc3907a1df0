"""The main job on the real built-in model, end to end, checked against closed forms and eager attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import effcli as api
from tests.conftest import Run

pytestmark = [pytest.mark.builtin, pytest.mark.slow]

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCABULARY = 30, 9, 3, 64, 576, 1536, 49152
# No package index, no hub: nothing may reach for the network once the model is cached.
OFFLINE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("builtin")


@pytest.fixture(scope="module")
def data(builtin_model: str, folder: Path) -> dict[str, Any]:
    """Run the default profile as a user does, offline."""
    import os
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "effcli", "profile", builtin_model, "--format", "json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | OFFLINE,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    (folder / "p.json").write_text(done.stdout)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def point(data: dict[str, Any], phase: str) -> dict[str, Any]:
    (found,) = [item for item in data["profiles"]["intensity"]["points"] if item["phase"] == phase]
    return dict(found)


def rotary_flops(item: dict[str, Any], tokens: int) -> int:
    """Return what the positions times the frequencies cost: a matrix product in some versions of transformers."""
    (flops,) = [module["flops"] for module in item["modules"] if module["name"] == "model.rotary_emb"]
    assert flops in (0, 2 * tokens * HEAD_DIM // 2)
    return int(flops)


def test_the_report_is_complete_and_valid(data: dict[str, Any]) -> None:
    schema = Path(__file__).resolve().parent.parent / "docs" / "schema" / "effcli.profile-1.schema.json"
    jsonschema.validate(data, json.loads(schema.read_text()))
    assert set(data["profiles"]) == {"intensity", "sinks", "kv", "latency", "energy", "outliers"}
    assert data["model"]["parameters"] == 134_515_008
    size = {"bfloat16": 2, "float32": 4}[data["model"]["dtype"]]
    assert data["model"]["weight_bytes"] == 134_515_008 * size


def test_flops_follow_the_closed_form(data: dict[str, Any]) -> None:
    per_layer = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM + 3 * HIDDEN * INTERMEDIATE
    prefill, decode = point(data, "prefill"), point(data, "decode")
    tokens = prefill["context"]
    linear = 2 * tokens * LAYERS * per_layer + 2 * HIDDEN * VOCABULARY  # the output head runs for the last token
    linear += rotary_flops(prefill, tokens)
    attention = 4 * tokens * tokens * HEADS * HEAD_DIM * LAYERS
    assert prefill["flops"] == linear + attention
    pairs = tokens * (tokens + 1) // 2
    assert prefill["flops_needed"] == linear + 4 * pairs * HEADS * HEAD_DIM * LAYERS
    decode_linear = 2 * (LAYERS * per_layer + HIDDEN * VOCABULARY) + rotary_flops(decode, 1)
    per_key = 4 * HEADS * HEAD_DIM * LAYERS
    keys, remainder = divmod(decode["flops"] - decode_linear, per_key)
    assert remainder == 0 and abs(keys - decode["context"]) <= 1


def test_roofline_figures_hang_together(data: dict[str, Any]) -> None:
    peaks = data["environment"]["peaks"]
    for phase in ("prefill", "decode"):
        item = point(data, phase)
        assert item["bytes"] == item["weight_bytes"] + item["activation_bytes"] + item["kv_bytes"]
        assert item["flops_per_byte"] == pytest.approx(item["flops"] / item["bytes"])
        peak = peaks["flops_per_second"][data["model"]["dtype"]]
        assert item["mfu"] == pytest.approx(item["flops"] / item["time_seconds"] / peak)
        assert 0 < item["mfu"] <= 1 and 0 < item["mbu"] <= 1
        assert item["attainable_seconds"] <= item["time_seconds"]
        for op in item["op_classes"] + item["ops"]:
            assert op["attained_fraction"] is None or op["attained_fraction"] <= 1 + 1e-9, op
        names = {module["name"] for module in item["modules"]}
        assert "model.layers.29.mlp.down_proj" in names


def test_the_cache_is_what_the_shapes_say(data: dict[str, Any]) -> None:
    kv = data["profiles"]["kv"]
    size = {"bfloat16": 2, "float32": 4}[kv["dtype"]]
    assert kv["bytes_per_token"] == 2 * LAYERS * KV_HEADS * HEAD_DIM * size
    assert kv["attention"] == "GQA"
    measured = [item for item in kv["points"] if item["measured_bytes"] is not None]
    assert measured
    assert all(item["measured_bytes"] == item["predicted_bytes"] for item in measured)


def test_sinks_equal_eager_attention(builtin_model: str) -> None:
    from effcli import loading, sources
    from profilers.sinks import sink_alphas
    from profilers.text import token_stream

    loaded = loading.load(sources.resolve(builtin_model), device="cpu", dtype="float32")
    model = loaded.model
    ids = token_stream(loaded.tokenizer, VOCABULARY).windows(2, 512)
    ours = torch.stack([alphas for alphas in sink_alphas(model, ids) if alphas is not None], dim=1)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            attentions = model(ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    reference = torch.stack([item[:, :, :, 0].double().mean(-1) for item in attentions], dim=1)
    assert ours.shape == reference.shape == (2, LAYERS, HEADS)
    assert (ours.double() - reference).abs().max() < 1e-4


def test_this_model_has_sinks(data: dict[str, Any]) -> None:
    sinks = data["profiles"]["sinks"]
    assert sinks["epsilon"] == 0.3 and sinks["sequences"] == 100
    rates = {item["bos"]: item["sink_rate"] for item in sinks["points"]}
    assert set(rates) == {True, False}
    assert all(0.3 < rate < 1 for rate in rates.values())


def test_every_rendering_comes_from_the_saved_report(data: dict[str, Any], effcli: Run, folder: Path) -> None:
    names = [f"r.{suffix}" for suffix in ("html", "md", "txt")]
    done = effcli("report", folder / "p.json", *[item for name in names for item in ("-o", name)], cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    for name in names:
        assert "23,040" in (folder / name).read_text() or data["model"]["dtype"] != "bfloat16"


def test_the_python_api_is_the_same_thing(builtin_model: str) -> None:
    report = api.profile(builtin_model, only=("kv",), context=(64,), device="cpu", dtype="bfloat16")
    assert report.profiles["kv"]["bytes_per_token"] == 23_040
    (only,) = report.profiles["kv"]["points"]
    assert only["measured_bytes"] == 23_040 * 64
