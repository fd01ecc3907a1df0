"""The looped model: what it computes, holds, saves, and loads both ways."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from passes.loop import targets
from passes.loop.convert import convert
from passes.loop.known import register
from passes.loop.layout import LoopPlan
from passes.loop.modeling_looped import FILE, LoopedLinear, looped_classes, share_blocks
from tests.passes.loop.small import DENSE, build, ids


def looped(name: str = "llama", *, rank: int = 3, groups: Any = ((0, 2), (1, 3))) -> Any:
    """Return a looped model with random parts of every layer's own."""
    model = build(name)
    convert(model, LoopPlan.even(targets.find(model), groups, rank))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "delta_" in key:
                parameter.normal_(std=0.1)
    return model


def unshared(model: Any, name: str) -> Any:
    """Return a plain model with the weights that each layer of a looped one runs with, written out."""
    plain = build(name)
    state, stack = dict(model.state_dict()), model.config.loop["stack"]
    with torch.no_grad():
        for key, tensor in plain.state_dict().items():
            if key in state:
                tensor.copy_(state[key])
        for path, module in model.get_submodule(stack).named_modules():
            if isinstance(module, LoopedLinear):
                weight = module.shared.weight + module.delta_out @ module.delta_in
                own = plain.get_submodule(f"{stack}.{path}")
                own.weight.copy_(weight if isinstance(own, nn.Linear) else weight.t())
    return plain


