"""Times of a run's parts by a clock that the models themselves move, and costs against torch's own counter."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effcli.reports.model import plain
from profilers import denoising
from profilers.base import DoesNotFitError, ProfilerError
from profilers.denoising import measure
from profilers.peaks import Peaks, WorkingSetBandwidth


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Block(torch.nn.Module):
    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.linear = torch.nn.Linear(4, 4, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds
        return self.linear(hidden)


class Denoiser(torch.nn.Module):
    """Embedding of 1 s, two blocks of 2 s and 3 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.blocks = torch.nn.ModuleList([Block(clock, 2.0), Block(clock, 3.0)])

    def forward(self, hidden: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        self.clock.now += 1.0
        for block in self.blocks:
            hidden = block(hidden)
        return hidden * scale


class Autoencoder(torch.nn.Module):
    """Decoding takes 5 s, and calls itself on a tile."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def decode(self, latents: torch.Tensor, tiled: bool = True) -> torch.Tensor:
        """Decode."""
        self.clock.now += 2.5
        return self.decode(latents, tiled=False) if tiled else latents


class Encoder(torch.nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self) -> None:
        self.clock.now += 4.0


class Toy:
    """A pipeline of 3 steps with two calls each: 4 s + 3 x (2 x 6 s + 0.5 s) + 5 s."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.denoiser, self.vae, self.encoder = Denoiser(clock), Autoencoder(clock), Encoder(clock)
        self.runs = 0

    def run(self) -> torch.Tensor:
        self.runs += 1
        self.encoder()
        latents = torch.ones(8, 4)
        with torch.no_grad():
            for _ in range(3):
                latents = self.denoiser(latents, scale=0.5) + self.denoiser(latents)
                self.clock.now += 0.5
        return self.vae.decode(latents)

    def measure(self, run: Callable[[], Any] | None = None, **settings: Any) -> denoising.DenoisingResult:
        asked = {"blocks": list(self.denoiser.blocks), "steps": 3, "peaks": None} | settings
        others = {"vae": self.vae, "text_encoder": self.encoder}
        return measure(run or self.run, self.denoiser, others=others, **asked)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    clock = Clock()
    monkeypatch.setattr(denoising, "time", clock)
    return Toy(clock)


def peaks(flops: float, bandwidth: float) -> Peaks:
    return Peaks(
        device="cpu",
        copy_bytes_per_second=bandwidth,
        read_bytes_per_second=bandwidth,
        memory_bytes_per_second=bandwidth,
        by_working_set=(WorkingSetBandwidth(1 << 16, bandwidth),),
        flops_per_second={"float32": flops},
        op_overhead_seconds=1e-6,
        seconds_spent=0.0,
    )


def test_each_part_has_its_time(toy: Toy) -> None:
    result = toy.measure()
    assert toy.runs == 4  # one to warm up
    assert result.run_seconds.p50 == 46.5
    assert (result.run_seconds.samples, result.run_seconds.relative_spread) == (3, 0.0)
    assert (result.denoiser_calls, result.denoiser_seconds, result.step_seconds) == (6, 36.0, 12.0)
    assert (result.call_seconds.p50, result.call_seconds.samples) == (6.0, 18)
    assert result.denoiser_share == 36.0 / 46.5
    assert (result.blocks_seconds, result.blocks_share) == (30.0, 30.0 / 36.0)
    parts = {(item.name, item.method): (item.calls, item.seconds) for item in result.components}
    assert parts == {("text_encoder", "forward"): (1, 4.0), ("vae", "decode"): (1, 5.0)}
    assert result.other_seconds == 1.5
    assert result.warnings == ()
    assert json.loads(json.dumps(plain(result)))["denoiser_calls"] == 6


def test_without_blocks_there_is_no_share_of_them(toy: Toy) -> None:
    result = toy.measure(blocks=[])
    assert result.blocks_seconds is None and result.blocks_share is None


def test_denoisers_that_take_turns_count_together(toy: Toy) -> None:
    second = Denoiser(toy.clock)

    def run() -> None:
        with torch.no_grad():
            toy.denoiser(torch.ones(8, 4))
            second(torch.ones(8, 4))

    result = measure(run, [toy.denoiser, second], others={}, blocks=[*second.blocks], steps=2, peaks=None)
    assert (result.denoiser_calls, result.denoiser_seconds, result.blocks_seconds) == (2, 12.0, 5.0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_are_as_before(toy: Toy, fails: bool) -> None:
    own = toy.vae.decode
    modules = (toy.denoiser, *toy.denoiser.blocks, toy.vae, toy.encoder)
    before = [dict(vars(module)) for module in modules]

    def run() -> None:
        toy.run()
        if fails and toy.runs == 2:
            raise KeyError("in a run")

    if fails:
        with pytest.raises(KeyError):
            toy.measure(run)
    else:
        toy.measure(run)
    for module, attributes in zip(modules, before, strict=True):
        assert vars(module) == attributes
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert toy.vae.decode == own


def test_a_method_that_the_object_overrides_is_put_back(toy: Toy) -> None:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        toy.clock.now += 7.0
        return latents

    toy.vae.decode = decode  # type: ignore[method-assign, assignment]
    result = toy.measure()
    assert [item.seconds for item in result.components if item.name == "vae"] == [7.0]
    assert toy.vae.decode is decode


def test_one_call_is_counted_as_torch_counts_it(toy: Toy) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        toy.denoiser(torch.ones(8, 4))
    cost = toy.measure().cost
    assert cost.flops == counter.get_total_flops() == 2 * 2 * 8 * 4 * 4
    assert cost.weight_bytes == 2 * 4 * 4 * 4
    # Two products read and write 8 x 4 values, and so does scaling the output.
    assert cost.activation_bytes == 3 * 2 * 8 * 4 * 4
    assert cost.bytes == cost.weight_bytes + cost.activation_bytes
    assert cost.flops_per_byte == cost.flops / cost.bytes
    assert (cost.dtype, cost.seconds, cost.flops_per_second) == ("float32", 6.0, cost.flops / 6.0)
    assert cost.attainable_seconds is None and cost.bound is None and cost.attained_fraction is None


@pytest.mark.parametrize(("flops", "bandwidth", "bound"), [(256.0, 1e9, "compute"), (1e9, 224.0, "memory")])
def test_the_roofline_says_what_bounds(toy: Toy, flops: float, bandwidth: float, bound: str) -> None:
    cost = toy.measure(peaks=peaks(flops, bandwidth)).cost
    expected = cost.flops / flops if bound == "compute" else cost.bytes / bandwidth
    assert (cost.bound, cost.attainable_seconds) == (bound, expected)
    assert cost.attained_fraction == expected / 6.0
    assert cost.ridge_flops_per_byte == flops / bandwidth


def test_a_ceiling_that_was_passed_is_raised_and_said(toy: Toy) -> None:
    result = toy.measure(peaks=peaks(1.0, 1e9))
    assert result.cost.peak_flops_per_second == result.cost.flops / 6.0
    assert result.cost.attained_fraction == 1.0
    assert any("was raised" in line for line in result.warnings)


def test_unstable_times_carry_a_warning(toy: Toy) -> None:
    def run() -> None:
        toy.run()
        toy.clock.now += 30.0 * toy.runs

    result = toy.measure(run)
    assert len(result.warnings) == 1 and "the time of a run is unstable" in result.warnings[0]


def test_long_runs_are_not_repeated(toy: Toy) -> None:
    def run() -> None:
        toy.run()
        toy.clock.now += 1000.0

    result = toy.measure(run)
    assert (toy.runs, result.run_seconds.samples) == (2, 1)
    assert "one sample" in result.warnings[0]


@pytest.mark.parametrize("setting", ["warmup", "repeats", "steps"])
def test_no_runs_are_refused(toy: Toy, setting: str) -> None:
    with pytest.raises(ProfilerError, match=f"{setting}=0"):
        toy.measure(**{setting: 0})


def test_a_run_without_the_denoiser_is_refused(toy: Toy) -> None:
    with pytest.raises(ProfilerError, match="did not call its denoiser"):
        toy.measure(lambda: None)


def test_too_little_memory_is_said_in_one_line(toy: Toy) -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(DoesNotFitError, match="smaller --height"):
        toy.measure(run)


def test_a_real_pipeline() -> None:
    from tests.passes.lemica import tiny_pipelines

    pipeline = tiny_pipelines.dit()
    blocks = list(pipeline.transformer.transformer_blocks)
    result = measure(
        lambda: pipeline(class_labels=[1], num_inference_steps=4, output_type="pt"),
        pipeline.transformer,
        others={"vae": pipeline.vae},
        blocks=blocks,
        steps=4,
        peaks=None,
        repeats=2,
    )
    assert result.denoiser_calls == 4
    assert [(item.name, item.method, item.calls) for item in result.components] == [("vae", "decode", 1)]
    assert 0 < result.blocks_seconds < result.denoiser_seconds < result.run_seconds.p50  # type: ignore[operator]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        pipeline.transformer(
            torch.zeros(2, 4, 8, 8), timestep=torch.tensor([1, 1]), class_labels=torch.tensor([1, 1000])
        )
    # torch's counter does not know the CPU's fused attention: 3 blocks, 2 branches, 2 heads of 8, 16 tokens.
    assert result.cost.flops == counter.get_total_flops() + 3 * 4 * 2 * 2 * 16 * 16 * 8
