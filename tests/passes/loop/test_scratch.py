"""Training from scratch: same windows for both models, what is refused, the tokenizer, the whole pipeline."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from effcli.dry_run import DryRun
from effcli.errors import BadInputError, InterruptedRunError, SourceError
from effcli.pipeline import optimize
from effcli.recipes import Recipe, from_mapping
from passes.base import PassContext, PassError, SourceContext
from passes.loop import LoopPass, scratch, scratch_record, scratch_text, scratch_tokenizer, targets
from passes.loop.layout import LoopPlan
from profilers.meta import meta_model
from tests.passes.loop.small import CONFIGS, CPU
from tests.passes.loop.test_heal import StopAt

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "saw", "two", "birds", "in", "their", "nest")
STEPS = 6
GIVEN = {
    "from_scratch": True, "train_tokens": STEPS * 4 * 32, "train_length": 32, "train_batch": 4, "blocks": 2, "loops": 2,
    "rank": 2,
}  # fmt: skip


def small_config(name: str = "tied") -> PreTrainedConfig:
    config = CONFIGS[name]()
    config.vocab_size = 300
    return config


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    chosen = torch.randint(len(WORDS), (6000,), generator=torch.Generator().manual_seed(1)).tolist()
    lines = [" ".join(WORDS[index] for index in chosen[start : start + 12]) for start in range(0, 6000, 12)]
    path.write_text("\n".join(lines) + "\n")
    return path


def item_of(text: Path, **values: Any) -> LoopPass:
    item = LoopPass.from_mapping(GIVEN | {"train_text": str(text)} | values)
    assert isinstance(item, LoopPass)
    return item


def twin_of(text: Path, folder: Path, work: Path, name: str = "tied", progress: Any = None, **values: Any) -> Path:
    """Build a twin as the pipeline does, and return its folder."""
    folder.mkdir()
    context = SourceContext(meta_model(small_config(name), torch.float32), None, CPU, work, 64, seed=3)
    if progress is not None:
        context.progress = progress
    item_of(text, **values).build_source(folder, context)
    return folder


def looped_of(text: Path, twin: Path, work: Path, progress: Any = None, **values: Any) -> tuple[PreTrainedModel, Any]:
    model = AutoModelForCausalLM.from_pretrained(twin).eval()
    context = PassContext(AutoTokenizer.from_pretrained(twin), CPU, None, work, seed=3, source=twin)
    if progress is not None:
        context.progress = progress
    return model, item_of(text, **values).apply(model, context)


@pytest.fixture(scope="module")
def twin(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    return twin_of(text, folder / "twin", folder / "work")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_twin_learns_and_training_it_again_gives_the_same_files(text: Path, twin: Path, tmp_path: Path) -> None:
    again = twin_of(text, tmp_path / "again", tmp_path / "work")
    weights = load_file(twin / "model.safetensors")
    assert same(weights, load_file(again / "model.safetensors"))
    assert (twin / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    said = json.loads((twin / scratch_record.FILE).read_text())
    assert (said["tokens"], said["steps"]) == (STEPS * 128, STEPS)
    first, last = said["curve"][0], said["curve"][-1]
    assert (first["tokens"], last["tokens"]) == (0, STEPS * 128)
    assert last["held_out_loss"] < first["held_out_loss"]
    assert first["held_out_loss"] == pytest.approx(math.log(300), abs=0.2)  # it knows nothing yet
    other = twin_of(text, tmp_path / "other", tmp_path / "work2", learning_rate=1e-4)
    assert not same(weights, load_file(other / "model.safetensors"))


def test_both_models_see_the_same_windows(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    original = scratch.next_token_loss

    def recorded(model: PreTrainedModel, windows: torch.Tensor, bos: int | None) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen[-1].append(windows.clone())
        return original(model, windows, bos)

    monkeypatch.setattr(scratch, "next_token_loss", recorded)
    seen.append([])
    folder = twin_of(text, tmp_path / "twin", tmp_path / "work")
    seen.append([])
    looped_of(text, folder, tmp_path / "work2")
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(torch.equal(mine, other) for mine, other in zip(*seen, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    part = scratch_text.read(item_of(text).parameters)
    training = tokenizer(part.training)["input_ids"]
    joined = ",".join(map(str, training))
    assert all(",".join(map(str, row)) in joined for windows in seen[0] for row in windows.tolist())
    assert part.training + part.held_out == text.read_text()
    assert 0.04 < len(part.held_out) / len(text.read_text()) < 0.06


def test_the_looped_model_stores_each_block_once_and_the_record_has_both(
    text: Path, twin: Path, tmp_path: Path
) -> None:
    model, record = looped_of(text, twin, tmp_path / "work")
    item_of(text).save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(name.endswith("q_proj.weight") for name in stored) == 2  # of four layers
    original = load_file(twin / "model.safetensors")
    said = record.details["from_scratch"]
    for name, tensors in (("twin", original), ("looped", stored)):
        assert said[name]["parameters"] == sum(tensor.numel() for tensor in tensors.values())
        assert said[name]["tokens"] == STEPS * 128
    assert said["parameter_share"] == said["looped"]["parameters"] / said["twin"]["parameters"] < 1
    assert said["loss_ratio"] == said["looped"]["held_out_loss"] / said["twin"]["held_out_loss"]
    deltas = 2 * sum(tensor.numel() for name, tensor in stored.items() if ".delta_" in name)
    assert said["looped"]["flops_per_token"] - said["twin"]["flops_per_token"] == deltas
    linears = 2 * sum(tensor.numel() for tensor in original.values() if tensor.dim() == 2)  # the head is tied
    assert said["twin"]["flops_per_token"] == linears
    assert "held-out loss" in record.summary and f"{STEPS * 128:,} tokens" in record.summary
    assert model.dtype == torch.float32 and not model.training
    with torch.no_grad():
        deltas_out = [tensor for name, tensor in stored.items() if name.endswith("delta_out")]
        assert all(tensor.abs().max() > 0 for tensor in deltas_out)  # they start at zero


def test_the_held_out_loss_is_the_mean_over_every_held_out_window(text: Path, twin: Path) -> None:
    said = json.loads((twin / scratch_record.FILE).read_text())
    tokenizer, model = AutoTokenizer.from_pretrained(twin), AutoModelForCausalLM.from_pretrained(twin).double().eval()
    ids = torch.tensor(tokenizer((twin / scratch.HELD_OUT).read_text())["input_ids"])
    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 31, 32):
            window = ids[start : start + 32]
            scores = model(window[None]).logits[0].log_softmax(-1)
            total -= float(sum(scores[place, window[place + 1]] for place in range(31)))
            count += 31
    assert said["held_out_loss"] == pytest.approx(total / count, rel=5e-3)  # trained and measured in bfloat16 products


def test_models_of_16_bits_are_trained_in_float32_and_stored_as_planned(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twin"
    folder.mkdir()
    meta = meta_model(small_config("gpt2"), torch.bfloat16)
    item = item_of(text)
    item.build_source(folder, SourceContext(meta, None, CPU, tmp_path / "work", seed=3))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    context = PassContext(AutoTokenizer.from_pretrained(folder), CPU, None, tmp_path / "work2", seed=3, source=folder)
    record = item.apply(model, context)
    item.save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert "as the plan says to the byte" in item.check_files(tmp_path / "out", model)[0]
    held = record.details["from_scratch"]["looped"]["curve"]
    assert held[-1]["held_out_loss"] < held[0]["held_out_loss"]


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_an_untrained_looped_model_whose_layers_begin_alike_is_its_twin(name: str, tmp_path: Path) -> None:
    config = small_config(name)
    model = scratch.initial(type(meta_model(config, torch.float32)), config, seed=3)
    plain = scratch.initial(type(model), config, seed=3)
    structure = targets.find(model)
    plan = LoopPlan.even(structure, ((0, 1), (2, 3)), 2)
    scratch.restart(model, plan, plan.to_json(), seed=3)
    stack = plain.get_submodule(structure.stack)
    with torch.no_grad():
        for first, second in ((0, 1), (2, 3)):
            stack[second].load_state_dict(stack[first].state_dict())
        ids = torch.arange(3, 40)[None]
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)


def test_an_interrupted_training_goes_on_to_the_same_weights(text: Path, twin: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        twin_of(text, tmp_path / "first", tmp_path / "work", progress=StopAt(3))
    resumed = twin_of(text, tmp_path / "second", tmp_path / "work")
    assert same(load_file(twin / "model.safetensors"), load_file(resumed / "model.safetensors"))
    whole, _ = looped_of(text, twin, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        looped_of(text, twin, tmp_path / "b", progress=StopAt(3))
    gone_on, record = looped_of(text, twin, tmp_path / "b")
    assert same(whole.state_dict(), gone_on.state_dict())
    assert record.details["from_scratch"]["looped"]["steps"] == STEPS


def test_a_tokenizer_keeps_the_ids_of_a_config_and_is_the_same_each_time(text: Path) -> None:
    special = scratch_tokenizer.special_tokens(small_config())
    assert special.tokens == ("<pad>", "<s>", "</s>")
    one, two = (scratch_tokenizer.train(text.read_text(), 280, special) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    assert (one.pad_token_id, one.bos_token_id, one.eos_token_id) == (0, 1, 2)
    assert len(one) == 280
    odd = "naïve — 猫\n\n\ttabs  and   spaces 🙂"
    assert one.decode(one(odd)["input_ids"]) == odd
    far = small_config("gpt2")
    far.bos_token_id = far.eos_token_id = 50256
    far.pad_token_id = None
    assert scratch_tokenizer.special_tokens(far) == scratch_tokenizer.Special(
        ("<|endoftext|>",), {"bos_token_id": 0, "eos_token_id": 0}
    )
    with pytest.raises(PassError, match="vocab_size=200 is less than the 259 tokens"):
        scratch_tokenizer.train("text", 200, special)


def test_tokenizers_and_texts_that_do_not_suit(text: Path, twin: Path, tmp_path: Path) -> None:
    parameters = item_of(text).parameters
    tokenizer, read = AutoTokenizer.from_pretrained(twin), scratch_text.read(parameters)
    with pytest.raises(PassError, match="has 300 tokens and the config says vocab_size=299"):
        scratch_text.tokenize(read, tokenizer, 299, parameters)
    with pytest.raises(PassError, match=r"tokens in its last 5 %, which are held out, and 100,000 are needed"):
        scratch_text.tokenize(read, tokenizer, 300, parameters, evaluation_window=100_000)
    with pytest.raises(PassError, match="to train on, and 32,032 are needed"):
        scratch_text.tokenize(read, tokenizer, 300, item_of(text, train_batch=1000, train_tokens="1M").parameters)
    with pytest.raises(PassError, match="no text at train_text="):
        item_of(tmp_path / "none").check_complete()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(PassError, match="cannot be read"):
        item_of(tmp_path / "binary").check_complete()
    (tmp_path / "short").write_text("word\n")
    with pytest.raises(PassError, match="has 5 bytes to train on, and 160 tokens are needed"):
        item_of(tmp_path / "short").check_complete()
    with pytest.raises(PassError, match="train_length=256 is past"):
        item_of(text, train_length=256, train_tokens="5k").check(meta_model(small_config(), torch.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_text": None}, "from_scratch needs train_text"),
        ({"train_tokens": 0}, "from_scratch needs train_tokens"),
        ({"train_tokens": 100}, "train_tokens=100 is less than one step"),
        ({"heal_tokens": "5M"}, "heal_tokens is for weights that are trained already"),
        ({"init": "average"}, "init is for weights that are trained already"),
        ({"samples": 4}, "samples is for weights"),
        ({"blocks": None, "loops": None, "target": 0.6}, "give blocks and loops, or pattern=sequence"),
        ({"from_scratch": False}, "train_text is for training from scratch"),
        ({"train_text": ""}, "cannot be read"),
    ],
)
def test_parameters_that_do_not_go_together(values: dict[str, Any], message: str, text: Path) -> None:
    with pytest.raises(PassError, match=message):
        item_of(text, **values).check_complete()


def test_defaults_of_training(text: Path) -> None:
    assert item_of(text).parameters.learning_rate == 1e-3
    assert item_of(text, learning_rate=2e-3).parameters.learning_rate == 2e-3
    assert item_of(text, train_tokens="5M").parameters.train_tokens == 5_000_000
    again = LoopPass.from_mapping(item_of(text).parameters.model_dump(mode="json"))
    assert again.parameters == item_of(text).parameters
    assert not item_of(text).needs_calibration
    assert item_of(text, blocks=None, loops=None, target=0.8, pattern="cycle").parameters.is_complete


# --- the whole pipeline -----------------------------------------------------------------------------------------------


def recipe(text: Path, **more: Any) -> Recipe:
    step = {"loop": GIVEN | {"train_text": str(text)}}
    return from_mapping(
        {"version": 1, "seed": 3, "passes": [step], "evaluation": {"tokens": 512, "context": 64}} | more
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    small_config().save_pretrained(tmp_path / "config")
    return tmp_path / "config" / "config.json"


@pytest.mark.slow
@pytest.mark.thorough
def test_the_report_compares_the_looped_model_with_its_twin(
    text: Path, config: Path, twin: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = optimize(str(config), recipe(text), out, context=32)
    assert not isinstance(report, DryRun)
    there = tmp_path / "out-twin"
    assert same(load_file(there / "model.safetensors"), load_file(twin / "model.safetensors"))
    said = report.passes[0].details["from_scratch"]
    assert said["twin"] == {
        key: value for key, value in json.loads((there / scratch_record.FILE).read_text()).items()
        if key != "format"
    }  # fmt: skip
    assert report.quality["text"] == scratch.HELD_OUT
    ids = torch.tensor(AutoTokenizer.from_pretrained(there)((there / scratch.HELD_OUT).read_text())["input_ids"])
    count = min(512 // 64, len(ids) // 64)
    starts = torch.arange(count) * (len(ids) - 64) // (count - 1)
    windows = torch.stack([ids[start : start + 64] for start in starts.tolist()])
    for folder, found in ((there, "before"), (out, "after")):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            scores = model(windows).logits.double().log_softmax(-1)[:, :-1]
        expected = -scores.gather(-1, windows[:, 1:, None]).mean().exp().log()
        assert math.log(report.quality["perplexity"][found]) == pytest.approx(float(expected), rel=1e-4)
    assert report.size.parameters == said["twin"]["parameters"]
    assert any("out-twin" in line for line in report.source["notes"])
    shutil.rmtree(out)
    with pytest.raises(BadInputError, match="out-twin' is there.*--resume to take it as it is"):
        optimize(str(config), recipe(text), out, context=32)
    changed_at = (there / "model.safetensors").stat().st_mtime_ns
    optimize(str(config), recipe(text), out, context=32, resume=True)
    assert (there / "model.safetensors").stat().st_mtime_ns == changed_at  # taken, not made again
    shutil.rmtree(out)
    with pytest.raises(BadInputError, match="was made otherwise: recipe 'seed' was 3, is 4"):
        optimize(str(config), recipe(text, seed=4), out, context=32, resume=True)


@pytest.mark.slow
@pytest.mark.thorough
def test_an_interrupted_twin_is_gone_on_with(text: Path, config: Path, twin: Path, tmp_path: Path) -> None:
    class StopAtTwin(StopAt):
        def task(self, description: str, total: float | None = None) -> Any:
            return super().task(description, total) if "train" in description else StopAt(10**9).task(description)

    with pytest.raises(InterruptedRunError, match="--resume to go on"):
        optimize(str(config), recipe(text), tmp_path / "out", context=32, progress=StopAtTwin(3))
    assert not (tmp_path / "out-twin").exists() and not (tmp_path / "out").exists()
    with pytest.raises(BadInputError, match="holds unfinished work"):
        optimize(str(config), recipe(text), tmp_path / "out", context=32)
    optimize(str(config), recipe(text), tmp_path / "out", context=32, resume=True)
    assert same(load_file(tmp_path / "out-twin" / "model.safetensors"), load_file(twin / "model.safetensors"))


def test_a_dry_run_trains_nothing(text: Path, config: Path, tmp_path: Path) -> None:
    said = optimize(str(config), recipe(text), tmp_path / "out", context=32, dry_run=True)
    assert isinstance(said, DryRun)
    prediction = said.planned[0].prediction
    assert prediction is not None and prediction.pass_seconds is not None
    assert any("training from scratch: 768 tokens" in line for line in prediction.notes)
    assert {path.name for path in tmp_path.iterdir()} == {"config"}


def test_a_missing_text_is_said_before_anything_is_trained(text: Path, config: Path, tmp_path: Path) -> None:
    wanted = recipe(text, evaluation={"text": str(tmp_path / "none.txt"), "context": 64})
    with pytest.raises(BadInputError, match="no text file at"):
        optimize(str(config), wanted, tmp_path / "out", context=32)
    assert {path.name for path in tmp_path.iterdir()} == {"config"}


def test_weights_where_there_must_be_none_and_none_where_there_must_be(
    text: Path, config: Path, twin: Path, tmp_path: Path
) -> None:
    for model in (twin, twin / "config.json"):
        with pytest.raises(
            SourceError, match="has weights, and pass 'loop' with these parameters starts from a config"
        ):
            optimize(str(model), recipe(text), tmp_path / "out", dry_run=True)
    plain = from_mapping({"version": 1, "passes": [{"loop": {"blocks": 2, "loops": 2, "rank": 2}}]})
    for model in (config, config.parent):
        with pytest.raises(SourceError, match="no weights to optimize.*--pass loop:from_scratch=true"):
            optimize(str(model), plain, tmp_path / "out", dry_run=True)
    with pytest.raises(SourceError, match=r"'smollm2-135m' is neither a config.json nor a folder with one"):
        optimize("smollm2-135m", recipe(text), tmp_path / "out", dry_run=True)
