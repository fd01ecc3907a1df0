"""Account for the time of a run by stage, the pipeline's own apart from passes, profiles and quality."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from effcli.reports.optimize_model import StageTime


class Times:
    """Seconds by stage, in the order in which stages first ran."""

    def __init__(self) -> None:
        self.stages: list[StageTime] = []

    @contextlib.contextmanager
    def stage(self, name: str, *, own: bool) -> Iterator[None]:
        """Add the block's time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(StageTime(name, time.perf_counter() - started, own))

    def add(self, entry: StageTime) -> None:
        """Add one entry, to the stage of its name where there is one."""
        for position, known in enumerate(self.stages):
            if (known.stage, known.own) == (entry.stage, entry.own):
                self.stages[position] = replace(known, seconds=known.seconds + entry.seconds)
                return
        self.stages.append(entry)

    def since(self, earlier: Times) -> list[dict[str, Any]]:
        """Return what was added after a copy was taken, JSON-ready."""
        known = {(item.stage, item.own): item.seconds for item in earlier.stages}
        return [
            {**asdict(item), "seconds": item.seconds - known.get((item.stage, item.own), 0.0)}
            for item in self.stages
            if item.seconds > known.get((item.stage, item.own), 0.0)
        ]

    def copy(self) -> Times:
        """Return a copy to compare with later."""
        other = Times()
        other.stages = list(self.stages)
        return other
