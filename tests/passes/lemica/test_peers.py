"""Diffusers' caches driven to a cost: against the same caches put in by hand, with the blocks that run watched."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from passes.base import PassError
from passes.lemica import peers
from profilers.base import SilentProgress
from tests.passes.lemica import tiny_pipelines

STEPS = 10
LAYERS = 3


def maker(pipeline: Any, seed: int, steps: int = STEPS) -> Callable[[], torch.Tensor]:
    """Return what makes one sample, guidance in one batch."""

    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        made = pipeline(class_labels=[seed % 10], num_inference_steps=steps, generator=generator, output_type="pt")
        return torch.as_tensor(made.images)

    return make


def wan(layers: int = 3) -> Any:
    """A pipeline that calls its denoiser twice a step, in cache contexts of its own; prompts come as embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    tiny_pipelines.randomize(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer.eval(), vae=None, scheduler=scheduler
    )
    return tiny_pipelines.quiet(pipeline)


def wan_maker(pipeline: Any, seed: int) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randn(1, 6, 8, generator=generator)
        made = pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=torch.zeros_like(prompt),
            latents=torch.randn(1, 4, 1, 4, 4, generator=generator),
            height=32,
            width=32,
            num_frames=1,
            num_inference_steps=STEPS,
            output_type="latent",
        )
        return torch.as_tensor(made.frames)

    return make


