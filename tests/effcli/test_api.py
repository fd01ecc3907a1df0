"""The Python API: live models, what is skipped and why, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import effcli
from effcli.errors import BadInputError
from profilers import peaks, registry
from profilers.base import NotApplicableError, Profiler, ProfilerError
from tests.tiny_models import build


@dataclasses.dataclass(frozen=True)
class Answer:
    answer: int


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "GEMM_SECONDS", 0.05)
    monkeypatch.setattr(peaks, "LARGEST_WORKING_SET", {"cpu": 1 << 22})


def with_profiler(monkeypatch: pytest.MonkeyPatch, profiler: Profiler) -> None:
    """Make a third party's profiler known besides the installed ones."""
    names, load = registry.names, registry.load
    monkeypatch.setattr(registry, "names", lambda: (*names(), profiler.name))
    monkeypatch.setattr(registry, "load", lambda name: profiler if name == profiler.name else load(name))


def test_a_live_model_is_measured_where_it_is_and_left_as_it_was() -> None:
    model = build("llama")
    ids = torch.arange(3, 35)[None]
    with torch.inference_mode():
        before = model(ids).logits
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    report = effcli.profile(model, only=("kv", "sinks", "intensity"), context=(32,), sequences=2)
    assert report.model.kind == "live" and report.model.architecture == "LlamaForCausalLM"
    assert set(report.profiles) == {"kv", "sinks", "intensity"}
    # 2 layers x keys and values x 2 KV heads x head size 8 x 4 bytes
    assert report.profiles["kv"]["bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


def test_a_model_on_meta_is_counted_only() -> None:
    report = effcli.profile(build("llama", device="meta"), context=(32,))
    assert report.config_only
    assert set(report.profiles) == {"kv", "intensity"}
    assert "needs weights" in report.skipped["latency"]
    with pytest.raises(BadInputError, match="'latency' needs weights"):
        effcli.profile(build("llama", device="meta"), only=("latency",))


def test_what_does_not_apply_is_skipped_with_its_reason_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(_context: object) -> Answer:
        raise NotApplicableError("this model has no question")

    with_profiler(monkeypatch, Profiler(name="deep-thought", title="Deep Thought", run=run, result_type=Answer))
    model = build("llama", device="meta")
    monkeypatch.setattr(effcli.api, "PROFILER_ORDER", ())
    monkeypatch.setattr(registry, "names", lambda: ("deep-thought",))
    skipped = effcli.profile(build("llama")).skipped
    assert skipped == {"deep-thought": "this model has no question"}
    with pytest.raises(ProfilerError, match="no question"):
        effcli.profile(build("llama"), only=("deep-thought",))
    assert "needs weights" in effcli.profile(model).skipped["deep-thought"]


def test_a_profiler_that_is_not_for_every_run_runs_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Profiler("asked", "Asked", run=lambda _: Answer(42), result_type=Answer, default=False, needs_weights=False)
    with_profiler(monkeypatch, asked)
    model = build("llama", device="meta")
    report = effcli.profile(model, context=(32,))
    assert "asked" not in report.profiles and "asked" not in report.skipped
    assert not {"redundancy"} & {*report.profiles, *report.skipped}
    assert set(effcli.profile(model, only=("asked",)).profiles) == {"asked"}


def test_a_third_partys_result_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = Profiler(name="deep-thought", title="Deep Thought", run=lambda _: Answer(42), result_type=Answer)
    with_profiler(monkeypatch, profiler)
    report = effcli.profile(build("llama"), only=("deep-thought",))
    assert report.to_dict()["profiles"] == {"deep-thought": {"answer": 42}}


def test_a_nan_cannot_enter_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken:
        figure: float

    profiler = Profiler(name="broken", title="Broken", run=lambda _: Broken(float("nan")), result_type=Broken)
    with_profiler(monkeypatch, profiler)
    with pytest.raises(ValueError, match="cannot hold nan"):
        effcli.profile(build("llama"), only=("broken",))


def test_a_context_past_the_limit_is_refused() -> None:
    with pytest.raises(ProfilerError, match="context 4096 is past the model's limit of 1024"):
        effcli.profile(build("llama"), only=("kv",), context=(4096,))
