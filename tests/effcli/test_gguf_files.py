import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from effcli import gguf_files, loading, sources
from effcli.errors import SourceError
from tests.effcli import tiny_files

Q = gguf.GGMLQuantizationType


@pytest.mark.parametrize("quantized", [Q.Q4_1, Q.Q8_0, Q.F16, Q.F32])
def test_weights_are_the_dequantized_values(tmp_path, quantized):
    path = tmp_path / "tiny.gguf"
    expected = tiny_files.write_gguf(path, quantized)
    loaded = loading.load(sources.resolve(str(path)), device="cpu", dtype="float32")
    found = loaded.model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name
    ids = torch.arange(40).unsqueeze(0)
    torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-6)
    packed = quantized in (Q.Q4_1, Q.Q8_0)
    assert any(quantized.name in note for note in loaded.notes) == packed


def test_saved_and_loaded_again(tmp_path):
    path = tmp_path / "tiny.gguf"
    expected = tiny_files.write_gguf(path, Q.Q4_1)
    loaded = loading.load(sources.resolve(str(path)), device="cpu", dtype="float32")
    assert not hasattr(loaded.config, "quantization_config")
    loaded.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, value in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_facts(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_files.write_gguf(path, Q.Q4_1)
    facts = gguf_files.read_facts(path)
    matrices = sum(p.numel() for p in tiny_files.write_gguf(path, Q.Q4_1).parameters() if p.ndim == 2)
    assert facts.architecture == "llama"
    assert facts.elements["Q4_1"] == matrices
    assert (facts.quantized, facts.stored_dtype) == ("Q4_1", None)
    assert facts.special_tokens == {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    }
    tiny_files.write_gguf(path, Q.F16)
    facts = gguf_files.read_facts(path)
    assert (facts.quantized, facts.stored_dtype) == ("", "float16")


def test_dtype_of_dequantized_weights(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_files.write_gguf(path, Q.Q4_1)
    loaded = loading.load(sources.resolve(str(path)), device="cpu")
    native = torch.bfloat16 in loading.native_dtypes(torch.device("cpu"))
    assert loaded.dtype == loaded.model.dtype == (torch.bfloat16 if native else torch.float32)
    assert "Q4_1" in loaded.dtype_reason


def test_config_only(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_files.write_gguf(path)
    loaded = loading.load(sources.resolve(str(path)), device="cpu", config_only=True)
    assert {p.device.type for p in loaded.model.parameters()} == {"meta"}
    assert loaded.config.hidden_size == tiny_files.GGUF_CONFIG.hidden_size
    assert loaded.fingerprint is None


def test_tokenizer_follows_the_metadata(tmp_path):
    """Against the rule written out with other parts: a regex for the digits, GPT-2's own pattern, plain BPE."""
    path = tmp_path / "tiny.gguf"
    tiny_files.write_gguf(path)
    tokenizer = loading.load(sources.resolve(str(path)), device="cpu").tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    tokens = [*tiny_files.SPECIAL_TOKENS.values(), *tiny_files.byte_tokens(), "Ġa", "ab"]
    reference = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("Ġ", "a"), ("a", "b")]))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in ("a ab ba", "12 345  6\n\n 7x8", "é ½ 日本\t<a>", "  a  9", "▁a ▁"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == reference.encode(text).ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer("a<eos>", add_special_tokens=False).input_ids[-1] == 2


def test_truncated(tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_files.write_gguf(path)
    whole = path.read_bytes()
    for kept in (4, 16, 200, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:kept])
        with pytest.raises(SourceError, match="truncated") as caught:
            loading.load(sources.resolve(str(path)), device="cpu")
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_one_of_several_parts(tmp_path):
    path = tmp_path / "part.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="one of 3 parts"):
        gguf_files.read_facts(path)


def test_unknown_architecture(tmp_path):
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "oddity")
    writer.add_tensor("token_embd.weight", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="oddity") as caught:
        loading.load(sources.resolve(str(path)), device="cpu")
    assert "\n" not in str(caught.value)