@pytest.mark.parametrize("name", DENSE)
def test_it_computes_what_layers_with_their_own_weights_would(name: str) -> None:
    model = looped(name)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, unshared(model, name)(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    model = looped(name)
    arguments = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = ids(2, 9)
    with_cache = model.generate(prompt, use_cache=True, **arguments)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **arguments))
    assert with_cache.shape == (2, 33)
    with torch.no_grad():
        whole = model(with_cache).logits
        first = model(with_cache[:, :20], use_cache=True)
        rest = model(with_cache[:, 20:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 20:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DENSE)
def test_each_tensor_is_held_and_stored_once(name: str, tmp_path: Path) -> None:
    model = looped(name)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(places) == len(set(places))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        stored = set(opened.keys())
    stack = model.config.loop["stack"]
    parent = stack.rpartition(".")[0]
    for path, module in build(name).get_submodule(stack).named_modules():
        if f"{stack}.{path}.delta_in" in stored:
            assert f"{stack}.{path}.weight" not in stored
            assert (f"{stack}.{path}.bias" in stored) == (module.bias is not None)
            assert f"{parent}.looped_blocks.{int(path[0]) % 2}.{path[2:]}.weight" in stored
    assert targets.stored(model)[1] == sum(
        tensor.numel() * tensor.element_size() for tensor in _tensors(tmp_path / "model.safetensors")
    )


def _tensors(path: Path) -> list[torch.Tensor]:
    with safe_open(path, framework="pt") as opened:
        return [opened.get_tensor(key) for key in opened.keys()]  # noqa: SIM118 - not a dict


READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    given = torch.load(folder + "/given.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(given["ids"]).logits
    again = folder + "/again"
    model.save_pretrained(again)
    same = open(again + "/modeling_looped.py").read() == open(folder + "/modeling_looped.py").read()
    print(json.dumps([torch.equal(logits, given["logits"]), same, "passes" in sys.modules, type(model).__module__]))
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(json.dumps("custom code" in str(error)))
"""


def test_both_ways_of_loading_give_the_same_to_the_bit(tmp_path: Path) -> None:
    names = ("llama", "tied", "qwen2", "gpt2", "neox", "gemma3")
    for name in names:
        model = looped(name)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.save({"ids": ids(), "logits": model(ids()).logits}, tmp_path / name / "given.pt")
        register(tmp_path / name)
        back, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert type(back) is type(model)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            assert torch.equal(back.eval()(ids()).logits, model(ids()).logits)
    done = subprocess.run(
        [sys.executable, "-c", READ, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "true", "false"))]
    for same, source, ours, module in lines[: len(names)]:
        assert same and source and not ours
        assert module.startswith("transformers_modules.")


def test_without_its_code_it_does_not_load(tmp_path: Path) -> None:
    looped().save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode != 0
    assert "contains custom code which must be executed" in done.stderr


def test_the_folder_says_what_it_needs(tmp_path: Path) -> None:
    looped("qwen2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "looped_qwen2"
    assert config["architectures"] == ["LoopedQwen2ForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "modeling_looped.LoopedQwen2Config",
        "AutoModelForCausalLM": "modeling_looped.LoopedQwen2ForCausalLM",
    }
    source = (tmp_path / FILE).read_text()
    assert "LoopedQwen2ForCausalLM = looped_classes(Qwen2Config, Qwen2ForCausalLM)" in source
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert {name.partition(".")[0] for name in imports} <= {"__future__", "pathlib", "typing", "torch", "transformers"}


def test_classes_are_made_once_and_known_to_transformers() -> None:
    model = looped()
    assert looped_classes(*type(model).__mro__[2:3], type(build("llama")))[1] is type(model)
    from passes.loop.modeling_looped import register as register_classes

    register_classes(type(model.config), type(model))
    register_classes(type(model.config), type(model))
    assert AutoConfig.for_model("looped_llama").__class__ is type(model.config)


def test_a_replaced_block_runs_in_every_layer() -> None:
    model = looped(rank=0)
    parent = model.model.looped_blocks[0].self_attn
    parent.q_proj = nn.Linear(32, 32, bias=False)
    seen = []
    parent.q_proj.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(ids())
    assert len(seen) == 2
    assert model.model.layers[2].self_attn.q_proj.shared is parent.q_proj


def test_a_copy_has_blocks_of_its_own() -> None:
    model = looped()
    other = copy.deepcopy(model)
    linear = other.model.layers[0].self_attn.q_proj
    assert linear.shared is other.model.looped_blocks[0].self_attn.q_proj
    assert linear.shared is not model.model.looped_blocks[0].self_attn.q_proj
    with torch.no_grad():
        linear.shared.weight.zero_()
        assert not torch.equal(other(ids()).logits, model(ids()).logits)


def test_gradients_reach_blocks_through_every_loop_and_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        model = looped().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids(), labels=ids()).loss.backward()
        found.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in found[0].values())
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6)


def test_new_weights_are_random_in_blocks_and_zero_in_effect_in_deltas() -> None:
    config = looped().config
    fresh = AutoModelForCausalLM.from_config(config)
    linear = fresh.model.layers[2].mlp.up_proj
    assert linear.delta_out.abs().max() == 0
    assert float(linear.delta_in.detach().std()) == pytest.approx(32**-0.5, rel=0.3)
    assert linear.shared.weight.std() > 0
    assert fresh.model.layers[0].mlp.up_proj.shared is linear.shared


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = looped("tied")
    model.save_pretrained(tmp_path)
    register(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("loop", "message"), [(None, "has format None"), ({"format": "x"}, "has format 'x'"), ("layers", "is of 9 layers")]
)
def test_a_config_of_another_plan_is_refused(loop: Any, message: str) -> None:
    model = build("llama")
    if loop == "layers":
        loop = {**LoopPlan.even(targets.find(model), ((0, 1),), 1).to_json(), "layers": 9}
    with pytest.raises(ValueError, match=message):
        share_blocks(model, loop)


def test_weights_need_the_memory_of_what_is_stored(tmp_path: Path) -> None:
    """Loading holds at its peak about the stored bytes: the unshared model is built without storage."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    structure = targets.find(model)
    plan = LoopPlan.even(structure, (tuple(range(8)), tuple(range(8, 16))), 0)
    convert(model, plan)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    sizes = plan.sizes(structure)
    assert sizes.bytes_after < sizes.bytes_before / 6
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from passes.loop.known import register; from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "register(Path(sys.argv[1])); torch.zeros(8) @ torch.zeros(8)\n"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * sizes.bytes_after + 100e6 < sizes.bytes_before
