"""Each kernel against float64, and whole models against plain transformers and float64.

The limits here are those of ``docs/passes/kernels.md``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from passes.base import KernelUse, LoadOptions, LoadRecord, PassError
from passes.quantize import kernels
from passes.quantize.kernels import PLAIN, KernelChoice, choose, quantize_linear, random_linear, repack, round_rows
from passes.quantize.linears import (
    UNPACK_INT4_ROWS,
    UNPACK_INT8_ROWS,
    DynamicInt8Linear,
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    PackedLinear,
)
from passes.quantize.packing import Integers, int4_group_size
from passes.quantize.quiet import quiet_libraries
from profilers.op_trace import OpTracer
from profilers.outliers import measure_outliers
from profilers.phases import forward_without_cache, prefill
from profilers.weights import weight_bytes_and_parameters
from tests.passes.quantize.compressed import HIDDEN, INNER, VOCABULARY, save_compressed, tiny_llama
from tests.passes.quantize.test_packing import random_integers
from tests.tiny_models import build

CPU = torch.device("cpu")
# ||kernel - float64|| / ||float64|| of one layer, by dtype of activations.
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
UNPACKED_LIMITS = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 2e-6}
# Zero points are multiplied by their scales and rounded to the dtype of the activations.
ASYMMETRIC_LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
# Logits of an int4 model through the kernel, as a multiple of the distance that plain weights have from float64.
MODEL_FACTOR = 1.5
HEAD_LIMIT = 1e-2

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
SCHEMES: dict[str, tuple[dict[str, Any] | None, str | None, str, str | None]] = {
    "w4a16": (INT4, None, "aten._weight_int4pack_mm_for_cpu", None),
    "w4a16 asymmetric": (INT4 | {"symmetric": False}, None, "aten._weight_int4pack_mm_for_cpu", None),
    "w4a16 by row": ({**INT8, "num_bits": 4}, None, "aten._weight_int4pack_mm_for_cpu", None),
    "w3a16": (INT4 | {"num_bits": 3}, None, "aten._weight_int4pack_mm_for_cpu", None),
    "groups of 16": (INT4 | {"group_size": 16}, None, PLAIN, "groups of 16"),
    "w8a16": (INT8, None, "aten._weight_int8pack_mm", None),
    "w6a16": (INT8 | {"num_bits": 6}, None, "aten._weight_int8pack_mm", None),
    "w8a16 in groups": (INT4 | {"num_bits": 8}, None, PLAIN, "one scale a row"),
    "w8a16 asymmetric": (INT8 | {"symmetric": False}, None, PLAIN, "zero points"),
    "w8a8": (None, "W8A8", "aten._int_mm", None),
    "fp8": (None, "FP8_DYNAMIC", PLAIN, "float8"),
    "nvfp4": (None, "NVFP4A16", PLAIN, "float4"),
    "mxfp4": (None, "MXFP4A16", PLAIN, "float4"),
}


def exact(weight: Integers) -> torch.Tensor:
    return weight.dequantize(torch.float64)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def options(dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> LoadOptions:
    return LoadOptions(CPU, dtype, **kwargs)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [1, 2, 7, UNPACK_INT4_ROWS - 1, UNPACK_INT4_ROWS, 200])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group", "symmetric", "bias"),
    [
        (64, 64, 32, True, False),
        (97, 96, 32, False, True),
        (576, 192, 64, True, True),
        (5, 1024, 512, True, False),
        (33, 256, None, False, False),
    ],
)
def test_int4_is_close_to_float64(
    out_features: int, in_features: int, group: int | None, symmetric: bool, bias: bool, rows: int, dtype: torch.dtype
) -> None:
    weight = random_integers(out_features, in_features, group, symmetric=symmetric)
    generator = torch.Generator().manual_seed(rows)
    offset = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    size = int4_group_size(group, in_features)
    assert size is not None
    layer = Int4Linear(weight, size, offset, dtype)
    x = torch.randn(2, rows, in_features, generator=generator).to(dtype)[:1]
    expected = x.double() @ exact(weight).t() + (0 if offset is None else offset.double())
    found = layer(x)
    assert found.shape == (1, rows, out_features) and found.dtype == dtype
    limits = ASYMMETRIC_LIMITS if not symmetric else UNPACKED_LIMITS if rows >= UNPACK_INT4_ROWS else LIMITS
    assert error(found, expected) < limits[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [1, 3, UNPACK_INT8_ROWS - 1, UNPACK_INT8_ROWS, 200])
@pytest.mark.parametrize(("out_features", "in_features", "bias"), [(97, 16, True), (1, 48, False), (64, 576, True)])
def test_int8_is_close_to_float64(
    out_features: int, in_features: int, bias: bool, rows: int, dtype: torch.dtype
) -> None:
    weight = random_integers(out_features, in_features, None, bits=8)
    generator = torch.Generator().manual_seed(rows)
    offset = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    expected = x.double() @ exact(weight).t() + (0 if offset is None else offset.double())
    limit = LIMITS[dtype] if dtype != torch.float16 else 1e-3  # its scales are rounded from bfloat16
    assert error(Int8Linear(weight, offset, dtype)(x), expected) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize(("out_features", "in_features"), [(97, 33), (64, 576)])
def test_w8a8_is_exact_but_for_rounding_the_activations(
    out_features: int, in_features: int, rows: int, dtype: torch.dtype
) -> None:
    weight = random_integers(out_features, in_features, None, bits=8)
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    scale = x.double().abs().amax(dim=-1, keepdim=True) / 127.5
    rounded = (x.float() / scale.float()).round().clamp(-128, 127).double() * scale
    layer = DynamicInt8Linear(weight, None, dtype)
    assert error(layer(x), rounded @ exact(weight).t()) < {torch.bfloat16: 4e-3, torch.float32: 2e-6}[dtype]
    zeros = layer(torch.zeros(2, in_features, dtype=dtype))
    assert (zeros == 0).all()


@pytest.mark.parametrize(
    ("arguments", "kernel", "reason"),
    [
        ((4, "int", 64, 576, 576, CPU, torch.bfloat16), "aten._weight_int4pack_mm_for_cpu", None),
        ((2, "int", 64, 576, 576, CPU, torch.bfloat16), "aten._weight_int4pack_mm_for_cpu", None),
        ((4, "int", 64, 576, 576, CPU, torch.float32), PLAIN, "float32"),
        ((4, "int", 16, 576, 576, CPU, torch.bfloat16), PLAIN, "groups of 16"),
        ((8, "int", None, 576, 576, CPU, torch.bfloat16), "aten._weight_int8pack_mm", None),
        ((8, "int", None, 576, 24, CPU, torch.bfloat16), PLAIN, "multiples of 16"),
        ((8, "int", 64, 576, 576, CPU, torch.bfloat16), PLAIN, "one scale a row"),
        ((8, "int-dynamic", None, 97, 33, CPU, torch.float32), "aten._int_mm", None),
        ((8, "float", None, 576, 576, CPU, torch.bfloat16), PLAIN, "float8"),
        ((8, "float-block", 128, 576, 576, CPU, torch.bfloat16), PLAIN, "by block"),
        ((4, "float-group", 16, 576, 576, CPU, torch.bfloat16), PLAIN, "float4"),
        ((4, "int", 64, 576, 576, torch.device("mps"), torch.bfloat16), PLAIN, "mps"),
    ],
)
def test_choose_names_the_kernel_or_the_reason(arguments: tuple[Any, ...], kernel: str, reason: str | None) -> None:
    choice = choose(*arguments)
    assert choice.kernel == kernel
    assert (choice.reason is None) == (reason is None) and (reason is None or reason in str(choice.reason))
    if choice.device == CPU:
        layer = random_linear(choice, bias=True)
        out = layer(torch.randn(3, choice.in_features).to(choice.dtype))
        assert out.shape == (3, choice.out_features) and out.isfinite().all()
        assert isinstance(layer, PackedLinear) == (reason is None)


@pytest.mark.parametrize(
    ("capability", "arguments", "kernel"),
    [
        ((8, 0), (4, "int", 128, 4096, 4096, torch.bfloat16), "aten._weight_int4pack_mm"),
        ((7, 5), (4, "int", 128, 4096, 4096, torch.bfloat16), PLAIN),
        ((8, 0), (4, "int", 128, 4096, 4096, torch.float16), PLAIN),
        ((8, 9), (8, "float", None, 4096, 4096, torch.bfloat16), "aten._scaled_mm"),
        ((8, 6), (8, "float", None, 4096, 4096, torch.bfloat16), PLAIN),
        ((9, 0), (8, "float", None, 4096, 4090, torch.bfloat16), PLAIN),
        ((9, 0), (8, "int-dynamic", None, 4096, 4096, torch.bfloat16), "aten._int_mm"),
        ((9, 0), (8, "int-dynamic", None, 4097, 4096, torch.bfloat16), PLAIN),
    ],
)
def test_choose_heeds_the_gpus_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arguments: tuple[Any, ...], kernel: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    *shape, dtype = arguments
    choice = choose(*shape, torch.device("cuda"), dtype)
    assert choice.kernel == kernel and (choice.reason is None) == (kernel != PLAIN)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_checkpoint_runs_the_kernel_of_its_scheme(name: str, tmp_path: Path) -> None:
    weights, preset, kernel, reason = SCHEMES[name]
    folder = _save(tiny_llama(bias=True), tmp_path, weights, preset=preset)
    ids = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    with quiet_libraries():
        plain = _logits(_read(folder), ids)  # as plain transformers runs it
    model = _read(folder)
    record = repack(model, options(), head="keep")
    classes = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert tuple(use.layer_class for use in record.kernels) == (*classes, "lm_head")
    for use in record.kernels[:-1]:
        assert (use.kernel, use.layers) == (kernel, 2)
        assert (use.fallback_reason is None) == (reason is None) and (reason or "") in (use.fallback_reason or "")
    assert record.kernels[-1] == KernelUse("lm_head", PLAIN, 1, "it is not quantized in the file")
    assert not hasattr(model, "ct_decompress_hook")
    found = _logits(model, ids)
    if kernel == PLAIN:
        assert torch.equal(found, plain)
    elif preset == "W8A8":  # compressed-tensors rounds a token's scale to bfloat16 first
        assert error(found, plain) < 0.1
    else:
        reference = _read(folder, torch.float64)
        repack(reference, options(torch.float64, kernels="plain"))
        expected = _logits(reference, ids)
        assert error(found, expected) < MODEL_FACTOR * error(plain, expected)


def test_float32_models_stay_exact(tmp_path: Path) -> None:
    """No kernel is fast in float32, so its weights are those that transformers decompresses."""
    folder = _save(tiny_llama(), tmp_path, INT4)
    ids = torch.randint(0, VOCABULARY, (1, 20))
    model, plain = _read(folder, torch.float32), _read(folder, torch.float32)
    record = repack(model, options(torch.float32))
    assert {use.kernel for use in record.kernels} == {PLAIN} and record.notes == ()
    with quiet_libraries():
        assert torch.equal(_logits(model, ids), _logits(plain, ids))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear and type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_runs_from_an_int8_copy(tied: bool, tmp_path: Path) -> None:
    folder = _save(tiny_llama(tied=tied), tmp_path, INT4)
    ids = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    kept, packed = _read(folder), _read(folder)
    repack(kept, options(), head="keep")
    record = repack(packed, options())
    assert record.kernels[-1] == KernelUse("lm_head", "aten._weight_int8pack_mm", 1)
    assert "int8" in record.notes[0] and ("tied" in record.notes[0]) == tied
    assert type(kept.lm_head) is nn.Linear and isinstance(packed.lm_head, Int8Linear)
    assert error(_logits(packed, ids), _logits(kept, ids).double()) < HEAD_LIMIT
    original = tiny_llama(tied=tied)
    size = weight_bytes_and_parameters(packed)
    assert size.parameters == sum(parameter.numel() for parameter in original.parameters())
    extra = VOCABULARY * HIDDEN + 2 * VOCABULARY - (0 if tied else 2 * VOCABULARY * HIDDEN)
    assert size.bytes - weight_bytes_and_parameters(kept).bytes == extra


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_rounding_is_to_the_nearest(monkeypatch: pytest.MonkeyPatch, bits: int, group: int | None) -> None:
    monkeypatch.setattr(kernels, "ROUNDED_ROWS", 3)
    weight = torch.randn(10, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    weight[4] = 0
    rounded = round_rows(weight, bits, group, torch.bfloat16)
    groups = weight.double().view(10, -1, group or 64)
    difference = (exact(rounded).view_as(groups) - groups).abs()
    # A scale that was rounded down leaves the largest value past the last integer, by at most the scale's rounding.
    limit = torch.maximum(rounded.scales.double() / 2, groups.abs().amax(dim=-1) * 2**-8)
    assert (difference <= limit.unsqueeze(-1) * 1.0001).all() and (exact(rounded)[4] == 0).all()
    layer = nn.Linear(64, 10, bias=False, dtype=torch.bfloat16)
    layer.weight.data = weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for dtype, kind in ((torch.bfloat16, PackedLinear), (torch.float32, nn.Linear)):
        ready = quantize_linear(layer, bits, group, dtype)
        assert isinstance(ready, kind)
        assert error(ready(x.to(dtype)), x.double() @ exact(rounded).t()) < LIMITS[dtype]


def test_packed_layers_survive_what_models_go_through(tmp_path: Path) -> None:
    folder = _save(tiny_llama(bias=True), tmp_path, INT4)
    model = _read(folder)
    repack(model, options())
    ids = torch.randint(0, VOCABULARY, (1, 12))
    before = _logits(model, ids)
    assert (model.device, model.dtype) == (CPU, torch.bfloat16)
    assert torch.equal(_logits(copy.deepcopy(model), ids), before)
    layer = model.model.layers[0].self_attn.q_proj
    assert not hasattr(layer, "weight") and list(layer.parameters()) == []
    assert (layer.in_features, layer.out_features) == (HIDDEN, HIDDEN) and "int4pack" in repr(layer)
    layer.to("cpu")
    layer.eval()
    for move in (lambda: layer.to("meta"), lambda: layer.half(), lambda: nn.Sequential(layer).float()):
        with pytest.raises(PassError, match="load the checkpoint again"):
            move()
    assert torch.equal(_logits(model, ids), before)
    notes = measure_outliers(model, ids).notes
    assert "15 layers have no rows: their weights are quantized and packed for a kernel" in notes
    generated = model.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False)  # random weights may end early
    assert generated.shape == (1, 15)
    forward_without_cache(model, ids, ids)


def test_traced_bytes_are_those_of_the_packed_weights(tmp_path: Path) -> None:
    folder = _save(tiny_llama(), tmp_path, INT4)
    model = _read(folder)
    repack(model, options())
    with OpTracer(model) as tracer:
        prefill(model, 1, 1)
    trace = tracer.result()
    layer = trace.modules["model.layers.0.mlp.gate_proj"]
    groups, rows = HIDDEN // 32, 128  # 96 rows are filled up to 128
    assert layer.weight_bytes == rows * HIDDEN // 2 + rows * groups * 2 * 2
    assert layer.flops == 2 * rows * HIDDEN
    down = trace.modules["model.layers.0.mlp.down_proj"]
    assert down.weight_bytes == HIDDEN * INNER // 2 + HIDDEN * (INNER // 32) * 2 * 2
    head = trace.modules["lm_head"]
    assert head.weight_bytes == VOCABULARY * HIDDEN + 2 * VOCABULARY and head.flops == 2 * VOCABULARY * HIDDEN
    assert trace.uncounted == ()


def test_packed_layers_compile_as_one_graph() -> None:
    layers = [
        random_linear(choose(4, "int", 32, 97, 64, CPU, torch.bfloat16), bias=True),
        random_linear(choose(8, "int", None, 64, 64, CPU, torch.bfloat16)),
        random_linear(choose(8, "int-dynamic", None, 64, 64, CPU, torch.bfloat16)),
    ]
    for layer in layers:
        for rows in (1, 64):
            x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            with torch.inference_mode():
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("ignore", "layers"), [(["lm_head"], 2), (["lm_head", "re:.*experts.*"], 0)])
def test_experts_that_transformers_fuses_are_said_to_be_decompressed(ignore: list[str], layers: int) -> None:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=INT4)
    model = build("mixtral")
    model.hf_quantizer = SimpleNamespace(
        compressor=SimpleNamespace(
            quantization_config=QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore)
        )
    )
    record = repack(model, options(torch.float32))
    experts = [use for use in record.kernels if use.layer_class == "experts"]
    assert [use.layers for use in experts] == ([layers] if layers else [])
    assert all("decompresses" in str(use.fallback_reason) for use in experts)


def test_fp8_layers_keep_row_and_tensor_scales() -> None:
    choice = KernelChoice("aten._scaled_mm", None, 8, "float", None, 32, 64, CPU, torch.bfloat16)
    layer = random_linear(choice)
    assert isinstance(layer, Fp8Linear) and layer.values.dtype == torch.float8_e4m3fn and layer.scales.shape == (1, 32)
    by_tensor = Fp8Linear(layer.values, torch.tensor([0.5]), None, torch.bfloat16)
    assert by_tensor.scales.shape == (1, 32) and (by_tensor.scales == 0.5).all()


def test_a_model_on_several_devices_is_left_to_compressed_tensors(tmp_path: Path) -> None:
    folder = _save(tiny_llama(), tmp_path, INT4)
    model = _read(folder)
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    record = repack(model, options())
    assert all(use.kernel == PLAIN and "several devices" in str(use.fallback_reason) for use in record.kernels[:-1])
    assert sum(use.layers for use in record.kernels) == 15
    with quiet_libraries():
        assert torch.equal(_logits(model, torch.tensor([[1, 2, 3]])), _logits(_read(folder), torch.tensor([[1, 2, 3]])))


@pytest.mark.parametrize("name", ["w4a16 asymmetric", "w8a16", "w8a8", "fp8", "nvfp4"])
def test_every_op_of_a_prefill_is_counted(name: str, tmp_path: Path) -> None:
    """Unpacking and rounding activations are work that a profile knows."""
    weights, preset, kernel, _ = SCHEMES[name]
    model = _read(_save(tiny_llama(), tmp_path, weights, preset=preset))
    repack(model, options())
    with quiet_libraries(), OpTracer(model) as tracer:
        prefill(model, 1, 64)
    trace = tracer.result()
    assert trace.uncounted == ()
    if kernel == PLAIN:
        layer = trace.modules["model.layers.0.mlp.gate_proj"]
        assert layer.flops == 2 * 64 * HIDDEN * INNER and layer.weight_bytes == 2 * HIDDEN * INNER


def test_a_model_that_is_not_quantized_is_left_alone() -> None:
    model = tiny_llama()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert repack(model, options(torch.float32)) == LoadRecord()
    assert [module for module in model.modules() if isinstance(module, nn.Linear)] == layers


def _save(model: PreTrainedModel, folder: Path, weights: dict[str, Any] | None, **kwargs: Any) -> Path:
    with quiet_libraries():
        return save_compressed(model, folder, weights, **kwargs)


def _read(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with quiet_libraries():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits
    return logits
