"""Parts of the saved reports of diffusion pipelines, read so that what is missing or of another type does no harm."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, items
from effcli.reports.changes import mapping, number
from effcli.reports.pipeline_model import Spread

OWN = {
    "fitted": "fitted reuse",
    "fitted-residual": "fitted reuse of the blocks' residual",
    "fitted-output": "fitted reuse of the whole output",
    "linear": "linear reuse",
    "lemica": "last {mode}",
}
"""Of the schedule's own path, but for ``lemica``: of the minimax path."""
METHODS = {
    "uniform": "uniform spacing",
    "greedy": "greedy threshold",
    "shortest-sum": "shortest sum",
    "first-block-cache": "First Block Cache",
    "mag-cache": "MagCache",
}
_REUSES = {
    "last": "the last full step's {mode}",
    "linear": "the line through the last two full steps' {mode}s",
    "fitted": "a fitted mix of the last full steps' {mode}s",
}
MODES = {
    "residual": "the residual of the whole block stack",
    "output": "the denoiser's whole output",
}
MOST_STEPS = 10_000
"""Of a map that is drawn; a report that claims more is damaged."""
MOST_LABEL = 40
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ErrorMap:
    """The mean error of each segment of reuse.

    Attributes
    ----------
    steps, max_gap : int
    weights : dict of (int, int) to float
        By edge (i, j) with j − i of 2 to ``max_gap``.
    samples : int
    distance : str
        ``latent`` or ``decoded``.
    reuse : str
    forwards : float or None
        Full denoiser calls that it took, for one sample.
    noise : float or None
    """

    steps: int
    max_gap: int
    weights: dict[tuple[int, int], float]
    samples: int
    distance: str
    reuse: str
    forwards: float | None
    noise: float | None

    @cached_property
    def positive(self) -> tuple[float, ...]:
        """The errors above 0, ascending."""
        return tuple(sorted(weight for weight in self.weights.values() if weight > 0))

    @property
    def unit(self) -> str:
        """What an error is."""
        return "latent L1" if self.distance == "latent" else "L1 of the decoded result"

    def worst(self, full: Sequence[int]) -> float | None:
        """Return the largest error of the segments between full steps; None where the map lacks one of them."""
        found = self.segments(full)
        return None if found is None else max(found, default=0.0)

    def segments(self, full: Sequence[int]) -> list[float] | None:
        """Return the errors of the segments between full steps; None where the map lacks one of them."""
        found = [0.0 if j - i == 1 else self.weights.get((i, j)) for i, j in pairwise(full)]
        known = [error for error in found if error is not None]
        return known if len(known) == len(found) else None

    def fewest(self, limit: float) -> int | None:
        """Return the least number of full steps, first and last included, with no segment's error above ``limit``."""
        fewest = {0: 1}
        for step in range(1, self.steps):
            ways = [
                fewest[start] + 1
                for start in range(max(0, step - self.max_gap), step)
                if start in fewest and (step - start == 1 or self.weights.get((start, step), limit + 1) <= limit)
            ]
            if ways:
                fewest[step] = min(ways)
        return fewest.get(self.steps - 1)


@dataclass(frozen=True)
class Result:
    """One schedule as it was measured; :class:`effcli.reports.pipeline_model.ScheduleResult` without gaps."""

    name: str
    steps: int | None
    full: tuple[int, ...]
    reuse: str
    mode: str
    origin: str
    default: bool
    data: Report

    @property
    def allowed(self) -> float | None:
        """How many times as fast the schedule lets the denoiser be: all calls over full calls."""
        calls, full_calls = number(self.data.get("calls")), number(self.data.get("full_calls"))
        if calls and full_calls:
            return calls / full_calls
        return self.steps / len(self.full) if self.steps and self.full else None

    def gain(self, part: str) -> float | None:
        """Return before over after of ``run`` or ``denoiser``."""
        before, after = (number(self.data.get(f"{part}_seconds_{side}")) for side in ("before", "after"))
        return before / after if before and after else None

    @property
    def of_steps(self) -> str:
        """``17 of 50`` steps."""
        return f"{len(self.full)} of {fmt.integer(self.steps)}"


