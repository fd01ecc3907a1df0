"""The hook on a live pipeline: drivers, schedulers, offloading, compiling, and what is refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from passes.base import PassError
from passes.lemica import targets
from passes.lemica.driving import Call, Residual, output_tensor
from passes.lemica.hook import Follower, Linear, attach
from passes.lemica.schedule import Mode, Schedule
from tests.passes.lemica import tiny_pipelines

STEPS = 6
FULL = (0, 2, 5)
MODES: tuple[Mode, ...] = ("residual", "output")


def schedule(full: tuple[int, ...] = FULL, steps: int = STEPS, reuse: str = "last") -> Schedule:
    return Schedule.model_validate({"name": "test", "steps": steps, "full": full, "reuse": reuse})


def run(pipeline: Any, steps: int = STEPS, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    called = pipeline(class_labels=list(range(batch)), num_inference_steps=steps, generator=generator, output_type="pt")
    images: torch.Tensor = called.images
    return images


@pytest.fixture
def pipeline() -> Any:
    return tiny_pipelines.dit(layers=2)


@pytest.fixture
def torch_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Everything:
    """Runs every call in full and writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.samples: list[torch.Tensor] = []

    def begin(self, steps: int) -> None:
        self.heard.append(("begin", steps))

    def denoise(self, step: int, branch: int, call: Call) -> Any:
        self.heard.append(("denoise", step, branch))
        return call.full(keep=False)[0]

    def stepped(self, step: int, sample: torch.Tensor) -> None:
        self.heard.append(("stepped", step))
        self.samples.append(sample)


# --- what a driver hears and can do ----------------------------------------------------------------------------------


def test_a_driver_hears_each_step_and_call(pipeline: Any) -> None:
    driver = Everything()
    with attach(pipeline, driver):
        run(pipeline, steps=2)
    assert driver.heard == [
        ("begin", 2),
        ("denoise", 0, 0),
        ("stepped", 0),
        ("denoise", 1, 0),
        ("stepped", 1),
    ]
    assert driver.samples[-1].shape == (2, 4, 8, 8)


def test_branches_are_counted_within_the_step() -> None:
    tiny = tiny_pipelines.wan()
    driver = Everything()
    with attach(tiny.pipeline, driver):
        tiny.run(2)
    calls = [heard for heard in driver.heard if heard[0] == "denoise"]
    assert calls == [("denoise", 0, 0), ("denoise", 0, 1), ("denoise", 1, 0), ("denoise", 1, 1)]


def test_the_residual_is_what_the_blocks_add(pipeline: Any) -> None:
    """Reusing a call's own residual gives its own output; half of it gives something between."""
    seen = []

    class Own(Everything):
        def denoise(self, step: int, branch: int, call: Call) -> Any:
            output, residual = call.full(keep=True)
            assert residual is not None
            assert residual.hidden.shape == (2, 16, 16)
            assert residual.context is None
            full = output_tensor(output)
            torch.testing.assert_close(output_tensor(call.reuse(residual)), full)
            half = output_tensor(call.reuse(residual.map(lambda item: item / 2)))
            seen.append((half - full).abs().max())
            return output

    plain = run(pipeline, steps=2)
    with attach(pipeline, Own()):
        assert torch.equal(run(pipeline, steps=2), plain)
    assert all(difference > 1e-3 for difference in seen)


def test_a_residual_can_be_reused_before_anything_ran_in_full(pipeline: Any) -> None:
    kept: list[Residual] = []

    class Keep(Everything):
        def denoise(self, step: int, branch: int, call: Call) -> Any:
            output, residual = call.full(keep=True)
            assert residual is not None
            kept.append(residual)
            return output

    class Reuse(Everything):
        def denoise(self, step: int, branch: int, call: Call) -> Any:
            assert call.fits(kept[step])
            assert not call.fits(Residual(kept[step].hidden[:1]))
            return call.reuse(kept[step])

    with attach(pipeline, Keep()):
        expected = run(pipeline, steps=3)
    with attach(pipeline, Reuse()):
        torch.testing.assert_close(run(pipeline, steps=3), expected)