def stable_diffusion_3() -> Any:
    """A pipeline of joint blocks; prompts come as embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=16,
        out_channels=4,
    )
    tiny_pipelines.randomize(transformer)
    encoders = {f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = StableDiffusion3Pipeline(transformer=transformer.eval(), scheduler=scheduler, vae=None, **encoders)
    return tiny_pipelines.quiet(pipeline)


def stable_diffusion_3_maker(pipeline: Any, seed: int) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        prompt, pooled = torch.randn(1, 6, 8, generator=generator), torch.randn(1, 16, generator=generator)
        made = pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=torch.zeros_like(prompt),
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
            latents=torch.randn(1, 4, 8, 8, generator=generator),
            height=64,
            width=64,
            num_inference_steps=STEPS,
            output_type="latent",
        )
        return torch.as_tensor(made.images)

    return make


@contextmanager
def watched(module: torch.nn.Module, block: torch.nn.Module) -> Any:
    """Yield a list with an entry for each call of ``module``: how often ``block`` ran within."""
    ran: list[int] = []

    def called(*_: object) -> None:
        ran.append(0)

    def in_block(*_: object) -> None:
        ran[-1] += 1

    handles = [module.register_forward_pre_hook(called), block.attn1.register_forward_pre_hook(in_block)]
    yield ran
    for handle in handles:
        handle.remove()


def traces(pipeline: Any) -> list[tuple[str, list[str]]]:
    """Return where forwards are replaced, and where hook registries are, with the names of their hooks.

    A pipeline that opens cache contexts leaves an empty registry at its denoiser by itself.
    """
    found = [("scheduler", [name]) for name in ("step", "set_timesteps") if name in pipeline.scheduler.__dict__]
    for name, module in pipeline.transformer.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        found += [(name, ["forward"])] if "forward" in module.__dict__ else []
        found += [] if registry is None else [(name, list(registry.hooks))]
    return found


def test_first_block_cache_is_that_of_diffusers_at_a_cost_below_the_target() -> None:
    pipeline = tiny_pipelines.dit(layers=LAYERS)
    makers = [maker(pipeline, seed) for seed in range(2)]
    found = peers.first_block_cache(pipeline, makers, 8.0)

    assert isinstance(found, peers.PeerRun) and found.method == "first-block-cache" and found.steps == STEPS
    assert 8 - 1.5 <= found.mean_cost_steps <= 8
    for index, make in enumerate(makers):
        alone = tiny_pipelines.dit(layers=LAYERS)
        with watched(alone.transformer, alone.transformer.transformer_blocks[-1]) as ran:
            expected = first_block_cache_by_hand(alone, found.settings["threshold"], index)
        assert torch.equal(found.results[index], expected)
        assert not torch.equal(found.results[index], make())
        full = sum(ran)
        assert len(ran) == STEPS and found.full_steps[index] == full
        assert found.cost_steps[index] == pytest.approx(full + (STEPS - full) / LAYERS)


def first_block_cache_by_hand(pipeline: Any, threshold: float, seed: int) -> torch.Tensor:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers.models.cache_utils import CacheMixin

    apply_first_block_cache(pipeline.transformer, FirstBlockCacheConfig(threshold=threshold))
    with CacheMixin.cache_context(pipeline.transformer, "cond"):
        return maker(pipeline, seed)()


def test_the_search_of_a_threshold_is_corrected_on_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SEARCH_RUNS", 1)
    pipeline = tiny_pipelines.dit(layers=LAYERS)
    found = peers.first_block_cache(pipeline, [maker(pipeline, seed) for seed in range(4)], 7.0)
    assert isinstance(found, peers.PeerRun)
    assert len(found.results) == 4 and 7 - 1.5 <= found.mean_cost_steps <= 7


@pytest.mark.parametrize("power", [0.5, 0.75, 1.5])
@pytest.mark.parametrize("target", [4.0, 12.0, 25.0, 45.0])
def test_a_threshold_is_found_in_few_attempts(power: float, target: float) -> None:
    tried = []

    def attempt(threshold: float) -> peers.PeerRun[None]:
        tried.append(threshold)
        cost = min(50.0, 50 * (0.02 / threshold) ** power)
        return peers.PeerRun("any", {"threshold": threshold}, (None,), 50, (cost,), (cost,))

    with SilentProgress().task("search") as task:
        found = peers._nearest(attempt, attempt(0.05), target, task)
    assert target - peers.TOLERANCE_STEPS <= found.mean_cost_steps <= target
    assert len(tried) <= 9


def test_of_costs_that_jump_over_the_target_the_largest_below_it_is_taken() -> None:
    def attempt(threshold: float) -> peers.PeerRun[None]:
        cost = 20.0 if threshold < 0.3 else 9.0
        return peers.PeerRun("any", {"threshold": threshold}, (None,), 50, (cost,), (cost,))

    with SilentProgress().task("search") as task:
        assert peers._nearest(attempt, attempt(0.05), 12.0, task).mean_cost_steps == 9.0


def test_no_run_starts_from_what_another_left() -> None:
    pipeline = tiny_pipelines.dit(layers=LAYERS)
    make = maker(pipeline, 0)
    for found in (
        peers.first_block_cache(pipeline, [make, make], 6.0),
        peers.mag_cache(pipeline, [make, make], 6.0, peers.magnitude_ratios(pipeline, [make])),
    ):
        assert isinstance(found, peers.PeerRun)
        assert torch.equal(found.results[0], found.results[1])
        assert found.full_steps[0] == found.full_steps[1] < STEPS


def test_a_target_of_all_steps_skips_nothing() -> None:
    pipeline = tiny_pipelines.dit(layers=LAYERS)
    make = maker(pipeline, 0)
    plain = make()
    for found in (
        peers.first_block_cache(pipeline, [make], STEPS),
        peers.mag_cache(pipeline, [make], STEPS, peers.magnitude_ratios(pipeline, [make])),
    ):
        assert isinstance(found, peers.PeerRun)
        assert found.mean_full_steps == found.mean_cost_steps == STEPS
        assert torch.equal(found.results[0], plain)


def test_magnitude_ratios_are_those_that_diffusers_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    pipeline = tiny_pipelines.dit(layers=LAYERS)
    found = peers.magnitude_ratios(pipeline, [maker(pipeline, 3)])
    both = peers.magnitude_ratios(pipeline, [maker(pipeline, 3), maker(pipeline, 4)])
    assert traces(pipeline) == []

    printed = []
    for seed in (3, 4):
        alone = tiny_pipelines.dit(layers=LAYERS)
        apply_mag_cache(alone.transformer, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
        maker(alone, seed)()
        lines = capsys.readouterr().out.splitlines()
        printed.append(ast.literal_eval(next(line for line in lines if line.startswith("[1.0"))))
    assert found == pytest.approx(printed[0], rel=1e-5)
    assert both == pytest.approx([sum(pair) / 2 for pair in zip(*printed, strict=True)], rel=1e-5)


def test_full_steps_of_settings_are_those_that_diffusers_runs() -> None:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    pipeline = tiny_pipelines.dit(layers=2)
    ratios = peers.magnitude_ratios(pipeline, [maker(pipeline, 0)])
    seen = set()
    for target in range(1, STEPS + 1):
        for setting in peers.mag_cache_settings(ratios, target):
            assert len(setting.full) <= target
            if setting.full in seen:
                continue
            seen.add(setting.full)
            alone = tiny_pipelines.dit(layers=2)
            config = MagCacheConfig(
                threshold=setting.threshold,
                max_skip_steps=setting.max_skip_steps,
                retention_ratio=setting.retention_ratio,
                num_inference_steps=STEPS,
                mag_ratios=list(ratios),
            )
            apply_mag_cache(alone.transformer, config)
            with watched(alone.transformer, alone.transformer.transformer_blocks[-1]) as ran:
                maker(alone, 0)()
            assert tuple(step for step, count in enumerate(ran) if count) == setting.full
    assert len(seen) > STEPS


def test_mag_cache_takes_the_setting_that_a_trial_likes_best() -> None:
    pipeline = tiny_pipelines.dit(layers=2)
    make = maker(pipeline, 0)
    plain, calibration = make(), maker(pipeline, 1)
    ratios = peers.magnitude_ratios(pipeline, [calibration])
    settings = {target: peers.mag_cache_settings(ratios, target) for target in range(3, STEPS)}
    target, known = max(settings.items(), key=lambda item: len(item[1]))
    assert len(known) > 1 and {len(item.full) for item in known} == {target}

    first = peers.mag_cache(pipeline, [make], target, ratios)
    assert isinstance(first, peers.PeerRun)
    assert first.settings["retention_ratio"] == known[0].retention_ratio
    assert first.full == known[0].full
    assert first.full_steps == first.cost_steps == (target,)

    errors: list[float] = []

    def trial() -> float:
        errors.append(float((make() - plain).abs().mean()))
        return -errors[-1]  # the worst, so that it is not by chance the first

    worst = peers.mag_cache(pipeline, [make], target, ratios, trial=trial)
    assert isinstance(worst, peers.PeerRun)
    assert len(errors) == len(known)
    assert float((worst.results[0] - plain).abs().mean()) == max(errors) > 0
    assert torch.equal(make(), plain)


@pytest.mark.parametrize("method", ["first-block-cache", "mag-cache"])
def test_the_pipeline_is_as_before(method: str) -> None:
    pipeline = tiny_pipelines.dit(layers=LAYERS)
    make = maker(pipeline, 0)
    plain = make()
    ratios = peers.magnitude_ratios(pipeline, [make])

    def compare(make: Callable[[], torch.Tensor]) -> object:
        if method == "mag-cache":
            return peers.mag_cache(pipeline, [make], 6, ratios)
        return peers.first_block_cache(pipeline, [make], 6)

    compare(make)
    assert traces(pipeline) == []
    assert torch.equal(make(), plain)

    class Stopped(Exception):
        pass

    def stopped() -> torch.Tensor:
        make()
        raise Stopped

    with pytest.raises(Stopped):
        compare(stopped)
    assert traces(pipeline) == []
    assert torch.equal(make(), plain)


def test_guidance_in_two_calls_has_a_state_for_each() -> None:
    pipeline = wan()
    makers = [wan_maker(pipeline, seed) for seed in range(2)]
    plain = [make() for make in makers]
    ratios = peers.magnitude_ratios(pipeline, makers)
    assert len(ratios) == STEPS and ratios[0] == 1.0

    exact = peers.mag_cache(pipeline, makers, 7, ratios)
    assert isinstance(exact, peers.PeerRun)
    assert exact.full_steps == exact.cost_steps == (7.0, 7.0)
    alone = wan()
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(
        threshold=exact.settings["threshold"],
        max_skip_steps=int(exact.settings["max_skip_steps"]),
        retention_ratio=exact.settings["retention_ratio"],
        num_inference_steps=STEPS,
        mag_ratios=list(ratios),
    )
    alone.transformer.enable_cache(config)
    assert torch.equal(wan_maker(alone, 0)(), exact.results[0])

    found = peers.first_block_cache(pipeline, makers, 8.0)
    assert isinstance(found, peers.PeerRun)
    assert 6.5 <= found.mean_cost_steps <= 8
    from diffusers.hooks import FirstBlockCacheConfig

    alone = wan()
    alone.transformer.enable_cache(FirstBlockCacheConfig(threshold=found.settings["threshold"]))
    assert torch.equal(wan_maker(alone, 0)(), found.results[0])
    assert traces(pipeline) == [("", [])]
    assert all(torch.equal(make(), before) for make, before in zip(makers, plain, strict=True))


def test_a_cost_that_cannot_be_reached_is_said() -> None:
    pipeline = tiny_pipelines.dit(layers=LAYERS)
    make = maker(pipeline, 0)
    found = peers.first_block_cache(pipeline, [make], 3.0)
    assert isinstance(found, peers.Unavailable)
    assert found.reason.startswith("the first of its 3 blocks runs at each of 10 steps, so that a run costs 4.0 full")
    assert peers.mag_cache_settings([1.0] * 50, 2) == ()
    found = peers.mag_cache(pipeline, [make], 0, [1.0] * STEPS)
    assert isinstance(found, peers.Unavailable)
    assert found.reason == "no setting that was tried runs 0 of 10 steps or fewer"


def test_what_they_do_not_fit_is_said() -> None:
    pipeline = tiny_pipelines.dit(layers=1)
    found = peers.first_block_cache(pipeline, [maker(pipeline, 0)], 6)
    assert found == peers.Unavailable(
        "first-block-cache", "the denoiser has one block, and the first block always runs"
    )

    pipeline = tiny_pipelines.dit(layers=2)

    def fails() -> torch.Tensor:
        raise TypeError("list indices must be integers\nor slices")

    found = peers.first_block_cache(pipeline, [fails], 6)
    assert found == peers.Unavailable(
        "first-block-cache", "fails on DiTPipeline: TypeError: list indices must be integers"
    )
    assert traces(pipeline) == []


def test_a_cache_that_fails_on_a_pipeline_is_said_and_leaves_nothing() -> None:
    # The last block of SD3 returns no text states, which this cache of diffusers takes for granted.
    pipeline = stable_diffusion_3()
    make = stable_diffusion_3_maker(pipeline, 0)
    plain = make()
    found = peers.first_block_cache(pipeline, [make], 7)
    assert isinstance(found, peers.Unavailable)
    assert found.reason.startswith("fails on StableDiffusion3Pipeline: TypeError: unsupported operand")
    assert [hooks for _, hooks in traces(pipeline) if hooks] == []
    assert torch.equal(make(), plain)

    ratios = peers.magnitude_ratios(pipeline, [make])
    fits = peers.mag_cache(pipeline, [make], 6, ratios)
    assert isinstance(fits, peers.PeerRun) and fits.full_steps == (6.0,)
    assert torch.equal(make(), plain)


def test_memory_that_runs_out_is_no_reason() -> None:
    pipeline = tiny_pipelines.dit(layers=2)

    def fails() -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        peers.first_block_cache(pipeline, [fails], 6)


def test_pipelines_with_other_denoisers_have_a_reason() -> None:
    from types import SimpleNamespace

    pipeline = tiny_pipelines.dit(layers=2)
    unet = SimpleNamespace(unet=pipeline.transformer, scheduler=pipeline.scheduler)
    two = SimpleNamespace(
        transformer=pipeline.transformer, transformer_2=pipeline.transformer, scheduler=pipeline.scheduler
    )
    make = maker(pipeline, 0)
    for compare in (peers.first_block_cache, lambda *given: peers.mag_cache(*given, [1.0] * STEPS)):
        found = compare(unet, [make], 6)
        assert isinstance(found, peers.Unavailable) and "has a UNet" in found.reason
        found = compare(two, [make], 6)
        assert isinstance(found, peers.Unavailable) and "changes its denoiser on the way" in found.reason


def test_no_runs_and_other_steps_are_refused() -> None:
    pipeline = tiny_pipelines.dit(layers=2)
    with pytest.raises(PassError, match="no runs to measure magnitude ratios on"):
        peers.magnitude_ratios(pipeline, [])
    with pytest.raises(PassError, match="no runs to compare caches on"):
        peers.first_block_cache(pipeline, [], 6)
    with pytest.raises(PassError, match="one run has 10 steps and another 8"):
        peers.magnitude_ratios(pipeline, [maker(pipeline, 0), maker(pipeline, 0, steps=8)])
    with pytest.raises(PassError, match="the runs have 8 steps, and the magnitude ratios are for 10"):
        peers.mag_cache(pipeline, [maker(pipeline, 0, steps=8)], 6, [1.0] * STEPS)
    assert traces(pipeline) == []
