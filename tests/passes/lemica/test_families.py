"""Every family of pipelines: schedules leave what is full as it is, and reuse what the blocks added.

The reference caches another way: every block by itself, x + (what this block added at the last full step), by hand. In
float64 the sum over the blocks is the residual of the stack, whatever lies between the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from passes.lemica.hook import Follower, attach
from passes.lemica.schedule import Schedule
from tests.passes.lemica.tiny_pipelines import TRANSFORMERS, UNETS, Tiny

STEPS = 6
FULL = (0, 2, 5)


def schedule(full: tuple[int, ...] = FULL, reuse: str = "last", steps: int = STEPS) -> Schedule:
    return Schedule.model_validate({"name": "test", "steps": steps, "full": full, "reuse": reuse})


def cached_by_block(tiny: Tiny, full: tuple[int, ...], reuse: str) -> Tiny:
    """Return a copy whose blocks each follow the schedule by hand."""
    tiny = copy.deepcopy(tiny)
    order = tiny.returns.split()
    for block in tiny.stack():
        block.forward = _cached_block(block.forward, tiny.branches, order, full, reuse)
    return tiny


def _cached_block(
    forward: Callable[..., Any], branches: int, order: list[str], full: tuple[int, ...], reuse: str
) -> Callable[..., Any]:
    calls = 0
    kept: dict[int, list[tuple[int, dict[str, torch.Tensor | None]]]] = {}

    def cached(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        step, branch = divmod(calls, branches)
        calls += 1
        entered = {
            "hidden": kwargs.get("hidden_states", args[0] if args else None),
            "context": kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None),
        }
        if step in full:
            output = forward(*args, **kwargs)
            parts = output if isinstance(output, tuple) else (output,)
            added = {
                name: None if part is None else part - entered[name] for name, part in zip(order, parts, strict=True)
            }
            kept.setdefault(branch, []).insert(0, (step, added))
            return output
        (newest, at), *older = kept[branch]
        left = []
        for name in order:
            part = at[name]
            if part is not None and reuse == "linear" and older:
                before, then = older[0]
                part = part + (step - newest) / (newest - before) * (part - then[name])
            left.append(entered[name] if part is None else entered[name] + part)
        return tuple(left) if len(left) > 1 else left[0]

    return cached


@contextmanager
def count_attention(tiny: Tiny) -> Iterator[list[int]]:
    """Yield a list of one number that counts calls of what is inside of the blocks."""
    count = [0]

    def counted(*_: Any) -> None:
        count[0] += 1

    handles = []
    for block in tiny.stack():
        kinds = ((child, type(child).__name__.lower()) for name, child in block.named_modules() if name)
        inner = next(child for child, kind in kinds if "attn" in kind or "attention" in kind)
        handles.append(inner.register_forward_pre_hook(counted))
    yield count
    for handle in handles:
        handle.remove()


class Built:
    """Pipelines, and their latents without a hook, made once for the module."""

    def __init__(self) -> None:
        self._built: dict[str, tuple[Tiny, torch.Tensor]] = {}

    def get(self, name: str) -> tuple[Tiny, torch.Tensor]:
        if name not in self._built:
            tiny = (TRANSFORMERS | UNETS)[name]()
            self._built[name] = (tiny, tiny.run(STEPS))
        return self._built[name]


@pytest.fixture(scope="module")
def built() -> Built:
    return Built()


@pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])
def test_all_steps_full_is_bit_identical(built: Built, name: str) -> None:
    tiny, plain = built.get(name)
    follower = Follower(schedule(tuple(range(STEPS))))
    with attach(tiny.pipeline, follower) as attached:
        assert torch.equal(tiny.run(STEPS), plain)
    assert attached.target.mode == ("output" if name in UNETS else "residual")
    assert follower.calls == follower.full_calls == STEPS * tiny.branches


@pytest.mark.parametrize(
    ("name", "reuse"),
    [*((name, "last") for name in TRANSFORMERS), *((name, "linear") for name in ("dit", "flux", "latte"))],
)
def test_reuse_equals_caching_each_block_by_hand_and_leaves_no_trace(built: Built, name: str, reuse: str) -> None:
    tiny, plain = built.get(name)
    expected = cached_by_block(tiny, FULL, reuse).run(STEPS)
    follower = Follower(schedule(reuse=reuse))
    before = traces(tiny)
    with count_attention(tiny) as count, attach(tiny.pipeline, follower):
        got = tiny.run(STEPS)
    effect = (expected - plain).abs().max()
    assert effect > 1e-6
    assert (got - expected).abs().max() < 1e-4 * effect
    assert follower.full_calls == len(FULL) * tiny.branches
    assert follower.calls == STEPS * tiny.branches
    assert count[0] == len(FULL) * tiny.branches * len(tiny.stack())
    assert traces(tiny) == before
    assert torch.equal(tiny.run(STEPS), plain)


@pytest.mark.parametrize("name", [*TRANSFORMERS, *UNETS])
def test_whole_outputs_are_repeated(built: Built, name: str) -> None:
    tiny, plain = built.get(name)
    reference = copy.deepcopy(tiny)
    denoiser = getattr(reference.pipeline, "transformer", None) or reference.pipeline.unet
    forward, outputs = denoiser.forward, []

    def repeated(*args: Any, **kwargs: Any) -> Any:
        full = len(outputs) // tiny.branches in FULL
        # Pipelines may change what they are given.
        outputs.append(copy.deepcopy(forward(*args, **kwargs) if full else outputs[-tiny.branches]))
        return copy.deepcopy(outputs[-1])

    denoiser.forward = repeated
    follower = Follower(schedule())
    before = traces(tiny)
    with attach(tiny.pipeline, follower, mode="output"):
        got = tiny.run(STEPS)
    assert torch.equal(got, reference.run(STEPS))
    assert not torch.equal(got, plain)
    assert (follower.calls, follower.full_calls) == (STEPS * tiny.branches, len(FULL) * tiny.branches)
    assert traces(tiny) == before
    assert torch.equal(tiny.run(STEPS), plain)


def traces(tiny: Tiny) -> dict[str, set[str]]:
    """Return the names of the attributes of the scheduler and of each module of the denoiser."""
    pipeline = tiny.pipeline
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    found = {f"module {name}": set(module.__dict__) for name, module in denoiser.named_modules()}
    return found | {"scheduler": {name for name in pipeline.scheduler.__dict__ if "step" in name or name == "forward"}}
