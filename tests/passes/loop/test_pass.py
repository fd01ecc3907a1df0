"""The pass on tiny models: exact at full rank, what it records, writes and checks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from passes.base import PassContext, PassError
from passes.loop import LoopParameters, LoopPass, blocks, damage, targets
from passes.loop.convert import convert, fill
from passes.loop.layout import Block, LoopPlan
from passes.loop.modeling_looped import FILE
from profilers.base import SilentProgress
from profilers.meta import meta_model
from tests.passes.loop.small import CPU, applied, build, ids


@pytest.mark.parametrize("allocation", ["auto", "even"])
@pytest.mark.parametrize(
    ("name", "rank"), [("llama", 16), ("tied", 16), ("qwen2", 16), ("gpt2", 32), ("neox", 32), ("opt", 32)]
)
def test_enough_rank_gives_the_original_logits(name: str, rank: int, allocation: str, tmp_path: Path) -> None:
    """Two layers of rank 16 make up for a difference of rank 32, which is all that these matrices have."""
    _, model, _ = applied(tmp_path, name, blocks=2, loops=2, rank=rank, allocation=allocation)
    assert type(model).__name__.startswith("Looped")
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, build(name)(ids()).logits, rtol=0, atol=1e-3)


def test_full_rank_is_exact_for_any_number_of_layers() -> None:
    model = build("llama")
    structure = targets.find(model)
    full = {key: (min(s.out_features, s.in_features),) * 4 for key, s in structure.linears[0].items()}
    plan = LoopPlan(structure.stack, 4, (Block((0, 1, 2, 3), full),))
    parameters = LoopParameters(blocks=1, loops=4, rank=16, allocation="even")
    found = blocks.fit(model, structure, plan, parameters, [ids(4, 16)], seed=0, progress=SilentProgress())
    convert(model, found.plan)
    fill(model, found.plan, found.fitted)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, build("llama")(ids()).logits, rtol=0, atol=1e-3)


def divergence(model: Any, other: Any) -> float:
    with torch.no_grad():
        p, q = (made(ids(4, 24, seed=9)).logits.log_softmax(-1) for made in (other, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def related() -> Any:
    """Return a model whose layers differ little."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for own, first in zip(layer.parameters(), model.model.layers[0].parameters(), strict=True):
                own.mul_(0.3).add_(first, alpha=0.95)
    return model


