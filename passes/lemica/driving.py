"""How a driver steers the denoiser of a live pipeline: run its blocks, or reuse what they added at an earlier step.

::

    pipeline(...) ── scheduler.set_timesteps ─────────────> driver.begin(steps)
          each step ── denoiser(...), once a branch ──────> driver.denoise(step, branch, call) -> output
                    └─ scheduler.step ────────────────────> driver.stepped(step, sample)

A :class:`Call` is one call of the denoiser, not made yet. The driver decides what becomes of it: :meth:`Call.full` runs
it, :meth:`Call.reuse` runs embedders and output heads around blocks that are replaced by a :class:`Residual`.
:func:`passes.lemica.hook.attach` puts a driver into a pipeline and takes it out again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Residual:
    """What the whole block stack added to the hidden states at one step, or a denoiser's whole output.

    Attributes
    ----------
    hidden : torch.Tensor
        Output minus input of the stack, in the layout of its last block's hidden states: first dimension is the batch
        (with classifier-free guidance in one batch, its branches one after the other), except for layouts that fold
        other dimensions into it. In whole-output mode: the output tensor.
    context : torch.Tensor or None
        The same of the text states (``encoder_hidden_states``), where the last block returns them.
    """

    hidden: torch.Tensor
    context: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Residual:
        """Return the residual with each tensor changed."""
        return Residual(change(self.hidden), None if self.context is None else change(self.context))

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        kept = (self.hidden,) if self.context is None else (self.hidden, self.context)
        return sum(item.numel() * item.element_size() for item in kept)


class Call(Protocol):
    """One call of the denoiser that the driver has to answer; each method may be called several times."""

    def full(self, *, keep: bool) -> tuple[Any, Residual | None]:
        """Run the denoiser; return its output as the pipeline takes it, and the residual where it is asked for.

        Parameters
        ----------
        keep : bool
            Whether the residual is needed; without, nothing is copied.
        """

    def reuse(self, residual: Residual) -> Any:
        """Run embedders and output heads with the blocks replaced by a residual; return the output."""

    def fits(self, residual: Residual) -> bool:
        """Say whether a residual is of this call's batch and shape; looks at shapes only."""


class Driver(Protocol):
    """What decides about each call of the denoiser. Steps are counted from 0 within one run of the pipeline."""

    def begin(self, steps: int) -> None:
        """Hear that a run of the pipeline starts; ``steps`` is the number of time steps that the scheduler has set."""

    def denoise(self, step: int, branch: int, call: Call) -> Any:
        """Return the output of one call.

        Parameters
        ----------
        step : int
            How often the scheduler has stepped in this run.
        branch : int
            How many calls came before in this step: 0, or more where guidance calls the denoiser once a branch.
        call : Call
        """

    def stepped(self, step: int, sample: torch.Tensor) -> None:
        """Hear that the scheduler has made step ``step``; ``sample`` is what it returned (the next latents)."""


def output_tensor(output: Any) -> torch.Tensor:
    """Return the tensor in a denoiser's output: itself, the first of a tuple, or ``sample`` of a model output.

    Outputs that are lists of tensors of one shape (one a sequence) are stacked.
    """
    import torch

    inner = output
    while not isinstance(inner, torch.Tensor):
        if isinstance(inner, list) and inner and isinstance(inner[0], torch.Tensor):
            return torch.stack(inner)
        inner = inner[0]
    return inner


def with_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """Return an output of the same form that holds another tensor; the counterpart of :func:`output_tensor`."""
    import torch

    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, list) and output and isinstance(output[0], torch.Tensor):
        return list(tensor.unbind(0))
    if isinstance(output, (tuple, list)):
        return type(output)([with_tensor(output[0], tensor), *output[1:]])
    key = next(iter(output.keys()))
    changed = dict(output.items()) | {key: with_tensor(output[key], tensor)}
    return type(output)(**changed)
