"""What is saved is what was computed, as transformers reads it, without a copy of the model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from transformers import AutoModelForCausalLM, PreTrainedModel

from passes.base import PassError
from passes.quantize import QuantizePass, saving
from tests.passes.quantize.small import build, context, logits, parameters, quantize, stored

LAYER = "model.layers.1.mlp.down_proj"


def reload(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or of another shape
    return model.eval()


@pytest.mark.parametrize(
    ("given", "number_format"),
    [
        ({"scheme": "w4a16"}, "pack-quantized"),
        ({"scheme": "w4a16", "method": "rtn", "symmetric": False, "group_size": 32}, "pack-quantized"),
        ({"scheme": "w4a16", "actorder": "none"}, "pack-quantized"),
        ({"scheme": "w8a16"}, "pack-quantized"),
        ({"scheme": "w8a8"}, "int-quantized"),
        ({"scheme": "fp8"}, "float-quantized"),
        ({"scheme": "fp8-block"}, "float-quantized"),
        ({"scheme": "nvfp4"}, "nvfp4-pack-quantized"),
        ({"scheme": "mxfp4"}, "mxfp4-pack-quantized"),
        ({"scheme": "auto", "bits": 5.0}, "pack-quantized"),
    ],
    ids=str,
)
def test_plain_transformers_reads_what_was_computed(given: dict[str, Any], number_format: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if "fp4" in given["scheme"] else torch.float32
    model = build(dtype=dtype)
    step = QuantizePass.from_mapping(parameters(**given))
    step.apply(model, context(tmp_path / "work"))
    expected = logits(model)
    step.save(model, tmp_path / "out")
    assert torch.equal(logits(reload(tmp_path / "out", dtype)), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == number_format
    assert config["quantization_status"] == "compressed" and "lm_head" in config["ignore"]
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_packed_integers_are_round_to_nearest_by_hand(tmp_path: Path) -> None:
    quantize(build(), tmp_path / "work", tmp_path / "out", method="rtn", group_size=32)
    tensors = stored(tmp_path / "out")
    weight = build().get_submodule(LAYER).weight.detach().double().reshape(128, 8, 32)
    scale = (weight.abs().amax(-1) / 7.5).float()  # 2 max|w| over the 15 steps of four bits
    assert torch.equal(tensors[f"{LAYER}.weight_scale"], scale)
    codes = (weight / scale.double()[..., None]).round().clamp(-8, 7).to(torch.int8).reshape(128, 256)
    shape = torch.Size(tensors[f"{LAYER}.weight_shape"].tolist())
    found = unpack_from_int32(tensors[f"{LAYER}.weight_packed"], 4, shape)
    # A group's largest value is 7.5 steps away: half-way between two codes, and rounded either way by the last bit.
    apart = (weight / scale.double()[..., None]).reshape(128, 256)
    assert bool(((found == codes) | ((apart - apart.floor() - 0.5).abs() < 1e-6)).all())
    assert int((found != codes).sum()) < 128 * 8


def test_float8_rows_by_hand(tmp_path: Path) -> None:
    quantize(build(), tmp_path / "work", tmp_path / "out", scheme="fp8")
    tensors = stored(tmp_path / "out")
    weight = build().get_submodule(LAYER).weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert torch.allclose(tensors[f"{LAYER}.weight_scale"], scale, rtol=1e-6)
    kept = tensors[f"{LAYER}.weight"].double() * tensors[f"{LAYER}.weight_scale"].double()
    # Three bits of mantissa: at most one part in sixteen; below 2^-6 of the scale steps are 2^-9.
    bound = weight.double().abs() / 16 + scale.double() * 2.0**-10 * 1.01
    assert bool(((kept - weight.double()).abs() <= bound).all())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "given", [{}, {"scheme": "w8a16"}, {"method": "rtn"}, {"scheme": "auto", "bits": 5.0}], ids=str
)
def test_experts_are_stored_as_published_and_read_back(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = build(name)
    original = logits(model)
    step = QuantizePass.from_mapping(parameters(**given))
    step.apply(model, context(tmp_path / "work"))
    expected = logits(model)
    step.save(model, tmp_path / "out")
    found = logits(reload(tmp_path / "out", torch.float32))
    assert torch.allclose(found, expected, atol=1e-6)  # fused experts add in another order
    assert not torch.allclose(found, original, atol=1e-4)
    layer = {"mixtral": "block_sparse_moe.experts.3.w2", "qwen3_moe": "mlp.experts.3.down_proj"}[name]
    assert f"model.layers.0.{layer}.weight_packed" in stored(tmp_path / "out")


def test_float8_experts_are_read_back_in_bfloat16_with_activations_as_they_are(tmp_path: Path) -> None:
    """Transformers dequantizes FP8 experts to bfloat16 when it reads them; the weights are those that were rounded."""
    model = build("mixtral")
    quantize(model, tmp_path / "work", tmp_path / "out", scheme="fp8")
    tensors = stored(tmp_path / "out")
    name = "model.layers.0.block_sparse_moe.experts.2.w2"
    expected = (tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"].float()).bfloat16().float()
    read = reload(tmp_path / "out", torch.float32)
    assert torch.equal(read.model.layers[0].mlp.experts.down_proj[2], expected)


def test_experts_left_out_are_stored_as_transformers_reads_them(tmp_path: Path) -> None:
    model = build("mixtral")
    step = QuantizePass.from_mapping(parameters(experts="skip"))
    record = step.apply(model, context(tmp_path / "work"))
    expected = logits(model)
    step.save(model, tmp_path / "out")
    assert torch.equal(logits(reload(tmp_path / "out", torch.float32)), expected)
    assert any("experts are stored fused" in note for note in record.notes)


def test_mixed_bits_are_stored_by_layer(tmp_path: Path) -> None:
    record = quantize(build(), tmp_path / "work", tmp_path / "out", scheme="auto", bits=5.0)
    tensors = stored(tmp_path / "out")
    widths = {item.name: item.bits for item in record.layers}
    assert set(widths.values()) == {4, 8}
    for name, bits in widths.items():
        columns = int(tensors[f"{name}.weight_shape"][1])
        assert tensors[f"{name}.weight_packed"].shape[1] == columns * bits / 32
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    listed = [name for group in groups.values() for name in group["targets"]]
    assert sorted(listed) == sorted(widths)
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        parent = "self_attn" if len(parts) == 3 else "mlp"
        assert len({widths[f"model.layers.0.{parent}.{part}"] for part in parts}) == 1


def test_cache_scales_are_stored_for_engines_that_read_them(tmp_path: Path) -> None:
    record = quantize(build(), tmp_path / "work", tmp_path / "out", kv_cache="fp8")
    tensors = stored(tmp_path / "out")
    for side in ("k_scale", "v_scale"):
        scale = tensors[f"model.layers.0.self_attn.{side}"]
        assert scale.numel() == 1 and 0 < float(scale) < 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8 and config["kv_cache_scheme"]["type"] == "float"
    assert any("transformers ignores them" in note for note in record.notes)


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    model = build()
    quantize(model, tmp_path / "work")
    saving.compress(model)
    saving.write(model, tmp_path / "out", saving.quantization_config(model, ()), shard_bytes=100_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 120_000 for path in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(stored(tmp_path / "out"))


def test_saving_holds_the_model_and_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each write, the bytes of live tensors are at most the compressed model's, and one shard's beside it."""
    import gc

    import transformers.modeling_utils

    def live() -> int:
        storages = {
            item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
            for item in gc.get_objects()
            if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == "cpu"  # no fake ones
        }
        return sum(storages.values())

    gc.collect()
    outside = live()
    model = build()
    quantize(model, tmp_path / "work", method="rtn")
    saving.compress(model)
    gc.collect()
    compressed = live() - outside
    seen: list[tuple[int, int]] = []
    save_file = transformers.modeling_utils.safe_save_file

    def watched(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        seen.append((live() - outside, sum(tensor.nbytes for tensor in tensors.values())))
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", watched)
    saving.write(model, tmp_path / "out", saving.quantization_config(model, ()), shard_bytes=100_000)
    assert len(seen) > 2
    assert all(held <= compressed + shard for held, shard in seen)


def test_a_model_that_was_not_quantized_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="has no quantized layer; run the pass before saving"):
        QuantizePass.from_mapping({}).save(build(), tmp_path / "out")


def test_skipped_layers_are_ignored_by_readers(tmp_path: Path) -> None:
    quantize(build(), tmp_path / "work", tmp_path / "out", ignore=["re:.*o_proj$"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"lm_head", *(f"model.layers.{index}.self_attn.o_proj" for index in range(3))}
