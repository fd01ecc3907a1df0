import gc
import json
import weakref

import pytest
import torch
from accelerate import disk_offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, OPTConfig

from profilers.base import NotApplicableError, ProfilerError
from profilers.reference import Head, Reference, final_states, record_reference
from tests.tiny_models import CONFIGS, VOCABULARY, build

DECODERS = [name for name in CONFIGS if name != "t5"]
# The experts' grouped matrix product of transformers takes no float64.
DENSE = [
    name for name in DECODERS if name not in ("mixtral", "qwen3_moe", "deepseek_v3", "jamba", "qwen3_next", "gpt_oss")
]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# Heads that do more than one matrix product.
HEADS = {
    "tied": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "soft cap": lambda: Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=0.1),
    "scaled up": lambda: CohereConfig(**COMMON, logit_scale=3.0),
    "scaled down": lambda: GraniteConfig(**COMMON, logits_scaling=8.0),
    "base model with a decoder inside": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    ),
}


def from_config(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def windows(count=2, length=20):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def full_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def check(model, ids, folder, tolerance):
    expected = full_logits(model, ids)
    reference = record_reference(model, ids)
    reference.save(folder)
    for kept in (reference, Reference.load(folder)):
        assert torch.equal(kept.windows, ids)
        for window in range(ids.shape[0]):
            found = torch.cat([kept.logits(window, start, min(start + 7, 20)) for start in range(0, 20, 7)])
            torch.testing.assert_close(found, expected[window], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", DECODERS)
def test_replayed_logits_are_the_models_own(name, tmp_path):
    check(build(name), windows(), tmp_path, 1e-5)


@pytest.mark.parametrize("name", [*DENSE, *HEADS])
def test_replayed_logits_in_float64(name, tmp_path):
    model = build(name, dtype=torch.float64) if name in CONFIGS else from_config(HEADS[name](), torch.float64)
    check(model, windows(), tmp_path, 1e-13)


def test_the_soft_cap_is_applied():
    model = from_config(HEADS["soft cap"]())
    reference = record_reference(model, windows())
    assert reference.logits(0, 0, 20).abs().max() <= 0.1
    states = final_states(model, windows())[0]
    assert model.lm_head(states).abs().max() > 0.1


def test_recording_leaves_the_model_as_it_was():
    model = build("llama")
    before, names = full_logits(model, windows()), set(model.__dict__)
    modules = list(model.named_modules())
    record_reference(model, windows())
    assert torch.equal(full_logits(model, windows()), before)
    assert list(model.named_modules()) == modules and set(model.__dict__) == names


def test_the_dropped_model_leaves_only_its_head():
    model = build("llama")
    layers, head = weakref.ref(model.model.layers[0]), weakref.ref(model.lm_head)
    reference = record_reference(model, windows())
    del model
    gc.collect()
    assert layers() is None and head() is not None
    assert reference.logits(0, 0, 3).shape == (3, VOCABULARY)


def test_what_is_kept_does_not_grow_with_the_vocabulary(tmp_path):
    sizes = {}
    for vocabulary in (97, 9_700):
        model = from_config(LlamaConfig(**{**COMMON, "vocab_size": vocabulary}), torch.bfloat16)
        reference = record_reference(model, windows())
        folder = tmp_path / str(vocabulary)
        reference.save(folder)
        sizes[vocabulary] = (folder / "states.safetensors").stat().st_size
        assert reference.states.shape == (2, 20, 32) and reference.states.dtype == torch.bfloat16
    assert sizes[97] == sizes[9_700]


def test_a_custom_head_module_is_used_in_memory_and_refused_on_disk(tmp_path):
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return 2 * self.inner(states)

    model = build("llama")
    plain = full_logits(model, windows())
    model.lm_head = Doubled(model.lm_head)
    reference = record_reference(model, windows())
    torch.testing.assert_close(reference.logits(1, 0, 20), 2 * plain[1])
    with pytest.raises(NotApplicableError, match="cannot be saved"):
        reference.save(tmp_path)


def test_hooks_and_patched_forwards_stay_with_the_whole_model():
    model = build("llama")
    expected = full_logits(model, windows())
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(1))
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    head = Head(model)
    torch.testing.assert_close(head.logits(final_states(model, windows())[0]), expected[0])
    assert not calls


def test_a_head_that_reads_more_than_the_states_is_refused():
    model = build("llama")
    inner = model.lm_head

    class Positional(torch.nn.Module):
        """Adds something that depends on how often it was called."""

        calls = 0

        def forward(self, states):
            self.calls += 1
            return inner(states) + self.calls

    model.lm_head = Positional()
    with pytest.raises(NotApplicableError, match="reads more than the final hidden states"):
        record_reference(model, windows())


def test_models_without_a_decoders_head_are_refused():
    with pytest.raises(NotApplicableError, match="T5ForConditionalGeneration is an encoder-decoder"):
        record_reference(build("t5"), windows())
    with pytest.raises(NotApplicableError, match="LlamaModel has no base model"):
        Head(build("llama").model)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"shape \(3,\)"),
        (torch.zeros(1, 1, dtype=torch.long), r"shape \(1, 1\)"),
        (torch.full((1, 4), VOCABULARY), f"token id {VOCABULARY} but the model knows {VOCABULARY}"),
        (torch.zeros(1, 1025, dtype=torch.long), "1025 is past the model's limit of 1024"),
    ],
)
def test_windows_that_the_model_cannot_read_are_refused(ids, message):
    with pytest.raises(ProfilerError, match=message):
        record_reference(build("llama"), ids)


def test_damaged_references_are_one_line_errors(tmp_path):
    record_reference(build("llama"), windows()).save(tmp_path)
    assert set(load_file(tmp_path / "head.safetensors")) == {"lm_head.weight"}
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))
    about = json.loads((tmp_path / "reference.json").read_text())
    (tmp_path / "reference.json").write_text(json.dumps(about | {"format": "effcli.reference/9"}))
    with pytest.raises(ProfilerError, match="'effcli.reference/9'.*record it again"):
        Reference.load(tmp_path)
    (tmp_path / "reference.json").write_text(json.dumps(about))
    (tmp_path / "states.safetensors").write_bytes(b"\x10")
    with pytest.raises(ProfilerError, match="cannot read the reference"):
        Reference.load(tmp_path)
    (tmp_path / "states.safetensors").unlink()
    with pytest.raises(ProfilerError, match="cannot read the reference"):
        Reference.load(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_models_whose_weights_accelerate_keeps_elsewhere(tmp_path, tied):
    model = from_config(LlamaConfig(**COMMON, tie_word_embeddings=tied))
    expected = full_logits(model, windows())
    disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    reference = record_reference(model, windows())
    torch.testing.assert_close(reference.logits(1, 0, 20), expected[1])
    reference.save(tmp_path / "saved")
    torch.testing.assert_close(Reference.load(tmp_path / "saved").logits(1, 0, 20), expected[1])


def test_a_first_forward_may_replace_the_head():
    """Quantized checkpoints are decompressed by a hook of the whole model's first forward."""
    model = build("llama")
    expected = full_logits(model, windows())
    wanted, model.lm_head = model.lm_head, torch.nn.Linear(32, VOCABULARY)

    def decompress(module, inputs):
        module.lm_head = wanted
        hook.remove()

    hook = model.register_forward_pre_hook(decompress)
    torch.testing.assert_close(record_reference(model, windows()).logits(0, 0, 20), expected[0])
