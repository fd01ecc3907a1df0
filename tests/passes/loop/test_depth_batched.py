"""Depth-wise batching: the tokens of each prompt alone, and as few calls of a block as hand counting says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.base import LoadOptions, PassError
from passes.loop import reuse, runtime, serving
from passes.loop.depth_batched import DepthBatchedDecoder
from passes.loop.layout import LoopPlan

from .small import applied, build, ids
from .test_reuse import context

LAYOUTS: dict[str, dict[str, Any]] = {
    "cycle": {"blocks": 2, "loops": 3, "pattern": "cycle"},
    "sequence": {"blocks": 3, "loops": 2},
    "one block": {"blocks": 1, "loops": 6},
    "sparse parts": {"blocks": 3, "loops": 2, "density": 0.5},
    "with own layers": {"blocks": 2, "loops": 2, "keep_first": 1, "keep_last": 1, "pattern": "cycle"},
}
PROMPTS = [ids(1, length, seed=length)[0].tolist() for length in (5, 9, 3, 12)]
NEW = 7


def looped(folder: Path, name: str = "llama6", **values: Any) -> Any:
    _, model, _ = applied(folder, name, **({"rank": 3} | values))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {key: looped(tmp_path_factory.mktemp("looped"), **values) for key, values in LAYOUTS.items()}


def alone(model: Any, prompt: list[int], tokens: int = NEW) -> tuple[int, ...]:
    """What plain transformers generates for this prompt by itself."""
    made = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tuple(made[0, len(prompt) :].tolist())


class Ticks:
    """Time that is counted in ticks of a decoder, and jumps over what it would sleep."""

    def __init__(self) -> None:
        self.decoder: DepthBatchedDecoder | None = None
        self.slept = 0.0

    def now(self) -> float:
        assert self.decoder is not None
        return self.decoder.ticks + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


def serve(decoder: DepthBatchedDecoder, prompts: Any, tokens: int, arrivals: Any = None) -> list[Any]:
    ticks = Ticks()
    ticks.decoder = decoder
    return decoder.generate(prompts, tokens, arrivals, clock=ticks.now, sleep=ticks.sleep)


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Count the calls of every block's linear, by name."""
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.model.looped_blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            calls[name] = 0
            handles.append(module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1})))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("join", ["block", "token"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arrivals", [None, (0, 1, 8, 30), (3, 2, 1, 0), (0, 0, 200, 203)])
def test_every_prompt_is_answered_as_alone(models: dict[str, Any], layout: str, arrivals: Any, join: Any) -> None:
    model = models[layout]
    found = serve(DepthBatchedDecoder(model, join=join), PROMPTS, NEW, arrivals)
    assert [item.tokens for item in found] == [alone(model, prompt) for prompt in PROMPTS]
    for item, arrival in zip(found, arrivals or [0] * 4, strict=True):
        assert item.arrived_seconds == arrival <= item.first_token_seconds <= item.finished_seconds


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    model = looped(tmp_path, name, blocks=2, loops=2)
    found = serve(DepthBatchedDecoder(model), PROMPTS, NEW, (0, 3, 5, 6))
    assert [item.tokens for item in found] == [alone(model, prompt) for prompt in PROMPTS]


def test_half_precision_gives_the_same_tokens_up_to_near_ties(tmp_path: Path) -> None:
    model = looped(tmp_path, model=build("llama6", dtype=torch.bfloat16), blocks=3, loops=2)
    found = serve(DepthBatchedDecoder(model), PROMPTS, NEW, (0, 2, 3, 9))
    for prompt, item in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(item.tokens)])).logits[0].float()
        for position, token in enumerate(item.tokens, len(prompt) - 1):
            best = logits[position].max()
            assert logits[position, token] >= best - 0.02 * best.abs()


def test_answers_end_at_the_end_token(models: dict[str, Any]) -> None:
    model = models["cycle"]
    free = alone(model, PROMPTS[0])
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [free[2], 96]
    try:
        decoder = DepthBatchedDecoder(model)
        found = serve(decoder, PROMPTS, NEW, (0, 1, 2, 3))
        assert found[0].tokens == free[: free.index(free[2]) + 1]
        assert [item.tokens for item in found] == [alone(model, prompt) for prompt in PROMPTS]
    finally:
        model.generation_config.eos_token_id = before


