"""Parameters of the lemica pass, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from passes.base import PassParameters

DEFAULT_SPEEDUP = 2.0
"""What is aimed at where no budget, speed-up or error is given."""
_AIMS = ("budget", "budgets", "speedup", "max_error", "published")


class LemicaParameters(PassParameters):
    """What ``--pass lemica:…`` takes; see ``docs/passes/lemica.md``."""

    budget: int | None = Field(default=None, ge=2, description="Steps that run in full, the first and last among them.")
    budgets: tuple[int, ...] | None = Field(
        default=None, description="Several budgets of one calibration, written 25+20+17: slow, medium, fast."
    )
    speedup: float | None = Field(
        default=None, gt=1, description="Steps over full steps; default: 2.0 where nothing else is aimed at."
    )
    max_error: float | None = Field(
        default=None, gt=0, description="Largest error of a segment; the smallest budget that holds it is chosen."
    )
    published: str | None = Field(
        default=None, description="A schedule that the authors of the method published, by name; needs no calibration."
    )
    steps: int = Field(default=50, ge=2, description="Sampling steps that the pipeline is run with.")
    max_gap: int = Field(default=8, ge=2, description="Largest distance of two full steps.")
    samples: int = Field(
        default=2, ge=1, description="Samples that errors are measured on: prompts or classes, each with its own seed."
    )
    fit_samples: int = Field(
        default=8, ge=1, description="Samples that fitted reuse is fitted on, those above first; one run a schedule."
    )
    prompts: Path | None = Field(
        default=None, description="UTF-8 file with a prompt (or class) a line; default: a dozen neutral ones."
    )
    reuse: Literal["last", "linear", "fitted"] = Field(
        default="fitted",
        description=(
            "What stands for a skipped step: what the last full step left (LeMiCa), the line through the last two, or "
            "a combination of them fitted on the calibration samples."
        ),
    )
    path: Literal["measured", "minimax", "shortest-sum", "uniform", "greedy"] = Field(
        default="measured",
        description=(
            "How the full steps are chosen: by LeMiCa's minimax path or a simpler rule; measured: each of these runs "
            "on the calibration samples, and the one that ends nearest to all steps is taken."
        ),
    )
    mode: Literal["auto", "residual", "output"] = Field(
        default="auto",
        description=(
            "Reuse the residual of the block stack, or the denoiser's whole output; auto: whichever ends nearer to all "
            "steps on the calibration samples, but with reuse=last the residual (LeMiCa), and for UNets the output."
        ),
    )
    distance: Literal["latent", "decoded"] = Field(
        default="latent", description="Where errors are measured: the final latents, or decoded pictures."
    )
    batch: int | None = Field(default=None, ge=1, description="Rows of one replay; default: as many as fit.")
    guidance: float | None = Field(default=None, ge=0, description="Guidance scale; default: the pipeline's own.")
    height: int | None = Field(default=None, ge=8, description="Pixels; default: the pipeline's own.")
    width: int | None = Field(default=None, ge=8, description="Pixels; default: the pipeline's own.")
    frames: int | None = Field(default=None, ge=1, description="Of a video; default: the pipeline's own.")
    eval_samples: int = Field(
        default=16, ge=1, description="Held-out samples that the result is compared with all steps on."
    )
    time_batch: int = Field(default=1, ge=1, description="Pictures (or videos) of one timed run.")
    compare: bool = Field(
        default=True, description="Run uniform, greedy, shortest-sum and diffusers' own caches beside it."
    )
    weights: Literal["link", "copy", "reference"] = Field(
        default="link",
        description="Weights in the output: hard links where the disk allows, copies, or a note of where they are.",
    )

    @field_validator("budgets", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_serializer("prompts")
    def _as_text(self, value: Path | None) -> str | None:
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _one_aim(self) -> LemicaParameters:
        given = [name for name in _AIMS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.budgets is not None and (not self.budgets or len(set(self.budgets)) < len(self.budgets)):
            raise ValueError(f"budgets {'+'.join(map(str, self.budgets))} must differ; write e.g. budgets=25+17+10")
        for budget in self.budgets or ((self.budget,) if self.budget is not None else ()):
            if not 2 <= budget <= self.steps:
                raise ValueError(f"budget {budget} is not between 2 and {self.steps} steps")
        if self.max_gap >= self.steps:
            object.__setattr__(self, "max_gap", self.steps - 1)
        return self

    def arguments(self) -> dict[str, Any]:
        """Return what the pipeline's call is given, by the names that diffusers uses."""
        named = {
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
        }
        return {key: value for key, value in named.items() if value is not None}
