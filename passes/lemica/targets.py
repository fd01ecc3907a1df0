"""What of a pipeline can be cached: its denoisers, and the block stack of each.

::

    pipeline ─┬─ scheduler            counts the steps
              └─ transformer | unet   denoiser ── blocks in the registry of diffusers ──> "residual"
                 (and transformer_2)           └─ others, UNets ─────────────────────────> "output"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from passes.base import PassError
from passes.lemica.schedule import Mode

if TYPE_CHECKING:
    import torch

BLOCK_LISTS = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
)
"""Names that diffusers gives to the lists of a denoiser's main stack. Lists of refiners of the text or the noise have
other names, and are no part of it."""
SKIPLESS_STEPS = 4
"""Pipelines of at most so many steps are distilled: each step counts."""
_DENOISERS = ("transformer", "transformer_2", "unet")
_DISTILLED = (
    "LCMScheduler",
    "TCDScheduler",
    "FlowMatchLCMScheduler",
    "CMStochasticIterativeScheduler",
    "FlowMapEulerDiscreteScheduler",
    "PiflowScheduler",
)


@dataclass(frozen=True)
class Target:
    """What will be cached of a pipeline.

    Attributes
    ----------
    denoisers : tuple of str
        Names of the pipeline's components, in the order of their use.
    mode : {"residual", "output"}
    blocks : tuple of tuple of str
        Qualified names of each denoiser's blocks, in the order of its module tree; empty in whole-output mode.
    """

    denoisers: tuple[str, ...]
    mode: Mode
    blocks: tuple[tuple[str, ...], ...]


def find(pipeline: Any, mode: Literal["auto", "residual", "output"] = "auto") -> Target:
    """Find what can be cached.

    Parameters
    ----------
    pipeline : diffusers.DiffusionPipeline
    mode : {"auto", "residual", "output"}
        "auto" takes the residual for transformers, the whole output for UNets.

    Raises
    ------
    PassError
        If the pipeline has no denoiser, its scheduler does not step or is for distilled models, or the blocks of the
        denoiser are not known and the whole output was not asked for.
    """
    _check_scheduler(pipeline)
    names = tuple(name for name in _DENOISERS if getattr(pipeline, name, None) is not None)
    if not names:
        raise PassError(
            f"{type(pipeline).__name__} has no transformer or unet to cache; its components are "
            f"{', '.join(sorted(getattr(pipeline, 'components', {}))) or 'not known'}"
        )
    if mode == "auto":
        mode = "output" if names == ("unet",) else "residual"
    if mode == "output":
        return Target(names, mode, tuple(() for _ in names))
    return Target(names, mode, tuple(block_names(denoiser(pipeline, name)) for name in names))


def denoiser(pipeline: Any, name: str) -> torch.nn.Module:
    """Return a denoiser by its component's name; of a compiled one, the module inside."""
    from diffusers.utils.torch_utils import unwrap_module

    found: torch.nn.Module = unwrap_module(getattr(pipeline, name))
    return found


def block_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the qualified names of a denoiser's blocks.

    Raises
    ------
    PassError
        If it has none, or one of a class that diffusers' registry does not know.
    """
    import torch
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.utils.torch_utils import unwrap_module

    names = []
    unknown = set()
    for name, child in module.named_children():
        if name not in BLOCK_LISTS or not isinstance(child, torch.nn.ModuleList):
            continue
        for index, wrapped in enumerate(child):
            block = unwrap_module(wrapped)
            try:
                TransformerBlockRegistry.get(type(block))
            except ValueError:
                unknown.add(type(block).__name__)
            names.append(f"{name}.{index}")
    kind = type(module).__name__
    if unknown:
        raise PassError(
            f"diffusers' block registry does not know {', '.join(sorted(unknown))} of {kind}, so that the residual of "
            "its stack cannot be cached; its whole output can: mode=output"
        )
    if not names:
        raise PassError(f"{kind} has no list of transformer blocks that is known; cache its whole output: mode=output")
    return tuple(names)


def check_steps(steps: int) -> None:
    """Refuse a number of steps at which nothing can be skipped.

    Raises
    ------
    PassError
        If there are at most :data:`SKIPLESS_STEPS`.
    """
    if steps <= SKIPLESS_STEPS:
        raise PassError(
            f"steps={steps}: a distilled pipeline of 1–{SKIPLESS_STEPS} steps has nothing to skip; each of its steps "
            f"makes up a large part of the result. Give steps={SKIPLESS_STEPS + 1} or more"
        )


def _check_scheduler(pipeline: Any) -> None:
    scheduler = getattr(pipeline, "scheduler", None)
    kind = type(scheduler).__name__
    if scheduler is None or not callable(getattr(scheduler, "step", None)):
        raise PassError(
            f"{type(pipeline).__name__} has no scheduler whose steps can be counted"
            + ("" if scheduler is None else f" ({kind} has no step method)")
        )
    if not callable(getattr(scheduler, "set_timesteps", None)):
        raise PassError(f"{kind} has no set_timesteps, so that a run's steps are not known in advance")
    if kind in _DISTILLED:
        raise PassError(
            f"{kind} is for distilled models: a distilled pipeline of 1–{SKIPLESS_STEPS} steps has nothing to skip; "
            "use the model that it was distilled from"
        )