def test_fitting_and_own_parts_beat_plain_tying(tmp_path: Path) -> None:
    found = {}
    for label, values in {
        "lower": {"init": "lower", "rank": 0},
        "least-squares": {"rank": 0},
        "rank 6": {"rank": 6},
    }.items():
        model = related()
        applied(tmp_path, model=model, blocks=2, loops=2, samples=24, length=64, **values)
        found[label] = divergence(model, related())
    assert 2 * found["rank 6"] < found["least-squares"] < found["lower"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("loop")
    item, model, record = applied(folder, "qwen2", blocks=1, loops=2, keep_first=1, keep_last=1)
    item.save(model, folder)
    return folder, model, record


def test_the_record_says_what_was_done(made: tuple[Path, Any, Any]) -> None:
    _, model, record = made
    assert {layer.name for layer in record.layers} == {
        f"model.layers.{index}.{part}"
        for index in (1, 2)
        for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip
    assert all(layer.bits == 32 and 0 < layer.error < 1 for layer in record.layers)
    assert {(item.name, item.reason) for item in record.skipped} == {
        ("model.layers.0", "keep_first=1 was asked for"),
        ("model.layers.3", "keep_last=1 was asked for"),
    }
    details = record.details
    assert details["plan"] == model.config.loop
    assert details["calibration"]["tokens"] == 8 * 32
    assert details["sizes"]["parameters_after"] == sum(item.numel() for item in model.parameters())
    for layer in record.layers:
        assert layer.error <= details["shared_error"][layer.name]
    assert "2 of 4 layers run with 1 stored blocks" in record.summary
    json.dumps(details)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    states = [applied(tmp_path, blocks=2, loops=2)[1].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_was_written_is_held_against_the_plan(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, model, _ = made
    item = LoopPass.from_mapping({"blocks": 1, "loops": 2, "keep_first": 1, "keep_last": 1, "rank": 4})
    bare = meta_model_of(model)
    (line,) = item.check_files(folder, bare)
    weights = load_file(folder / "model.safetensors")
    held = sum(tensor.nbytes for tensor in weights.values())
    assert (
        line == f"7 tensors of shared blocks, each stored once; {held:,} bytes of tensors, as the plan says to the byte"
    )

    def refused(message: str, tensors: dict[str, torch.Tensor] | None = None, config: Any = None) -> None:
        save_file(tensors or weights, tmp_path / "model.safetensors")
        (tmp_path / FILE).write_text((folder / FILE).read_text())
        known = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(known | (config or {})))
        with pytest.raises(PassError, match=message):
            item.check_files(tmp_path, bare)

    twice = {"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}
    refused("'model.layers.2.mlp.up_proj.weight' is on disk, and layer 2 runs with", weights | twice)
    refused(f"take {held + 4:,} bytes on disk, and the plan says {held:,}", weights | {"x": torch.zeros(1)})
    loop = model.config.loop
    refused("the plan says 7 parameters", config={"loop": loop | {"stored": {"parameters": 7, "bytes": held}}})
    refused("has format 'x'", config={"loop": {"format": "x"}})
    (tmp_path / FILE).write_text("import os\n")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(PassError, match="is not the modelling file that this release writes"):
        item.check_files(tmp_path, bare)


def meta_model_of(model: Any) -> Any:
    from passes.loop.modeling_looped import register

    register(type(model.config), type(model))
    return meta_model(model.config, model.dtype)


def test_a_target_takes_the_groups_of_least_measured_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measured(model: Any, structure: Any, batches: Any, groups: Any, context: Any) -> dict[Any, float]:
        seen.extend(groups)
        return {group: abs(group[0] - 2.0) + len(group) for group in groups}

    monkeypatch.setattr(damage, "measure", measured)
    _, model, record = applied(tmp_path, "llama6", target=0.9, rank=2, max_loops=2, samples=4)
    assert seen == [(index, index + 1) for index in range(5)]
    assert [block["layers"] for block in model.config.loop["blocks"]] == [[2, 3]]
    assert record.details["sizes"]["share"] <= 0.9
    chosen = [entry["layers"] for entry in record.details["damages"] if entry["chosen"]]
    assert chosen == [[2, 3]]
    assert {item.reason for item in record.skipped} == {"the target is met without sharing it, at less damage"}


def test_damage_is_measured_and_the_target_met(tmp_path: Path) -> None:
    original = build("llama")
    _, model, record = applied(tmp_path, target=0.8, rank=2)
    assert record.details["sizes"]["share"] <= 0.8
    assert all(entry["kl"] > 0 for entry in record.details["damages"])
    assert divergence(model, original) > 0


def test_without_text_nothing_is_fitted(tmp_path: Path) -> None:
    item = LoopPass.from_mapping({"blocks": 2, "loops": 2, "rank": 0, "init": "average", "align": False})
    model, original = build("llama"), build("llama")
    item.apply(model, PassContext(None, CPU, None, tmp_path))
    mean = (original.model.layers[0].mlp.up_proj.weight + original.model.layers[1].mlp.up_proj.weight) / 2
    torch.testing.assert_close(model.model.looped_blocks[0].mlp.up_proj.weight, mean)
    with pytest.raises(PassError, match="loop fits shared weights to text; give a calibration text"):
        LoopPass.from_mapping({"blocks": 2, "loops": 2, "rank": 2}).apply(
            build("llama"), PassContext(None, CPU, None, tmp_path)
        )


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    _, model, record = applied(tmp_path, model=build("llama", dtype=torch.bfloat16), blocks=2, loops=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {layer.bits for layer in record.layers} == {16.0}
    with torch.no_grad():
        assert torch.isfinite(model(ids()).logits).all()


def test_healing_is_part_of_the_pass_and_of_its_record(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"blocks": 2, "loops": 2, "init": "lower", "rank": 2}
    _, loose, _ = applied(tmp_path, model=related(), **plan)
    values = {"heal_tokens": 64 * 30, "heal_length": 16, "heal_batch": 4, "learning_rate": 1e-3}
    _, healed, record = applied(tmp_path, model=related(), **plan, **values)
    assert divergence(healed, related()) < divergence(loose, related())
    found = record.details["healing"]
    assert (found["tokens"], found["ended"]) == (64 * 30, "tokens")
    assert found["curve"][-1]["held_out"] < found["curve"][0]["held_out"]
    assert record.summary.endswith("healed on 1,920 tokens")
    assert any(note.startswith("healed on 1,920 tokens (0.5 rounds") for note in record.notes)
    json.dumps(record.details)
