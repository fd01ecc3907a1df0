"""Which text is evaluated on, and the report of ``effcli eval``."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from effcli import checkpoint, harness, provenance
from effcli.errors import BadInputError
from effcli.evaluation import evaluate, evaluation_windows
from effcli.recipes import Calibration, Evaluation
from effcli.reports.render import render
from profilers.base import NotApplicableError, ProfilerError
from profilers.text import split_texts
from tests.conftest import save_tiny
from tests.tiny_models import VOCABULARY

SMALL = Evaluation(tokens=512, context=64)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def changed_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with noise on its weights."""
    folder = tmp_path_factory.mktemp("changed") / "llama"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    path = tmp_path / "quiz.jsonl"
    path.write_text(
        "".join(
            json.dumps({"query": f"Question {index}:", "choices": ["yes", "no"], "gold": index % 2}) + "\n"
            for index in range(30)
        )
    )
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def prose(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return "".join(chr(97 + code) for code in torch.randint(0, 26, (length,), generator=generator).tolist())


def windows_of(tokenizer: Any, calibration: Calibration | None = None, **evaluation: Any) -> Any:
    return evaluation_windows(tokenizer, VOCABULARY, Evaluation(**evaluation), calibration or Calibration(), 0)


# --- text -----------------------------------------------------------------------------------------------------------


def test_windows_are_apart_and_share_nothing_with_the_calibration_text(tokenizer: Any) -> None:
    calibration, windows, name, notes = windows_of(tokenizer, tokens=4096, context=128)
    assert windows.shape == (32, 128) and windows.dtype == torch.long
    split = split_texts(tokenizer, VOCABULARY)
    assert torch.equal(calibration.ids, split.calibration.ids) and name == split.evaluation.name
    text = split.evaluation.ids.tolist()
    end = 0
    for row in windows.tolist():  # each is found behind the end of the one before
        end = next(i for i in range(end, len(text)) if text[i : i + 128] == row) + 128
    assert notes == split.notes
    quiet = evaluation_windows(tokenizer, VOCABULARY, Evaluation(), Calibration(), 0, calibrates=False)
    assert quiet.notes == ()


def test_user_texts_are_named_and_read(tokenizer: Any, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.txt", prose(3_000, 1))
    found = windows_of(tokenizer, text=mine, tokens=1024, context=256)
    assert found.name == "mine.txt" and found.windows.shape == (4, 256)
    assert tokenizer.decode(found.windows[0]).replace(" ", "") == prose(3_000, 1)[:256]
    both = windows_of(tokenizer, Calibration(text=mine), text=mine, tokens=256, context=64)
    assert both.name == "mine.txt, last 25%" and both.calibration.ids.numel() == 2_250
    assert tokenizer.decode(both.windows[0]).replace(" ", "") in prose(3_000, 1)[2_250:]


def test_less_text_than_asked_for_is_said(tokenizer: Any, tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.txt", prose(1_000, 1))
    found = windows_of(tokenizer, text=mine, tokens=4096, context=300)
    assert found.windows.shape == (3, 300)
    assert "has 1,000 tokens: 900 of the 4,096 asked for" in found.notes[-1]
    with pytest.raises(ProfilerError, match="1000 tokens but 1001 are needed"):
        windows_of(tokenizer, text=mine, tokens=4096, context=1001)


def test_windows_start_with_bos_where_the_tokenizer_adds_it(tokenizer: Any, tmp_path: Path) -> None:
    class AddsBos:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    mine = write(tmp_path / "mine.txt", prose(1_000, 1))
    found = windows_of(AddsBos(), text=mine, tokens=512, context=64)
    plain = windows_of(tokenizer, text=mine, tokens=512, context=63)
    assert found.windows.shape == (8, 64) and (found.windows[:, 0] == 1).all()
    assert torch.equal(found.windows[0, 1:], plain.windows[0])
    assert "BOS" in found.notes[-1]


def test_text_and_data_set_together_are_refused(tokenizer: Any) -> None:
    with pytest.raises(BadInputError, match="both a text and a data set"):
        windows_of(tokenizer, text=Path("a"), dataset="b")


# --- evaluate -------------------------------------------------------------------------------------------------------


def test_against_the_original(tiny_folder: Path, changed_folder: Path, quiz: Path, tokenizer: Any) -> None:
    report = evaluate(
        changed_folder, against=tiny_folder, evaluation=SMALL.model_copy(update={"tasks": quiz}), task_samples=10
    )
    ids = evaluation_windows(tokenizer, VOCABULARY, SMALL, Calibration(), 0).windows
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.double().log_softmax(-1)[:, :-1]
        for folder in (tiny_folder, changed_folder)
    )
    quality = report.quality
    nll = -after.gather(-1, ids[:, 1:, None]).mean().item()
    assert quality.perplexity.after == pytest.approx(math.exp(nll), rel=1e-5)
    assert quality.kl.mean == pytest.approx((before.exp() * (before - after)).sum(-1).mean().item(), rel=1e-3)
    assert (report.model.source, report.against.source) == (str(changed_folder), str(tiny_folder))
    assert [(task.metric, task.samples, task.available) for task in quality.tasks] == [
        ("acc", 10, 30),
        ("acc_norm", 10, 30),
        ("acc_bytes", 10, 30),
    ]
    assert any("10 of 30 samples" in note for note in report.notes)
    data = json.loads(report.to_json())
    assert data["schema"] == "effcli.eval/1" and data["quality"]["kl"]["p99"] == quality.kl.p99
    for format_ in ("human", "markdown", "html"):
        text = render(data, format_)
        assert "KL" in text and "quiz" in text


def test_by_itself_there_is_nothing_to_compare_with(tiny_folder: Path) -> None:
    report = evaluate(tiny_folder, evaluation=SMALL, seed=3)
    assert report.quality.perplexity.before is None and report.quality.kl is None and report.against is None
    assert (report.seed, report.evaluation["tokens"], report.lm_eval) == (3, 512, None)
    assert "erplexity" in render(report.to_dict(), "human")


def test_the_two_models_are_never_in_memory_together(
    tiny_folder: Path, changed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, layers = checkpoint.load, []

    def watched(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        assert all(layer() is None for layer in layers)
        loaded = load(*arguments, **options)
        layers.append(weakref.ref(loaded.model.model.layers[0]))
        return loaded

    monkeypatch.setattr(checkpoint, "load", watched)
    evaluate(changed_folder, against=tiny_folder, evaluation=SMALL)
    assert len(layers) == 2


def test_a_checkpoint_is_not_evaluated_on_what_it_was_calibrated_on(tiny_folder: Path, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "made")
    mine = write(tmp_path / "mine.txt", prose(4_000, 1))
    made = provenance.Provenance(
        format=provenance.FORMAT, created="", source={}, recipe={"calibration": {"text": str(mine)}}, passes=(),
        dtype="float32", device="cpu", versions={}, files={},
    )  # fmt: skip
    (folder / provenance.FILE).write_text(made.to_json())
    report = evaluate(folder, evaluation=SMALL.model_copy(update={"text": mine}))
    assert report.quality.text == "mine.txt, last 25%"
    mine.rename(tmp_path / "moved.txt")
    report = evaluate(folder, evaluation=SMALL.model_copy(update={"text": tmp_path / "moved.txt"}))
    assert any("calibrated on" in note and "not here" in note for note in report.notes)


def test_tasks_of_the_harness_join_ours(
    tiny_folder: Path, changed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(model: Any, tokenizer: Any, tasks: Any, *, limit: int, seed: int, progress: Any) -> dict[str, Any]:
        asked.append((type(model).__name__, tuple(tasks), limit, seed))
        share = 0.5 + 0.1 * len(asked)
        return {
            "results": {"piqa": {"acc,none": share, "acc_stderr,none": 0.1}, "wiki": {"bits_per_byte,none": 1.5}},
            "n-samples": {"piqa": {"original": 1838, "effective": 20}},
        }

    monkeypatch.setattr(harness, "check_installed", lambda tasks: None)
    monkeypatch.setattr(harness, "run", run)
    report = evaluate(changed_folder, against=tiny_folder, evaluation=SMALL, lm_eval=("piqa", "wiki"), task_samples=20)
    assert asked == [("LlamaForCausalLM", ("piqa", "wiki"), 20, 0)] * 2
    (task,) = report.quality.tasks
    assert (task.before, task.after) == (pytest.approx(0.6), pytest.approx(0.7))
    assert "lm-eval wiki: bits_per_byte 1.5" in report.notes
    assert report.lm_eval["results"]["piqa"]["acc,none"] == pytest.approx(0.7)


def test_what_is_refused_before_anything_is_loaded(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfilerError, match="no task file"):
        evaluate(tmp_path / "absent", evaluation=Evaluation(tasks=tmp_path / "none.jsonl"))
    if harness.find_spec("lm_eval") is None:
        with pytest.raises(BadInputError, match="pip install lm-eval"):
            evaluate(tmp_path / "absent", lm_eval=("piqa",))


def test_encoder_decoders_have_no_quality_on_plain_text(tmp_path: Path) -> None:
    folder = save_tiny("t5", tmp_path / "t5")
    with pytest.raises(NotApplicableError, match="T5ForConditionalGeneration is an encoder-decoder"):
        evaluate(folder, evaluation=SMALL)


def test_models_of_another_vocabulary_are_not_compared(tiny_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.resize_token_embeddings(VOCABULARY + 3)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "other")
    with pytest.raises(ProfilerError, match="100 logits and the reference 97"):
        evaluate(tmp_path / "other", against=tiny_folder, evaluation=SMALL)
