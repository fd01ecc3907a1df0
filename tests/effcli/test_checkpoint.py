"""Loading to run: any source, quantized checkpoints with their kernels, and files that are not what they should be."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

import effcli
from effcli import checkpoint
from effcli.checkpoint_files import sha256_of
from effcli.errors import BadInputError, SourceError
from effcli.provenance import FILE, FORMAT, Provenance
from passes.base import PassRecord
from passes.quantize.linears import Int4Linear, Int8Linear
from passes.quantize.quiet import quiet_libraries
from profilers.weights import weight_bytes_and_parameters
from tests.passes.quantize.compressed import save_compressed, tiny_llama

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in the compressed-tensors format, as another tool leaves it."""
    with quiet_libraries():
        return save_compressed(tiny_llama(), tmp_path_factory.mktemp("int4"), INT4)


@pytest.fixture
def optimized(compressed: Path, tmp_path: Path) -> Path:
    """Return that folder with the ``effcli.json`` of a quantize pass."""
    folder = tmp_path / "out"
    folder.mkdir()
    for path in compressed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    made = Provenance(
        format=FORMAT,
        created="2026-01-01T00:00:00+00:00",
        source={"spec": "tiny", "kind": "folder"},
        recipe={"version": 1, "passes": [{"name": "quantize", "parameters": {"scheme": "w4a16"}}]},
        passes=(PassRecord("quantize", {"scheme": "w4a16"}, "14 layers to 4 bits"),),
        dtype="bfloat16",
        device="cpu",
        versions={},
        files={path.name: sha256_of(path) for path in folder.iterdir()},
    )
    (folder / FILE).write_text(made.to_json())
    return folder


def test_a_compressed_folder_runs_on_packed_kernels_and_says_so(compressed: Path) -> None:
    loaded = checkpoint.load(compressed, device="cpu")
    model = loaded.model
    assert loaded.provenance is None and loaded.tokenizer is None
    assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear) and isinstance(model.lm_head, Int8Linear)
    assert {use.kernel for use in loaded.record.kernels} == {
        "aten._weight_int4pack_mm_for_cpu",
        "aten._weight_int8pack_mm",
    }
    notes = "\n".join(loaded.source.notes)
    assert "aten._weight_int4pack_mm_for_cpu runs 14 layers (q_proj, k_proj" in notes
    assert "int8 copy" in notes
    assert model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_plain_kernels_are_those_of_transformers(compressed: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = checkpoint.load(compressed, device="cpu", kernels="plain")
    with quiet_libraries():
        plain = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            ids = torch.tensor([[1, 5, 9, 30]])
            assert torch.equal(loaded.model(ids).logits, plain(ids).logits)
    assert {use.fallback_reason for use in loaded.record.kernels} == {
        "plain weights were asked for",
        "it is not quantized in the file",
    }


def test_loading_prints_nothing(compressed: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        checkpoint.load(compressed, device="cpu")
    assert (out.getvalue(), err.getvalue()) == ("", "")


def test_an_optimized_folder_is_prepared_by_the_passes_that_made_it(optimized: Path) -> None:
    loaded = checkpoint.load(optimized, device="cpu", verify=True)
    assert loaded.provenance is not None and loaded.provenance.passes[0].name == "quantize"
    assert isinstance(loaded.model.model.layers[1].self_attn.o_proj, Int4Linear)
    assert sum(use.layers for use in loaded.record.kernels) == 15
    model, tokenizer = effcli.load(optimized, device="cpu")
    assert isinstance(model.lm_head, Int8Linear) and tokenizer is None


def test_a_profile_counts_what_is_packed(optimized: Path) -> None:
    report = effcli.profile(str(optimized), only=["kv"], context=[16], device="cpu")
    loaded = checkpoint.load(optimized, device="cpu")
    size = weight_bytes_and_parameters(loaded.model)
    assert size.parameters == sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert report.profiles["kv"]["weight_bytes"] == size.bytes
    assert any("_weight_int4pack_mm_for_cpu" in note for note in report.model.notes)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_checkpoint_is_refused_in_one_line(optimized: Path, damage: str) -> None:
    path = optimized / "generation_config.json"
    if damage == "changed":
        path.write_text(path.read_text() + " ")
    else:
        path.unlink()
    with pytest.raises(SourceError, match="generation_config.json.*fetch") as caught:
        checkpoint.load(optimized, device="cpu", verify=True)
    assert "\n" not in str(caught.value)
    checkpoint.load(optimized, device="cpu")  # not asked to verify


def test_a_damaged_record_is_refused(optimized: Path) -> None:
    data = json.loads((optimized / FILE).read_text())
    (optimized / FILE).write_text(json.dumps(data | {"format": "effcli.checkpoint/9"}))
    with pytest.raises(SourceError, match="effcli.checkpoint/9.*update effcli"):
        checkpoint.load(optimized, device="cpu")


def test_plain_sources_load_as_they_are(tiny_folder: Path) -> None:
    loaded = checkpoint.load(tiny_folder, device="cpu")
    assert loaded.record.kernels == () and loaded.provenance is None and loaded.tokenizer is not None
    with pytest.raises(SourceError, match="nothing to verify"):
        checkpoint.load(tiny_folder, verify=True)
    with pytest.raises(BadInputError, match="unknown dtype"):
        checkpoint.load(tiny_folder, dtype="int4")
    with pytest.raises(BadInputError, match="no device 'gpu'"):
        checkpoint.load(tiny_folder, device="gpu")


def test_a_missing_package_is_named(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "compressed_tensors" else find(name, *rest)
    )
    with pytest.raises(SourceError, match=r"pip install 'effcli\[quantize\]'"):
        checkpoint.load(compressed, device="cpu")


def test_compile_prepares_generate(compressed: Path) -> None:
    model = checkpoint.load(compressed, device="cpu", compile=True).model
    assert model.generation_config.cache_implementation == "static"
    assert model.generation_config.compile_config.fullgraph
