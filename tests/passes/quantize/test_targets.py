"""Which layers are quantized is decided from shapes, and every linear layer that is left out has a reason."""

from __future__ import annotations

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers.pytorch_utils import Conv1D

from passes.base import PassError
from passes.quantize import QuantizeParameters, QuantizePass, targets
from tests import tiny_models
from tests.passes.quantize.small import build


def find(name: str, **given: object) -> targets.Targets:
    return targets.find(build(name, device="meta"), QuantizeParameters(**given))


@pytest.mark.parametrize("name", sorted(tiny_models.CONFIGS))
def test_every_linear_layer_is_quantized_or_has_a_reason(name: str) -> None:
    model = tiny_models.build(name, device="meta")
    try:
        found = targets.find(model, QuantizeParameters(scheme="fp8"))
    except PassError as error:
        assert name in ("gpt2", "falcon")  # layers of their own classes only
        assert "the format holds plain nn.Linear only" in str(error)
        return
    names = [item.name for item in (*found.layers, *found.skipped)]
    assert len(names) == len(set(names))
    linear = {key for key, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    assert linear <= set(names)
    assert all(item.reason for item in found.skipped)
    assert not any(layer.name == "lm_head" for layer in found.layers)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_have_the_names_and_shapes_of_their_linear_layers(name: str) -> None:
    found = find(name)
    model = build(name)
    linearize_moe(model)
    linear = targets.find(model, QuantizeParameters())
    assert {(layer.name, layer.out_features, layer.in_features) for layer in found.layers} == {
        (layer.name, *model.get_submodule(layer.name).weight.shape) for layer in linear.layers
    }
    assert {layer.group for layer in found.layers if layer.expert} == {targets.EXPERTS_GROUP}
    assert sum(layer.expert for layer in found.layers) == 2 * 4 * 3


def test_layers_that_engines_fuse_share_a_group() -> None:
    groups = {layer.name.rpartition(".")[2]: layer.group for layer in find("llama").layers if ".0." in layer.name}
    assert groups["q_proj"] == groups["k_proj"] == groups["v_proj"] != groups["o_proj"]
    assert groups["gate_proj"] == groups["up_proj"] != groups["down_proj"]


def test_ignored_layers_are_named_with_the_entry_that_named_them() -> None:
    by_pattern = find("llama", ignore=["re:.*down_proj$", "model.layers.1.self_attn.q_proj"])
    reasons = {item.name: item.reason for item in by_pattern.skipped}
    assert reasons["model.layers.0.mlp.down_proj"] == "ignore=re:.*down_proj$ was asked for"
    assert reasons["model.layers.1.self_attn.q_proj"] == "ignore=model.layers.1.self_attn.q_proj was asked for"
    with pytest.raises(PassError, match="ignore=re:.*donw_proj matches no linear layer"):
        find("llama", ignore=["re:.*donw_proj"])
    with pytest.raises(PassError, match="has no layer that scheme=w4a16 could quantize"):
        find("llama", ignore=["Linear"])


def test_experts_are_skipped_only_when_asked_and_only_all_of_them() -> None:
    skipped = find("mixtral", experts="skip")
    assert not skipped.experts
    assert sum(item.reason == "experts=skip was asked for" for item in skipped.skipped) == 24
    with pytest.raises(PassError, match="leave all of them out with experts=skip"):
        find("mixtral", ignore=["re:.*down_proj$"])


def test_experts_of_an_unknown_form_are_an_error_unless_skipped() -> None:
    model = build("mixtral", device="meta")
    for layer in model.model.layers:
        odd = nn.Module()
        odd.kernel = nn.Parameter(torch.empty(4, 64, 64, device="meta"))
        layer.mlp.experts = odd
    with pytest.raises(PassError, match=r"mlp.experts.kernel holds experts of shape \(4, 64, 64\)"):
        targets.find(model, QuantizeParameters())
    found = targets.find(model, QuantizeParameters(experts="skip"))
    assert [item.name for item in found.skipped if "kernel" in item.reason] == [
        f"model.layers.{index}.mlp.experts" for index in range(2)
    ]


def test_layers_with_one_weight_are_skipped() -> None:
    model = build("llama", device="meta")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    skipped = {item.name: item.reason for item in targets.find(model, QuantizeParameters()).skipped}
    assert skipped["model.layers.1.mlp.up_proj"] == "shares its weight with model.layers.0.mlp.up_proj"
    assert "model.layers.0.mlp.up_proj" in skipped


def test_a_weight_that_transformers_sets_by_name_is_skipped() -> None:
    found = targets.find(tiny_models.build("mamba", device="meta"), QuantizeParameters())
    assert {item.reason for item in found.skipped if item.name.endswith("out_proj")} == {
        "transformers sets its plain weight by name when it reads a checkpoint"
    }


def layer(name: str, columns: int) -> targets.TargetLayer:
    return targets.TargetLayer(name, name, 64, columns, name, False)


@pytest.mark.parametrize(
    ("widths", "given", "expected"),
    [
        ((256, 1024), {}, 128),
        ((576, 1536), {}, 64),
        ((96, 256), {}, 32),
        ((256, 1024), {"group_size": 256}, 256),
        ((48, 64), {"group_size": 16}, 16),
        ((576,), {"scheme": "w8a16"}, None),
        ((576,), {"scheme": "fp8"}, None),
        ((576,), {"scheme": "nvfp4"}, 16),
        ((576,), {"scheme": "mxfp4"}, 32),
        ((256,), {"scheme": "fp8-block"}, None),
    ],
)
def test_group_size_comes_from_the_shapes(
    widths: tuple[int, ...], given: dict[str, object], expected: int | None
) -> None:
    layers = tuple(layer(f"layer{index}", width) for index, width in enumerate(widths))
    assert targets.choose_group_size(layers, QuantizeParameters(**given)) == expected


@pytest.mark.parametrize(
    ("widths", "given", "message"),
    [
        ((256, 576), {"group_size": 128}, "does not divide the 576 input features of layer1; use 32 or 64"),
        ((256, 48), {}, "do not divide the 48 input features of layer1"),
        ((256, 48), {}, "ask for group_size=16, which no fast kernel takes"),
        ((48,), {"scheme": "mxfp4"}, "scheme=mxfp4 has groups of 32, which do not divide the 48"),
        ((576,), {"scheme": "fp8-block"}, "scales activations by 128 columns, which do not divide the 576"),
    ],
)
def test_a_group_size_that_does_not_divide_is_refused(
    widths: tuple[int, ...], given: dict[str, object], message: str
) -> None:
    layers = tuple(layer(f"layer{index}", width) for index, width in enumerate(widths))
    with pytest.raises(PassError) as raised:
        targets.choose_group_size(layers, QuantizeParameters(**given))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gpt2", {}, "has no layer that scheme=w4a16 could quantize"),
        (
            "t5",
            {"scheme": "fp8", "method": "gptq"},
            "has an encoder and a decoder, which calibration does not handle; use method=rtn",
        ),
        ("gpt_oss", {"group_size": 16}, "model_type 'gpt_oss' as fused tensors only"),
        ("qwen3_moe", {"scheme": "w8a8"}, "cannot read experts in scheme=w8a8 back"),
        ("qwen3_moe", {"group_size": 8, "symmetric": False}, "drops the zero points of experts"),
        ("qwen3", {"scheme": "mxfp4", "ignore": ["re:.*down_proj"]}, "read back in bfloat16 only"),
        ("mamba", {"kv_cache": "fp8"}, "has no self_attn module whose cache could be FP8"),
    ],
)
def test_a_model_that_cannot_be_changed_is_refused_before_weights_are_loaded(
    name: str, given: dict[str, object], message: str
) -> None:
    with pytest.raises(PassError) as raised:
        QuantizePass.from_mapping(given).check(tiny_models.build(name, device="meta"))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = build(device="meta")
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(PassError, match="is quantized already"):
        QuantizePass.from_mapping({}).check(model)