@dataclass(frozen=True)
class Row:
    """One way to skip steps at one budget; ``label`` is what readers call ``method``."""

    method: str
    label: str
    budget: int
    full_calls: float | None
    full: tuple[int, ...] | None
    run_seconds: float | None
    likeness: Report
    chosen: bool
    reason: str | None

    @property
    def psnr(self) -> Spread | None:
        """PSNR in dB."""
        return spread(self.likeness.get("psnr_db"))


def whole(value: object) -> int | None:
    """Return a count, or None."""
    found = number(value)
    return None if found is None or found < 0 or found != int(found) else int(found)


def full_steps(value: object, steps: int | None) -> tuple[int, ...] | None:
    """Return steps in ascending order as they were saved, or None where these are none of ``steps``."""
    if not isinstance(value, (list, tuple)) or steps is None or steps > MOST_STEPS:
        return None
    found = [whole(step) for step in value]
    known = tuple(step for step in found if step is not None)
    ordered = len(known) == len(found) and list(known) == sorted(set(known))
    return known if ordered and known and known[-1] < steps else None


def spread(value: object) -> Spread | None:
    """Return a mean with its interval, or None."""
    data = mapping(value)
    mean, low, high = (number(data.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return None
    return Spread(mean, low, high) if low is not None and high is not None else Spread(mean, None, None)


def steps_of(report: Report) -> int | None:
    """Return the number of steps of a run."""
    return whole(report.get("steps"))


def results(report: Report) -> tuple[Result, ...]:
    """Return the measured schedules, the default first."""
    default = mapping(report.get("lemica")).get("default")
    found = []
    for data in items(report, "schedules"):
        if not isinstance(data, dict):
            continue
        steps = whole(data.get("steps")) or steps_of(report)
        found.append(
            Result(
                printable(data.get("name") or fmt.MISSING),
                steps,
                full_steps(data.get("full"), steps) or (),
                printable(data.get("reuse") or fmt.MISSING),
                "output" if data.get("mode") == "output" else "residual",
                printable(data.get("origin") or ""),
                data.get("name") is not None and data.get("name") == default,
                data,
            )
        )
    return tuple(sorted(found, key=lambda result: not result.default))


def mode_of(report: Report) -> str:
    """Return what is reused: ``residual`` of the blocks, or the whole ``output``."""
    calibration = mapping(mapping(report.get("lemica")).get("calibration"))
    found = calibration.get("mode") or mapping(report.get("pipeline")).get("mode")
    return "output" if found == "output" else "residual"


def reuse_text(reuse: str, mode: str) -> str:
    """Say what stands for a skipped step."""
    known = _REUSES.get(reuse)
    return reuse if known is None else known.format(mode=mode)


def other_passes(report: Report) -> tuple[str, ...]:
    """Return the passes that ran besides lemica: what they did is in every figure of what came out."""
    names = (mapping(record).get("name") for record in items(report, "passes"))
    return tuple(printable(name) for name in names if name is not None and name != "lemica")


def own_paths(report: Report) -> dict[int, str]:
    """Return how each schedule's full steps were chosen, by budget: ``minimax``."""
    found = {}
    for schedule in items(mapping(report.get("lemica")), "schedules"):
        data = mapping(schedule)
        full, path = full_steps(data.get("full"), whole(data.get("steps"))), data.get("path")
        if full is not None and isinstance(path, str):
            found[len(full)] = printable(path)
    return found


def _asked_path(report: Report) -> str:
    """Return how full steps were to be chosen, of reports whose schedules do not say how they were."""
    for record in items(report, "passes"):
        given = mapping(mapping(record).get("parameters"))
        if mapping(record).get("name") != "lemica":
            continue
        if given.get("published") is not None:
            return "published"
        if isinstance(given.get("path"), str):
            return printable(given["path"])
    return "minimax"


def rows(report: Report) -> tuple[Row, ...]:
    """Return the comparison, budgets from the largest; the rows of a budget in the order that they were saved."""
    steps, paths, asked, mode = steps_of(report), own_paths(report), _asked_path(report), mode_of(report)
    found = []
    for data in items(report, "comparison"):
        budget = whole(mapping(data).get("budget"))
        if budget is None or not isinstance(data, dict):
            continue
        method = printable(data.get("method") or fmt.MISSING)
        own = "minimax" if method == "lemica" and budget in paths else paths.get(budget, asked)
        found.append(
            Row(
                method,
                f"{own}, {OWN[method].format(mode=mode)}" if method in OWN else METHODS.get(method, method),
                budget,
                number(data.get("full_calls")),
                full_steps(data.get("full"), steps),
                number(data.get("run_seconds")),
                mapping(data.get("likeness")),
                data.get("chosen") is True,
                printable(data["reason"]) if data.get("reason") else None,
            )
        )
    return tuple(sorted(found, key=lambda row: -row.budget))


def error_map(value: object) -> ErrorMap | None:
    """Return the map in a saved :class:`passes.lemica.schedule.ErrorGraph`, or None where there is none to draw."""
    data = mapping(value)
    steps, max_gap = whole(data.get("steps")), whole(data.get("max_gap"))
    if steps is None or max_gap is None or not 2 <= steps <= MOST_STEPS:
        return None
    weights: dict[tuple[int, int], float] = {}
    samples = 0
    for edge, errors in zip(items(data, "edges"), items(data, "errors"), strict=False):
        pair = full_steps(edge, steps)
        known = [error for item in errors if (error := number(item)) is not None] if isinstance(errors, list) else []
        if pair is not None and len(pair) == 2 and pair[1] - pair[0] <= max_gap and known:
            weights[pair[0], pair[1]] = sum(known) / len(known)
            samples = max(samples, len(known))
    if not any(weight > 0 for weight in weights.values()):
        return None
    return ErrorMap(
        steps,
        max(j - i for i, j in weights),
        weights,
        samples,
        printable(data.get("distance") or "latent"),
        printable(data.get("reuse") or "last"),
        number(data.get("forwards")),
        number(data.get("noise")),
    )


def ranges(steps: Sequence[int]) -> str:
    """Return steps as text: ``0–8, 10, 13``."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def short_label(text: object) -> str:
    """Return a label on one line that fits beside a picture."""
    label = printable(text)
    return label if len(label) <= MOST_LABEL else label[: MOST_LABEL - 1] + "…"


def png_size(text: object) -> tuple[int, int] | None:
    """Return width and height of a PNG in base64; None where it is none."""
    if not isinstance(text, str) or not text.isascii():
        return None
    try:
        start = base64.b64decode(text, validate=True)[:24]
    except binascii.Error:
        return None
    if len(start) < 24 or not start.startswith(PNG_START):
        return None
    width, height = struct.unpack(">II", start[16:24])
    return int(width), int(height)


def frames(report: Report) -> int | None:
    """Return the frames of one video; None where the pipeline makes pictures."""
    return whole(mapping(report.get("arguments")).get("num_frames"))


def psnr_text(value: Spread) -> str:
    """Return PSNR with its interval: ``34.1 dB PSNR (95 % interval 33.0 to 35.2)``."""
    interval = f" (95 % interval {interval_text(value)})" if value.low is not None else ""
    return f"{fmt.significant(value.mean)} dB PSNR{interval}"


def interval_text(value: Spread | None) -> str:
    """Return ``33.0 to 35.2``; a dash where there is no interval."""
    if value is None or value.low is None or value.high is None:
        return fmt.MISSING
    return f"{fmt.significant(value.low)} to {fmt.significant(value.high)}"


def mean_text(value: object) -> str:
    """Return the mean of a saved spread."""
    found = spread(value)
    return fmt.significant(found.mean if found is not None else None)
