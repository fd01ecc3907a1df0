import math

import pytest
import torch

from profilers import peaks
from profilers.peaks import Peaks, Seen, WorkingSetBandwidth, last_level_cache_bytes, measure_peaks

CPU = torch.device("cpu")
MIB = 1 << 20


class Ticks:
    """A clock that advances one second each time it is read, so that every timed interval lasts one second."""

    now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(peaks, "LARGEST_WORKING_SET", {"cpu": 2 * MIB})
    monkeypatch.setattr(peaks, "GEMM_SECONDS", 0.05)


def test_units_under_a_known_clock(small):
    measured = measure_peaks(CPU, [torch.float32, torch.bfloat16], clock=Ticks())
    # One second for each run: bytes and FLOPs of one run are the rates.
    assert measured.copy_bytes_per_second == 2 * MIB  # 1 MiB read, 1 MiB written
    assert measured.read_bytes_per_second == 2 * MIB
    assert measured.memory_bytes_per_second == 2 * MIB
    assert [level.working_set_bytes for level in measured.by_working_set] == [MIB // 4, MIB // 2, MIB, 2 * MIB]
    # A smaller set takes as long, so its rate is lower; the envelope raises it to that of the largest.
    assert {level.bytes_per_second for level in measured.by_working_set} == {2 * MIB}
    assert measured.flops_per_second == {"float32": 2 * 256**3, "bfloat16": 2 * 256**3}
    assert measured.op_overhead_seconds == 1.0


def test_real_measurement_is_a_falling_envelope_that_ends_in_memory(small):
    measured = measure_peaks(CPU, [torch.float32])
    rates = [level.bytes_per_second for level in measured.by_working_set]
    sizes = [level.working_set_bytes for level in measured.by_working_set]
    assert rates == sorted(rates, reverse=True)
    assert sizes == sorted(sizes)
    assert rates[-1] == measured.memory_bytes_per_second
    assert measured.memory_bytes_per_second == max(measured.copy_bytes_per_second, measured.read_bytes_per_second)
    assert all(math.isfinite(rate) and rate > 0 for rate in [*rates, *measured.flops_per_second.values()])
    assert measured.op_overhead_seconds > 0
    assert measured.seconds_spent > 0
    assert measured.device


def test_dtypes_that_cannot_be_multiplied_are_left_out(small):
    measured = measure_peaks(CPU, [torch.float32, torch.bool, torch.float32], clock=Ticks())
    assert list(measured.flops_per_second) == ["float32"]


def test_slow_products_stop_the_search(monkeypatch):
    monkeypatch.setattr(peaks, "LARGEST_WORKING_SET", {"cpu": MIB // 4})
    done = []
    monkeypatch.setattr(peaks.F, "linear", lambda x, w: done.append((x.shape[0], *w.shape)))
    measure_peaks(CPU, [torch.float32], clock=Ticks())
    assert {shape for shape in done if shape[0] != 1} == {(16, 16, 16), (256, 256, 256)}  # the probe and the smallest


def test_ceiling_between_sizes_is_that_of_the_smaller():
    levels = (WorkingSetBandwidth(100, 9.0), WorkingSetBandwidth(200, 5.0), WorkingSetBandwidth(400, 2.0))
    measured = Peaks("x", 2.0, 1.0, 2.0, levels, {}, 1e-6, 1.0)
    assert [measured.bandwidth(size) for size in (1, 100, 199, 200, 399, 400, 10**9)] == [9, 9, 9, 5, 5, 2, 2]


def test_envelope_is_the_running_maximum_from_the_largest():
    envelope = peaks._envelope([1, 2, 4, 8], [3.0, 7.0, 2.0, 4.0])
    assert [level.bytes_per_second for level in envelope] == [7, 7, 4, 4]


def test_working_sets_stay_within_a_part_of_the_memory(monkeypatch):
    monkeypatch.setattr(peaks, "memory_available_bytes", lambda device: 80 * MIB)
    monkeypatch.setattr(peaks, "last_level_cache_bytes", lambda device: None)
    sizes = peaks._working_sets(CPU)
    assert sizes[0] == peaks.SMALLEST_WORKING_SET
    assert sizes[-1] == 8 * MIB  # the largest power of two within 80 / 8
    assert all(b == 2 * a for a, b in zip(sizes, sizes[1:], strict=False))


def test_main_memory_set_exceeds_the_cache(monkeypatch):
    monkeypatch.setattr(peaks, "memory_available_bytes", lambda device: 64 << 30)
    monkeypatch.setattr(peaks, "last_level_cache_bytes", lambda device: 128 * MIB)
    assert peaks._working_sets(CPU)[-1] == 512 * MIB


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_filler_is_made_of_ordinary_numbers_in_every_view(dtype):
    filler = peaks._random((1 << 18,), torch.bfloat16, CPU).view(dtype)
    assert torch.isfinite(filler).all()
    subnormal = filler.abs() < torch.finfo(dtype).smallest_normal
    assert subnormal.double().mean() < 1e-3
    assert filler.unique().numel() > 1000


def test_filler_has_the_shape_asked_for():
    assert peaks._random((3, peaks.TILE_ELEMENTS // 2), torch.float32, CPU).shape == (3, peaks.TILE_ELEMENTS // 2)
    assert peaks._random((5,), torch.bfloat16, CPU).dtype == torch.bfloat16


def test_last_level_cache_is_plausible_or_unknown():
    size = last_level_cache_bytes(CPU)
    assert size is None or 64 << 10 <= size <= 4 << 30


def test_progress_gets_one_step_for_each_size_and_dtype(small):
    import contextlib

    class Recorder:
        steps, total = 0, 0

        @contextlib.contextmanager
        def task(self, description, total=None):
            self.total = total
            yield self

        def advance(self, steps=1.0):
            self.steps += steps

    recorder = Recorder()
    measure_peaks(CPU, [torch.float32], recorder, clock=Ticks())
    assert recorder.steps == recorder.total == 5


def test_busy_machine_is_noted():
    assert peaks._busy_note(0.05) == ()
    assert "35%" in peaks._busy_note(0.35)[0]


def test_cpu_time_of_others_leaves_out_ones_own(monkeypatch):
    class Process:
        seconds = 0.0

        def cpu_times(self):
            return type("Times", (), {"user": self.seconds, "system": 0.0})

    process, now = Process(), [0.0]
    monkeypatch.setattr(peaks.psutil, "Process", lambda: process)
    monkeypatch.setattr(peaks.psutil, "cpu_percent", lambda: 75.0)
    monkeypatch.setattr(peaks.psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: now[0])
    use = peaks._OthersCpuUse()
    now[0], process.seconds = 10.0, 20.0  # half of the 40 CPU seconds that there were
    assert use.share() == pytest.approx(0.25)


def _two_levels(rate, small, large):
    return Peaks(
        device="test",
        copy_bytes_per_second=large,
        read_bytes_per_second=large / 2,
        memory_bytes_per_second=large,
        by_working_set=(WorkingSetBandwidth(1000, small), WorkingSetBandwidth(100_000, large)),
        flops_per_second={"float32": rate},
        op_overhead_seconds=1e-6 * rate,
        seconds_spent=1.0,
    )


def test_merging_keeps_the_better_figure_of_each():
    merged = _two_levels(1.0, 40.0, 20.0).merged(_two_levels(2.0, 30.0, 25.0))
    assert merged.flops_per_second == {"float32": 2.0}
    assert [level.bytes_per_second for level in merged.by_working_set] == [40.0, 25.0]
    assert (merged.memory_bytes_per_second, merged.copy_bytes_per_second) == (25.0, 25.0)
    assert merged.op_overhead_seconds == 1e-6
    assert merged.seconds_spent == 2.0


def test_a_ceiling_that_something_passed_is_raised_to_it_and_says_so():
    low = _two_levels(10.0, 40.0, 20.0)
    same = low.raised("float32", [Seen("slow", 9, 2000, 50.0)])
    assert same == low
    raised = low.raised("float32", [Seen("fast", 50, 2000, 1.0), Seen("also fast", 30, 5, 1.0)])
    assert raised.flops_per_second == {"float32": 50.0}
    assert "from 10 to 50 FLOP/s" in raised.notes[0] and "fast" in raised.notes[0]
    # 2,000 bytes in a second lie in the level of 1,000 bytes; main memory has shown nothing.
    assert [level.bytes_per_second for level in raised.by_working_set] == [2000.0, 20.0]
    assert raised.memory_bytes_per_second == 20.0
    assert raised.bandwidth(2000) == 2000.0
    huge = low.raised("float32", [Seen("huge", 0, 200_000, 1000.0)])
    assert huge.memory_bytes_per_second == 200.0
    assert [level.bytes_per_second for level in huge.by_working_set] == [200.0, 200.0]
