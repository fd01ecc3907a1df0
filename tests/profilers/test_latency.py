import pytest
import torch

from profilers import latency, timing
from profilers.base import ProfileContext, ProfileRequest
from profilers.latency import measure_latency, spread_warnings
from profilers.timing import Distribution, PhaseTiming, PhaseTimings, Repeats
from tests.tiny_models import build


class KnownTimings:
    """Timings with round numbers."""

    def measure(self, batch, context):
        return PhaseTiming(
            batch,
            context,
            prefill=Distribution.of([0.5, 0.5, 0.5]),
            decode=Distribution.of([0.02, 0.02, 0.04]),
            peak_memory_bytes=123,
            peak_memory_reason=None,
            decode_context=(context, context + 2),
        )


def test_rates_follow_from_medians():
    result = measure_latency(build("llama"), (1, 8), (64, 128), timings=KnownTimings(), load_seconds=1.25)
    assert [(point.batch, point.context) for point in result.points] == [(1, 64), (1, 128), (8, 64), (8, 128)]
    last = result.points[-1]
    assert last.tokens_per_second == pytest.approx(8 / 0.02)
    assert last.prefill_tokens_per_second == pytest.approx(8 * 128 / 0.5)
    assert last.peak_memory_bytes == 123 and last.decode_context == (128, 130)
    assert result.load_seconds == 1.25
    assert result.threads == torch.get_num_threads()
    assert result.attention_implementation == "sdpa"


def test_shaky_numbers_carry_a_warning():
    point = measure_latency(build("llama"), (1,), (8,), timings=KnownTimings()).points[0]
    (warning,) = point.warnings  # TPOT only: p90 0.036, p10 0.020, median 0.020
    assert warning.startswith("TPOT is unstable: p10 to p90 span 80% of the median over 3 samples")


def test_warning_threshold():
    def spread(value):
        return Distribution(1.0, 1.0, 1.0, 1.0, 1.0, value, 9)

    assert spread_warnings("TTFT", spread(latency.UNSTABLE_SPREAD)) == ()
    assert len(spread_warnings("TTFT", spread(latency.UNSTABLE_SPREAD + 0.01))) == 1
    assert "one sample" in spread_warnings("TTFT", Distribution.of([12.0]))[0]


@pytest.fixture
def context(monkeypatch):
    monkeypatch.setattr(timing, "PREFILL_REPEATS", Repeats(2, 2, 0.0, 10.0))
    monkeypatch.setattr(timing, "DECODE_REPEATS", Repeats(3, 3, 0.0, 10.0))

    def make(model, request):
        return ProfileContext(
            model, model.config, None, model.device, model.dtype, request, None, PhaseTimings(model), load_seconds=2.0
        )

    return make


def test_run_takes_the_request(context):
    result = latency.run(context(build("llama"), ProfileRequest(batches=(2,), contexts=(16, 24))))
    assert [(point.batch, point.context) for point in result.points] == [(2, 16), (2, 24)]
    assert result.load_seconds == 2.0


def test_default_context_is_clipped_to_the_limit(context):
    model = build("llama")
    assert latency.run(context(model, ProfileRequest())).points[0].context == 512
    model.config.max_position_embeddings = 100
    assert latency.run(context(model, ProfileRequest())).points[0].context == 100
