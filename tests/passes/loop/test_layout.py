"""Plans: exact sizes against models that were built, their form in the config, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from passes.base import PassError
from passes.loop import targets
from passes.loop.convert import convert, on_meta
from passes.loop.layout import Block, LoopPlan
from profilers.meta import meta_model
from tests.passes.loop.small import CONFIGS, DENSE, build

PAIRS = ((0, 1), (2, 3))


def plan_of(structure: targets.Structure, groups: Any = PAIRS, rank: int = 3) -> LoopPlan:
    return LoopPlan.even(structure, groups, rank)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("groups", [PAIRS, ((0, 2, 3),)])
def test_sizes_are_those_of_the_model_that_comes_out(name: str, groups: Any) -> None:
    model = build(name)
    structure = targets.find(model)
    plan = plan_of(structure, groups)
    sizes = plan.sizes(structure)
    looped = on_meta(meta_model(CONFIGS[name](), model.dtype), plan)
    convert(model, plan)
    for made in (model, looped):
        assert targets.stored(made) == (sizes.parameters_after, sizes.bytes_after)
    assert set(looped.state_dict()) == set(model.state_dict())
    assert sizes.delta_flops_per_token == 2 * sum(p.numel() for key, p in model.named_parameters() if "delta_" in key)
    layers = model.get_submodule(structure.stack)
    shared = model.get_submodule(structure.stack.rpartition(".")[0]).looped_blocks
    assert sizes.layers_after == sum(p.numel() for p in (*layers.parameters(), *shared.parameters()))


def test_sizes_by_hand() -> None:
    structure = targets.find(build("llama"))
    linears = 32 * 32 * 2 + 16 * 32 * 2 + 48 * 32 * 3
    of_rank = 2 * (32 + 32) + 2 * (16 + 32) + 3 * (48 + 32)
    plan = plan_of(structure, ((1, 2, 3),), rank=3)
    sizes = plan.sizes(structure)
    assert sizes.parameters_before == 2 * 97 * 32 + 4 * (linears + 2 * 32) + 32
    assert sizes.delta_parameters == 3 * 3 * of_rank
    assert sizes.parameters_after == sizes.parameters_before - 2 * linears + sizes.delta_parameters
    assert sizes.bytes_after == 4 * sizes.parameters_after
    assert plan.sets == 2
    assert plan.shared_layers == {1, 2, 3}


def test_the_config_holds_the_plan() -> None:
    structure = targets.find(build("qwen2"))
    plan = plan_of(structure)
    plan = replace(
        plan, blocks=(replace(plan.blocks[0], ranks=plan.blocks[0].ranks | {"mlp.up_proj": (0, 7)}), plan.blocks[1])
    )
    data = json.loads(json.dumps(plan.to_json(plan.sizes(structure)), sort_keys=True))
    assert data["format"] == "effcli.loop/1"
    assert data["stored"]["parameters"] == plan.sizes(structure).parameters_after
    assert LoopPlan.from_json(data) == plan
    LoopPlan.from_json(data).check(structure)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "has format None"),
        ({"format": "effcli.loop/9"}, "has format 'effcli.loop/9'"),
        ({"format": "effcli.loop/1", "stack": "model.layers", "layers": 4}, "lacks a part"),
        ({"format": "effcli.loop/1", "stack": "s", "layers": 4, "blocks": [{"layers": 3}]}, "lacks a part"),
    ],
)
def test_a_damaged_plan_is_named(data: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        LoopPlan.from_json(data)


def changed(plan: LoopPlan, **values: Any) -> LoopPlan:
    return replace(plan, blocks=(replace(plan.blocks[0], **values), *plan.blocks[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: replace(plan, layers=5), "the plan is of 5 layers"),
        (lambda plan: changed(plan, layers=(1, 0)), "no ascending list"),
        (lambda plan: changed(plan, layers=(0, 9)), "names a layer that is not there"),
        (lambda plan: changed(plan, layers=(0, 2)), "layer 2 is in two blocks"),
        (lambda plan: changed(plan, ranks={}), "does not list the layers' linears: mlp.down_proj"),
        (lambda plan: changed(plan, ranks=plan.blocks[0].ranks | {"mlp.up_proj": (1,)}), "has 1 ranks"),
        (
            lambda plan: changed(plan, ranks=plan.blocks[0].ranks | {"self_attn.k_proj": (17, 1)}),
            "rank=17 does not fit model.layers.0.self_attn.k_proj, which is 16 x 32; give a rank from 0 to 16",
        ),
    ],
)
def test_a_plan_of_another_model_is_refused(change: Any, message: str) -> None:
    structure = targets.find(build("llama"))
    with pytest.raises(PassError, match=message):
        change(plan_of(structure)).check(structure)


def test_layers_of_different_kinds_do_not_share() -> None:
    structure = targets.find(build("gemma3"))
    plan_of(structure, ((0, 2), (1, 3))).check(structure)
    with pytest.raises(PassError, match="layers 0 and 1 .* cannot share weights: .*sliding_attention"):
        plan_of(structure).check(structure)


def test_experts_are_refused_by_name() -> None:
    structure = targets.find(build("mixtral"))
    with pytest.raises(PassError, match="layer 0 of MixtralForCausalLM cannot share its weights: .*experts"):
        LoopPlan(structure.stack, 4, (Block((0, 1), {}),)).check(structure)


def test_a_looped_or_quantized_or_foreign_model_is_refused() -> None:
    model = build("llama")
    convert(model, plan_of(targets.find(model)))
    with pytest.raises(PassError, match="LoopedLlamaForCausalLM is looped already; give the original"):
        targets.find(model)
    model = build("llama")
    model.config.quantization_config = {}
    with pytest.raises(PassError, match="quantized already"):
        targets.find(model)
    foreign = build("llama")
    foreign.__class__ = type("MyModel", (type(foreign),), {})
    with pytest.raises(PassError, match="MyModel comes with code of its own"):
        targets.find(foreign)
