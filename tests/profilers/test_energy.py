import time

import pynvml
import pytest
import torch

from profilers import energy
from profilers.base import ProfileContext, ProfileRequest
from profilers.energy import EnergyMeter, measure_energy
from profilers.timing import PhaseTimings
from tests.tiny_models import build


class FakeError(Exception):
    pass


class FakeNVML:
    """A GPU that draws 200 W: its counter moves with the fake clock."""

    NVMLError = FakeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    watts = 200.0

    def __init__(self, *, missing=(), uuid="GPU-1"):
        self.now = 0.0
        self.missing = set(missing)
        self.uuid = uuid
        self.open = 0
        self.reasons = 0x004

    def _answer(self, name, value):
        if name in self.missing:
            raise FakeError("Not Supported")
        return value

    def nvmlInit(self):
        self._answer("init", None)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != self.uuid:
            raise FakeError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._answer("counter", int(self.now * self.watts * 1000))

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._answer("power", int(self.watts * 1000))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return self._answer("limit", 350_000)

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._answer("clock", {1: 1500, 2: 9000}[kind])

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._answer("temperature", 61)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._answer("throttle", self.reasons)


def metered(nvml, stretches=2, seconds=1.5, tokens=600):
    meter = EnergyMeter(nvml, "handle", clock=lambda: nvml.now, interval=0.001)
    for _ in range(stretches):
        with meter:
            nvml.now += seconds
        nvml.now += 100.0  # between stretches nothing is metered
    return meter.result(tokens, 4, 512)


def test_energy_counter_arithmetic():
    result = metered(FakeNVML())
    assert result.seconds == pytest.approx(3.0)
    assert result.joules_per_token == pytest.approx(200 * 3.0 / 600)
    assert result.average_power_watts == pytest.approx(200)
    assert result.method == "energy counter"
    assert (result.power_limit_watts, result.temperature_celsius) == (350, 61)
    assert (result.sm_clock_hertz, result.memory_clock_hertz) == (1.5e9, 9e9)
    assert result.throttle_reasons == ("software power cap",)
    assert (result.tokens, result.batch, result.context, result.reason) == (600, 4, 512, None)


def test_sampled_power_where_there_is_no_counter():
    result = metered(FakeNVML(missing=["counter"]))
    assert result.method == "sampled power"
    assert result.joules_per_token == pytest.approx(200 * 3.0 / 600)
    assert result.reason is None  # no figure is None


def test_neither_counter_nor_power():
    result = metered(FakeNVML(missing=["counter", "power"]))
    assert result.joules_per_token is None and result.average_power_watts is None and result.method is None
    assert "energy counter: Not Supported" in result.reason and "power: Not Supported" in result.reason
    assert result.sm_clock_hertz == 1.5e9


@pytest.mark.parametrize(
    ("query", "field", "words"),
    [
        ("limit", "power_limit_watts", "power limit"),
        ("clock", "memory_clock_hertz", "memory clock"),
        ("temperature", "temperature_celsius", "temperature"),
        ("throttle", "throttle_reasons", "throttle reasons"),
    ],
)
def test_each_missing_figure_is_none_with_its_reason(query, field, words):
    result = metered(FakeNVML(missing=[query]))
    assert getattr(result, field) is None
    assert f"{words}: Not Supported" in result.reason
    assert result.joules_per_token is not None


def test_no_throttling_is_an_empty_tuple_and_idle_clocks_are_none():
    nvml = FakeNVML()
    nvml.reasons = 0x001
    assert metered(nvml).throttle_reasons == ()


def test_reasons_seen_at_different_times_are_all_reported():
    nvml = FakeNVML()
    meter = EnergyMeter(nvml, "handle", clock=lambda: nvml.now, interval=0.001)
    for reasons in (0x020, 0x080 | 0x040):
        nvml.reasons = reasons
        with meter:
            nvml.now += 1
            time.sleep(0.01)
    assert meter.result(1, 1, 1).throttle_reasons == (
        "software thermal slowdown",
        "hardware thermal slowdown",
        "hardware power brake slowdown",
    )


