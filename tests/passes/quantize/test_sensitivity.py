"""Sensitivities are what a plain forward says in float64, the model is left alone, and interrupted work goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from effcli.reports.model import plain
from passes.base import PassContext, PassError
from passes.quantize import sensitivity, targets
from passes.quantize.parameters import QuantizeParameters
from passes.quantize.sensitivity import Allocation, allocate
from profilers.text import TokenStream
from tests.passes.quantize.compressed import tiny_llama
from tests.tiny_models import VOCABULARY, build

pytest.importorskip("compressed_tensors")

TEXT = TokenStream(torch.randint(0, VOCABULARY, (4000,), generator=torch.Generator().manual_seed(1)), "random")


def parameters(bits: float = 5.0, **values: Any) -> QuantizeParameters:
    return QuantizeParameters(scheme="auto", bits=bits, **values)


def run(model: Any, folder: Path, bits: float = 5.0, progress: Any = None, **values: Any) -> Allocation:
    wanted = parameters(bits, **values)
    context = PassContext(None, torch.device("cpu"), TEXT, folder)
    if progress is not None:
        context.progress = progress
    return allocate(model, wanted, context, targets.find(model, wanted).layers)


def rounded(weight: torch.Tensor, bits: int, size: int | None) -> torch.Tensor:
    """Round to nearest by the definition: a scale is a group's largest absolute value / (2^bits - 1) x 2."""
    groups = weight.double().reshape(weight.shape[0], -1, size or weight.shape[1])
    scale = (groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).float().double()
    steps = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (steps * scale).reshape(weight.shape)


