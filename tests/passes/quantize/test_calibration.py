"""Calibration gives what llm-compressor gives, and the same again: after a restart, and after an interruption."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import passes.calibration_text
import passes.quantize
from passes.base import PassError
from passes.quantize import QuantizePass, calibration, modifiers
from passes.quantize.quiet import quiet_libraries
from profilers.base import ProfilerError
from profilers.text import TokenStream
from tests.passes.quantize.small import LENGTH, SAMPLES, VOCABULARY, build, context, parameters, quantize, stored, text


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def by_oneshot(name: str, recipe: list[Any], folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights and scales that llm-compressor's own entry point comes to, on the same batches."""
    build(name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = text().windows(SAMPLES, LENGTH)
    batch = {"input_ids": windows, "attention_mask": torch.ones_like(windows)}
    with quiet_libraries():
        oneshot(
            model=model,
            processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))),
            dataset=DataLoader([batch], batch_size=None),
            recipe=recipe,
            pipeline="sequential",
        )
    return {key: value for key, value in tensors(model).items() if "observer" not in key}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_gptq_equals_llm_compressor(name: str, tmp_path: Path) -> None:
    model = build(name)
    quantize(model, tmp_path / "work", group_size=32)
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        }
    }
    expected = by_oneshot(name, [GPTQModifier(config_groups=groups, ignore=["lm_head"])], tmp_path / "source")
    assert_same(tensors(model), expected)


