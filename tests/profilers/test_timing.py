import statistics

import pytest
import torch

from profilers import timing
from profilers.base import DoesNotFitError, ProfilerError
from profilers.phases import prefill
from profilers.timing import Distribution, PhaseTimings, Repeats, check_point, decode_room, first_token, next_token
from tests.tiny_models import CONFIGS, VOCABULARY, build


class StepClock:
    """A clock that the timed work itself moves."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "PREFILL_REPEATS", Repeats(2, 2, 0.0, 10.0))
    monkeypatch.setattr(timing, "DECODE_REPEATS", Repeats(3, 3, 0.0, 10.0))


def test_percentiles_equal_the_standard_library():
    samples = [0.5, 0.1, 0.4, 0.2, 0.3, 0.9, 0.7]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    hundredths = statistics.quantiles(samples, n=100, method="inclusive")
    summary = Distribution.of(samples)
    assert summary.p50 == pytest.approx(statistics.median(samples))
    assert summary.p90 == pytest.approx(tenths[8])
    assert summary.p99 == pytest.approx(hundredths[98])
    assert summary.mean == pytest.approx(statistics.fmean(samples))
    assert summary.minimum == 0.1 and summary.samples == 7
    assert summary.relative_spread == pytest.approx((tenths[8] - tenths[0]) / statistics.median(samples))


def test_one_sample_has_no_spread():
    assert Distribution.of([2.0]) == Distribution(2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 1)


@pytest.mark.parametrize(
    ("samples", "enough"),
    [
        ([], False),
        ([11.0], True),  # one run past the limit
        ([0.6, 0.6], False),  # long enough, too few
        ([0.1] * 3, False),  # enough of them, too short
        ([0.6] * 3, True),
        ([0.01] * 32, True),  # the most
        ([4.0, 4.0], False),
        ([5.0, 5.0], True),
    ],
)
def test_when_to_stop(samples, enough):
    assert Repeats(minimum=3, maximum=32, seconds=1.5, limit_seconds=10.0).enough(samples) is enough


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture(name, quick):
    measured = PhaseTimings(build(name)).measure(2, 12)
    assert (measured.batch, measured.context) == (2, 12)
    assert measured.prefill.samples == 2 and measured.decode.samples == 3
    assert 0 < measured.prefill.minimum <= measured.prefill.p50 <= measured.prefill.p99
    assert measured.decode_context == (14, 16)
    assert (measured.peak_memory_bytes is None) is (measured.peak_memory_reason is not None)


def test_what_is_timed_is_exactly_prefill_and_steps(quick, monkeypatch):
    clock = StepClock()
    calls = []

    def forward(kind, seconds, real):
        def timed(model, *arguments):
            calls.append(kind)
            clock.now += seconds
            return real(model, *arguments)

        return timed

    monkeypatch.setattr(timing, "first_token", forward("prefill", 3.0, first_token))
    monkeypatch.setattr(timing, "next_token", forward("step", 0.25, next_token))
    measured = PhaseTimings(build("llama"), clock=clock).measure(1, 8)
    assert measured.prefill == Distribution(3.0, 3.0, 3.0, 3.0, 3.0, 0.0, 2)
    assert measured.decode == Distribution(0.25, 0.25, 0.25, 0.25, 0.25, 0.0, 3)
    assert calls == ["prefill"] + ["step"] * 5 + ["prefill"] * 2  # one prefill and two steps warm up


def test_a_point_is_measured_once(quick):
    timings = PhaseTimings(build("llama"))
    assert timings.measure(1, 8) is timings.measure(1, 8)
    assert timings.measure(1, 8) is not timings.measure(1, 9)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_tokens_are_those_of_greedy_generation(name):
    model = build(name)
    ids = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
    state, token = first_token(model, ids)
    chosen = [token]
    for _ in range(3):
        state, token = next_token(model, state, token)
        chosen.append(token)
    # Reference: no cache, the whole sequence again for each token.
    sequence = ids
    for token in chosen:
        inputs = {"input_ids": ids, "decoder_input_ids": sequence} if name == "t5" else {"input_ids": sequence}
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits
        assert torch.equal(token, logits[:, -1].argmax(-1, keepdim=True))
        sequence = torch.cat([sequence, token], dim=1)


def test_steps_end_at_the_last_position():
    config = CONFIGS["gpt2"]()  # 1,024 learned positions: one more would fail
    assert decode_room(config, 512, 66) == (512, 66)
    assert decode_room(config, 958, 66) == (958, 66)
    assert decode_room(config, 1024, 66) == (958, 66)
    config.n_positions = 10
    assert decode_room(config, 10, 66) == (1, 9)
    config.n_positions = 3
    with pytest.raises(ProfilerError, match="3 positions"):
        decode_room(config, 3, 66)


def test_context_at_the_limit_is_measured(quick, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        timing, "first_token", lambda model, ids: lengths.append(ids.shape[1]) or first_token(model, ids)
    )
    measured = PhaseTimings(build("gpt2")).measure(1, 1024)
    assert measured.decode_context == (1021, 1023)
    assert lengths == [1019, 1024, 1024]  # none but the timed ones is of the whole context


def test_context_next_to_the_limit_is_measured(quick):
    measured = PhaseTimings(build("gpt2")).measure(1, 1023)
    assert measured.decode_context == (1021, 1023)


def test_context_past_the_limit_is_refused():
    with pytest.raises(ProfilerError, match="1025.*1024"):
        PhaseTimings(build("llama")).measure(1, 1025)


@pytest.mark.parametrize(("batch", "context"), [(0, 8), (-1, 8), (1, 0)])
def test_sizes_that_are_none_are_refused(batch, context):
    with pytest.raises(ProfilerError, match="give 1 or more"):
        PhaseTimings(build("llama")).measure(batch, context)


def test_meta_model_is_refused():
    with pytest.raises(ProfilerError, match="meta"):
        PhaseTimings(build("llama", device="meta")).measure(1, 8)


def test_a_batch_that_cannot_fit_is_refused_before_it_is_allocated():
    with pytest.raises(DoesNotFitError, match=r"batch 1000000000 x context 1000 .*GB.*--batch"):
        PhaseTimings(build("llama")).measure(1_000_000_000, 1000)


def test_need_counts_the_cache(monkeypatch):
    model = build("llama")
    state = prefill(model, 4, 100)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers)
    activations = 4 * 100 * (32 + 2 * 48) * 4
    monkeypatch.setattr(timing, "memory_available_bytes", lambda device: cache + activations)
    check_point(model, 4, 100)
    monkeypatch.setattr(timing, "memory_available_bytes", lambda device: cache + activations - 1)
    with pytest.raises(DoesNotFitError):
        check_point(model, 4, 100)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_is_one_line_with_the_remedy(error, monkeypatch):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(timing, "first_token", fails)
    with pytest.raises(DoesNotFitError, match="batch 2 x context 8 ran out of memory on cpu; give a smaller --batch"):
        PhaseTimings(build("llama")).measure(2, 8)


def test_real_cpu_allocation_failure_is_recognized():
    with pytest.raises(DoesNotFitError), timing.out_of_memory_as_error(1, 1, torch.device("cpu")):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_pass_through(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(timing, "first_token", fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        PhaseTimings(build("llama")).measure(1, 8)
