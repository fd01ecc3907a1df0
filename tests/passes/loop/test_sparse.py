"""Sparse parts of layers: which entries, against brute force; what a model with them computes, holds and saves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from passes.base import PassError
from passes.loop import LoopPass, sparse, targets
from passes.loop.convert import convert
from passes.loop.layout import LoopPlan
from passes.loop.modeling_looped import LoopedLinear, pack_bits, unpack_bits
from tests.passes.loop.small import DENSE, applied, build, ids


def linear(seed: int, *, layers: int = 2, shape: tuple[int, int] = (2, 3), rank: int = 0) -> sparse.Linear:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    draws = [torch.rand(inputs, generator=generator, dtype=torch.double) for _ in range(layers)]
    return sparse.Linear(
        [torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(layers)],
        [(0.1 + draw).diag() for draw in draws],
        [0.1 + torch.rand(outputs, generator=generator) for _ in range(layers)],
        (0,) + (rank,) * (layers - 1),
    )


def written_out(found: Any, member: int) -> torch.Tensor:
    """Return the weight that a layer runs with."""
    weight = found.shared.clone()
    if found.deltas[member] is not None:
        weight += found.deltas[member][0] @ found.deltas[member][1]
    if found.sparse[member] is not None:
        mask, values = found.sparse[member]
        weight[mask] += values
    return weight.double()


def weighted_error(given: sparse.Linear, weights: list[torch.Tensor]) -> float:
    return sum(
        float((gradient.double()[:, None] * moment.diagonal() * (weight - own).square()).sum())
        for weight, own, moment, gradient in zip(weights, given.weights, given.inputs, given.gradients, strict=True)
    )


@pytest.mark.parametrize("entries", [0, 1, 3, 6])
def test_no_other_entries_and_no_other_shared_weight_have_a_smaller_error(entries: int) -> None:
    given = linear(0)
    found = sparse.fit({"a": given}, {"a": (0, entries)})["a"]
    error = weighted_error(given, [written_out(found, member) for member in (0, 1)])
    cost = [
        gradient.double()[:, None] * moment.diagonal()
        for moment, gradient in zip(given.inputs, given.gradients, strict=True)
    ]
    best = float("inf")
    for own in itertools.combinations(range(6), entries):
        mask = torch.zeros(6, dtype=torch.bool)
        mask[list(own)] = True
        mean = (cost[0] * given.weights[0] + cost[1] * given.weights[1]) / (cost[0] + cost[1])
        weights = [torch.where(mask.view(2, 3), weight, mean) for weight in given.weights]
        best = min(best, weighted_error(given, weights))
    assert error == pytest.approx(best, rel=1e-5, abs=1e-10)


def test_entries_go_where_sharing_costs_most_unless_even_is_asked_for() -> None:
    alike = linear(1)
    alike = sparse.Linear([alike.weights[0]] * 2, alike.inputs, alike.gradients, alike.ranks)
    linears = {"alike": alike, "apart": linear(2)}
    entries = {"alike": (0, 3), "apart": (0, 3)}
    counts = [
        {
            name: len(item.sparse[1][1])
            for name, item in sparse.fit(linears, entries, even=even).items()
            if item.sparse[1]
        }
        for even in (False, True)
    ]
    assert counts == [{"alike": 0, "apart": 6}, {"alike": 3, "apart": 3}]


@pytest.mark.parametrize("rank", [0, 1])
def test_errors_are_those_of_the_weights_that_run(rank: int) -> None:
    given = linear(3, layers=3, shape=(5, 4), rank=rank)
    found = sparse.fit({"a": given}, {"a": (0, 7, 9)}, even=True)["a"]
    assert [own if own is None else int(own[0].sum()) for own in found.sparse] == [None, 7, 9]
    for member in range(3):
        error = given.weights[member] - written_out(found, member)
        moment, weight = given.inputs[member], given.weights[member]
        wanted = torch.trace(error @ moment @ error.t()) / torch.trace(weight @ moment @ weight.t())
        assert found.errors[member] == pytest.approx(float(wanted), rel=1e-4)
        assert found.errors[member] <= found.shared_errors[member]


@pytest.mark.parametrize("shape", [(3,), (8,), (5, 7), (4, 16)])
def test_packed_bits_are_the_mask(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, mask.numel()), mask.flatten())


def looped(name: str, rank: int = 0) -> Any:
    """Return a looped model with random sparse parts."""
    model = build(name)
    convert(model, LoopPlan.even(targets.find(model), ((0, 1, 2),), rank, 0.4))
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoopedLinear) and module.delta_values is not None:
                module.delta_values.normal_(std=0.1)
                entries = torch.randperm(module.out_features * module.in_features)
                module.delta_mask.copy_(pack_bits(entries < len(module.delta_values)))
                if module.delta_out is not None:
                    module.delta_out.normal_(std=0.1)
    return model


def unshared(model: Any, name: str) -> Any:
    """Return a plain model with the weights that each layer runs with, made entry by entry."""
    plain = build(name)
    state, stack = dict(model.state_dict()), model.config.loop["stack"]
    with torch.no_grad():
        for key, tensor in plain.state_dict().items():
            if key in state:
                tensor.copy_(state[key])
        for path, module in model.get_submodule(stack).named_modules():
            if not isinstance(module, LoopedLinear):
                continue
            weight = module.shared.weight.clone()
            if module.delta_out is not None:
                weight += module.delta_out @ module.delta_in
            if module.delta_values is not None:
                values = iter(module.delta_values.tolist())
                packed = module.delta_mask.tolist()
                for entry in range(weight.numel()):
                    if packed[entry // 8] >> entry % 8 & 1:
                        weight.view(-1)[entry] += next(values)
                assert next(values, None) is None
            own = plain.get_submodule(f"{stack}.{path}")
            own.weight.copy_(weight if isinstance(own, nn.Linear) else weight.t())
    return plain


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", DENSE)
def test_it_computes_what_layers_with_their_own_weights_would(name: str, rank: int) -> None:
    model = looped(name, rank)
    wanted = unshared(model, name)(ids()).logits
    torch.testing.assert_close(model(ids()).logits, wanted, rtol=1e-4, atol=1e-4)
    seen = []
    watched = [module.shared for module in model.modules() if isinstance(module, LoopedLinear)]
    handles = [module.register_forward_hook(lambda *_: seen.append(1)) for module in dict.fromkeys(watched)]
    torch.testing.assert_close(model(ids()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(seen) == len(watched)  # who watches the shared linears sees every call
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unpacked_it_computes_the_same_and_saves_the_same(name: str, tmp_path: Path) -> None:
    model = looped(name, 2)
    keys = set(model.state_dict())
    held, wanted = sum(tensor.nbytes for tensor in model.buffers()), model(ids()).logits
    model.unpack()
    assert set(model.state_dict()) == keys
    dense = sum(tensor.nbytes for tensor in model.buffers()) - held
    unpacked = [
        module for module in model.modules() if isinstance(module, LoopedLinear) and module.delta_values is not None
    ]
    assert dense == 4 * sum(module.out_features * module.in_features for module in unpacked) > 0
    torch.testing.assert_close(model(ids()).logits, wanted, rtol=1e-5, atol=1e-5)
    model.train()
    with torch.no_grad():
        unpacked[0].delta_values += 1
    assert not torch.allclose(model(ids()).logits, wanted, atol=1e-2)  # training does not run with what was held before


def test_gradients_reach_the_shared_weight_and_the_values() -> None:
    model = looped("llama")
    model(ids()).logits.square().mean().backward()
    first, second = (model.model.layers[index].mlp.up_proj for index in (0, 1))
    assert first.delta_values is None and second.delta_values.grad.abs().min() > 0
    values, shared = second.delta_values.grad.clone(), second.shared.weight.grad
    assert shared.abs().min() > 0
    entry = unpack_bits(second.delta_mask, shared.numel()).nonzero()[5]
    with torch.no_grad():
        losses = []
        for step in (1e-2, -2e-2):
            second.delta_values[5] += step
            losses.append(float(model(ids()).logits.double().square().mean()))
    assert float(values[5]) == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2), entry


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_on_disk_are_those_of_the_plan_and_loading_gives_the_same(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    item, model, record = applied(tmp_path, name, build(name, dtype=dtype), blocks=2, loops=2, density=0.4, rank=0)
    assert isinstance(item, LoopPass)
    item.save(model, tmp_path)
    sizes = record.details["sizes"]
    assert targets.stored(model) == (sizes["parameters_after"], sizes["bytes_after"])
    assert sizes["mask_bytes"] == sum(buffer.nbytes for key, buffer in model.named_buffers() if "delta_mask" in key)
    with torch.device("meta"):
        bare = type(model)(model.config)
    item.check_files(tmp_path, bare.to(dtype))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, model.eval()(ids()).logits)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
@torch.no_grad()
def test_all_entries_give_the_original_logits_and_fewer_more_error(name: str, tmp_path: Path) -> None:
    original = build(name)(ids()).logits.log_softmax(-1)
    damages = []
    for density in (1.0, 0.7, 0.3):
        _, model, _ = applied(tmp_path, name, blocks=2, loops=2, density=density, rank=0)
        with torch.no_grad():
            logits = model(ids()).logits
        if density == 1.0:
            torch.testing.assert_close(logits, build(name)(ids()).logits, rtol=0, atol=1e-3)
        damages.append(float((original.exp() * (original - logits.log_softmax(-1))).sum(-1).mean()))
    assert damages == sorted(damages) and damages[0] < 1e-6


@torch.no_grad()
def test_of_as_many_parameters_they_cost_less_than_low_rank_parts(tmp_path: Path) -> None:
    original = build("llama")(ids(4, 24, seed=9)).logits.log_softmax(-1)
    found = {}
    for label, values in {"sparse": {"density": 0.5, "rank": 0}, "low-rank": {"rank": 5}}.items():
        _, model, record = applied(tmp_path, blocks=2, loops=2, samples=24, length=64, **values)
        with torch.no_grad():
            q = model(ids(4, 24, seed=9)).logits.log_softmax(-1)
        share = record.details["sizes"]["layers_share"]
        found[label] = float((original.exp() * (original - q)).sum(-1).mean()), share
    assert found["sparse"][1] <= found["low-rank"][1]
    assert 2 * found["sparse"][0] < found["low-rank"][0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0.5, "target": 0.8}, "density goes with blocks and loops"),
        ({"density": 0.5, "blocks": 2, "loops": 2, "init": "average"}, "density fits the shared weights itself"),
        ({"density": 1.5, "blocks": 2, "loops": 2}, "parameter 'density'"),
        ({"density": 0.5, "from_scratch": True, "blocks": 2, "loops": 2}, "density is for weights that are trained"),
    ],
)
def test_what_does_not_agree_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        LoopPass.from_mapping(values)