def divergence(model: Any, changed: Any, ids: torch.Tensor) -> float:
    """Mean KL of whole forwards in float64."""
    with torch.no_grad():
        p, q = (item(ids).logits.log_softmax(-1) for item in (model, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("layout", [(4, 32), (4, 64), (8, None)])
def test_rounding_is_to_the_nearest_step(layout: tuple[int, int | None]) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    found = sensitivity.round_to_nearest(weight, parameters(), layout).double()
    bits, size = layout
    groups = weight.double().reshape(48, -1, size or 64)
    scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    steps = found.reshape(groups.shape) / scale
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.min() >= -(2 ** (bits - 1)) - 1e-4 and steps.max() <= 2 ** (bits - 1) - 1 + 1e-4
    # The largest value of a group lies half a step from the last one: either neighbour is as near.
    assert ((found.reshape(groups.shape) - groups).abs() / scale).max() < 0.5 + 1e-4


@pytest.mark.parametrize("name", ["wide llama", "gemma3", "diffllama"])
def test_sensitivity_is_the_divergence_of_a_whole_forward(name: str, tmp_path: Path) -> None:
    model = tiny_llama() if name == "wide llama" else build(name)
    ignored = {} if name == "wide llama" else {"ignore": ("re:.*down_proj$",)}  # 48 columns hold no group
    found = run(model, tmp_path, 5.5, **ignored)
    ids = TEXT.windows(sensitivity.WINDOWS, sensitivity.WINDOW_LENGTH)
    exact = copy.deepcopy(model).double()
    for group in found.table:
        changed = copy.deepcopy(exact)
        for layer in group.layers:
            weight = model.get_submodule(layer).weight.data
            layout = (group.measured_as.bits, group.measured_as.group_size)
            lower = sensitivity.round_to_nearest(weight, parameters(), layout)
            changed.get_submodule(layer).weight.data = lower.double()
        expected = divergence(exact, changed, ids)
        assert group.measured_kl == pytest.approx(expected, rel=0.01, abs=1e-6)


def test_other_layouts_scale_with_the_error_that_inputs_see(tmp_path: Path) -> None:
    model = tiny_llama()
    found = run(model, tmp_path)
    ids = TEXT.windows(sensitivity.WINDOWS, sensitivity.WINDOW_LENGTH)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, name=name: seen.__setitem__(name, args[0].double()))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    for group in found.table:
        errors = []
        for choice in group.choices:
            total = 0.0
            for layer in group.layers:
                weight = model.get_submodule(layer).weight.data.double()
                lost = rounded(weight.float(), choice.bits, choice.group_size) - weight
                power = seen[layer].flatten(0, 1).square().mean(0)
                total += float((lost.square() * power).sum())
            errors.append(total)
        for choice, error in zip(group.choices, errors, strict=True):
            assert choice.loss == pytest.approx(group.measured_kl * error / errors[0], rel=1e-3)


def test_fused_layers_share_a_layout_and_the_budget_holds(tmp_path: Path) -> None:
    model = tiny_llama()
    for bits in (4.5, 5.0, 6.5):
        found = run(model, tmp_path, bits)
        assert found.bits_per_parameter <= bits
        stored = weights = 0
        for name, (width, size) in found.layouts.items():
            rows, columns = model.get_submodule(name).weight.shape
            stored += rows * columns * width + 16 * rows * (columns // (size or columns))
            weights += rows * columns
        assert found.bits_per_parameter == pytest.approx(stored / weights)
        attention = "model.layers.0.self_attn."
        assert len({found.layouts[f"{attention}{part}"] for part in ("q_proj", "k_proj", "v_proj")}) == 1
    assert set(found.choices) == {layer.name for layer in targets.find(model, parameters()).layers}


def test_a_layer_that_matters_more_gets_more_bits(tmp_path: Path) -> None:
    model = tiny_llama()
    first, last = model.model.layers
    for module in (first.self_attn.o_proj, first.mlp.down_proj, last.mlp.down_proj):
        module.weight.data *= 1e-3  # only attention of the last block still reaches the output
    found = run(model, tmp_path, 5.2)
    assert found.layouts["model.layers.1.self_attn.o_proj"][0] == 8
    assert found.layouts["model.layers.1.self_attn.v_proj"][0] == 8
    assert found.layouts["model.layers.0.mlp.up_proj"][0] == 4


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = TEXT.windows(1, 16)
    with torch.no_grad():
        logits = model(ids).logits
    run(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(
        "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


class Interrupting:
    """Progress that counts steps and stops after some."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps, self.stop_after = 0, stop_after

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Interrupting]:
        yield self

    def advance(self, steps: float = 1.0) -> None:
        self.steps += 1
        if self.steps == self.stop_after:
            raise KeyboardInterrupt

    def describe(self, description: str) -> None:
        pass


def test_interrupted_measuring_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = run(tiny_llama(), tmp_path / "whole")
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", progress=Interrupting(3))
    assert not any("forward" in module.__dict__ for module in model.modules())
    rest = Interrupting()
    resumed = run(model, tmp_path / "cut", progress=rest)
    assert rest.steps == len(whole.table) - 3
    assert resumed.table == whole.table
    again = Interrupting()
    run(model, tmp_path / "cut", 6.0, progress=again)
    assert again.steps == 0, "another budget needs no new measurement"
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    run(model, tmp_path / "cut", progress=again)
    assert again.steps == len(whole.table), "other weights need new ones"


def test_a_damaged_store_is_measured_again(tmp_path: Path) -> None:
    whole = run(tiny_llama(), tmp_path)
    (tmp_path / sensitivity.FILE).write_text('{"identity": "', encoding="utf-8")
    assert run(tiny_llama(), tmp_path).table == whole.table


def test_a_model_whose_blocks_cannot_be_skipped_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipping = run(tiny_llama(), tmp_path / "skipping")
    model = tiny_llama()
    first, last = model.model.layers[0], model.model.layers[1]
    original = type(last).forward

    def reads_the_first_block(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Add what the first block saw, which a skipped block does not record."""
        output = original(self, *args, **kwargs)
        if self is first:
            self.seen = output
        return output + self.seen if self is last else output

    monkeypatch.setattr(type(last), "forward", reads_the_first_block)
    monkeypatch.setattr(type(first), "seen", 0.0, raising=False)
    last.register_forward_pre_hook(lambda module, args: setattr(module, "seen", first.__dict__.pop("seen")))
    whole = run(model, tmp_path / "whole")
    assert not skipping.notes
    assert any("ran the whole model" in note for note in whole.notes)


def test_the_record_is_plain_data(tmp_path: Path) -> None:
    found = run(tiny_llama(), tmp_path)
    data = json.loads(json.dumps(plain(found.plain())))
    assert data["bits_per_parameter"] == found.bits_per_parameter
    assert sum(group["choices"][group["chosen"]]["loss"] for group in data["table"]) == pytest.approx(
        found.predicted_loss
    )


def test_a_budget_that_no_layout_reaches(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"bits=4\.1 cannot be reached: these layers need at least 4\."):
        run(tiny_llama(), tmp_path, 4.1)
    assert not (tmp_path / sensitivity.FILE).exists(), "refused before anything was measured"


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    model = tiny_llama()
    short = TokenStream(torch.arange(20), "short")
    layers = targets.find(model, parameters()).layers
    with pytest.raises(PassError, match="too short to measure sensitivity"):
        allocate(model, parameters(), PassContext(None, torch.device("cpu"), short, tmp_path), layers)


def test_columns_that_no_group_divides(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"do not divide the 48 input features of model\.layers\.0\.mlp\.down_proj"):
        run(build("llama"), tmp_path)
