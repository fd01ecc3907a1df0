"""Schedules that the authors of LeMiCa publish for known models: applied by name, without calibration.

Source: LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation (NeurIPS 2025), the
tables in its repository.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from passes.base import PassError
from passes.lemica.schedule import Schedule


@dataclass(frozen=True)
class Published:
    """A schedule and what it is for.

    Attributes
    ----------
    pipeline : str
        Class of the pipeline.
    model : str
        The model that it was found on; others of the same class may take more harm from it.
    schedule : Schedule
    """

    pipeline: str
    model: str
    schedule: Schedule


def _published(pipeline: str, model: str, steps: int, full: tuple[int, ...]) -> tuple[str, Published]:
    name = f"{model.lower()}:{len(full)}"
    schedule = Schedule(name=name, steps=steps, full=full, origin=f"published for {model}")
    return name, Published(pipeline, model, schedule)


PUBLISHED: dict[str, Published] = dict(
    (
        _published("WanPipeline", "Wan2.1-T2V-1.3B", 50, (*range(13), 14, 16, 18, 21, 24, 29, 35, 40, 44, 47, 48, 49)),
        _published("WanPipeline", "Wan2.1-T2V-1.3B", 50, (*range(10), 11, 13, 16, 20, 26, 33, 40, 45, 48, 49)),
        _published("WanPipeline", "Wan2.1-T2V-1.3B", 50, (*range(9), 10, 13, 18, 25, 32, 39, 46, 49)),
        _published("WanPipeline", "Wan2.1-T2V-1.3B", 50, (*range(6), 7, 10, 16, 23, 30, 37, 44, 49)),
        _published("QwenImagePipeline", "Qwen-Image", 50, (0, 1, 3, 7, 14, 21, 28, 35, 42, 49)),
    )
)
"""By name: the model in lower case, a colon, the number of full steps (``wan2.1-t2v-1.3b:17``)."""


def find(name: str) -> Schedule:
    """Return a published schedule.

    Raises
    ------
    PassError
        If there is none of that name; the message has the known ones.
    """
    if name in PUBLISHED:
        return PUBLISHED[name].schedule
    near = difflib.get_close_matches(name.lower(), PUBLISHED, n=1)
    meant = f", did you mean '{near[0]}'?" if near else ";"
    raise PassError(f"no published schedule '{name}'{meant} known: {', '.join(PUBLISHED)}")