def test_bits_are_those_of_nvml():
    bits = {
        value
        for name, value in vars(pynvml).items()
        if name.startswith("nvmlClocksThrottleReason") and isinstance(value, int) and value.bit_count() == 1
    }
    assert set(energy.THROTTLE_REASONS) == bits - {pynvml.nvmlClocksThrottleReasonGpuIdle}


def test_a_bug_in_sampling_surfaces():
    nvml = FakeNVML()
    nvml.nvmlDeviceGetPowerUsage = lambda handle: "many" / 2
    with pytest.raises(TypeError), EnergyMeter(nvml, "handle", clock=lambda: nvml.now):
        time.sleep(0.02)


def test_nvml_is_shut_down_after_success_and_failure():
    nvml = FakeNVML()

    def work(meter):
        assert nvml.open == 1
        with meter:
            nvml.now += 1
        return 10

    assert energy._with_nvml(nvml, "GPU-1", work, 1, 8).tokens == 10
    assert nvml.open == 0

    def failing(meter):
        raise RuntimeError("decode failed")

    with pytest.raises(RuntimeError, match="decode failed"):
        energy._with_nvml(nvml, "GPU-1", failing, 1, 8)
    assert nvml.open == 0


def test_device_unknown_to_nvml_and_library_that_does_not_start():
    nvml = FakeNVML()
    result = energy._with_nvml(nvml, "GPU-2", lambda meter: 1, 1, 8)
    assert result.joules_per_token is None and "GPU-2" in result.reason and "Not Found" in result.reason
    assert nvml.open == 0
    broken = FakeNVML(missing=["init"])
    assert "Not Supported" in energy._with_nvml(broken, "GPU-1", lambda meter: 1, 1, 8).reason
    assert broken.open == 0


def test_decode_counts_steps_times_batch(monkeypatch):
    nvml = FakeNVML()
    monkeypatch.setattr(energy, "DECODE_SECONDS", 2.0)
    monkeypatch.setattr(energy, "STRETCH_STEPS", 5)
    monkeypatch.setattr(energy, "WARM_UP_STEPS", 1)
    steps = []
    real = energy.next_token

    def counted(model, state, tokens):
        nvml.now += 0.2
        steps.append(tokens.shape)
        return real(model, state, tokens)

    monkeypatch.setattr(energy, "next_token", counted)
    meter = EnergyMeter(nvml, "handle", clock=lambda: nvml.now)
    tokens = energy._decode(build("llama"), 3, 16, 0, meter)
    # Two stretches of one step to warm up and five metered ones of 0.2 s reach two seconds.
    assert len(steps) == 12 and set(steps) == {(3, 1)}
    assert tokens == 10 * 3
    assert meter.seconds == pytest.approx(2.0)


def test_cpu_says_so():
    result = measure_energy(build("llama"))
    assert result.joules_per_token is None and "cpu" in result.reason
    values = [getattr(result, name) for name in ("average_power_watts", "throttle_reasons", "tokens", "seconds")]
    assert values == [None] * 4


def test_run_on_cpu():
    model = build("llama")
    context = ProfileContext(
        model, model.config, None, torch.device("cpu"), torch.float32, ProfileRequest(), None, PhaseTimings(model)
    )
    assert "cpu" in energy.run(context).reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so NVML is there")
def test_real_library_without_a_gpu_gives_its_own_words():
    result = energy._with_nvml(pynvml, "GPU-0", lambda meter: 1, 1, 8)
    assert result.reason.startswith("NVML") and result.joules_per_token is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_real_gpu():
    result = measure_energy(build("llama", device="cuda"), 2, 64)
    assert result.reason is None or result.joules_per_token is not None
    assert 0 < result.average_power_watts < 2000 and result.seconds >= energy.DECODE_SECONDS
