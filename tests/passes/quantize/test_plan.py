"""Predictions against what is then written and loaded; times against the profile that they start from."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from passes.base import Figures, ModelProfile, PassContext, PassError, Prediction
from passes.quantize import QuantizePass, plan, product_times
from passes.quantize.parameters import QuantizeParameters
from passes.quantize.product_times import Product, ProductTimes, time_products
from profilers.meta import meta_model
from profilers.peaks import Peaks, WorkingSetBandwidth
from profilers.text import TokenStream
from profilers.weights import weight_bytes_and_parameters
from tests.passes.quantize.compressed import tiny_llama
from tests.tiny_models import VOCABULARY, build

pytest.importorskip("llmcompressor")

CPU = torch.device("cpu")
PEAKS = Peaks(
    device="cpu",
    copy_bytes_per_second=1e10,
    read_bytes_per_second=1e10,
    memory_bytes_per_second=1e10,
    by_working_set=(WorkingSetBandwidth(1 << 20, 1e10),),
    flops_per_second={"bfloat16": 1e11, "float32": 5e10},
    op_overhead_seconds=1e-6,
    seconds_spent=0.0,
)
MEASURED = Figures(
    weight_bytes=None, kv_bytes_per_token=256.0, ttft_seconds=0.5, tpot_seconds=0.01, peak_memory_bytes=10**9
)


def profile(model: Any, figures: Figures = MEASURED, **values: Any) -> ModelProfile:
    """Return a profile of a model in bfloat16, without op times."""
    known = dataclasses.replace(figures, weight_bytes=weight_bytes_and_parameters(model).bytes)
    return ModelProfile(
        model=meta_model(model.config, torch.bfloat16),
        dtype=torch.bfloat16,
        device=CPU,
        peaks=PEAKS,
        batch=1,
        context=16,
        figures=known,
        report={"profiles": {}, **values},
    )


def predict(model: Any, figures: Figures = MEASURED, **values: Any) -> Prediction:
    return plan.predict(QuantizeParameters(**values), profile(model, figures))


def half(model: nn.Module) -> Any:
    return copy.deepcopy(model).to(torch.bfloat16)


def written(model: Any, folder: Path, **values: Any) -> Path:
    """Quantize a model and write it."""
    text = TokenStream(torch.randint(0, VOCABULARY, (4000,), generator=torch.Generator().manual_seed(1)), "random")
    item = QuantizePass.from_mapping(values)
    item.apply(model, PassContext(None, CPU, text, folder / "work"))
    item.save(model, folder / "out")
    return folder / "out"


@pytest.mark.parametrize(
    "values",
    [
        {"method": "rtn"},
        {"method": "rtn", "group_size": 32},
        {"method": "rtn", "symmetric": False},
        {"scheme": "w8a16"},
        {"scheme": "w8a8", "method": "rtn"},
        {"scheme": "fp8"},
        {"method": "rtn", "ignore": ("re:.*o_proj$",)},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_written_and_loaded(values: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    from effcli import checkpoint

    model = half(tiny_llama(tied=tied))
    # 96 columns hold no groups of 64, so the group size is 32 for all.
    prediction = predict(model, **values)
    total = sum(parameter.numel() for parameter in model.parameters())
    folder = written(model, tmp_path, **values)
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert prediction.bits_per_parameter == pytest.approx(8 * stored / total, rel=1e-12)
    loaded = checkpoint.load(str(folder), device="cpu", dtype="bfloat16")
    assert prediction.figures.weight_bytes == weight_bytes_and_parameters(loaded.model).bytes


def test_times_replace_the_measured_share_of_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(sets: Any, device: torch.device, dtype: torch.dtype) -> tuple[ProductTimes, ...]:
        seconds = (2e-3, 5e-4)  # four times as fast, whatever the phase
        return tuple(
            ProductTimes({}, {product.key: 0 for product in products}, total)
            for products, total in zip(sets, seconds, strict=True)
        )

    monkeypatch.setattr(product_times, "time_products", times)
    model = half(tiny_llama())
    apart = predict(model, method="rtn")
    assert apart.figures.tpot_seconds == pytest.approx(10e-3 - 2e-3 + 5e-4)
    assert apart.figures.ttft_seconds == pytest.approx(0.5 - 2e-3 + 5e-4)
    assert apart.slower is False

    # With op times, the share of matrix products in the measured step counts: 60 % here.
    point = {
        "batch": 1,
        "context": 16,
        "time_seconds": 10e-3,
        "op_classes": [{"name": "matmul", "measured_seconds": 6e-3}],
    }
    points = [{**point, "phase": "decode"}, {**point, "phase": "prefill"}]
    seen = plan.predict(QuantizeParameters(method="rtn"), profile(model, profiles={"intensity": {"points": points}}))
    assert seen.figures.tpot_seconds == pytest.approx(10e-3 * (0.4 + 0.6 / 4))
    assert any("60% of the 10 ms" in note for note in seen.notes)


def test_a_slower_kernel_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(sets: Any, device: torch.device, dtype: torch.dtype) -> tuple[ProductTimes, ...]:
        return tuple(
            ProductTimes({}, {product.key: 0 for product in products}, total)
            for products, total in zip(sets, (2e-3, 4e-3), strict=True)
        )

    monkeypatch.setattr(product_times, "time_products", times)
    found = predict(half(tiny_llama()), method="rtn")
    assert found.slower is True
    assert any("slower" in note for note in found.notes)


def test_no_kernel_means_no_change_and_says_so() -> None:
    found = predict(half(tiny_llama()), scheme="mxfp4")
    assert found.figures.tpot_seconds == MEASURED.tpot_seconds
    assert found.slower is False
    assert any("float4" in note for note in found.notes)


def test_rounding_activations_without_a_kernel_costs_time() -> None:
    # Products of this size take microseconds; rounding the activations in Python takes many.
    found = predict(half(tiny_llama()), scheme="fp8")
    tpot = found.figures.tpot_seconds
    assert tpot is not None and tpot > 10e-3
    assert any("rounding activations takes time" in note for note in found.notes)


def test_without_measured_times_there_are_none() -> None:
    nothing = Figures(kv_bytes_per_token=256.0)
    found = predict(half(tiny_llama()), nothing, method="rtn")
    assert found.figures.tpot_seconds is None and found.figures.ttft_seconds is None
    assert found.figures.peak_memory_bytes is None
    assert found.slower is None
    assert found.figures.weight_bytes is not None
    assert any("no measured times" in note for note in found.notes)


def test_mixed_bits_meet_the_budget() -> None:
    model = half(tiny_llama())
    weights = sum(layer.weight.numel() for layer in model.modules() if type(layer) is nn.Linear) - VOCABULARY * 64
    total = sum(parameter.numel() for parameter in model.parameters())
    for bits in (4.75, 5.5):
        found = predict(model, scheme="auto", bits=bits)
        assert found.bits_per_parameter == pytest.approx((bits * weights + 16 * (total - weights)) / total)
    with pytest.raises(PassError, match=r"bits=4\.2 is less than"):
        predict(model, scheme="auto", bits=4.2)


def test_more_samples_take_more_time_and_memory_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half(tiny_llama())
    few, many = (predict(model, samples=samples) for samples in (8, 512))
    assert few.pass_seconds is not None and many.pass_seconds is not None
    assert few.pass_seconds < many.pass_seconds
    assert few.fits is True
    monkeypatch.setattr("profilers.device.memory_available_bytes", lambda device: 1000)
    assert predict(model).fits is False


def test_fp8_cache_is_left_to_engines_that_read_it() -> None:
    found = predict(half(tiny_llama()), method="rtn", kv_cache="fp8")
    assert found.figures.kv_bytes_per_token == MEASURED.kv_bytes_per_token
    assert any("vLLM" in note for note in found.notes)


def test_experts_run_as_plain_weights() -> None:
    found = predict(half(build("mixtral")), scheme="w8a16")
    assert any("experts" in note and "fused" in note for note in found.notes)


class Slow(nn.Module):
    """Takes a known time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.register_buffer("weight", torch.zeros(250))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        import time

        time.sleep(self.seconds)
        return rows


def test_products_are_timed_by_kind_and_summed_over_layers() -> None:
    slow = [Product("a", lambda: Slow(2e-3), 6, 1, 8), Product("b", lambda: Slow(1e-3), 2.5, 1, 8)]
    fast = [Product("a", lambda: Slow(5e-4), 6, 1, 8)]
    first, second = time_products((slow, fast), CPU, torch.float32)
    assert first.seconds["a"] == pytest.approx(2e-3, rel=0.5)
    assert first.total_seconds == pytest.approx(6 * first.seconds["a"] + 2.5 * first.seconds["b"])
    assert second.total_seconds < first.total_seconds
    assert first.held_bytes == {"a": 1000, "b": 1000}