def test_smoothquant_equals_llm_compressor(tmp_path: Path) -> None:
    model = build()
    quantize(model, tmp_path / "work", scheme="w8a8")
    recipe = [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8", ignore=["lm_head"])]
    assert_same(tensors(model), by_oneshot("llama", recipe, tmp_path / "source"))


def test_awq_equals_llm_compressor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    quantize(model, tmp_path / "work", method="awq")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # theirs pins memory, which needs a GPU
    recipe = [AWQModifier(), QuantizationModifier(scheme="W4A16", ignore=["lm_head"])]
    assert_same(tensors(model), by_oneshot("llama", recipe, tmp_path / "source"))


def test_layers_with_one_input_share_a_hessian_that_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    accumulate = modifiers.GPTQModifier.calibrate_module

    def counted(self: Any, module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        accumulate(self, module, args, output)

    monkeypatch.setattr(modifiers.GPTQModifier, "calibrate_module", counted)
    quantize(build(), tmp_path)
    assert len(calls) == 3 * 4  # qkv, o, gate and up, down in each of three layers; one batch


def test_inputs_that_stop_being_shared_are_calibrated_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes.calibration_text, "BATCH_TOKENS", LENGTH)  # a sample a batch
    plain = build()
    quantize(plain, tmp_path / "plain")
    model = build()
    forward = type(model.model.layers[0].self_attn).forward
    seen: list[int] = []

    def diverging(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) % 3 == 0:  # the same values in another tensor for one of the layers
            key = self.k_proj.forward
            self.k_proj.forward = lambda x: key(x)
            hook = self.k_proj.register_forward_pre_hook(lambda module, given: (given[0].clone(),), prepend=True)
            try:
                return forward(self, hidden_states, *args, **kwargs)
            finally:
                hook.remove()
                self.k_proj.forward = key
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", diverging)
    quantize(model, tmp_path / "diverging")
    monkeypatch.undo()
    assert_same(tensors(plain), tensors(model))


def reconstruction(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Return the squared difference of final states on text that neither was calibrated on."""
    ids = text(256, seed=3).ids[None]
    with torch.no_grad():
        return float((model.model(ids).last_hidden_state - other.model(ids).last_hidden_state).square().sum())


def test_gptq_is_nearer_to_the_original_than_rounding(tmp_path: Path) -> None:
    original, gptq, rounded = build(), build(), build()
    gptq_record = quantize(gptq, tmp_path / "gptq")
    rounded_record = quantize(rounded, tmp_path / "rtn", method="rtn")
    assert reconstruction(gptq, original) < 0.8 * reconstruction(rounded, original)
    assert gptq_record.details["error_of"] == "outputs" and rounded_record.details["error_of"] == "weights"


def test_errors_are_those_of_outputs_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator)
    rounded = weight + 0.1 * torch.randn(8, 16, generator=generator)
    inputs = torch.randn(100, 16, generator=generator)
    exact, lost = weight.double() @ inputs.double().T, (weight - rounded).double() @ inputs.double().T
    found = modifiers.output_error(weight, rounded, 3.0 * inputs.T @ inputs)
    assert found == pytest.approx(float(lost.square().sum() / exact.square().sum()), rel=1e-5)


def test_rounding_errors_are_those_of_weights_by_hand(tmp_path: Path) -> None:
    record = quantize(build(), tmp_path, method="rtn", group_size=32)
    weight = build().model.layers[0].mlp.down_proj.weight.detach().double()
    groups = weight.reshape(128, 8, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).float().double()  # compressed-tensors: 2 max|w| over 15 steps
    rounded = (groups / scale).round().clamp(-8, 7) * scale
    expected = float((groups - rounded).square().sum() / groups.square().sum())
    error = next(layer.error for layer in record.layers if layer.name == "model.layers.0.mlp.down_proj")
    assert error == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let AWQ try three scales in place of twenty."""
    monkeypatch.setattr(AWQModifier, "_get_grid_search_params", lambda self: [(0.0, False), (0.5, False), (0.5, True)])


class Interrupted(Exception):
    pass


@contextlib.contextmanager
def interrupted_after(parts: int) -> Iterator[None]:
    """Stop a run in the middle of the part after ``parts`` finished ones, when its results are not yet on disk."""
    save = calibration._Run._save

    def failing(self: Any, index: int, state: Any) -> None:
        if index == parts:
            raise Interrupted
        save(self, index, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration._Run, "_save", failing)
        yield


@pytest.mark.usefixtures("coarse_search")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llama", {}),
        ("llama", {"scheme": "w8a8"}),
        ("llama", {"method": "awq"}),
        ("llama", {"scheme": "auto", "bits": 4.6}),
        ("gemma3", {"method": "awq"}),
        ("mixtral", {"kv_cache": "fp8"}),
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(
    name: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes.calibration_text, "BATCH_TOKENS", 2 * LENGTH)
    quantize(build(name), tmp_path / "whole", tmp_path / "whole-out", **given)
    with interrupted_after(2), pytest.raises(Interrupted):
        quantize(build(name), tmp_path / "work", **given)
    record = quantize(build(name), tmp_path / "work", tmp_path / "out", **given)
    assert any("the first 2 parts of the model were taken over" in note for note in record.notes)
    whole, resumed = (sorted((tmp_path / side).glob("*.safetensors")) for side in ("whole-out", "out"))
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in resumed]
    assert record.layers == quantize(build(name), tmp_path / "again", **given).layers


def test_what_another_source_or_recipe_left_is_not_used(tmp_path: Path) -> None:
    with interrupted_after(2), pytest.raises(Interrupted):
        quantize(build(), tmp_path)
    changed = build()
    changed.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1e-3
    for model, given in ((changed, {}), (build(), {"dampening": 0.02})):
        assert quantize(model, tmp_path, **given).notes == ()
        assert len(list(tmp_path.iterdir())) == 1  # the old one is gone


def test_activations_of_finished_layers_are_not_kept(tmp_path: Path) -> None:
    with interrupted_after(3), pytest.raises(Interrupted):
        quantize(build(), tmp_path)
    (folder,) = tmp_path.iterdir()
    assert "model_layers_0" not in {path.name for path in (folder / calibration.SPOOL).iterdir()}


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    for side in ("a", "b"):
        quantize(build(), tmp_path / f"{side}-work", tmp_path / side)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(method: str, value: float, tmp_path: Path) -> None:
    model = build()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(PassError, match="weight model.layers.1.mlp.up_proj.weight holds 1 values that are NaN or inf"):
        quantize(model, tmp_path, method=method)


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    step = QuantizePass.from_mapping(parameters())
    with pytest.raises(PassError, match="has 300 tokens, and samples=8 of length=64 need 512; .* or samples=4"):
        step.apply(build(), context(tmp_path, calibration=text(300)))
    with pytest.raises(PassError, match="needs calibration text; give one, or use method=rtn"):
        step.apply(build(), context(tmp_path, calibration=None))

    class Other:
        name = "two words"

        def windows(self, count: int, length: int) -> torch.Tensor:
            raise ProfilerError("it has 2 tokens")

    with pytest.raises(PassError, match="'two words' is too short for length=64: it has 2 tokens"):
        step.apply(build(), context(tmp_path, calibration=Other()))


def test_a_hessian_that_cannot_be_inverted_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = modifiers.GPTQModifier.calibrate_module

    def broken(self: Any, module: Any, args: Any, output: Any) -> None:
        accumulate(self, module, args, output)
        if self._module_names[module] == "model.layers.1.mlp.down_proj":
            self._hessians[module].neg_()

    monkeypatch.setattr(modifiers.GPTQModifier, "calibrate_module", broken)
    record = quantize(build(), tmp_path)
    assert any("1 layers were rounded to nearest" in note and "1.mlp.down_proj" in note for note in record.notes)


def test_a_model_that_cannot_be_cut_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = build()
    forward = model.model.forward

    def untraceable(*args: Any, **kwargs: Any) -> Any:
        if bool((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).sum() > -1):
            return forward(*args, **kwargs)
        raise AssertionError

    model.model.forward = untraceable
    with pytest.raises(PassError, match="use method=rtn"):
        quantize(model, tmp_path)


def test_smoothing_that_would_change_the_model_is_refused(tmp_path: Path) -> None:
    # llm-compressor balances Gemma's MLP against the norm after attention, which does not feed it.
    with pytest.raises(PassError, match="guess of which norms of Gemma3ForCausalLM feed which layers is wrong"):
        quantize(build("gemma3"), tmp_path, scheme="w8a8")
    # Mixtral's router reads the norm that its experts read.
    with pytest.raises(PassError, match="use method=gptq"):
        quantize(build("mixtral"), tmp_path, method="awq")


def test_smoothing_leaves_the_model_what_it_was(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    record = quantize(model, tmp_path, method="awq", scheme="w8a16")
    ids = text(48, seed=2).ids[None]
    with torch.no_grad():
        before, after = build("qwen3_moe")(ids).logits, model(ids).logits
    assert float((before - after).abs().max()) < 0.05 * float(before.abs().max())
    assert record.summary == "32 layers to 8 bits (AWQ, w8a16)"


class Recorded:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.total = 0.0
        self.done = 0.0
        self.texts: list[str] = []

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Recorded]:
        self.total = total or 0.0
        yield self

    def advance(self, steps: float = 1.0) -> None:
        self.done += steps

    def describe(self, text: str) -> None:
        self.texts.append(text)


def test_progress_shows_layer_and_error_and_ends_at_its_total(tmp_path: Path) -> None:
    progress = Recorded()
    step = QuantizePass.from_mapping(parameters())
    step.apply(build(), context(tmp_path, progress=progress))
    assert progress.done == progress.total > 0
    assert "calibrating layer 2 of 3 (error of down_proj" in " ".join(progress.texts)


def test_nothing_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantize(build("mixtral"), tmp_path / "work", tmp_path / "out")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.usefixtures("coarse_search")
def test_memory_does_not_grow_with_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the activations that are alive while a layer is calibrated, with few and with many samples."""
    import gc

    monkeypatch.setattr(passes.calibration_text, "BATCH_TOKENS", LENGTH)
    forward = calibration._Run._forward
    alive: dict[int, int] = {}
    for method in ("gptq", "awq"):
        for samples in (4, 16):
            model = build()
            peak = 0

            def watched(self: Any, subgraph: Any, sample: int) -> Any:
                nonlocal peak
                outputs = forward(self, subgraph, sample)
                if sample == self.samples - 1 and subgraph is self.subgraphs[1] and not peak:
                    found = {
                        item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
                        for item in gc.get_objects()
                        if type(item) is torch.Tensor and item.ndim == 3 and item.shape[-2:] == (LENGTH, 128)
                    }
                    peak = max(peak, sum(found.values()))
                return outputs

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(calibration._Run, "_forward", watched)
                quantize(model, tmp_path / f"{method}{samples}", method=method, samples=samples)
            alive[samples] = peak
        assert 0 < alive[16] <= alive[4] + LENGTH * 128 * 4


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    quantize(build(), tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_a_whole_run_is_recorded(tmp_path: Path) -> None:
    record = quantize(build(), tmp_path / "work", tmp_path / "out", ignore=["re:.*o_proj$"])
    assert record.summary == "18 layers to 4 bits in groups of 128 (GPTQ, w4a16)"
    assert record.details["calibration"] == {
        "text": "a Markov chain",
        "samples": SAMPLES,
        "length": LENGTH,
        "tokens": SAMPLES * LENGTH,
    }
    assert {(item.kind, item.bits, item.group_size) for item in record.layers} >= {("q_proj", 4.0, 128)}
    assert all(item.error is not None and 0 < item.error < 0.05 for item in record.layers)
    assert {item.name.rpartition(".")[2] for item in record.skipped} == {"o_proj", "lm_head"}
    assert record.parameters["samples"] == SAMPLES and record.parameters["scheme"] == "w4a16"
    assert set(record.versions) == {"llmcompressor", "compressed-tensors", "torch", "transformers"}
    weights = stored(tmp_path / "out")
    assert weights["model.embed_tokens.weight"].shape == (VOCABULARY, 128)
    assert "model.layers.0.self_attn.o_proj.weight" in weights


def test_windows_are_those_that_the_text_gives(tmp_path: Path) -> None:
    stream = TokenStream(torch.arange(4096) % VOCABULARY, "counting")
    batches = passes.calibration_text.batches(context(tmp_path, calibration=stream), 40, LENGTH, without="none")
    assert torch.equal(torch.cat(batches), stream.windows(40, LENGTH))
    assert [len(batch) for batch in batches] == [32, 8]
