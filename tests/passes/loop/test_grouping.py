"""Which layers share: patterns by hand, the dynamic programme against every grouping there is, and what is refused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from passes.base import PassError
from passes.loop import LoopParameters, grouping, targets
from passes.loop.grouping import Option
from passes.loop.layout import LoopPlan
from profilers.meta import meta_model
from tests.passes.loop.small import CONFIGS


def structure(name: str = "llama6") -> targets.Structure:
    import torch

    return targets.find(meta_model(CONFIGS[name](), torch.float32))


def regular(**values: Any) -> Any:
    return grouping.regular(LoopParameters(**{"rank": 2} | values), structure(values.pop("name", "llama6")))


def test_cycle_and_sequence() -> None:
    assert regular(blocks=3, loops=2, pattern="cycle") == ((0, 3), (1, 4), (2, 5))
    assert regular(blocks=3, loops=2) == ((0, 1), (2, 3), (4, 5))
    assert regular(blocks=2, loops=2, keep_first=1, keep_last=1) == ((1, 2), (3, 4))
    assert regular(blocks=1, loops=6, pattern="cycle") == ((0, 1, 2, 3, 4, 5),)


def test_a_pattern_with_a_target_takes_as_many_blocks_as_it_can() -> None:
    shares = {}
    for loops in (2, 3, 6):
        groups = grouping.arrange(range(6), 6 // loops, "cycle")
        shares[loops] = LoopPlan.even(structure(), groups, 2).sizes(structure()).share
    assert regular(target=shares[2] + 1e-6, pattern="cycle") == ((0, 3), (1, 4), (2, 5))
    assert regular(target=shares[2] - 1e-6, pattern="cycle") == ((0, 2, 4), (1, 3, 5))
    with pytest.raises(PassError, match=f"at least {shares[6]:.4f} of the"):
        regular(target=shares[6] - 1e-3, pattern="cycle")


def runs(layers: int, longest: int) -> list[tuple[int, ...]]:
    return [
        tuple(range(start, start + size))
        for start in range(layers)
        for size in range(2, longest + 1)
        if start + size <= layers
    ]


def groupings(layers: int, allowed: set[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], ...]]:
    for count in range(layers // 2 + 1):
        for chosen in itertools.combinations(sorted(allowed), count):
            members = [index for group in chosen for index in group]
            if len(members) == len(set(members)):
                yield chosen


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all_groupings(seed: int) -> None:
    rolled = random.Random(seed)
    layers = rolled.randint(4, 8)
    allowed = {group for group in runs(layers, 4) if rolled.random() < 0.8}
    damages = {group: rolled.choice([0.0, rolled.random(), 5 * rolled.random()]) for group in allowed}
    savings = {group: rolled.choice([100, 120, 7]) * (len(group) - 1) - rolled.choice([0, 130]) for group in allowed}
    options = [Option(group, 3, savings[group], damages[group]) for group in sorted(allowed)]
    every = list(groupings(layers, allowed))
    most = max(sum(savings[group] for group in chosen) for chosen in every)
    for needed in (0, 1, most // 3, most // 2, most):
        enough = [chosen for chosen in every if sum(savings[group] for group in chosen) >= needed]
        best = min(sum(damages[group] for group in chosen) for chosen in enough)
        found = [option.layers for option in grouping.choose(layers, options, needed)]
        assert sum(damages[group] for group in found) == pytest.approx(best)
        assert sum(savings[group] for group in found) >= needed
    with pytest.raises(PassError, match="parameters at most"):
        grouping.choose(layers, options, most + 1)


def test_free_meets_the_target_where_sharing_costs_least() -> None:
    known = structure()
    parameters = LoopParameters(target=0.9, rank=2, max_loops=2)
    chosen = grouping.free(parameters, known, lambda group, rank: float(abs(group[0] - 3)))
    assert [(option.layers, option.rank) for option in chosen] == [((3, 4), 2)]
    assert LoopPlan.even(known, [(3, 4)], 2).sizes(known).share <= 0.9


def test_ranks_are_chosen_with_the_groups() -> None:
    known = structure()
    parameters = LoopParameters(target=0.85, max_loops=2)

    def damage(group: tuple[int, ...], rank: int) -> float:
        return max(0.0, 1 - rank / 9) * (10.0 if 0 in group else 1.0)

    every = grouping.options(parameters, known, damage)
    assert {option.rank for option in every} <= {0, 8, 16} and all(option.saved > 0 for option in every)
    needed = known.parameters - int(0.85 * known.parameters)
    best = min(
        sum(option.damage for option in chosen)
        for count in range(4)
        for chosen in itertools.combinations(every, count)
        if sum(option.saved for option in chosen) >= needed
        and len({index for option in chosen for index in option.layers}) == 2 * count
    )
    chosen = grouping.free(parameters, known, damage)
    assert sum(option.damage for option in chosen) == pytest.approx(best)
    plan = LoopPlan.even(known, [option.layers for option in chosen], [option.rank for option in chosen])
    assert plan.sizes(known).share <= 0.85


def test_a_target_below_what_can_be_reached_names_the_least() -> None:
    known = structure()
    parameters = LoopParameters(target=0.2, rank=0, max_loops=3)
    with pytest.raises(PassError, match="target=0.2 cannot be met: with rank=0, pattern=free, max_loops=3") as caught:
        grouping.check(parameters, known)
    least = float(str(caught.value).partition("give target=")[2].split()[0])
    grouping.check(parameters.model_copy(update={"target": least}), known)
    with pytest.raises(PassError):
        grouping.check(parameters.model_copy(update={"target": least - 2e-4}), known)
    outside = known.parameters - sum(known.layer_parameters)
    assert f"{outside / known.parameters:.1%} are embeddings and others outside the layers" in str(caught.value)


def test_candidates_are_neighbours_of_one_kind() -> None:
    assert grouping.candidates(LoopParameters(target=0.5), structure("llama")) == (
        (0, 1), (0, 1, 2), (1, 2), (1, 2, 3), (2, 3),
    )  # fmt: skip
    assert grouping.candidates(LoopParameters(target=0.5, keep_first=1), structure("llama"))[0] == (1, 2)
    with pytest.raises(PassError, match="no two neighbouring layers of Gemma3ForCausalLM are of one kind"):
        grouping.check(LoopParameters(target=0.5, rank=2), structure("gemma3"))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "llama6",
            {"blocks": 4, "loops": 2},
            "blocks=4 times loops=2 is 8, and LlamaForCausalLM has 6 layers; give blocks=3,loops=2 or blocks=2,loops=3",
        ),
        ("llama6", {"blocks": 3, "loops": 2, "keep_first": 1}, "has 5 layers without the 1 that are kept"),
        ("llama6", {"blocks": 3, "loops": 2, "rank": 17}, "rank=17 does not fit model.layers.0.self_attn.k_proj"),
        ("llama1", {"blocks": 1, "loops": 2}, "has one layer, so there is nothing to share"),
        ("llama6", {"blocks": 3, "loops": 2, "keep_first": 3, "keep_last": 2}, "leave 1 of 6 layers"),
        ("gemma3", {"blocks": 2, "loops": 2}, "layers 0 and 1 of Gemma3ForCausalLM cannot share weights"),
        ("mixtral", {"blocks": 2, "loops": 2}, "no layer of MixtralForCausalLM can share its weights"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        grouping.check(LoopParameters(**{"rank": 2} | values), structure(name))


def test_gemma_shares_in_a_cycle_of_its_own_kinds() -> None:
    assert grouping.regular(LoopParameters(blocks=2, loops=2, pattern="cycle", rank=2), structure("gemma3")) == (
        (0, 2), (1, 3),
    )  # fmt: skip
