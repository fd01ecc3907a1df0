"""Rounding the denoiser of a diffusion pipeline: what is rounded, to what, how it is stored, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from passes.base import PassError, PipelineContext
from passes.lemica import hook
from passes.lemica.schedule import Schedule
from passes.quantize import QuantizePass
from passes.quantize.schemes import stored_bits
from tests.passes.lemica import tiny_pipelines

pytest.importorskip("llmcompressor")

HIDDEN, STEPS = 64, 6
WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCK_LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
LAYERS = tuple(f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in BLOCK_LAYERS)


def dit(heads: int = 4, head_dim: int = HIDDEN // 4) -> Any:
    """A DiTPipeline wide enough for groups of 32."""
    from diffusers import DiTTransformer2DModel

    pipeline = tiny_pipelines.dit()
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    tiny_pipelines.randomize(transformer)
    pipeline.register_modules(transformer=transformer.eval())
    return pipeline


def quantize(pipeline: Any, folder: Path, **parameters: Any) -> Any:
    """Save a pipeline, quantize it over its files, and return the record."""
    pipeline.save_pretrained(folder)
    item = QuantizePass.from_mapping({"method": "rtn"} | parameters)
    item.check_pipeline(pipeline)
    record = item.apply_pipeline(pipeline, PipelineContext(torch.device("cpu"), folder))
    item.save_pipeline(pipeline, folder)
    return record


def opened(folder: Path, **options: Any) -> Any:
    from effcli.diffusion.opening import open_pipeline

    return open_pipeline(folder, device="cpu", **options)


def nearest(weight: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """Round a weight to symmetric integers by the largest value of each group, in float64."""
    rows, columns = weight.shape
    groups = weight.double().view(rows, -1, group_size or columns)
    limit = 2 ** (bits - 1)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / ((2 * limit - 1) / 2)).float().double()
    return ((groups / scale).round().clamp(-limit, limit - 1) * scale).view(rows, columns)


@pytest.mark.parametrize(("scheme", "bits", "group_size"), [("w8a16", 8, None), ("w4a16", 4, 64)])
def test_weights_are_rounded_to_the_nearest(tmp_path: Path, scheme: str, bits: int, group_size: int | None) -> None:
    pipeline = dit()
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    record = quantize(pipeline, tmp_path, scheme=scheme)

    after = opened(tmp_path).pipeline.transformer.state_dict()
    assert after.keys() == before.keys()
    rounded = {f"{name}.weight" for name in LAYERS}
    for name, tensor in before.items():
        if name not in rounded:
            assert torch.equal(after[name], tensor), name
    errors = {item.name: item.error for item in record.layers}
    assert errors.keys() == {f"transformer.{name}" for name in LAYERS}
    for name in LAYERS:
        weight = before[f"{name}.weight"]
        expected = nearest(weight, bits, group_size)
        found = after[f"{name}.weight"].double()
        # Elsewhere only where a value is halfway between two, as the largest negative of a group is by construction.
        other = ~torch.isclose(found, expected, rtol=1e-6, atol=1e-7)
        assert float(other.float().mean()) < 0.01
        torch.testing.assert_close((found - weight)[other].abs(), (expected - weight)[other].abs(), rtol=1e-3, atol=0)
        relative = float((weight.double() - expected).square().sum() / weight.double().square().sum())
        assert errors[f"transformer.{name}"] == pytest.approx(relative, rel=1e-3)
    assert {(item.bits, item.group_size) for item in record.layers} == {(float(bits), group_size)}
    assert {item.kind for item in record.layers} == {"to_q", "to_k", "to_v", "to_out", "proj", "net"}
    reasons = {item.name.removeprefix("transformer."): item.reason for item in record.skipped}
    assert "scales and gates" in reasons["transformer_blocks.0.norm1.linear"]
    assert "outside the stack" in reasons["proj_out_1"]


def test_the_file_shrinks_as_the_scheme_says(tmp_path: Path) -> None:
    pipeline = dit()
    shapes = {name: pipeline.transformer.get_submodule(name).weight.shape for name in LAYERS}
    pipeline.save_pretrained(tmp_path)
    before = sum(tensor.nbytes for tensor in load_file(tmp_path / "transformer" / WEIGHTS).values())
    quantize(pipeline, tmp_path, scheme="w4a16", group_size=32)

    after = sum(tensor.nbytes for tensor in load_file(tmp_path / "transformer" / WEIGHTS).values())
    plain = sum(4 * rows * columns for rows, columns in shapes.values())
    # Scales are float32 here, as the weights were: 16 bits more each than the formula counts.
    packed = sum(
        (stored_bits("w4a16", rows, columns, bits=4, group_size=32) + 16 * rows * columns / 32) / 8
        for rows, columns in shapes.values()
    )
    assert after == before - plain + packed


def test_hard_links_are_replaced_and_not_written_into(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "linked"
    pipeline = dit()
    pipeline.save_pretrained(source)
    kept = {path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(source / name, folder / name)
    item = QuantizePass.from_mapping({"scheme": "w8a16"})
    item.apply_pipeline(pipeline, PipelineContext(torch.device("cpu"), tmp_path))
    item.save_pipeline(pipeline, folder)

    assert {name: (source / name).read_bytes() for name in kept} == kept
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["quantization_config"]["quantization_status"] == "compressed"
    original = json.loads(kept[Path("transformer/config.json")])
    assert {key: value for key, value in config.items() if key != "quantization_config"} == original


def test_what_was_stored_in_half_precision_stays_so(tmp_path: Path) -> None:
    pipeline = dit()
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    item = QuantizePass.from_mapping({"scheme": "w8a16"})
    live = opened(tmp_path).pipeline  # float32 on a CPU
    item.apply_pipeline(live, PipelineContext(torch.device("cpu"), tmp_path))
    item.save_pipeline(live, tmp_path)

    stored = load_file(tmp_path / "transformer" / WEIGHTS)
    original = pipeline.transformer.state_dict()
    for name, tensor in stored.items():
        if name in original:
            assert torch.equal(tensor, original[name]), name
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("weight_scale")} == {torch.float32}


def test_a_schedule_is_followed_as_with_the_same_weights_unpacked(tmp_path: Path) -> None:
    quantize(dit(), tmp_path, scheme="w4a16")
    packed = opened(tmp_path, dtype="bfloat16")
    assert packed.pipeline.transformer.transformer_blocks[0].attn1.to_q.kernel.startswith("aten._weight_int4pack_mm")
    plain = dit()
    plain.transformer.load_state_dict(opened(tmp_path).pipeline.transformer.state_dict())
    schedule = Schedule(name="s", steps=STEPS, full=(0, 2, STEPS - 1), reuse="last", errors=(), origin="test")

    pictures = []
    for pipeline, full_dtype in ((packed.pipeline, torch.bfloat16), (plain, torch.float32), (plain, torch.bfloat16)):
        if pipeline is plain:
            pipeline.to(full_dtype)
        follower = hook.Follower(schedule)
        with hook.attach(pipeline, follower), torch.no_grad():
            made = pipeline(
                class_labels=[1, 2],
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            )
        assert follower.full_calls == 3 and follower.calls == STEPS
        pictures.append(torch.from_numpy(made.images))
    low, exact, rounded = pictures
    # As far from float32 as plain bfloat16 is.
    assert (low - exact).abs().mean() < 2 * (rounded - exact).abs().mean()
    # In float32 the weights are the same numbers, so the pictures are too.
    again = opened(tmp_path).pipeline
    with hook.attach(again, hook.Follower(schedule)), torch.no_grad():
        made = again(
            class_labels=[1, 2], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="np"
        )
    torch.testing.assert_close(torch.from_numpy(made.images), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layers", "left"),
    [
        (
            "FluxTransformer2DModel",
            {"num_layers": 1, "num_single_layers": 1},
            {
                "single_transformer_blocks.0.norm.linear",
                "transformer_blocks.0.norm1.linear",
                "transformer_blocks.0.norm1_context.linear",
            },
        ),
        (
            "QwenImageTransformer2DModel",
            {"num_layers": 1},
            {"transformer_blocks.0.img_mod.1", "transformer_blocks.0.txt_mod.1"},
        ),
        ("ZImageTransformer2DModel", {"n_layers": 1}, {"layers.0.adaLN_modulation.0"}),
        ("WanTransformer3DModel", {"num_layers": 1}, set()),
    ],
)
def test_modulation_is_left_in_other_families(name: str, layers: dict[str, int], left: set[str]) -> None:
    import diffusers
    from accelerate import init_empty_weights

    from passes.quantize import denoiser
    from passes.quantize.parameters import QuantizeParameters

    with init_empty_weights():
        module = getattr(diffusers, name)(**layers)
    pipeline = SimpleNamespace(transformer=module)
    found, _ = denoiser.check(pipeline, QuantizeParameters(scheme="w4a16", method="rtn"))["transformer"]
    linear = {key for key, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert {item.name for item in found.skipped if "outside" not in item.reason} == left
    assert {item.name for item in found.layers} | {item.name for item in found.skipped} == linear
    assert len(found.layers) >= 6


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scheme": "w4a16"}, "method=gptq (what method=auto means there)"),
        ({"scheme": "w4a16", "method": "awq"}, "give method=rtn"),
        ({"scheme": "auto", "bits": 5}, "scheme=auto is not offered for pipelines"),
        ({"scheme": "nvfp4", "method": "rtn"}, "scheme=nvfp4 is not offered for pipelines"),
        ({"scheme": "w8a16", "kv_cache": "fp8"}, "has no KV cache"),
        ({"scheme": "w8a16", "ignore": "nothing"}, "ignore=nothing matches no linear layer"),
        ({"scheme": "w4a16", "method": "rtn", "group_size": 96}, "no layer that scheme=w4a16 could quantize"),
    ],
)
def test_what_a_pipeline_cannot_have_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError) as refused:
        QuantizePass.from_mapping(parameters).check_pipeline(dit())
    assert message in str(refused.value)


def test_a_pipeline_without_known_blocks_is_refused() -> None:
    from diffusers import UNet2DModel

    pipeline = dit()
    pipeline.transformer = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    item = QuantizePass.from_mapping({"scheme": "w8a16"})
    with pytest.raises(PassError, match="UNet2DModel has no list of transformer blocks"):
        item.check_pipeline(pipeline)
    pipeline.transformer = None
    with pytest.raises(PassError, match="has no transformer to quantize"):
        item.check_pipeline(pipeline)


def test_a_quantized_pipeline_is_not_quantized_again(tmp_path: Path) -> None:
    quantize(dit(), tmp_path, scheme="w8a16")
    with pytest.raises(PassError, match="is quantized already"):
        QuantizePass.from_mapping({"scheme": "w8a16"}).check_pipeline(opened(tmp_path).pipeline)


def test_layers_that_no_group_divides_are_left_and_named(tmp_path: Path) -> None:
    # 48 hidden: only the second layer of a feed-forward has 192 input features, which 64 divides.
    record = quantize(dit(heads=4, head_dim=12), tmp_path, scheme="w4a16")
    assert {item.name.partition("blocks.")[2] for item in record.layers} == {"0.ff.net.2", "1.ff.net.2"}
    assert {item.group_size for item in record.layers} == {64}
    reasons = {item.name: item.reason for item in record.skipped}
    assert "its 48 input features are no multiple of 32" in reasons["transformer.transformer_blocks.0.attn1.to_q"]
    opened(tmp_path)


def test_ignored_layers_stay(tmp_path: Path) -> None:
    record = quantize(dit(), tmp_path, scheme="w8a16", ignore="re:.*to_out.0$")
    assert len(record.layers) == len(LAYERS) - 2
    assert sum(item.reason == "ignore=re:.*to_out.0$ was asked for" for item in record.skipped) == 2


def test_a_weight_that_is_not_finite_is_named() -> None:
    pipeline = dit()
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[1].attn1.to_k.weight[0, 0] = float("nan")
    item = QuantizePass.from_mapping({"scheme": "w8a16"})
    with pytest.raises(PassError, match=r"transformer_blocks\.1\.attn1\.to_k\.weight"):
        item.apply_pipeline(pipeline, PipelineContext(torch.device("cpu"), Path()))
