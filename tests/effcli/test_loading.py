import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig

from effcli import loading, sources
from effcli.errors import BadInputError, EffcliError, NoRoomError, SourceError
from tests import tiny_models
from tests.effcli import tiny_files

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    tiny_files.save(tmp_path / "model")
    return tmp_path / "model"


def load(path, **options):
    trust = {name: options[name] for name in ("allow_pickle", "trust_remote_code") if name in options}
    source = sources.resolve(str(path), config_only=options.get("config_only", False), **trust)
    return loading.load(source, **({"device": "cpu"} | options))


def refusal(path, kind=SourceError, **options) -> str:
    with pytest.raises(EffcliError) as caught:
        load(path, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "mamba", "t5"])
def test_weights_config_tokenizer(tmp_path, name, capsys):
    expected = tiny_files.save(tmp_path, name)
    capsys.readouterr()
    loaded = load(tmp_path)
    assert type(loaded.model) is type(expected)
    for key, value in expected.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key
    assert not loaded.model.training
    assert loaded.tokenizer("w5 w7", add_special_tokens=False).input_ids == [5, 7]
    assert loaded.load_seconds > 0
    assert len(loaded.fingerprint) == 64
    assert (loaded.device, loaded.dtype, loaded.notes) == (CPU, torch.float32, ())
    assert "float32" in loaded.dtype_reason
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_shards_have_the_same_weights(tmp_path):
    expected = tiny_files.save(tmp_path, max_shard_size="20KB")
    loaded = load(tmp_path)
    for key, value in expected.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_config_only_builds_on_meta(folder):
    (folder / "model.safetensors").unlink()
    for path in (folder, folder / "config.json"):
        loaded = load(path, config_only=path == folder)
        assert {tensor.device.type for tensor in loaded.model.state_dict().values()} == {"meta"}
        assert loaded.device == CPU
        assert (loaded.load_seconds, loaded.fingerprint) == (None, None)
        assert loaded.tokenizer is not None


@pytest.mark.parametrize("name", sorted(tiny_models.CONFIGS))
def test_config_only_for_every_architecture(tmp_path, name):
    config = tiny_models.CONFIGS[name]()
    config.save_pretrained(tmp_path)
    loaded = load(tmp_path, config_only=True)
    expected = tiny_models.build(name, device="meta")
    assert loaded.model.num_parameters() == expected.num_parameters()
    assert type(loaded.model) is type(expected)


def test_no_tokenizer_is_said(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    loaded = load(folder)
    assert loaded.tokenizer is None
    assert "no tokenizer" in loaded.notes[0]


def test_broken_tokenizer_is_said(folder):
    (folder / "tokenizer.json").write_text("{")
    loaded = load(folder)
    assert loaded.tokenizer is None
    assert "cannot be loaded" in loaded.notes[0]


def test_pickles(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "--allow-pickle" in refusal(folder)
    loaded = load(folder, allow_pickle=True)
    for key, value in weights.items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_missing_tensor_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(folder)
    assert "lack 1 tensors" in message
    assert "up_proj" in message


def test_unread_tensor_is_noted(folder):
    weights = load_file(folder / "model.safetensors") | {"extra.weight": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "extra.weight" in load(folder).notes[0]


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_shape_is_refused(folder):
    edit(folder, intermediate_size=64)
    refusal(folder)


def test_unknown_architecture(folder):
    edit(folder, model_type="lamma")
    assert "'lamma'" in refusal(folder)


def test_value_that_the_config_class_refuses(folder):
    edit(folder, hidden_size="many")
    assert "hidden_size" in refusal(folder)


def test_own_code_is_refused_or_left(folder):
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    loaded = load(folder)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert "not run" in loaded.notes[0]
    edit(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    assert "--trust-remote-code" in refusal(folder)


def test_own_code_runs_when_trusted(folder, monkeypatch, tmp_path):
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}, architectures=["Own"])
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nprint('noise')\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    loaded = load(folder, trust_remote_code=True)
    assert type(loaded.model).__name__ == "Own"
    assert "--trust-remote-code" in loaded.notes[0]


@pytest.mark.parametrize("architectures", [["BertForMaskedLM"], None])
def test_encoder_is_refused(tmp_path, architectures):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(**sizes, architectures=architectures).save_pretrained(tmp_path)
    message = refusal(tmp_path, config_only=True)
    assert (architectures or ["bert"])[0] in message
    assert "does not generate text" in message


def test_other_head_is_refused(tmp_path):
    LlamaConfig(architectures=["LlamaForSequenceClassification"]).save_pretrained(tmp_path)
    assert "LlamaForSequenceClassification" in refusal(tmp_path, config_only=True)


def test_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "diffusers pipeline" in refusal(tmp_path)


def test_weights_that_do_not_fit(folder, monkeypatch):
    import profilers.device

    needed = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(profilers.device, "memory_available_bytes", lambda device: needed // 2)
    message = refusal(folder, NoRoomError)
    assert str(folder) in message
    assert "--config-only" in message
    assert load(folder, config_only=True).model is not None


def test_spread_over_devices(monkeypatch):
    """The arithmetic of placement, with made-up sizes: no GPU is needed for it."""
    import profilers.device

    free = {"cpu": 100, "cuda": 50}
    monkeypatch.setattr(profilers.device, "memory_available_bytes", lambda device: free[device.type])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = torch.device("cuda", 0)
    assert loading._placement("x", 47, gpu) == ({"": gpu}, None)
    placement, note = loading._placement("x", 48, gpu)
    assert placement == "auto"
    assert "accelerate" in note
    assert loading._placement("x", 195, gpu)[0] == "auto"
    with pytest.raises(NoRoomError, match="GPU"):
        loading._placement("x", 196, gpu)
    assert loading._placement("x", 100, CPU) == (None, None)
    with pytest.raises(NoRoomError):
        loading._placement("x", 101, CPU)


def test_unknown_dtype(folder):
    assert "did you mean 'bfloat16'" in refusal(folder, BadInputError, dtype="bfloat61")


@pytest.mark.parametrize(("name", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_dtype_asked_for(folder, name, expected):
    loaded = load(folder, dtype=name)
    assert loaded.dtype == loaded.model.dtype == expected
    assert loaded.dtype_reason == "asked for"


def test_out_of_memory_has_its_exit_code(folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert "memory ran out" in refusal(folder, NoRoomError)


def test_quantized_config_is_counted_unquantized(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    loaded = load(folder, config_only=True)
    assert "quantized" in loaded.notes[0]
    assert loaded.dtype == torch.float32
