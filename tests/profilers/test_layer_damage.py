import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from profilers import layer_damage
from profilers.base import NotApplicableError, ProfilerError
from profilers.layer_damage import skip_damage, tie_damage
from profilers.quality import measure_quality
from profilers.reference import record_reference
from tests.profilers.test_layer_exchange import assert_same, copied_with_weights_of, layers_of, state_of
from tests.tiny_models import VOCABULARY, build

IDS = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
BATCHES = (IDS[:2], IDS[2:])


def deep(layers=6, *, seed=0):
    """A llama whose layers matter: random weights with the usual small deviation hardly change a logit."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def brute_force(original, changed):
    """KL over full logits, one forward each, in float64: mean over all tokens but each row's last."""
    with torch.no_grad():
        theirs, own = (
            model(IDS, use_cache=False).logits[:, :-1].double().log_softmax(-1) for model in (original, changed)
        )
    return float((theirs.exp() * (theirs - own)).sum(-1).mean())


def averaged(model, group):
    changed = copy.deepcopy(model)
    named = [dict(layers_of(model)[index].named_parameters()) for index in group]
    with torch.no_grad():
        for index in group:
            for name, parameter in layers_of(changed)[index].named_parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.stack([each[name].double() for each in named]).mean(0))
    return changed


GROUPS = [(0, 1), (2, 3), (4, 5), (1, 2, 3), (5, 0), (3, 1, 2, 5)]


@pytest.mark.parametrize("resumes", [True, False])
def test_tying_equals_brute_force(resumes, monkeypatch):
    model = deep()
    before = state_of(model)
    if not resumes:
        monkeypatch.setattr(layer_damage.Original, "_resumes", lambda *_: False)
    found = tie_damage(model, BATCHES, GROUPS, weights="first")
    expected = [
        brute_force(model, copied_with_weights_of(model, {index: group[0] for index in group[1:]})) for group in GROUPS
    ]
    assert found == pytest.approx(expected, rel=1e-4)
    assert min(found) > 0.01
    found = tie_damage(model, BATCHES, GROUPS, weights="average")
    assert found == pytest.approx([brute_force(model, averaged(model, group)) for group in GROUPS], rel=1e-4)
    assert_same(model, before)


@pytest.mark.parametrize("name", ["gpt2", "falcon", "qwen3", "mistral", "diffllama"])
def test_tying_works_in_every_dense_architecture(name):
    model = build(name)
    (found,) = tie_damage(model, BATCHES, [(0, 1)])
    assert found == pytest.approx(brute_force(model, averaged(model, (0, 1))), rel=1e-3, abs=1e-9)
    assert found > 0


def test_skipping_equals_brute_force():
    model = deep()
    before = state_of(model)
    expected = []
    for index in range(6):
        shorter = copy.deepcopy(model)
        del shorter.model.layers[index]
        shorter.config.num_hidden_layers = 5
        expected.append(brute_force(model, shorter))
    assert skip_damage(model, BATCHES, range(6)) == pytest.approx(expected, rel=1e-4)
    assert_same(model, before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "mamba", "jamba", "gpt_oss", "gemma3"])
def test_layers_that_cannot_be_shared_can_be_skipped(name):
    assert min(skip_damage(build(name), BATCHES, (0, 1))) > 0


def test_layers_with_equal_weights_cost_nothing_to_tie():
    model = deep()
    layers_of(model)[3].load_state_dict(layers_of(model)[2].state_dict())
    for weights in ("first", "average"):
        same, others = tie_damage(model, BATCHES, [(2, 3), (3, 4)], weights=weights)
        assert same == 0.0 < others


def test_the_definition_is_that_of_quality():
    model = deep()
    changed = copied_with_weights_of(model, {4: 3})
    quality = measure_quality(changed, IDS, record_reference(model, IDS), text_name="random")
    assert tie_damage(model, [IDS], [(3, 4)], weights="first") == pytest.approx([quality.kl.mean], rel=1e-5)


def test_nothing_depends_on_how_the_text_is_divided_or_on_what_is_kept(monkeypatch):
    model = deep()
    found = tie_damage(model, [IDS], [(1, 2)]) + skip_damage(model, [IDS], [4])
    monkeypatch.setattr(layer_damage, "TOKENS_AT_ONCE", 24)
    monkeypatch.setattr(layer_damage, "KEPT_LOG_PROBABILITIES", 0)
    monkeypatch.setattr("profilers.reference.LOGITS_AT_ONCE", 5 * VOCABULARY)
    again = tie_damage(model, BATCHES, [(1, 2)]) + skip_damage(model, BATCHES, [4])
    assert again == pytest.approx(found, rel=1e-4)


def test_early_layers_are_not_computed_again():
    model = deep()
    calls = []
    layers_of(model)[0].self_attn.register_forward_hook(lambda *_: calls.append(0))
    skip_damage(model, [IDS], [0])
    once = len(calls)
    calls.clear()
    skip_damage(model, [IDS], [0, 1, 2, 3, 4, 5])
    assert len(calls) == once


def test_half_precision_weights_are_averaged_in_single():
    model = deep().to(torch.bfloat16)
    means = layer_damage.average_weights(model, (0, 1, 2))
    q = [layers_of(model)[index].self_attn.q_proj.weight for index in range(3)]
    expected = torch.stack([weight.double() for weight in q]).mean(0)
    assert means["self_attn.q_proj"].dtype == torch.bfloat16
    assert torch.allclose(means["self_attn.q_proj"].double(), expected, rtol=2**-8)


def test_a_change_that_overflows_costs_infinitely_much_and_a_broken_original_is_an_error(monkeypatch):
    model = deep()
    broken = {"mlp.up_proj": torch.full((48, 32), float("inf"))}
    monkeypatch.setattr(layer_damage, "average_weights", lambda *_: broken)
    assert tie_damage(model, [IDS], [(0, 1)], weights="average") == [float("inf")]
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ProfilerError, match="own logits are not finite"):
        skip_damage(model, [IDS], [0])


def test_groups_that_make_no_sense_are_refused():
    model = deep()
    for group in ((1,), (1, 1)):
        with pytest.raises(ProfilerError, match="two or more different ones"):
            tie_damage(model, [IDS], [group])
    with pytest.raises(ProfilerError, match="no layer 6"):
        tie_damage(model, [IDS], [(5, 6)])
    with pytest.raises(ProfilerError, match="layer 0 cannot share weights: .*experts"):
        tie_damage(build("mixtral"), [IDS], [(0, 1)])
    with pytest.raises(ProfilerError, match="no text"):
        skip_damage(model, [], [0])
    with pytest.raises(NotApplicableError, match="encoder-decoder"):
        skip_damage(build("t5"), [IDS], [0])


def test_tokens_of_probability_zero_add_nothing_and_a_token_that_is_ruled_out_adds_infinity():
    theirs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    own = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5]]).log()
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert layer_damage._divergence(theirs, own).tolist() == [pytest.approx(float(expected)), float("inf"), 0.0]
