from __future__ import annotations

import numpy as np
import pytest
import torch

from profilers import activations
from profilers.sinks import MASSIVE_LISTED, measure_sinks
from profilers.text import token_stream
from tests import tiny_models
from tests.profilers.tiny_inputs import BOS, sharp, tiny_tokenizer, words
from tests.tiny_models import VOCABULARY


def layer_outputs(model, tokens):
    found = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return [hidden.double().numpy() for hidden in found]


def test_massive_activations_equal_brute_force():
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[BOS, 7] = -5000.0
        model.model.embed_tokens.weight[10, 20] = 300.0
    tokenizer, text = tiny_tokenizer(), words(400, seed=3)
    result = measure_sinks(model, tokenizer, sequences=4, text=text)
    windows = token_stream(tokenizer, VOCABULARY, text).windows(4, 64)
    expected = {}
    for bos, tokens in {True: torch.cat([torch.full((4, 1), BOS), windows[:, :-1]], 1), False: windows}.items():
        for layer, hidden in enumerate(layer_outputs(model, tokens)):
            for sequence, state in enumerate(hidden):
                median = np.median(np.abs(state))
                for position, dimension in np.argwhere((np.abs(state) > 100) & (np.abs(state) > 1000 * median)):
                    key = (bos, layer, position + 1, f"w{tokens[sequence, position]}", dimension)
                    expected[key] = max(expected.get(key, 0.0), abs(state[position, dimension]))
    assert result.massive_activation_count == len(expected) > 2
    assert (True, 1, 1, "w1", 7) in expected
    largest = sorted(expected.values(), reverse=True)[:MASSIVE_LISTED]
    assert [abs(found.value) for found in result.massive_activations] == pytest.approx(largest, rel=1e-5)
    for found in result.massive_activations:
        key = (found.bos, found.layer, found.position, found.token, found.dimension)
        assert abs(found.value) == pytest.approx(expected[key], rel=1e-5)
        assert found.ratio_to_median > 1000
    assert result.massive_activations[0].value < 0


def test_massive_needs_both_thresholds():
    state = torch.full((4, 8), 0.05)
    state[0, 0], state[1, 1], state[2, 2] = 99.0, -101.0, 100.5
    found = activations._massive_entries(state)
    assert [(position, dimension) for position, dimension, _, _ in found] == [(1, 1), (2, 2)]
    assert activations._massive_entries(state + 0.2) == []  # 101 / 0.25 is below 1,000


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba", "jamba"])
def test_perturbation_moves_only_what_comes_after(name):
    result = measure_sinks(tiny_models.build(name), sequences=3)
    assert [spread.bos for spread in result.perturbation] == [True, False]
    for spread in result.perturbation:
        assert (spread.context, spread.changed_position, spread.sequences) == (64, 33, 3)
        for layer, change in enumerate(spread.relative_change):
            assert len(change) == 64
            assert max(change[:32]) < 1e-5
            assert change[32] > 0.1
            assert spread.mean_by_layer[layer] == pytest.approx(np.mean(change[32:]))
        assert max(spread.relative_change[-1][33:]) > 1e-4


def test_perturbation_equals_brute_force(monkeypatch):
    model = sharp("llama")
    tokenizer, text = tiny_tokenizer(), words(400)
    changed = {}

    def change(ids, index, stream, vocabulary_size, seed):
        other = ids.clone()
        other[:, index] = (ids[:, index] + 1) % VOCABULARY
        changed[int(ids[0, 0]) == BOS] = (ids, other)
        return other

    monkeypatch.setattr(activations, "_change_token", change)
    result = measure_sinks(model, tokenizer, sequences=3, text=text)
    for spread in result.perturbation:
        before, after = changed[spread.bos]
        for layer, (old, new) in enumerate(zip(layer_outputs(model, before), layer_outputs(model, after), strict=True)):
            expected = (np.linalg.norm(new - old, axis=-1) / np.linalg.norm(old, axis=-1)).mean(axis=0)
            assert spread.relative_change[layer] == pytest.approx(expected, abs=1e-4)


def test_one_token_of_each_sequence_is_changed():
    stream = token_stream(tiny_tokenizer(), VOCABULARY, words(300))
    original = stream.windows(4, 20)
    changed = activations._change_token(original, 10, stream, VOCABULARY, seed=0)
    assert torch.all((changed != original).sum(dim=1) == 1) and torch.all(changed[:, 10] != original[:, 10])
    single = token_stream(tiny_tokenizer(), VOCABULARY, "w9 w9 w9")
    assert activations._change_token(single.windows(1, 3), 1, single, VOCABULARY, seed=0).tolist() == [[9, 10, 9]]
