"""loop through the whole pipeline, with quantize after it: the folder, the report, both ways of loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import effcli
from effcli import provenance
from effcli.checkpoint_files import sha256_of
from effcli.errors import SourceError
from effcli.pipeline import optimize
from effcli.recipes import Recipe, from_mapping
from effcli.staging import folder_for
from passes.base import PassError
from tests.conftest import save_tiny

LOOP = {"loop": {"blocks": 1, "loops": 2, "rank": 4, "samples": 8, "length": 32}}
QUANTIZE = {"quantize": {"scheme": "w4a16", "group_size": 16, "samples": 4, "length": 32}}


def recipe(*passes: dict[str, Any]) -> Recipe:
    return from_mapping({"version": 1, "passes": list(passes), "evaluation": {"tokens": 256, "context": 64}})


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loop") / "out"
    optimize(str(tiny_folder), recipe(LOOP, QUANTIZE), out, context=64)
    return out


@pytest.mark.slow
def test_the_folder_holds_its_own_code_and_is_loaded_without_it(made: Path) -> None:
    about = provenance.read(made)
    assert about is not None
    assert [record.name for record in about.passes] == ["loop", "quantize"]
    assert about.files["modeling_looped.py"] == sha256_of(made / "modeling_looped.py")
    source = (made / "modeling_looped.py").read_text()
    (made / "modeling_looped.py").write_text("raise RuntimeError('the code of the folder ran')\n")
    try:
        for trust in (False, True):
            model, tokenizer = effcli.load(made, trust_remote_code=trust)
            assert type(model).__module__ == "passes.loop.modeling_looped"
            assert tokenizer is not None
    finally:
        (made / "modeling_looped.py").write_text(source)
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert output.shape[0] == 1


@pytest.mark.slow
def test_plain_transformers_reads_it_with_its_code(made: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "assert 'passes' not in sys.modules\n"
        "torch.save(model(torch.arange(3, 20)[None]).logits.detach(), sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made), str(tmp_path / "logits.pt")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, _ = effcli.load(made, kernels="plain", dtype="float32")
    with torch.no_grad():
        ours = model(torch.arange(3, 20)[None]).logits
    torch.testing.assert_close(ours, torch.load(tmp_path / "logits.pt"), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_report_counts_each_block_once(made: Path, tiny_folder: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    rows = [row for row in report["audit"] if row["tensor_class"] == "q_proj" and row["quantized"]]
    assert [row["modules"] for row in rows] == [1]
    original, _ = effcli.load(tiny_folder)
    assert report["size"]["parameters"] == sum(item.numel() for item in original.parameters())
    assert any("each stored once" in line for line in report["audit_notes"])
    first, second = report["passes"]
    assert first["details"]["sizes"]["parameters_before"] == report["size"]["parameters"]
    assert len(second["layers"]) == 7
    moved, nothing = report["measured"]
    assert nothing is None
    assert moved["summary"].startswith("stored less")
    counted, timed = moved["tables"]
    flops = dict((row[0], row[1:]) for row in counted["rows"])["FLOP a token"]
    assert flops[1] > flops[0]  # the low-rank parts
    assert [row[1] for row in timed["rows"]] == [1, 1, 2, 2]
    assert any(stage["stage"] == "after: what passes measure" and not stage["own"] for stage in report["stages"])
    assert "own sets" in (made / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.thorough
def test_a_looped_checkpoint_can_be_quantized_later(tiny_folder: Path, tmp_path: Path) -> None:
    optimize(str(tiny_folder), recipe(LOOP), tmp_path / "looped", context=64)
    rtn = {"quantize": {"scheme": "w4a16", "group_size": 16, "method": "rtn"}}
    optimize(str(tmp_path / "looped"), recipe(rtn), tmp_path / "both", context=64)
    about = provenance.read(tmp_path / "both")
    assert about is not None and about.source["passes"] == ["loop"]
    model, _ = effcli.load(tmp_path / "both")
    assert type(model).__name__ == "LoopedLlamaForCausalLM"
    assert (tmp_path / "both" / "modeling_looped.py").is_file()
    with pytest.raises(PassError, match="is looped already"):
        optimize(str(tmp_path / "looped"), recipe(LOOP), tmp_path / "twice", dry_run=True)


def test_a_dry_run_predicts_both_passes(tiny_folder: Path, tmp_path: Path) -> None:
    said = optimize(str(tiny_folder), recipe(LOOP, QUANTIZE), tmp_path / "out", context=32, dry_run=True)
    first, second = (item.prediction for item in said.planned)  # type: ignore[union-attr]
    assert first is not None and second is not None
    assert second.bits_per_parameter < first.bits_per_parameter < 32
    assert second.figures.weight_bytes <= first.figures.weight_bytes
    assert any(line.startswith("7 linear layers hold") for line in second.notes)  # those of one block


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (({"loop": {}},), "loop needs blocks and loops"),
        ((QUANTIZE, LOOP), "must come"),
        ((LOOP, {"quantize": {"scheme": "w8a8"}}), "are shared by several layers; use method=gptq"),
        (({"loop": {"blocks": 2, "loops": 2, "rank": 4}},), "times loops=2 is 4, and LlamaForCausalLM has 2 layers"),
        (({"loop": {"target": 0.1, "rank": 4}},), "target=0.1 cannot be met"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    passes: Any, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(PassError, match=message):
        optimize(str(tiny_folder), recipe(*passes), tmp_path / "out", dry_run=True)


def test_a_looped_checkpoint_of_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "looped")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "looped_xyz", "architectures": ["LoopedXyzForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    about = {
        "format": provenance.FORMAT, "created": "", "source": {"passes": ["loop"]}, "recipe": {}, "passes": [],
        "dtype": "float32", "device": "", "versions": {}, "files": {},
    }  # fmt: skip
    (folder / provenance.FILE).write_text(json.dumps(about))
    with pytest.raises(SourceError, match="is a looped XyzForCausalLM, which the installed transformers"):
        effcli.load(folder)


@pytest.mark.slow
@pytest.mark.thorough
def test_healing_that_is_killed_goes_on_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    healed = {"heal_tokens": 60 * 64, "heal_length": 16, "heal_batch": 4, "checkpoint_minutes": 0}
    given = "loop:" + ",".join(f"{key}={value}" for key, value in (LOOP["loop"] | healed).items())
    hashes = []
    for name in ("straight", "killed"):
        out = tmp_path / name
        command = [sys.executable, "-m", "effcli", "optimize", tiny_folder, "--pass", given, "-o", out]
        command += ["--context", 64, "--eval-tokens", 256]
        if name == "killed":
            state = folder_for(out) / "pass-1.work" / "healing.safetensors"
            running = subprocess.Popen(
                [*map(str, command)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            while not state.exists():
                assert running.poll() is None, running.communicate()
                time.sleep(0.002)
            running.kill()
            running.communicate()
            assert not out.exists()
            command.append("--resume")
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        healing = json.loads((out / "report.json").read_text())["passes"][0]["details"]["healing"]
        assert healing["resumed"] == (name == "killed")
        assert healing["steps"] == 60
        hashes.append(sha256_of(out / "model.safetensors"))
    assert hashes[0] == hashes[1]