def test_a_transformer_in_whole_output_mode(pipeline: Any) -> None:
    plain = run(pipeline)
    with attach(pipeline, Follower(schedule(tuple(range(STEPS)))), mode="output") as attached:
        assert torch.equal(run(pipeline), plain)
    assert attached.target.blocks == ((),)
    follower = Follower(schedule())
    with attach(pipeline, follower, mode="output"):
        assert not torch.equal(run(pipeline), plain)
    assert (follower.calls, follower.full_calls) == (STEPS, len(FULL))


# --- the follower ----------------------------------------------------------------------------------------------------


@dataclass
class FakeCall:
    value: float
    kept: list[bool] = field(default_factory=list)
    reused: float | None = None
    does_fit: bool = True

    def full(self, *, keep: bool) -> tuple[Any, Residual | None]:
        self.kept.append(keep)
        return "full", Residual(torch.tensor([self.value])) if keep else None

    def reuse(self, residual: Residual) -> Any:
        self.reused = residual.hidden.item()
        return "reused"

    def fits(self, residual: Residual) -> bool:
        return self.does_fit


def follow(follower: Follower, values: list[float], *, misfits: tuple[int, ...] = ()) -> list[FakeCall]:
    follower.begin(len(values))
    calls = [FakeCall(value, does_fit=step not in misfits) for step, value in enumerate(values)]
    for step, call in enumerate(calls):
        follower.denoise(step, 0, call)
        follower.stepped(step, torch.zeros(1))
    return calls


def test_only_what_is_reused_later_is_kept() -> None:
    calls = follow(Follower(schedule((0, 1, 4, 5), steps=8)), [float(step) for step in range(8)])
    assert [call.kept for call in calls] == [[False], [True], [], [], [False], [True], [], []]
    assert [call.reused for call in calls] == [None, None, 1.0, 1.0, None, None, 5.0, 5.0]


def test_linear_goes_on_along_the_line_through_the_last_two() -> None:
    values = [step**2.0 for step in range(9)]
    calls = follow(Follower(schedule((0, 3, 5), steps=9, reuse="linear")), values)
    assert [call.kept for call in calls] == [[True], [], [], [True], [], [True], [], [], []]
    # One full step: its own. Through (0, 0) and (3, 9): slope 3. Through (3, 9) and (5, 25): slope 8.
    assert [call.reused for call in calls] == [None, 0.0, 0.0, None, 12.0, None, 33.0, 41.0, 49.0]


def test_linear_is_exact_for_what_changes_linearly() -> None:
    line = Linear(schedule((0, 3), steps=6))
    newest, older = Residual(torch.tensor([6.0]), torch.tensor([3.0])), Residual(torch.zeros(1), torch.zeros(1))
    found = line(5, 0, (newest, older))
    assert found.context is not None
    assert (found.hidden.item(), found.context.item()) == (10.0, 5.0)


def test_what_does_not_fit_runs_in_full_and_is_kept() -> None:
    follower = Follower(schedule((0,), steps=4))
    calls = follow(follower, [0.0, 1.0, 2.0, 3.0], misfits=(1,))
    assert [call.kept for call in calls] == [[True], [True], [], []]
    assert [call.reused for call in calls] == [None, None, 1.0, 1.0]
    assert (follower.calls, follower.full_calls) == (4, 2)


def test_a_branch_that_missed_the_last_full_step_runs_in_full() -> None:
    follower = Follower(schedule((0, 2), steps=4))
    follower.begin(4)
    answers = [
        [follower.denoise(step, branch, FakeCall(0.0)) for branch in branches]
        for step, branches in enumerate([(0, 1), (0, 1), (0,), (0, 1)])
    ]
    assert answers == [["full", "full"], ["reused", "reused"], ["full"], ["reused", "full"]]


def test_combine_takes_the_place_of_the_schedules_own() -> None:
    seen = []

    def combine(step: int, branch: int, residuals: tuple[Residual, ...]) -> Residual:
        seen.append((step, branch, [item.hidden.item() for item in residuals]))
        return residuals[-1]

    follow(Follower(schedule((0, 2), steps=4, reuse="fitted"), combine), [0.0, 1.0, 2.0, 3.0])
    assert seen == [(1, 0, [0.0]), (3, 0, [2.0, 0.0])]
    with pytest.raises(PassError, match="fitted coefficients, and none were given"):
        Follower(schedule(reuse="fitted"))


