"""Training codebooks: the budget, determinism, every option, and that what it weighs is what the loss feels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from passes.base import PassError
from passes.kv_pq import fit
from passes.kv_pq.codebooks import Codebooks
from passes.kv_pq.collect import collect
from passes.kv_pq.parameters import KVPQParameters
from profilers.base import SilentProgress


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, 97, (24, 64), generator=generator).split(8))


def train(model: Any, batches: list[torch.Tensor], **values: Any) -> tuple[Codebooks, dict[str, Any]]:
    return fit.train(model, batches, KVPQParameters(**{"iterations": 2, **values}))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_budget_is_kept(model: Any, batches: list[torch.Tensor], bits: float) -> None:
    parameters = KVPQParameters(bits=bits)
    books, about = train(model, batches, bits=bits)
    assert books.bits_per_value <= parameters.budget_bits
    assert books.bits_per_value == 8 * parameters.codes(16) / 16  # on average over layers, keys and values
    parts = [about["parts"][kind][str(layer)] for kind in ("keys", "values") for layer in range(3)]
    assert sum(map(sum, parts)) / 12 == parameters.codes(16) - 1  # two heads a side, and a gain of each


def test_more_bits_lose_less(model: Any, batches: list[torch.Tensor]) -> None:
    lost = []
    for bits in (2, 4, 7):
        _, about = train(model, batches, bits=bits, allocation="even")
        lost.append(sum(about["distortion"]["values"].values()))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.05 * lost[0]


def test_the_same_seed_gives_the_same_codebooks_and_nothing_of_the_model_changes(
    model: Any, batches: list[torch.Tensor]
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    implementation = model.config._attn_implementation
    one, other = (train(model, batches)[0] for _ in range(2))
    for layer in one.layers:
        for kind in ("keys", "values"):
            for name, tensor in getattr(one.layers[layer], kind).tensors().items():
                assert torch.equal(tensor, getattr(other.layers[layer], kind).tensors()[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    "values",
    [
        {"pairing": "neighbours"},
        {"pairing": "rope"},
        {"pairing": "correlation"},
        {"keys": "after-rope", "rotation": "opq"},
        {"rotation": "hadamard"},
        {"gains": False},
        {"weighting": "none"},
        {"allocation": "even"},
        {"per_head": False},
    ],
    ids=str,
)
def test_every_option_encodes_and_decodes(
    model: Any, batches: list[torch.Tensor], values: dict[str, Any], tmp_path: Any
) -> None:
    books, about = train(model, batches, bits=5, **values)
    books.save(tmp_path)
    again = Codebooks.load(tmp_path)
    for layer, stored in again.layers.items():
        assert (stored.rope is None) == (values.get("keys") == "after-rope")
        for kind in ("keys", "values"):
            side = getattr(stored, kind)
            assert (side.gains is None) == (values.get("gains") is False)
            assert (side.basis is not None) == ("rotation" in values and (kind == "values" or stored.rope is None))
            assert about["distortion"][kind][str(layer)] < 0.2
            if values.get("per_head") is False:
                assert torch.equal(side.centroids[0], side.centroids[1])


def test_what_weighs_more_gets_more_codes(model: Any, batches: list[torch.Tensor]) -> None:
    """A layer, or a head, whose values are multiplied by zero afterwards does not matter to the loss."""
    import copy

    changed = copy.deepcopy(model)
    changed.model.layers[1].self_attn.o_proj.weight.data.zero_()
    changed.model.layers[2].self_attn.o_proj.weight.data[:, :32].zero_()  # both query heads of the first KV head
    _, about = train(changed, batches)
    parts = about["parts"]["values"]
    assert max(parts["1"]) < min(*parts["0"], parts["2"][1])
    assert parts["2"][0] < parts["2"][1]


def test_gradients_are_those_of_the_loss(model: Any, batches: list[torch.Tensor]) -> None:
    """Squared gradients of values by finite differences of the whole model, through the value projection's bias."""
    generator = torch.Generator().manual_seed(3)
    found = collect(
        model, batches[:1], {0: None, 1: None, 2: None}, kv_heads=2, kept=0, vectors=10**6, gradient_batches=1,
        generator=generator, progress=SilentProgress(),
    )  # fmt: skip
    gradient = found[1]["values"].gradient
    assert gradient is not None
    assert gradient.shape == found[1]["values"].x.shape == (2, 8 * 64, 16)
    # The sum over tokens is the gradient of a bias of the value projection; drawing tokens again needs the same seed.
    projection = model.model.layers[1].self_attn.v_proj
    drawn = torch.Generator().manual_seed(3)
    torch.randperm(8 * 64, generator=drawn)
    with torch.no_grad():
        chance = model(input_ids=batches[0]).logits.float().softmax(-1).flatten(0, 1)
    noise = torch.rand(chance.shape, generator=drawn).clamp_min(1e-20).log().neg()
    labels = (noise / chance.clamp_min(1e-30)).argmin(-1)

    def loss(step: float) -> float:
        handle = projection.register_forward_hook(lambda _m, _a, out: out + step * direction)
        try:
            with torch.no_grad():
                logits = model(input_ids=batches[0]).logits.double().flatten(0, 1)
        finally:
            handle.remove()
        return float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))

    direction = torch.zeros(32)
    direction[5] = 1.0  # head 0, channel 5
    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert float(gradient[0, :, 5].sum()) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_too_little_text(model: Any) -> None:
    with pytest.raises(
        PassError, match="240 tokens of calibration text are too few for 256 centroids, which need 1024"
    ):
        train(model, [torch.zeros(4, 64, dtype=torch.int64)])


def test_keys_that_cannot_be_turned_back() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    text = [torch.randint(0, 97, (24, 64))]
    with pytest.raises(PassError, match="keys of layer 0 cannot be stored before rotary embedding: its attention is"):
        train(model.eval(), text, keys="before-rope")
    books, _ = train(model, text)
    assert books.layers[0].rope is None


def test_a_share_of_the_windows_is_random_and_none_that_gives_the_fisher_information(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = list(torch.full((24, 64), 5).split(8))
    seen: list[torch.Tensor] = []

    def watched(model: Any, batches: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.extend(batches)
        assert bool((torch.cat(batches[: kwargs["gradient_batches"]])[:18] == 5).all())
        raise PassError("seen enough")

    monkeypatch.setattr(fit, "collect", watched)
    with pytest.raises(PassError, match="seen enough"):
        train(model, text, random=0.25)
    windows = torch.cat(seen)
    assert [tuple(batch.shape) for batch in seen] == [(8, 64)] * 3
    assert bool((windows[:18] == 5).all())
    assert windows[18:].unique().numel() > 80
    assert all(bool((batch == 5).all()) for batch in text)  # what was given is as it was