def test_lockstep_reads_a_block_as_often_as_a_batch_and_no_less(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["sequence"]
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    decoder = DepthBatchedDecoder(model)
    with counted(model) as calls:
        serve(decoder, PROMPTS, NEW)
    prefills, steps, loops = len(PROMPTS), NEW - 1, 2
    assert set(calls.values()) == {loops * (prefills + steps)}  # as four prompts and a batch of four make by hand
    assert decoder.ticks == 6 * steps
    assert decoder.rows_run == 4 * 6 * steps


def test_sequences_at_different_loops_of_one_block_share_its_calls(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block, six loops: a sequence that arrives in mid-token shares every call from then on."""
    model = models["one block"]
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)  # random weights may end an answer early
    results = {}
    for join in ("block", "token"):
        decoder = DepthBatchedDecoder(model, join=join)  # type: ignore[arg-type]
        with counted(model) as calls:
            served = serve(decoder, PROMPTS[:2], 5, (0, 3))
        (ticks,) = {count - 2 * 6 for count in calls.values()}  # less the two prompts
        assert ticks == decoder.ticks
        results[join] = ticks, served[1].first_token_seconds, served[1].finished_seconds
    # Four steps of six layers each; the second begins at tick 3, or when the first has ended its token at tick 6.
    assert results == {"block": (27, 3, 27), "token": (30, 6, 30)}


def test_a_cycle_is_joined_when_the_others_come_to_its_first_block(models: dict[str, Any]) -> None:
    """Blocks A B A B A B: at tick 1 the first waits for B, so A's rows are 1 and 1; then both move together."""
    decoder = DepthBatchedDecoder(models["cycle"])
    served = serve(decoder, PROMPTS[:2], 3, (0, 2))
    assert (served[0].finished_seconds, served[1].finished_seconds) == (12, 14)
    assert decoder.ticks == 14  # 2 alone, 10 together, 2 alone
    assert decoder.rows_run == 24


def test_groups_of_a_sequence_merge_and_run_together(models: dict[str, Any]) -> None:
    decoder = DepthBatchedDecoder(models["sequence"])
    tokens = 20
    serve(decoder, PROMPTS[:2], tokens, (0, 1))
    lockstep = 6 * (tokens - 1)
    assert decoder.rows_run == 2 * lockstep
    assert decoder.ticks <= lockstep + 2 * 6


def test_the_model_is_left_as_it_was(models: dict[str, Any]) -> None:
    model = models["with own layers"]
    names = [(name, id(module)) for name, module in model.named_modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    serve(DepthBatchedDecoder(model), PROMPTS, 3, (0, 1, 2, 3))
    assert [(name, id(module)) for name, module in model.named_modules()] == names
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("gpt2", {}, "has no 'embed_tokens' beside its layers"),
        ("neox", {}, "has no 'embed_tokens' beside its layers"),
        ("opt", {}, "has no 'rotary_emb' beside its layers"),
        ("gemma3", {"pattern": "cycle"}, "has sliding_attention"),
    ],
)
def test_other_layer_calls_are_refused_by_name(name: str, values: Any, message: str, tmp_path: Path) -> None:
    model = looped(tmp_path, name, blocks=2, loops=2, **values)
    with pytest.raises(PassError, match=message):
        DepthBatchedDecoder(model)


def test_what_only_a_comparison_shows_is_refused(models: dict[str, Any]) -> None:
    """A model that scales its logits, as some architectures do after the head."""
    model = models["cycle"]
    handle = model.register_forward_hook(
        lambda module, args, output: output.__setitem__("logits", output.logits * 2) or output
    )
    try:
        with pytest.raises(PassError, match="gives other logits than by itself"):
            DepthBatchedDecoder(model)
    finally:
        handle.remove()


def test_a_layer_that_differs_in_more_than_weights_is_refused(models: dict[str, Any]) -> None:
    model = models["cycle"]
    attention = model.model.layers[2].self_attn
    attention.scaling *= 2
    try:
        with pytest.raises(PassError, match="so its layers are not called in the usual way"):
            DepthBatchedDecoder(model)
    finally:
        attention.scaling /= 2


def test_wrong_requests_are_refused(models: dict[str, Any]) -> None:
    model = models["cycle"]
    decoder = DepthBatchedDecoder(model)
    for prompts, tokens, arrivals, message in (
        ([[]], 3, None, "prompt 0 has 0 tokens"),
        ([[5] * 255], 3, None, "the model has 256 positions"),
        (["text"], 3, None, "has no tokenizer"),
        ([[5]], 0, None, "max_new_tokens=0"),
        ([[5]], 3, [0.0, 1.0], "2 arrivals for 1 prompts"),
        ([[5]], 3, [-1.0], "of 0 seconds or more"),
    ):
        with pytest.raises(PassError, match=message):
            decoder.generate(prompts, tokens, arrivals)
    assert decoder.generate([], 3) == []
    with pytest.raises(PassError, match="is no looped model"):
        DepthBatchedDecoder(build("llama"))
    model.generation_config.repetition_penalty = 1.3
    try:
        with pytest.raises(PassError, match="repetition_penalty=1.3"):
            DepthBatchedDecoder(model)
    finally:
        model.generation_config.repetition_penalty = None


def test_the_plan_of_the_model_decides_the_places(models: dict[str, Any]) -> None:
    for key, model in models.items():
        plan = LoopPlan.from_json(model.config.loop)
        found = DepthBatchedDecoder(model)._places
        assert len(found) == plan.sets, key
        assert sorted(layer for place in found for layer in place.layers) == list(range(6))


def test_all_ways_to_serve_give_the_same_tokens_and_gains_are_ratios_of_times(models: dict[str, Any]) -> None:
    found = serving.measure(models["cycle"], sequences=3, prompt_tokens=4, new_tokens=4, seconds=(0.0, 600.0))
    assert found.rounds == serving.FEWEST_ROUNDS
    assert [gain.way for gain in found.gains] == list(serving.WAYS)
    assert all(gain.same_tokens for gain in found.gains)
    ours = found.gains[-1]
    assert (ours.total_gain, ours.total_interval) == (1.0, (1.0, 1.0))
    assert found.arrivals_seconds[0] == 0 < found.arrivals_seconds[1]
    for gain in found.gains:
        assert gain.total_interval is not None and gain.latency_interval is not None
        assert gain.total_interval[0] <= gain.total_gain <= gain.total_interval[1]
        assert gain.total_seconds >= found.arrivals_seconds[-1]
    assert found.gains[1].latency_seconds >= found.arrivals_seconds[-1] / 2  # the first waits for the last, and so on


def test_gains_are_paired_by_round() -> None:
    answers = [(1, 2)]
    rounds: list[Any] = [
        {way: ((answers, [slow]), slow) for way in serving.WAYS} | {"static batch": ((answers, [2 * slow]), 3 * slow)}
        for slow in (1.0, 5.0, 2.0, 1.0, 9.0, 4.0)
    ]
    gain = serving._gain("static batch", rounds)
    assert (gain.total_gain, gain.total_interval) == (3.0, (3.0, 3.0))
    assert (gain.latency_gain, gain.latency_interval) == (2.0, (2.0, 2.0))
    rounds[3]["static batch"] = (([(1, 3)], [1.0]), 1.0)
    assert not serving._gain("static batch", rounds).same_tokens


def test_the_answer_ends_where_generation_ends(models: dict[str, Any]) -> None:
    model = models["cycle"]
    prompts = torch.tensor([PROMPTS[0], PROMPTS[1][:5]])
    free = [alone(model, row) for row in prompts.tolist()]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = free[0][1]
    try:
        expected = [row[: row.index(free[0][1]) + 1] if free[0][1] in row else row for row in free]
        assert serving._generate(model, prompts, NEW) == expected
    finally:
        model.generation_config.eos_token_id = before


def test_the_pass_records_the_runtime_and_refuses_what_cannot_be_split(tmp_path: Path) -> None:
    item, model, record = applied(tmp_path, "llama", blocks=2, loops=2, runtime="depth-batched")
    assert model.config.loop["runtime"] == record.parameters["runtime"] == "depth-batched"
    said = item.load(tmp_path, model, LoadOptions(torch.device("cpu"), torch.float32))
    assert any("effcli.depth_batched(model, tokenizer)" in note for note in said.notes)
    _, plain, _ = applied(tmp_path / "plain", "llama", blocks=2, loops=2)
    assert "runtime" not in plain.config.loop
    with pytest.raises(PassError, match="has no 'embed_tokens' beside its layers"):
        applied(tmp_path / "other", "gpt2", blocks=2, loops=2, runtime="depth-batched")


def test_the_report_says_what_was_gained_or_why_not(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(serving.measure, "__kwdefaults__", serving.measure.__kwdefaults__ | {"seconds": (0.0, 600.0)})
    model = models["cycle"]
    measured = runtime.measure(model, context(model), depth_batched=True)
    assert "x as fast as token by token" in measured.summary
    table = measured.tables[-1]
    assert [row[0] for row in table.rows] == list(serving.WAYS)
    assert all(len(row) == len(table.columns) for row in table.rows)
    monkeypatch.setattr(serving.measure, "__kwdefaults__", serving.measure.__kwdefaults__ | {"seconds": (0.0, 0.0)})
    hurried = runtime.measure(model, context(model), depth_batched=True)
    assert "what is gained is not known, rounds: 1, too few" in hurried.summary
    assert [row[2] for row in hurried.tables[-1].rows] == [None] * len(serving.WAYS)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    refused = runtime.measure(model, context(model), depth_batched=True)
    assert "batching over depth was not measured: " in refused.summary and len(refused.tables) == 2
