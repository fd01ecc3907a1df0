"""Hidden units: which are found, that permuting them changes nothing, and that the assignment is the best one."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from passes.loop import align, blocks, targets
from passes.loop.align import HiddenUnits
from passes.loop.damage import Remaining
from passes.loop.layout import LoopPlan
from passes.loop.modeling_looped import sizes, weight_of
from passes.loop.parameters import LoopParameters
from profilers.base import SilentProgress
from tests.passes.loop.small import build, ids

GATED = HiddenUnits(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp.up_proj")


def plain(index: int, name: str, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, inputs = sizes(layer.get_submodule(name))
    return torch.eye(inputs), torch.ones(outputs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", (GATED,)),
        ("qwen2", (GATED,)),
        ("gpt2", (HiddenUnits(("mlp.c_fc",), "mlp.c_proj", None),)),
        ("neox", (HiddenUnits(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", None),)),
    ],
)
def test_hidden_units_are_found_by_trying(name: str, expected: tuple[HiddenUnits, ...]) -> None:
    model = build(name)
    structure = targets.find(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert align.find(model.get_submodule(structure.stack)[1], structure.linears[1]) == expected
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "neox"])
def test_what_the_model_computes_stays_the_same(name: str) -> None:
    model = build(name)
    structure = targets.find(model)
    stack = model.get_submodule(structure.stack)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        before = model(ids(2, 16)).logits
    (units,) = align.find(stack[0], structure.linears[0])
    changed = weight_of(stack[2].get_submodule(units.producers[0])).detach().clone()
    orders, plain_share, aligned = align.align(
        [stack[0], stack[2]], (0, 2), units, lambda index, name: plain(index, name, stack[0])
    )
    assert set(orders) == {2} and aligned > plain_share
    assert not torch.equal(weight_of(stack[2].get_submodule(units.producers[0])), changed)
    with torch.no_grad():
        torch.testing.assert_close(model(ids(2, 16)).logits, before, rtol=1e-4, atol=1e-4)


def test_the_order_is_the_best_of_all() -> None:
    hidden, width = 5, 3
    generator = torch.Generator().manual_seed(0)

    def layer() -> nn.Module:
        made = nn.Module()
        made.gate, made.up, made.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        for parameter in made.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        return made

    one, two = layer(), layer()
    units = HiddenUnits(("gate", "up"), "down", "up")
    original = copy.deepcopy(two)

    def similarity(other: nn.Module) -> float:
        products = [(one.get_submodule(n).weight * other.get_submodule(n).weight).sum() for n in ("gate", "up", "down")]
        return float(torch.stack(products).sum().detach())

    best = -1e9
    for order in itertools.permutations(range(hidden)):
        for signs in itertools.product((1.0, -1.0), repeat=hidden):
            tried, where, sign = copy.deepcopy(original), torch.tensor(order), torch.tensor(signs)
            with torch.no_grad():
                tried.gate.weight.copy_(original.gate.weight[where])
                tried.up.weight.copy_(original.up.weight[where] * sign[:, None])
                tried.down.weight.copy_(original.down.weight[:, where] * sign)
            best = max(best, similarity(tried))
    align.align([one, two], (0, 1), units, lambda index, name: plain(index, name, one))
    assert similarity(two) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("init", ["least-squares", "average"])
def test_a_layer_and_its_permuted_copy_share_one_weight_without_loss(init: str) -> None:
    model = build("llama")
    structure = targets.find(model)
    first, second = model.model.layers[1], model.model.layers[2]
    order = torch.randperm(structure.linears[1]["mlp.up_proj"].out_features, generator=torch.Generator().manual_seed(2))
    signs = torch.ones(len(order))
    signs[::3] = -1
    second.load_state_dict(first.state_dict())
    align._permute(second, GATED.producers, GATED.consumer, GATED.signed, order, signs)
    plan = LoopPlan.even(structure, ((1, 2),), 0)
    worst = {}
    for aligned in (True, False):
        parameters = LoopParameters(blocks=1, loops=2, keep_first=1, keep_last=1, rank=0, init=init, align=aligned)
        batches = [ids(2, 32)] if init == "least-squares" else []
        found = blocks.fit(
            copy.deepcopy(model), structure, plan, parameters, batches, seed=0, progress=SilentProgress()
        )
        worst[aligned] = max(error for fitted in found.fitted.values() for error in fitted.errors)
        assert set(found.similarity) == ({(1, 2)} if aligned else set())
    assert worst[True] < 1e-6 < 1e-2 < worst[False]


def test_what_low_rank_parts_leave_of_two_layers_is_the_tail_of_their_difference() -> None:
    model = build("llama")
    structure = targets.find(model)
    left, whole = 0.0, 0.0
    for name in structure.linears[0]:
        one, two = (weight_of(model.model.layers[index].get_submodule(name)).detach().double() for index in (0, 1))
        values = torch.linalg.svdvals(one - two).square()
        left, whole = left + float(values[6:].sum()), whole + float(values.sum())
    remaining = Remaining(model, structure)
    assert remaining.share((0, 1), 3) == pytest.approx(left / whole, rel=1e-4)
    assert remaining.share((0, 1), 0) == pytest.approx(1.0)
    assert 0 < remaining.share((0, 1, 2), 3) < 1
