"""Healing: what it learns, what it leaves alone, going on after an interruption, and when it stops by itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedModel

from passes.base import PassError
from passes.loop import heal, targets
from passes.loop.convert import convert
from passes.loop.layout import LoopPlan
from passes.loop.training import HELD_OUT_WINDOWS, Settings, Windows
from tests.passes.loop.small import CONFIGS, VOCABULARY

SETTINGS = Settings(tokens=12 * 4 * 16, length=16, batch=4, micro_batch=2, learning_rate=1e-3)


def text(tokens: int = 600) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(5))


def pair(name: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()
    student = copy.deepcopy(teacher)
    plan = LoopPlan.even(targets.find(student), ((0, 1), (2, 3)), 4)
    convert(student, plan)
    return student.eval(), teacher


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class StopAt:
    """Progress that is interrupted after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[StopAt]:
        yield self

    def advance(self, steps: float = 1.0) -> None:
        self.left -= int(steps)
        if self.left == 0:
            raise KeyboardInterrupt

    def describe(self, text: str) -> None:
        return None


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_the_looped_model_comes_closer_to_the_original(name: str, tmp_path: Path) -> None:
    student, teacher = pair(name)
    before = weights(teacher)
    done = heal.heal(student, teacher, text(), SETTINGS, tmp_path)
    first, last = done.curve[0], done.curve[-1]
    assert (first.tokens, last.tokens) == (0, SETTINGS.tokens)
    assert last.held_out < 0.7 * first.held_out
    assert (done.steps, done.ended, done.resumed) == (12, "tokens", False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not student.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())


def test_the_curve_is_the_kl_divergence_of_whole_logits(tmp_path: Path) -> None:
    student, teacher = pair()
    held_out = text()[-HELD_OUT_WINDOWS * 16 :].view(-1, 16)
    with torch.no_grad():
        p = teacher(held_out).logits.double().log_softmax(-1)
        q = student(held_out).logits.double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    done = heal.heal(student, teacher, text(), SETTINGS, tmp_path)
    assert done.curve[0].held_out == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("label_weight", [0.0, 0.3, 1.0])
