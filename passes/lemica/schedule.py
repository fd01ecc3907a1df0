"""Schedules and the error graph that they come from, as ``lemica.json`` keeps them.

::

    ErrorGraph (edges, error of each sample) ──path.py──> Schedule (full steps) ──hook.py──> a pipeline that follows it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from passes.base import PassError

FILE = "lemica.json"
COEFFICIENTS_FILE = "lemica.safetensors"
FORMAT = "effcli.lemica/1"

Reuse = Literal["last", "linear", "fitted"]
"""What stands for a skipped step: what the last full step left, the line through the last two, or a combination of the
last three that was fitted to the model's own."""
Mode = Literal["residual", "output"]
"""What is cached: the residual of the whole block stack, or the denoiser's whole output."""
Distance = Literal["latent", "decoded"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(_Strict):
    """Which sampling steps run the whole denoiser; the others reuse what the last one left."""

    name: str
    steps: int = Field(ge=2, description="Calls of the scheduler in one run.")
    full: tuple[int, ...] = Field(description="Full steps, ascending; the first is 0.")
    reuse: Reuse = "last"
    mode: Mode = Field(default="residual", description="What is reused.")
    path: str | None = Field(default=None, description="Solver that found it; null for a published schedule.")
    errors: tuple[float, ...] | None = Field(
        default=None, description="Error of each segment by itself, in order; null for a published schedule."
    )
    origin: str = Field(default="", description="How it was found: calibrated, published, interpolated from.")

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        if not self.full or self.full[0] != 0 or list(self.full) != sorted(set(self.full)):
            raise ValueError(f"full steps {list(self.full)} must ascend from 0")
        if self.full[-1] >= self.steps:
            raise ValueError(f"full step {self.full[-1]} is not one of {self.steps} steps (0 … {self.steps - 1})")
        return self

    @property
    def budget(self) -> int:
        """Full steps."""
        return len(self.full)

    @property
    def flags(self) -> tuple[bool, ...]:
        """Whether each step is full."""
        chosen = set(self.full)
        return tuple(step in chosen for step in range(self.steps))


class ErrorGraph(_Strict):
    """What each segment of reuse does to the final result, by itself.

    Edge (i, j): full steps at i and j, every step between reuses what i left. Edges (j − 1, j) skip nothing, weigh 0
    and are left out.
    """

    steps: int = Field(ge=2)
    max_gap: int = Field(ge=2, description="Largest j − i.")
    edges: tuple[tuple[int, int], ...]
    errors: tuple[tuple[float, ...], ...] = Field(
        description="By edge, then sample: mean absolute difference of the final result to that without reuse."
    )
    distance: Distance = "latent"
    reuse: Reuse = "last"
    forwards: int = Field(default=0, description="Denoiser calls at full cost that the graph took, for one sample.")
    noise: float = Field(default=0.0, description="Largest error of a replay that reuses nothing; 0 is the aim.")

    @property
    def equivalent_runs(self) -> float:
        """Cost in full runs of the pipeline, for one sample."""
        return self.forwards / self.steps

    def weights(self, samples: int | None = None) -> dict[tuple[int, int], float]:
        """Return each edge's mean error over the first ``samples`` samples (default: all), and 0 for (j − 1, j)."""
        found = {(step, step + 1): 0.0 for step in range(self.steps - 1)}
        for edge, errors in zip(self.edges, self.errors, strict=True):
            used = errors[:samples]
            found[edge] = sum(used) / len(used)
        return found


class Calibration(_Strict):
    """What the schedules were calibrated on; a pipeline must agree with it to follow them."""

    pipeline: str = Field(description="Class of the pipeline.")
    denoiser: str = Field(description="Class of the denoiser.")
    scheduler: str = Field(description="Class of the scheduler.")
    scheduler_config: dict[str, Any] = Field(description="Its configuration, without what names files and versions.")
    mode: Mode = Field(default="residual", description="What the segments of the graph reuse.")
    inference_steps: int = Field(description="As the pipeline's call is given them; a scheduler may make more of them.")
    inputs: tuple[str, ...] = Field(default=(), description="Prompts or classes.")
    seeds: tuple[int, ...] = ()
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Of the pipeline's call: guidance, size, frames."
    )
    versions: dict[str, str] = Field(default_factory=dict)


class LemicaFile(_Strict):
    """Content of ``lemica.json``."""

    format: Literal["effcli.lemica/1"] = "effcli.lemica/1"
    schedules: tuple[Schedule, ...] = Field(min_length=1)
    default: str = Field(description="Name of the schedule that is followed where none is named.")
    calibration: Calibration
    graph: ErrorGraph | None = None

    def schedule(self, name: str | None = None) -> Schedule:
        """Return a schedule by name or by its full steps (``"17"``), or the default.

        Raises
        ------
        PassError
            If there is none of that name; the message has the known ones.
        """
        wanted = name or self.default
        for item in self.schedules:
            if wanted in (item.name, str(item.budget)):
                return item
        known = ", ".join(f"{item.name} ({item.budget} of {item.steps} steps)" for item in self.schedules)
        raise PassError(f"no schedule '{wanted}'; known: {known}")


def write(folder: Path, content: LemicaFile) -> None:
    """Write ``lemica.json`` into a folder."""
    (folder / FILE).write_text(json.dumps(content.model_dump(mode="json"), allow_nan=False) + "\n", encoding="utf-8")


def read(folder: Path) -> LemicaFile:
    """Read ``lemica.json`` of a pipeline folder.

    Raises
    ------
    PassError
        If it is missing, damaged, or of another format.
    """
    path = folder / FILE
    try:
        return LemicaFile.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PassError(
            f"no {FILE} in '{folder}'; make one with: effcli optimize '{folder}' --pass lemica -o OUT"
        ) from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else error
        detail = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if isinstance(first, dict) else str(first)
        raise PassError(f"'{path}' cannot be read ({detail}); fetch the checkpoint again") from None
