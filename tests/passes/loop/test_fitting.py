"""Statistics of text, importance of linears, and the ranks that they lead to, on real tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from passes.base import PassError
from passes.loop import blocks, importance, statistics, targets
from passes.loop.layout import LoopPlan
from passes.loop.parameters import LoopParameters
from passes.loop.targets import Shape
from profilers.base import SilentProgress
from tests.passes.loop.small import build, ids, text


def batches(count: int = 3) -> list[torch.Tensor]:
    return [ids(2, 16, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_moments_are_those_of_the_inputs(name: str) -> None:
    model = build(name)
    structure = targets.find(model)
    seen: dict[Any, list[torch.Tensor]] = {}
    stack = model.get_submodule(structure.stack)
    for index in (1, 2):
        for path in structure.linears[index]:
            stack[index].get_submodule(path).register_forward_pre_hook(
                lambda _m, args, key=(index, path): seen.setdefault(key, []).append(args[0].flatten(0, -2))
            )
    with torch.no_grad():
        for batch in batches():
            model(batch)
    found = statistics.collect(model, structure, (1, 2), batches())
    assert found.tokens == 3 * 32
    assert set(found.leaders) == set(seen)
    for (index, path), rows in seen.items():
        x = torch.cat(rows[:3]).double()
        torch.testing.assert_close(found.of(index, path), x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
    if name == "llama":  # q, k and v read one tensor; gate and up another
        assert len(found.sums) == 2 * 4
        assert found.leaders[1, "self_attn.v_proj"] == found.leaders[1, "self_attn.q_proj"]


def test_moments_stop_at_the_last_layer_that_is_wanted_and_leave_no_hook() -> None:
    model = build("llama")
    ran = []
    model.model.layers[3].register_forward_hook(lambda *_: ran.append(1))
    statistics.collect(model, targets.find(model), (0, 2), batches())
    assert not ran
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_memory_of_moments_does_not_grow_with_text() -> None:
    model = build("llama")
    structure = targets.find(model)
    sizes = [
        sum(item.numel() for item in statistics.collect(model, structure, (0,), batches(count)).sums.values())
        for count in (1, 6)
    ]
    assert sizes[0] == sizes[1]
    assert 4 * sizes[0] <= statistics.moment_bytes(structure, 0)


def test_a_linear_that_is_not_called_for_every_token_is_named() -> None:
    model = build("llama")
    structure = targets.find(model)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x[:, :1])) * mlp.up_proj(x[:, :1]))
    with pytest.raises(PassError, match="model.layers.1.mlp.gate_proj ran on 6 of 96 tokens"):
        statistics.collect(model, structure, (1,), batches())


def test_importance_is_the_second_moment_of_the_gradients_of_the_outputs() -> None:
    model = build("llama")
    structure = targets.find(model)
    found = importance.measure(model, structure, (0, 3), batches(1), generator=torch.Generator().manual_seed(7))
    assert set(found) == {(index, path) for index in (0, 3) for path in structure.linears[index]}
    kept: dict[Any, torch.Tensor] = {}
    for index in (0, 3):
        for path in structure.linears[index]:
            model.model.layers[index].get_submodule(path).register_forward_hook(
                lambda _m, _a, output, key=(index, path): (output.retain_grad(), kept.update({key: output}))[0]
            )
    logits = model(batches(1)[0]).logits
    chance = logits.detach().float().softmax(-1).flatten(0, 1)
    noise = torch.rand(chance.shape, generator=torch.Generator().manual_seed(7)).clamp_min(1e-20).log().neg()
    drawn = (noise / chance.clamp_min(1e-30)).argmin(-1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn, reduction="sum").backward()
    for key, value in found.items():
        gradient = kept[key].grad
        assert gradient is not None
        rows = gradient.flatten(0, 1).double()
        torch.testing.assert_close(value.double(), rows.t() @ rows / len(rows), rtol=1e-3, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_ranks_go_where_they_take_most_off_the_error_and_cost_no_more() -> None:
    shapes = {"a": Shape(8, 8, 4), "b": Shape(4, 8, 4)}
    gains = {
        "a": [torch.tensor([16.0, 8, 4, 2, 1, 1, 1, 1]), torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])],
        "b": [torch.tensor([3.0, 3, 3, 3]), torch.tensor([0.1, 0.1, 0.1, 0.1])],
    }
    even = {"a": (2, 2), "b": (2, 2)}
    ranks = blocks.share_ranks(gains, shapes, even)
    # of 112 parameters: four ranks of a0 and two of b0, which are all that is smaller than a whole weight; then one of
    # a1, and the 8 that are left make no other
    assert ranks == {"a": (4, 1), "b": (2, 0)}
    spent = sum(sum(given) * shapes[name].rank_parameters for name, given in ranks.items())
    assert spent <= sum(sum(given) * shapes[name].rank_parameters for name, given in even.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_uneven_ranks_lower_the_weighted_error_at_the_same_size(name: str) -> None:
    model = build(name)
    structure = targets.find(model)
    plan = LoopPlan.even(structure, ((0, 1), (2, 3)), 4)
    totals, sizes = [], []
    for allocation in ("even", "auto"):
        parameters = LoopParameters(blocks=2, loops=2, rank=4, allocation=allocation)
        found = blocks.fit(model, structure, plan, parameters, batches(), seed=0, progress=SilentProgress())
        moments = statistics.collect(model, structure, (0, 1, 2, 3), batches())
        total = 0.0
        for (number, path), fitted in found.fitted.items():
            for member, index in enumerate(plan.blocks[number].layers):
                weight = (
                    blocks.weight_of(model.get_submodule(structure.stack)[index].get_submodule(path)).detach().double()
                )
                whole = float(((weight @ moments.of(index, path)) * weight).sum())
                total += found.importance[index, path] * whole * fitted.errors[member]
        totals.append(total)
        sizes.append(found.plan.sizes(structure).parameters_after)
    assert totals[1] < totals[0]
    assert sizes[1] <= sizes[0]


def test_moments_that_do_not_fit_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    structure = targets.find(model)
    plan = LoopPlan.even(structure, ((0, 1), (2, 3)), 4)
    # Putting units in another order rounds sums otherwise, and ranks may then swap places.
    parameters = LoopParameters(blocks=2, loops=2, rank=4, align=False)
    whole = blocks.fit(model, structure, plan, parameters, batches(), seed=0, progress=SilentProgress())
    monkeypatch.setattr(blocks, "MEMORY_SHARE", 0.0)
    parted = blocks.fit(model, structure, plan, parameters, batches(), seed=0, progress=SilentProgress())
    assert (whole.runs, parted.runs) == (1, 2)
    assert parted.plan == whole.plan
    for key, item in whole.fitted.items():
        torch.testing.assert_close(parted.fitted[key].shared, item.shared)


def test_the_text_of_tests_is_long_enough(tmp_path: Path) -> None:
    assert text().windows(8, 32).shape == (8, 32)
