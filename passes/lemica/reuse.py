"""What stands for a skipped step: combinations of what the last full steps left, fitted in closed form.

LeMiCa reuses the last residual of the blocks as it is. The schedule is known before the run, and so is, for each
skipped step, how what its full steps left relates to its own: :class:`Fitting` runs the schedule once over calibration
samples, lets the denoiser run at skipped steps too, and solves for the weights of the last three that come closest: of
residuals channel by channel, of whole outputs one for all. The run then goes on with that combination, so that later
weights are fitted to states as they will be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import PassError
from passes.lemica.driving import Call, Residual
from passes.lemica.schedule import COEFFICIENTS_FILE, Schedule

if TYPE_CHECKING:
    import torch

ANCHORS = 3
"""Full steps whose residuals are combined."""
RIDGE = 1e-3
"""Weight of the prior (the last residual alone) against the fit, in shares of the residuals' own power."""


@dataclass(frozen=True)
class Coefficients:
    """Weights of the last residuals at each skipped step.

    Attributes
    ----------
    weights : dict of (int, int, str) to torch.Tensor
        By step, branch and part (``hidden``, ``context``): shape (anchors, channels), or (anchors, 1) for one weight
        for all; the newest residual first.
    """

    weights: Mapping[tuple[int, int, str], torch.Tensor] = field(default_factory=dict)

    def combine(self, step: int, branch: int, residuals: tuple[Residual, ...]) -> Residual:
        """Return what stands for the blocks at a skipped step.

        Parameters
        ----------
        step, branch : int
        residuals : tuple of Residual
            Of the last full steps, newest first, at most ``ANCHORS``.

        Raises
        ------
        PassError
            If nothing was fitted for that step.
        """
        parts: list[torch.Tensor | None] = []
        for part in ("hidden", "context"):
            tensors = [getattr(item, part) for item in residuals]
            if tensors[0] is None:
                parts.append(None)
                continue
            weights = self.weights.get((step, branch, part))
            if weights is None:
                raise PassError(f"nothing was fitted for step {step}, branch {branch}; calibrate the schedule again")
            scale = weights.to(tensors[0].device, tensors[0].dtype)
            total = scale[0] * tensors[0]
            for row, tensor in zip(scale[1:], tensors[1:], strict=False):
                total.addcmul_(row, tensor)
            parts.append(total)
        assert parts[0] is not None
        return Residual(parts[0], parts[1])


def write(folder: Path, by_schedule: Mapping[str, Coefficients]) -> None:
    """Write the coefficients of schedules, by their names, into a folder; nothing where there are none."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{step}.{branch}.{part}": tensor.contiguous()
        for name, found in by_schedule.items()
        for (step, branch, part), tensor in found.weights.items()
    }
    if tensors:
        save_file(tensors, folder / COEFFICIENTS_FILE)


def read(folder: Path, name: str) -> Coefficients:
    """Read the coefficients of the schedule called ``name``.

    Raises
    ------
    PassError
        If there are none.
    """
    from safetensors import SafetensorError, safe_open

    path, found = folder / COEFFICIENTS_FILE, {}
    try:
        with safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                head, step, branch, part = key.rsplit(".", 3)
                if head == name:
                    found[int(step), int(branch), part] = opened.get_tensor(key)
    except (OSError, SafetensorError, ValueError) as error:
        raise PassError(f"'{path}' cannot be read ({error}); fetch the checkpoint again") from None
    if not found:
        raise PassError(f"'{path}' holds nothing for schedule '{name}'; calibrate it again")
    return Coefficients(found)


class Fitting:
    """The driver that fits: follows a schedule over calibration samples, and runs the denoiser at skipped steps too.

    Attributes
    ----------
    weights : dict
        As in :class:`Coefficients`, filled as the run goes on.
    errors : dict of (int, int) to float
        By step and branch: share of the residual's power that the combination leaves.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.weights: dict[tuple[int, int, str], torch.Tensor] = {}
        self.errors: dict[tuple[int, int], float] = {}
        self._kept: dict[int, list[Residual]] = {}

    def begin(self, steps: int) -> None:
        """Start a run."""
        if steps != self.schedule.steps:
            raise PassError(f"the schedule is for {self.schedule.steps} steps and the pipeline runs {steps}")
        self._kept = {}

    def denoise(self, step: int, branch: int, call: Call) -> Any:
        """Run the denoiser; at a skipped step, fit to what it leaves and answer with the fit."""
        kept = self._kept.setdefault(branch, [])
        output, residual = call.full(keep=True)
        assert residual is not None
        if step in self.schedule.full or not kept:
            self._kept[branch] = [residual, *kept][:ANCHORS]
            return output
        left = total = 0.0
        for part in ("hidden", "context"):
            target = getattr(residual, part)
            if target is None:
                continue
            tensors = [getattr(item, part) for item in kept]
            weights, error, power = fit(tensors, target, by_channel=self.schedule.mode == "residual")
            self.weights[step, branch, part] = weights
            left, total = left + error, total + power
        self.errors[step, branch] = left / total if total else 0.0
        return call.reuse(Coefficients(self.weights).combine(step, branch, tuple(kept)))

    def stepped(self, step: int, sample: torch.Tensor) -> None:
        """Nothing to do."""


def fit(tensors: list[torch.Tensor], target: torch.Tensor, *, by_channel: bool) -> tuple[torch.Tensor, float, float]:
    """Return the weights w with which Σ w_k tensors_k comes closest to ``target``, pulled towards (1, 0, …).

    Parameters
    ----------
    tensors : list of torch.Tensor
        Of one shape, channels last.
    target : torch.Tensor
        Of the same shape.
    by_channel : bool
        One weight a channel, or one for all.

    Returns
    -------
    weights : torch.Tensor
        Shape (len(tensors), channels or 1), float32, on the CPU.
    left, power : float
        Sum of squares that the combination leaves, and of the target.
    """
    import torch

    channels = target.shape[-1] if by_channel else 1
    columns = torch.stack([item.reshape(-1, channels) for item in tensors]).double()  # (anchors, rows, channels)
    wanted = target.reshape(-1, channels).double()
    gram = torch.einsum("arc,brc->cab", columns, columns)
    right = torch.einsum("arc,rc->ca", columns, wanted)
    prior = torch.zeros(len(tensors), dtype=torch.float64, device=target.device)
    prior[0] = 1
    pull = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    pull = (pull + torch.finfo(torch.float32).tiny) * torch.eye(len(tensors), dtype=torch.float64, device=target.device)
    weights = torch.linalg.solve(gram + pull, right + (pull @ prior))  # (channels, anchors)
    left = wanted - torch.einsum("ca,arc->rc", weights, columns)
    return weights.T.float().cpu(), float(left.square().sum()), float(wanted.square().sum())
