"""Opening a pipeline with a quantized denoiser: the same outputs as before saving, and loud refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from effcli.diffusion import quantized
from effcli.diffusion.opening import open_pipeline
from effcli.errors import SourceError
from passes.base import PipelineContext
from passes.quantize import QuantizePass
from tests.passes.quantize.test_denoiser import WEIGHTS, dit

pytest.importorskip("llmcompressor")

SCHEMES = ("w8a16", "w4a16", "w8a8", "fp8")


def outputs(transformer: Any) -> torch.Tensor:
    states = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = transformer(
            states.to(transformer.dtype), torch.tensor([10, 10]), torch.tensor([1, 2])
        ).sample
    return result.float()


@pytest.fixture(scope="module", params=SCHEMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, torch.Tensor]:
    """A scheme, a pipeline stored in it, and what its denoiser returned before it was stored."""
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    pipeline = dit()
    pipeline.save_pretrained(folder)
    item = QuantizePass.from_mapping({"scheme": request.param, "method": "rtn"})
    item.apply_pipeline(pipeline, PipelineContext(torch.device("cpu"), folder))
    before = outputs(pipeline.transformer)
    item.save_pipeline(pipeline, folder)
    return request.param, folder, before


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    pipeline = dit()
    pipeline.save_pretrained(tmp_path)
    item = QuantizePass.from_mapping({"scheme": "w8a16"})
    item.apply_pipeline(pipeline, PipelineContext(torch.device("cpu"), tmp_path))
    item.save_pipeline(pipeline, tmp_path)
    return tmp_path


def test_outputs_are_those_before_saving(made: tuple[str, Path, torch.Tensor]) -> None:
    scheme, folder, before = made
    opened = open_pipeline(folder, device="cpu")
    after = outputs(opened.pipeline.transformer)
    if scheme == "w8a8":  # the product in integers; compressed-tensors rounds a scale otherwise before the last digit
        assert (after - before).abs().max() < 0.01 * before.abs().max()
    else:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert opened.info.blocks == 2
    assert [note for note in opened.info.notes if note.startswith("transformer has 12 quantized layers: 12 on aten.")]


def test_bfloat16_runs_packed_kernels(made: tuple[str, Path, torch.Tensor]) -> None:
    scheme, folder, before = made
    opened = open_pipeline(folder, device="cpu", dtype="bfloat16")
    kernels = {
        "w8a16": "aten._weight_int8pack_mm",
        "w4a16": "aten._weight_int4pack_mm_for_cpu",
        "w8a8": "aten._int_mm",
        "fp8": "aten.linear",
    }
    assert f"12 on {kernels[scheme]}" in opened.info.notes[-1]
    assert (outputs(opened.pipeline.transformer) - before).abs().mean() < 0.05 * before.abs().mean()


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_zero_points_are_read_back(tmp_path: Path, scheme: str) -> None:
    pipeline = dit()
    pipeline.save_pretrained(tmp_path)
    item = QuantizePass.from_mapping({"scheme": scheme, "method": "rtn", "symmetric": False})
    item.apply_pipeline(pipeline, PipelineContext(torch.device("cpu"), tmp_path))
    before = outputs(pipeline.transformer)
    item.save_pipeline(pipeline, tmp_path)
    after = outputs(open_pipeline(tmp_path, device="cpu").pipeline.transformer)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_plain_weights_can_be_asked_for(made: tuple[str, Path, torch.Tensor]) -> None:
    scheme, folder, before = made
    place = folder / "transformer"
    part = quantized.load(
        place, "DiTTransformer2DModel", [place / WEIGHTS], torch.device("cpu"), torch.float32, kernels="plain"
    )
    assert all(hasattr(block.attn1.to_q, "weight") for block in part.module.transformer_blocks)
    torch.testing.assert_close(outputs(part.module), before, rtol=1e-5, atol=1e-5)
    assert "plain weights were asked for" in part.note(scheme)


def test_a_run_is_that_of_the_live_pipeline(stored: Path) -> None:
    pipeline = open_pipeline(stored, device="cpu").pipeline
    other = dit()
    other.transformer.load_state_dict(pipeline.transformer.state_dict())
    pictures = [
        torch.from_numpy(
            each(
                class_labels=[3], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
            ).images
        )
        for each in (pipeline, other)
    ]
    torch.testing.assert_close(*pictures, rtol=1e-6, atol=1e-6)


def test_plain_diffusers_refuses(stored: Path) -> None:
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="compressed-tensors"):
        DiffusionPipeline.from_pretrained(stored)


def test_parameters_are_counted_as_before(stored: Path) -> None:
    parameters = sum(item.numel() for item in dit().transformer.parameters())
    info = open_pipeline(stored, device="cpu", dtype="bfloat16").info
    component = next(item for item in info.components if item.name == "transformer")
    assert component.parameters == parameters
    assert component.weight_bytes is not None and component.weight_bytes < 2 * parameters


def test_what_a_class_keeps_in_float32_stays_so(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiTTransformer2DModel

    monkeypatch.setattr(DiTTransformer2DModel, "_keep_in_fp32_modules", ["proj_out_2"], raising=False)
    place = stored / "transformer"
    module = quantized.load(
        place, "DiTTransformer2DModel", [place / WEIGHTS], torch.device("cpu"), torch.bfloat16
    ).module
    assert module.proj_out_2.weight.dtype == torch.float32
    assert module.proj_out_1.weight.dtype == torch.bfloat16


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path, {"format": "pt"})


PACKED = "transformer_blocks.0.attn1.to_q.weight_packed"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (PACKED, None, f"lack 1 tensors, first '{PACKED}'"),
        ("strange", torch.zeros(1), "hold 1 tensors that its config.json does not describe, first 'strange'"),
        (PACKED, torch.zeros(2, 2, dtype=torch.int32), f"'{PACKED}' in .* is \\(2, 2\\)"),
        (PACKED, torch.zeros(64, 16), f"'{PACKED}' in .* of torch.float32"),
    ],
)
def test_damaged_weights_are_named(stored: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    change(stored, name, tensor)
    with pytest.raises(SourceError, match=message):
        open_pipeline(stored, device="cpu")


def test_other_components_are_left_to_diffusers(stored: Path) -> None:
    components = {"transformer": ("diffusers", "DiTTransformer2DModel"), "vae": ("diffusers", "AutoencoderKL")}
    assert quantized.find(stored, components) == ("transformer",)
    shutil.rmtree(stored / "vae")
    assert quantized.find(stored, components) == ("transformer",)
    path = stored / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = "gguf"
    path.write_text(json.dumps(config))
    assert quantized.find(stored, components) == ()
