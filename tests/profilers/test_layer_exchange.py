import copy

import pytest
import torch
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from profilers.attention_capture import decoder_layers
from profilers.base import ProfilerError
from profilers.layer_exchange import layer_kinds, layer_linears, skipping, unshareable, with_weights_of
from tests.tiny_models import CONFIGS, VOCABULARY, build

IDS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
DENSE = ("llama", "qwen3", "mistral", "gpt2", "falcon", "diffllama", "gemma3")


def layers_of(model):
    return decoder_layers(model)[1]


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def state_of(model):
    """Everything that a change could leave behind: which object is where, what it holds, hooks, attributes."""
    parameters = {name: (id(item), item.clone()) for name, item in model.named_parameters(remove_duplicate=False)}
    modules = {
        name: (id(item), tuple(item.__dict__), len(item._forward_hooks), len(item._forward_pre_hooks))
        for name, item in model.named_modules()
    }
    return parameters, modules


def assert_same(model, before):
    parameters, modules = state_of(model)
    assert modules == before[1]
    assert parameters.keys() == before[0].keys()
    for name, (identity, value) in parameters.items():
        assert identity == before[0][name][0] and torch.equal(value, before[0][name][1]), name


def copied_with_weights_of(model, sources):
    """Change a copy of the model by hand: write the other layer's matrices over those of each layer."""
    changed = copy.deepcopy(model)
    for index, other in sources.items():
        theirs = dict(layers_of(model)[other].named_parameters())
        with torch.no_grad():
            for name, parameter in layers_of(changed)[index].named_parameters():
                if parameter.dim() == 2:
                    parameter.copy_(theirs[name])
    return changed


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("sources", [{1: 0}, {0: 1}, {0: 1, 1: 0}])
def test_layers_run_with_the_matrices_of_others_and_their_own_norms_and_biases(name, sources):
    if name == "gemma3":
        sources = {2 * index: 2 * other for index, other in sources.items()}
    model = build(name)
    for parameter in model.parameters():  # norms and biases that are not all alike
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    before, original = state_of(model), logits(model)
    with with_weights_of(model, sources):
        found = logits(model)
    assert torch.equal(found, logits(copied_with_weights_of(model, sources)))
    assert not torch.equal(found, original)
    assert_same(model, before)


def test_the_model_is_as_it_was_after_an_error_inside():
    model = build("llama")
    before = state_of(model)
    with pytest.raises(KeyError), with_weights_of(model, {1: 0}), skipping(model, (0,)):
        raise KeyError
    assert_same(model, before)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "t5"])
def test_a_skipped_layer_passes_its_input_on(name):
    model = build(name)
    before = state_of(model)
    seen = {}
    stack = layers_of(model)
    handle = stack[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(states=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with skipping(model, (0,)):
        logits(model)
    handle.remove()
    with torch.no_grad():
        embedded = model.get_input_embeddings()(IDS)
    if name == "gpt2":
        embedded = embedded + model.transformer.wpe.weight[: IDS.shape[1]]
    assert torch.allclose(seen["states"], embedded, rtol=1e-6)
    assert_same(model, before)


def test_skipping_every_layer_leaves_the_embeddings_under_the_head():
    model = build("llama")
    with skipping(model, (0, 1, 1)):
        found = logits(model)
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(model.model.embed_tokens(IDS)))
    assert torch.equal(found, expected)


def test_skipping_works_while_decoding_with_a_cache():
    model = build("llama")
    with skipping(model, (0,)), torch.no_grad():
        whole = model(IDS).logits[:, -1]
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        last = model(IDS[:, -1:], past_key_values=cache).logits[:, -1]
    assert torch.allclose(last, whole, atol=1e-5)


def test_linears_are_named_in_order():
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert list(layer_linears(layers_of(build("llama"))[0])) == [
        *attention,
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    assert list(layer_linears(layers_of(build("gpt2"))[1])) == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]


@pytest.mark.parametrize("name", DENSE)
def test_dense_layers_can_be_shared(name):
    assert [unshareable(layer) for layer in layers_of(build(name))] == [None] * len(layers_of(build(name)))


@pytest.mark.parametrize(
    ("name", "layer", "matrices"),
    [
        ("mixtral", 0, ("mlp.gate.weight (4×32)", "mlp.experts.gate_up_proj (4×96×32)")),
        ("deepseek_v3", 1, ("mlp.gate.weight (4×32)", "mlp.experts.down_proj (4×32×24)")),
        ("gpt_oss", 0, ("mlp.router.weight (4×32)", "mlp.experts.gate_up_proj", "bias")),
        ("mamba", 0, ("mixer.A_log (64×8)", "mixer.conv1d.weight (64×1×4)")),
        ("jamba", 1, ("feed_forward.experts.gate_up_proj",)),
        ("bamba", 0, ("mamba.conv1d.weight",)),
        ("qwen3_next", 0, ("linear_attn.conv1d.weight",)),
    ],
)
def test_what_cannot_be_shared_is_named(name, layer, matrices):
    model = build(name)
    reason = unshareable(layers_of(model)[layer])
    for matrix in matrices:
        assert matrix in reason
    other = 0 if layer else 1
    with pytest.raises(ProfilerError, match=r"layer \d cannot share weights: not the weight of a linear layer: "):
        with_weights_of(model, {layer: other}).__enter__()


def test_the_dense_layer_of_a_model_with_experts_can_be_shared():
    assert unshareable(layers_of(build("deepseek_v3"))[0]) is None


def test_packed_weights_cannot_be_shared():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Identity())
    layer[1].packed_parameters = 16
    assert unshareable(layer) == "not the weight of a linear layer: 1 (packed)"
    assert unshareable(torch.nn.LayerNorm(4)) == "it has no linear layers"


def test_kinds_tell_types_of_attention_apart():
    kinds = layer_kinds(build("gemma3"))
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]
    assert "sliding_attention" in kinds[0] and "full_attention" in kinds[1]
    assert kinds[0].replace("sliding", "full") == kinds[1]
    with pytest.raises(ProfilerError, match=r"different kinds \(full_attention against sliding_attention\)"):
        with_weights_of(build("gemma3"), {1: 0}).__enter__()


def test_kinds_tell_shapes_and_positions_apart():
    for name in ("llama", "gpt2", "mistral"):
        assert len(set(layer_kinds(build(name)))) == 1
    dense, experts = layer_kinds(build("deepseek_v3"))
    assert dense != experts
    assert len(set(layer_kinds(build("jamba")))) == 2
    mixed = SmolLM3Config(
        **{**CONFIGS["llama"]().to_dict(), "num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1], "layer_types": None}
    )
    kinds = layer_kinds(SmolLM3ForCausalLM(mixed))
    assert kinds[0] == kinds[1] == kinds[3] != kinds[2]


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ProfilerError, match="there is no layer 2; the model has layers 0 to 1"):
        with_weights_of(build("llama"), {2: 0}).__enter__()
    with pytest.raises(ProfilerError, match="there is no layer -1"):
        skipping(build("llama"), (-1,)).__enter__()


def test_weights_that_are_elsewhere_are_refused():
    with pytest.raises(ProfilerError, match="the weights of layer 1 are not on the device"):
        with_weights_of(build("llama", device="meta"), {1: 0}).__enter__()