def test_another_number_of_steps_is_refused(pipeline: Any) -> None:
    with attach(pipeline, Follower(schedule())), pytest.raises(PassError, match="has 5 time steps, .* is for 6"):
        run(pipeline, steps=5)
    run(pipeline, steps=5)


# --- runs and schedulers ---------------------------------------------------------------------------------------------


def test_runs_one_after_the_other_do_not_know_of_each_other(pipeline: Any) -> None:
    with attach(pipeline, Follower(schedule())):
        first, two, again = run(pipeline), run(pipeline, batch=2), run(pipeline)
    assert torch.equal(first, again)
    torch.testing.assert_close(two[:1].shape, first.shape)
    assert two.shape[0] == 2


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schedulers_with_memory(pipeline: Any, kind: str) -> None:
    import diffusers

    pipeline.scheduler = getattr(diffusers, kind)()
    plain = run(pipeline)
    with attach(pipeline, Follower(schedule(tuple(range(STEPS))))):
        assert torch.equal(run(pipeline), plain)
    follower = Follower(schedule())
    with attach(pipeline, follower):
        assert not torch.equal(run(pipeline), plain)
    assert (follower.calls, follower.full_calls) == (STEPS, len(FULL))
    assert torch.equal(run(pipeline), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scheduler_of_second_order_has_more_steps_than_asked_for(pipeline: Any) -> None:
    from diffusers import HeunDiscreteScheduler

    pipeline.scheduler = HeunDiscreteScheduler()
    follower = Follower(schedule((0, 1, 2, 4, 6), steps=7))
    with attach(pipeline, follower):
        run(pipeline, steps=4)
    assert (follower.calls, follower.full_calls) == (7, 5)


def test_the_schedulers_signatures_stay_and_a_copy_steps_itself(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    signatures = inspect.signature(scheduler.set_timesteps), inspect.signature(scheduler.step)
    driver = Everything()
    with attach(pipeline, driver):
        assert (inspect.signature(scheduler.set_timesteps), inspect.signature(scheduler.step)) == signatures
        copied = copy.deepcopy(scheduler)
        copied.set_timesteps(3)
        assert driver.heard == []
        assert len(copied.timesteps) == 3
        assert scheduler.num_inference_steps is None


def test_what_was_on_the_scheduler_before_is_put_back(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    step = scheduler.step
    scheduler.step = mine = lambda *args, **kwargs: step(*args, **kwargs)
    with attach(pipeline, Follower(schedule())):
        run(pipeline)
    assert scheduler.step is mine
    assert "set_timesteps" not in scheduler.__dict__


def test_a_replaced_scheduler_is_noticed(pipeline: Any) -> None:
    with attach(pipeline, Follower(schedule())):
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        with pytest.raises(PassError, match="if the scheduler was replaced, remove"):
            run(pipeline)


def test_a_call_after_the_last_step_is_refused(pipeline: Any) -> None:
    with attach(pipeline, Follower(schedule())), torch.no_grad():
        run(pipeline)
        with pytest.raises(PassError, match="after the last of 6 steps"):
            pipeline.transformer(torch.zeros(1, 4, 8, 8), timestep=torch.tensor([1]), class_labels=torch.tensor([1]))


def test_a_run_that_starts_in_the_middle_is_refused() -> None:
    tiny = tiny_pipelines.flux()
    scheduler = tiny.pipeline.scheduler
    set_begin_index = scheduler.set_begin_index
    scheduler.set_begin_index = lambda _: set_begin_index(2)
    with attach(tiny.pipeline, Follower(schedule())), pytest.raises(PassError, match="starts at time step 2 of 6"):
        tiny.run(STEPS)


def test_what_fails_on_the_way_in_is_taken_back(pipeline: Any) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    block = pipeline.transformer.transformer_blocks[1]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "effcli_lemica_block")
    with pytest.raises(ValueError, match="already exists"):
        attach(pipeline, Everything())
    assert "step" not in pipeline.scheduler.__dict__
    assert not {"forward", "compile", "_diffusers_hook"} & set(pipeline.transformer.transformer_blocks[0].__dict__)


def test_an_interrupted_run_leaves_nothing_behind(pipeline: Any) -> None:
    plain = run(pipeline)
    block = pipeline.transformer.transformer_blocks[1]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with attach(pipeline, Follower(schedule())):
        expected = run(pipeline)
        handle = block.attn1.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(pipeline)
        handle.remove()
        assert torch.equal(run(pipeline), expected)
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("mode", MODES)
def test_two_transformers_do_not_share_what_is_reused(mode: Mode) -> None:
    """Wan 2.2: the first step of the second transformer runs in full, whatever the schedule says."""
    tiny = tiny_pipelines.wan(two=True)
    driver = Everything()
    high = 0

    def counted(*_: Any) -> None:
        nonlocal high
        high += 1

    handle = tiny.pipeline.transformer.blocks[0].attn1.register_forward_pre_hook(counted)
    with attach(tiny.pipeline, driver) as attached:
        plain = tiny.run(STEPS)
    assert attached.target.denoisers == ("transformer", "transformer_2")
    assert 0 < high < 2 * STEPS
    handle.remove()
    follower = Follower(schedule((0,)))
    with attach(tiny.pipeline, follower, mode=mode):
        assert not torch.equal(tiny.run(STEPS), plain)
    assert (follower.calls, follower.full_calls) == (2 * STEPS, 4)
    assert torch.equal(tiny.run(STEPS), plain)


# --- with other things that change a pipeline ------------------------------------------------------------------------


def test_attached_twice_is_refused(pipeline: Any) -> None:
    with attach(pipeline, Everything()), pytest.raises(PassError, match="follows a driver already"):
        attach(pipeline, Everything())
    attach(pipeline, Everything()).remove()


def test_removing_twice_does_nothing_more(pipeline: Any) -> None:
    attached = attach(pipeline, Everything())
    attached.remove()
    attached.remove()
    assert "forward" not in pipeline.transformer.__dict__


def test_a_cache_of_diffusers_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    tiny = tiny_pipelines.wan()
    tiny.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PassError, match="disable_cache"):
        attach(tiny.pipeline, Everything())


class DoublingLinear(torch.nn.Linear):
    """Stands for a quantized layer: another class, another arithmetic."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(given, (self.weight * 8).round() / 8, self.bias)


def test_replaced_linear_layers(pipeline: Any) -> None:
    for block in pipeline.transformer.transformer_blocks:
        for module in list(block.modules()):
            for name, child in module.named_children():
                if type(child) is torch.nn.Linear:
                    replaced = DoublingLinear(child.in_features, child.out_features, child.bias is not None)
                    replaced.load_state_dict(child.state_dict())
                    setattr(module, name, replaced)
    plain = run(pipeline)
    with attach(pipeline, Follower(schedule(tuple(range(STEPS))))):
        assert torch.equal(run(pipeline), plain)
    follower = Follower(schedule())
    with attach(pipeline, follower):
        run(pipeline)
    assert follower.full_calls == len(FULL)
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", ["attach", "offload"])
def test_accelerates_offloading(pipeline: Any, first: str, mode: Mode) -> None:
    """Offloading takes its hook off and puts it on again after each run; the schedule stays."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    transformer = pipeline.transformer
    with attach(pipeline, Follower(schedule()), mode=mode):
        expected = run(pipeline)
    plain = run(pipeline)
    if first == "offload":
        cpu_offload_with_hook(transformer, torch.device("cpu"))
    follower = Follower(schedule())
    attached = attach(pipeline, follower, mode=mode)
    for _ in range(2):
        remove_hook_from_module(transformer, recurse=True)
        cpu_offload_with_hook(transformer, torch.device("cpu"))
        assert torch.equal(run(pipeline), expected)
        assert follower.full_calls == len(FULL)
    attached.remove()
    assert hasattr(transformer, "_hf_hook")
    assert torch.equal(run(pipeline), plain)
    remove_hook_from_module(transformer)
    assert torch.equal(run(pipeline), plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_group_offloading_and_casting_of_diffusers(pipeline: Any, first: str, mode: Mode) -> None:
    from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

    def offload() -> None:
        device = torch.device("cpu")
        apply_layerwise_casting(pipeline.transformer, torch.bfloat16, torch.float32)
        apply_group_offloading(
            pipeline.transformer, onload_device=device, offload_device=device, offload_type="leaf_level"
        )

    follower = Follower(schedule())
    if first == "offload":
        offload()
        attached = attach(pipeline, follower, mode=mode)
    else:
        attached = attach(pipeline, follower, mode=mode)
        offload()
    with_schedule = run(pipeline)
    assert (follower.calls, follower.full_calls) == (STEPS, len(FULL))
    attached.remove()
    plain = run(pipeline)
    assert not torch.equal(plain, with_schedule)
    again = Follower(schedule())
    with attach(pipeline, again, mode=mode):
        assert torch.equal(run(pipeline), with_schedule)


def _compile(pipeline: Any, how: str, backend: Any, **options: Any) -> None:
    if how == "module":
        pipeline.transformer.compile(backend=backend, **options)
    elif how == "wrapper":
        pipeline.transformer = torch.compile(pipeline.transformer, backend=backend, **options)
    else:
        pipeline.transformer._repeated_blocks = ["BasicTransformerBlock"]
        pipeline.transformer.compile_repeated_blocks(backend=backend, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", ["compile", "attach"])
@pytest.mark.parametrize("how", ["module", "wrapper", "blocks"])
def test_compiled_gives_the_same_from_few_graphs(
    torch_compiler: None, pipeline: Any, how: str, first: str, mode: Mode
) -> None:
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    plain = run(pipeline)
    with attach(pipeline, Follower(schedule()), mode=mode):
        expected = run(pipeline)
    # A whole graph, but where the compiler is put around a schedule that is there already.
    options = {"fullgraph": (how, first) != ("wrapper", "attach")}
    follower = Follower(schedule())
    if first == "compile":
        _compile(pipeline, how, backend, **options)
        attached = attach(pipeline, follower, mode=mode)
    else:
        attached = attach(pipeline, follower, mode=mode)
        _compile(pipeline, how, backend, **options)
    torch.testing.assert_close(run(pipeline), expected)
    made = graphs
    assert 0 < made <= 4
    run(pipeline)
    assert graphs == made
    assert (follower.calls, follower.full_calls) == (STEPS, len(FULL))
    attached.remove()
    torch.testing.assert_close(run(pipeline), plain)
    inner = targets.denoiser(pipeline, "transformer")
    assert not {"compile", "_diffusers_hook"} & set(inner.__dict__)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_blocks_that_are_not_known_are_refused_by_name(pipeline: Any) -> None:
    class OwnBlock(torch.nn.Module):
        pass

    class OwnTransformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([OwnBlock()])

    with pytest.raises(PassError, match="does not know OwnBlock of OwnTransformer.*mode=output"):
        targets.block_names(OwnTransformer())
    with pytest.raises(PassError, match="Linear has no list of transformer blocks.*mode=output"):
        targets.block_names(torch.nn.Linear(1, 1))


def test_a_pipeline_without_a_denoiser_is_refused_with_what_it_has(pipeline: Any) -> None:
    pipeline.transformer = None
    with pytest.raises(PassError, match="DiTPipeline has no transformer or unet.*scheduler, .*vae"):
        targets.find(pipeline)


def test_distilled_pipelines_are_refused(pipeline: Any) -> None:
    from diffusers import LCMScheduler

    targets.check_steps(5)
    with pytest.raises(PassError, match="steps=4.*nothing to skip"):
        targets.check_steps(4)
    pipeline.scheduler = LCMScheduler()
    with pytest.raises(PassError, match="LCMScheduler.*nothing to skip"):
        attach(pipeline, Everything())


def test_a_scheduler_that_cannot_be_counted_is_refused(pipeline: Any) -> None:
    class NoStep:
        pass

    pipeline.scheduler = NoStep()
    with pytest.raises(PassError, match="NoStep has no step method"):
        targets.find(pipeline)


@pytest.mark.parametrize("name", tiny_pipelines.TRANSFORMERS)
def test_the_main_stack_and_nothing_else_is_found(name: str) -> None:
    tiny = tiny_pipelines.TRANSFORMERS[name]()
    found = targets.find(tiny.pipeline)
    expected = [
        f"{blocks}.{index}"
        for blocks in tiny.blocks
        for index in range(len(getattr(tiny.pipeline.transformer, blocks)))
    ]
    assert sorted(found.blocks[0]) == sorted(expected)