def test_the_loss_of_logits_and_its_gradient_as_torch_has_them(label_weight: float) -> None:
    generator = torch.Generator().manual_seed(1)
    wanted, found = (3 * torch.randn(2, 150, 11, generator=generator) for _ in range(2))  # more rows than one part
    windows = torch.randint(11, (2, 150), generator=generator)
    exact = found.double().requires_grad_()
    p, q = wanted.double().log_softmax(-1), exact.log_softmax(-1)
    apart = (p.exp() * (p - q)).sum(-1)
    surprise = torch.nn.functional.cross_entropy(q[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")
    expected = torch.cat([(1 - label_weight) * apart[:, :-1] + label_weight * surprise, apart[:, -1:]], dim=1).mean()
    expected.backward()
    found.requires_grad_()
    loss, divergence = heal.logits_loss(wanted, found, windows, label_weight)
    (2 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert divergence.item() == pytest.approx(apart.mean().item(), rel=1e-5)
    assert not divergence.requires_grad
    assert found.grad is not None and exact.grad is not None
    torch.testing.assert_close(found.grad.double() / 2, exact.grad, rtol=1e-4, atol=1e-8)


def test_labels_teach_the_text_and_the_curve_stays_the_divergence(tmp_path: Path) -> None:
    ids = torch.arange(600) % 7 + 3  # a text that the original, with random weights, does not know
    surprises, divergences = [], []
    for label_weight in (0.0, 0.9):
        student, teacher = pair()
        done = heal.heal(student, teacher, ids, SETTINGS, tmp_path / str(label_weight), label_weight=label_weight)
        with torch.no_grad():
            surprises.append(float(student(ids[None, :64], labels=ids[None, :64]).loss))
        divergences.append([point.held_out for point in done.curve])
    assert surprises[1] < surprises[0] - 0.1
    assert divergences[0][0] == divergences[1][0]
    assert divergences[0][-1] < divergences[1][-1]


@pytest.mark.parametrize("train", ["deltas", "all"])
def test_only_what_was_asked_for_is_trained(train: Any, tmp_path: Path) -> None:
    student, teacher = pair("qwen2")
    before = weights(student)
    done = heal.heal(student, teacher, text(), SETTINGS, tmp_path, names=train)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    shared = {name for name in before if "looped_blocks" in name}
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    assert changed == set(before) - embeddings - (shared if train == "deltas" else set())
    assert done.trained_parameters == sum(before[name].numel() for name in changed)


def test_a_model_in_bfloat16_is_trained_in_float32_and_given_back_as_it_was(tmp_path: Path) -> None:
    student, teacher = pair(dtype=torch.bfloat16)
    done = heal.heal(student, teacher, text(), SETTINGS, tmp_path)
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.bfloat16}
    assert done.curve[-1].held_out < done.curve[0].held_out


def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        student, teacher = pair()
        settings = Settings(**{**vars(SETTINGS), "gradient_checkpointing": checkpointing, "tokens": 3 * 64})
        heal.heal(student, teacher, text(), settings, tmp_path / str(checkpointing))
        found.append(weights(student))
        assert not any(module.training for module in student.modules())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, teacher = pair()
    straight = heal.heal(whole, teacher, text(), SETTINGS, tmp_path / "a", seed=3)
    first, _ = pair()
    with pytest.raises(KeyboardInterrupt):
        heal.heal(first, teacher, text(), SETTINGS, tmp_path / "b", seed=3, progress=StopAt(5))
    second, _ = pair()
    done = heal.heal(second, teacher, text(), SETTINGS, tmp_path / "b", seed=3)
    assert done.resumed
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in second.state_dict().items())
    assert [(point.tokens, point.held_out) for point in done.curve] == [
        (point.tokens, point.held_out) for point in straight.curve
    ]
    other, _ = pair()
    heal.heal(other, teacher, text(), SETTINGS, tmp_path / "c", seed=4)
    assert any(not torch.equal(tensor, whole.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair()
    with pytest.raises(KeyboardInterrupt):
        heal.heal(student, teacher, text(), SETTINGS, tmp_path, progress=StopAt(3))
    saved = (tmp_path / heal.STATE).read_bytes()

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        heal.heal(pair()[0], teacher, text(), Settings(**{**vars(SETTINGS), "checkpoint_seconds": 0}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [heal.STATE]
    assert (tmp_path / heal.STATE).read_bytes() == saved


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / heal.STATE).write_bytes(b"nothing")
    with pytest.raises(PassError, match="is damaged"):
        heal.heal(*pair(), text(), SETTINGS, tmp_path)


def test_a_loss_that_rises_or_is_no_number_ends_it(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"diverged in step \d+.*smaller learning_rate \(it was 30\)"):
        heal.heal(*pair(), text(), Settings(**{**vars(SETTINGS), "tokens": 64 * 40, "learning_rate": 30}), tmp_path)
    student, teacher = pair()
    with torch.no_grad():
        student.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(PassError, match="diverged in step 1: the loss became nan"):
        heal.heal(student, teacher, text(), SETTINGS, tmp_path / "nan")


def test_a_time_limit_ends_it(tmp_path: Path) -> None:
    done = heal.heal(*pair(), text(), Settings(**{**vars(SETTINGS), "limit_seconds": 0.0}), tmp_path)
    assert (done.steps, done.ended) == (0, "time limit")
    assert done.curve[-1].held_out == done.curve[0].held_out


def test_every_window_is_seen_once_a_round_and_the_held_out_ones_never(tmp_path: Path) -> None:
    ids = torch.arange(16 * 40)
    windows = Windows(ids, SETTINGS, seed=1)
    seen = torch.cat([windows.of_step(step) for step in range(windows.count // 4)])
    starts = seen[:, 0].tolist()
    assert len(set(starts)) == len(starts)
    later = torch.cat([windows.of_step(step) for step in range(3 * windows.count)])
    assert int(later.max()) < int(windows.held_out.min())
    assert bool((later[:, 1:] == later[:, :-1] + 1).all())


def test_too_short_a_text() -> None:
    with pytest.raises(PassError, match="80 tokens, too few for steps of 4 windows of 16 tokens; give a text of 144"):
        heal.heal(*pair(), text(80), SETTINGS, Path("unused"))


@pytest.mark.slow
@pytest.mark.thorough
def test_two_processes_come_to_the_weights_of_one(tmp_path: Path) -> None:
    from passes.loop import launched
    from profilers.base import SilentProgress

    settings = Settings(**{**vars(SETTINGS), "tokens": 3 * 4 * 16})
    whole, teacher = pair()
    one = heal.heal(whole, teacher, text(), settings, tmp_path / "one", seed=3)
    shared, _ = pair()
    before = weights(shared)
    two = launched.heal(
        shared, teacher, text(), settings, tmp_path / "two", processes=2, seed=3, progress=SilentProgress()
    )
    assert (two.processes, two.steps, two.trained_parameters) == (2, one.steps, one.trained_parameters)
    # AdamW makes steps of one size out of gradients of any size, so rounding shows where gradients are next to nothing.
    assert [point.held_out for point in two.curve] == pytest.approx([point.held_out for point in one.curve], rel=0.02)
    final = whole.state_dict()
    moved = sum(float((final[name] - before[name]).square().sum()) for name in final)
    apart = sum(float((tensor - final[name]).square().sum()) for name, tensor in shared.state_dict().items())
    assert apart <= 0.1 * moved
    assert [path.name for path in (tmp_path / "two").iterdir()] == []
    with pytest.raises(PassError, match="5 windows of a step do not divide among 2 processes"):
        launched.heal(
            shared, teacher, text(), Settings(**{**vars(SETTINGS), "batch": 5}), tmp_path / "odd", processes=2,
            progress=SilentProgress(),
        )  # fmt: skip
