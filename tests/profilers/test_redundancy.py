import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from profilers import redundancy
from profilers.base import NotApplicableError, ProfileContext, ProfileRequest, ProfilerError
from profilers.redundancy import measure_redundancy, skip_damage, tie_damage
from profilers.timing import PhaseTimings
from tests.profilers.test_layer_damage import deep
from tests.profilers.test_layer_exchange import assert_same, layers_of, state_of
from tests.tiny_models import VOCABULARY, build

WINDOWS = torch.randint(3, VOCABULARY, (4, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured():
    model = deep()
    before = state_of(model)
    result = measure_redundancy(model, WINDOWS)
    assert_same(model, before)
    return model, result


def test_everything_is_measured_and_saved_as_plain_numbers(measured):
    _, result = measured
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert [layer.layer for layer in result.layers] == list(range(6))
    assert [group.layers for group in result.groups] == [
        tuple(range(first, first + size)) for size in (2, 3, 4) for first in range(7 - size)
    ]
    assert len(result.kinds) == 1 and {layer.kind for layer in result.layers} == {0}
    assert (result.similarity_tokens, result.cka_tokens, result.damage_tokens, result.context) == (132, 128, 128, 33)
    assert result.notes == () and result.cka_reason is None


def test_damages_are_those_of_the_plain_functions(measured):
    model, result = measured
    assert [layer.skip_kl_nats_per_token for layer in result.layers] == pytest.approx(
        skip_damage(model, [WINDOWS], range(6)), rel=1e-6
    )
    assert [group.kl_nats_per_token for group in result.groups] == pytest.approx(
        tie_damage(model, [WINDOWS], [group.layers for group in result.groups]), rel=1e-6
    )
    for figure in (*result.groups,):
        low, high = figure.kl_interval
        assert 0 <= low < figure.kl_nats_per_token < high


def test_cosines_and_distances_equal_brute_force(measured):
    model, result = measured
    with torch.no_grad():
        hidden = model(WINDOWS, output_hidden_states=True).hidden_states[:-1]  # the last one is after the final norm
    states = [each.double().flatten(0, 1).numpy() for each in hidden]
    for first in range(6):
        for last in range(first + 1, 6):
            cosines = [
                float(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y))
                for x, y in zip(states[first], states[last], strict=True)
            ]
            distance = float(np.mean([math.acos(value) / math.pi for value in cosines]))
            assert result.block_angular_distances[last - first - 1][first] == pytest.approx(distance, rel=1e-9)
            if last == first + 1:
                assert result.layers[first].input_output_cosine == pytest.approx(float(np.mean(cosines)), rel=1e-9)
                assert result.layers[first].input_output_angular_distance == pytest.approx(distance, rel=1e-9)
    assert [len(row) for row in result.block_angular_distances] == [6, 5, 4, 3, 2, 1]


def test_cka_equals_the_feature_space_form_in_float64(measured):
    model, result = measured
    hidden = model(WINDOWS, output_hidden_states=True).hidden_states[1:-1]
    states = [each[:, 1:].double().flatten(0, 1).detach().numpy() for each in hidden]
    for i, x in enumerate(states):
        for j, y in enumerate(states):
            x, y = x - x.mean(0), y - y.mean(0)
            expected = (np.linalg.norm(y.T @ x) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
            assert result.cka[i][j] == pytest.approx(expected, abs=1e-5)
    assert len(result.cka) == len(result.cka[0]) == 6


def test_layers_that_are_equal_cost_nothing_to_tie_and_are_told_from_others():
    model = deep(4)
    layers_of(model)[2].load_state_dict(layers_of(model)[1].state_dict())
    found = {group.layers: group.kl_nats_per_token for group in measure_redundancy(model, WINDOWS).groups}
    assert found[1, 2] == 0.0
    assert min(damage for group, damage in found.items() if group != (1, 2)) > 0


def test_a_layer_that_does_nothing_costs_nothing_to_skip():
    model = deep(3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    result = measure_redundancy(model, WINDOWS)
    idle = result.layers[1]
    assert idle.skip_kl_nats_per_token == 0.0
    assert idle.input_output_cosine == pytest.approx(1.0) and idle.input_output_angular_distance < 1e-6
    assert result.cka[0][1] == pytest.approx(1.0, abs=1e-6)
    assert result.layers[0].skip_kl_nats_per_token > 0


def test_experts_are_skipped_and_not_tied():
    result = measure_redundancy(build("mixtral"), WINDOWS)
    assert result.groups == ()
    for layer in result.layers:
        assert "mlp.experts.gate_up_proj" in layer.unshareable_reason
        assert layer.skip_kl_nats_per_token > 0


def test_only_adjacent_layers_of_one_kind_are_tied():
    result = measure_redundancy(build("gemma3"), WINDOWS)
    assert result.groups == () and [layer.kind for layer in result.layers] == [0, 1, 0, 1]
    assert [layer.unshareable_reason for layer in result.layers] == [None] * 4
    assert [group.layers for group in measure_redundancy(build("gpt2"), WINDOWS).groups] == [(0, 1)]


def test_cost_is_bounded(monkeypatch):
    model = deep()
    monkeypatch.setattr(redundancy, "DAMAGE_FLOPS", {"cpu": 1.0})
    long = WINDOWS.repeat(20, 1)
    result = measure_redundancy(model, long)
    assert result.damage_tokens == 256 // 33 * 32
    assert {len(group.layers) for group in result.groups} == {2}
    assert len(result.notes) == 2 and "groups of 4 layers were not tied" in result.notes[0]
    asked = measure_redundancy(model, long, group_sizes=(3,), damage_tokens=66)
    assert asked.damage_tokens == 64 and {len(group.layers) for group in asked.groups} == {3} and asked.notes == ()


def test_a_damage_that_is_not_finite_has_a_reason(monkeypatch):
    model = deep(2)
    broken = {"mlp.up_proj": torch.full((48, 32), float("inf"))}
    monkeypatch.setattr("profilers.layer_damage.average_weights", lambda *_: broken)
    (group,) = measure_redundancy(model, WINDOWS).groups
    assert group.kl_nats_per_token is None and group.kl_interval is None and "not finite" in group.reason


def test_layers_that_return_one_state_for_all_tokens_have_no_cka():
    model = deep(1)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:] = 1.0
    result = measure_redundancy(model, WINDOWS)
    assert result.cka == () and "the same state" in result.cka_reason
    assert result.groups == () and result.layers[0].skip_kl_nats_per_token == 0.0


def test_encoder_decoders_and_unreadable_windows_are_refused():
    with pytest.raises(NotApplicableError, match="encoder-decoder"):
        measure_redundancy(build("t5"), WINDOWS)
    with pytest.raises(ProfilerError, match="token id"):
        measure_redundancy(deep(1), WINDOWS + VOCABULARY)


@pytest.mark.parametrize(("contexts", "context"), [(None, 64), ((16, 32), 16)])
def test_the_instrument_takes_its_windows_from_text(contexts, context, monkeypatch):
    model = deep(2)  # 64 positions
    monkeypatch.setattr(redundancy, "SIMILARITY_TOKENS", 256)
    monkeypatch.setattr(redundancy, "MOST_TOKENS", 256)
    result = redundancy.run(
        ProfileContext(
            model=model,
            config=model.config,
            tokenizer=None,
            device=torch.device("cpu"),
            dtype=torch.float32,
            request=ProfileRequest(contexts=contexts),
            peaks=None,
            timings=PhaseTimings(model),
        )
    )
    assert result.context == context and result.damage_tokens == 256 // context * (context - 1)
    assert result.text.startswith("random tokens")


def test_it_runs_only_when_it_is_named():
    assert redundancy.PROFILER.default is False
