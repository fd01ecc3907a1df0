"""Quantizing a looped model: each block once, with the inputs of all its loops; saved, read back, repacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

pytest.importorskip("llmcompressor")

from passes.base import LoadOptions, PassContext, PassError  # noqa: E402
from passes.loop import targets  # noqa: E402
from passes.loop.convert import convert  # noqa: E402
from passes.loop.layout import LoopPlan  # noqa: E402
from passes.loop.modeling_looped import register  # noqa: E402
from passes.quantize import QuantizePass  # noqa: E402
from passes.quantize.linears import Int4Linear  # noqa: E402
from tests.passes.loop.small import CPU, VOCABULARY, ids, text  # noqa: E402

CYCLE, SEQUENCE = ((0, 2), (1, 3)), ((0, 1), (2, 3))


def looped(groups: Any, density: float = 0.0) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    convert(model, LoopPlan.even(targets.find(model), groups, 4, density))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "delta_" in key:  # not the masks, which are no parameters
                parameter.normal_(std=0.1)
    return model


def quantized(model: Any, work: Path, **values: Any) -> tuple[QuantizePass, Any]:
    item = QuantizePass.from_mapping({"scheme": "w4a16", "group_size": 32, "samples": 4, "length": 32} | values)
    assert isinstance(item, QuantizePass)
    return item, item.apply(model, PassContext(None, CPU, text(), work, seed=0))


@pytest.mark.parametrize("groups", [CYCLE, SEQUENCE])
def test_each_block_is_quantized_once_from_all_its_loops(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from passes.quantize.modifiers import SharedGPTQ

    compressed: list[Any] = []
    hessians: dict[str, torch.Tensor] = {}
    rows: dict[str, list[torch.Tensor]] = {}
    real = SharedGPTQ.compress_module_list

    def watched(self: Any, modules: Any) -> None:
        for module in modules:
            name = self._module_names[module]
            compressed.append(name)
            hessians[name] = self._hessians[module].clone() / self._num_samples[module]
        real(self, modules)

    monkeypatch.setattr(SharedGPTQ, "compress_module_list", watched)
    model = looped(groups)
    first = model.model.looped_blocks[0].self_attn.q_proj
    windows = text().windows(4, 32)
    handle = first.register_forward_pre_hook(lambda _m, args: rows.setdefault("q", []).append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(windows)  # the first block's first inputs are those of the model as it is
    handle.remove()
    _, record = quantized(model, tmp_path)
    assert len(compressed) == len(set(compressed)) == 3 * 7
    assert {layer.name.rpartition(".")[0].rpartition(".")[0] for layer in record.layers} == {
        "model.looped_blocks.0", "model.looped_blocks.1", "model.layers.4",
    }  # fmt: skip
    x = torch.cat(rows["q"])
    expected = x.t() @ x
    found = hessians["model.looped_blocks.0.self_attn.q_proj"]
    # Both loops of the first block were seen before it was rounded (in a cycle, with the second block between them).
    torch.testing.assert_close(found / found.trace(), expected / expected.trace(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.4])
def test_it_is_read_back_and_repacked(density: float, tmp_path: Path) -> None:
    model = looped(SEQUENCE, density)
    item, _ = quantized(model, tmp_path / "work")
    with torch.no_grad():
        wanted = model(ids()).logits
    item.save(model, tmp_path)
    register(type(model.config), type(model))
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    options = LoadOptions(CPU, torch.float32, "plain")
    record = item.load(tmp_path, back, options)
    with torch.no_grad():
        torch.testing.assert_close(back(ids()).logits, wanted, rtol=1e-3, atol=1e-3)
    assert {use.layer_class: use.layers for use in record.kernels}["q_proj"] == 3
    fast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    item.load(tmp_path, fast, LoadOptions(CPU, torch.bfloat16, "auto"))
    shared = fast.model.layers[1].self_attn.q_proj.shared
    assert isinstance(shared, Int4Linear) and shared is fast.model.layers[0].self_attn.q_proj.shared
    assert (tmp_path / "modeling_looped.py").is_file()


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from passes.quantize import calibration

    whole = looped(SEQUENCE)
    quantized(whole, tmp_path / "whole")
    save, saved = calibration._Run._save, []

    def failing(self: Any, index: int, state: Any) -> None:
        save(self, index, state)
        saved.append(index)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibration._Run, "_save", failing)
        with pytest.raises(KeyboardInterrupt):
            quantized(looped(SEQUENCE), tmp_path / "killed")
    resumed = looped(SEQUENCE)
    quantized(resumed, tmp_path / "killed")
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in whole.state_dict().items())


@pytest.mark.parametrize("values", [{"method": "awq"}, {"scheme": "w8a8", "group_size": None}])
def test_smoothing_is_refused_by_name(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PassError, match="moves scales from each layer's norm .* use method=gptq, or method=rtn"):
        quantized(looped(SEQUENCE), tmp_path, **values)
