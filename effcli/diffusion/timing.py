"""Time one run of a pipeline, and the denoiser's part of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from effcli.diffusion.comparing import Bench
    from passes.lemica.hook import Follower


@dataclass(frozen=True)
class TimedRun:
    """Seconds of one run, from the call of the pipeline to its pictures, and of the denoiser's calls in it."""

    seconds: float
    denoiser_seconds: float


def timed_run(bench: Bench, driver: Follower | None, device: torch.device) -> TimedRun:
    """Run a pipeline's samples once, with a driver or as it is; the device is waited for around each call."""
    import contextlib

    from passes.lemica import hook, inputs, targets
    from profilers.device import synchronize

    spent = 0.0
    started: list[float] = []

    def before(module: Any, arguments: Any) -> None:
        synchronize(device)
        started.append(time.perf_counter())

    def after(module: Any, arguments: Any, output: Any) -> None:
        nonlocal spent
        synchronize(device)
        spent += time.perf_counter() - started.pop()

    with contextlib.ExitStack() as stack:
        if driver is not None:
            stack.enter_context(hook.attach(bench.pipeline, driver, mode=driver.schedule.mode))
        for name in bench.target.denoisers:
            module = targets.denoiser(bench.pipeline, name)
            for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
                stack.callback(handle.remove)
        synchronize(device)
        begun = time.perf_counter()
        inputs.generate(bench.pipeline, bench.samples, steps=bench.steps, arguments=dict(bench.arguments), output="pt")
        synchronize(device)
        seconds = time.perf_counter() - begun
    return TimedRun(seconds, spent)
