"""The error graph's edges, measured by several processes: each takes some of the steps j that edges end at.

::

    what is left ── by (chunk, j), costliest first, to the part with least to do ──> one process a part
    work/part-N.jsonl <── each journals for itself ──> merged into work/journal.jsonl, also after a kill

The edges of one chunk and j stay together, so that batches, and with them the last bits of results, are those of one
process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from passes.base import Spread
from passes.lemica import graph
from passes.lemica.inputs import Sample
from passes.lemica.journal import Check, Journal
from passes.lemica.recording import Recording
from passes.opening import opened
from profilers.base import Progress

Edges = Sequence[tuple[int, int]]
_FUNCTION = "passes.lemica.spreading:measure"
_TIMES_WEIGHTS = 2
"""What a part takes, in bytes of the pipeline's weights: states and residuals of a batch lie beside them."""


def run(
    builder: graph.Builder,
    edges: Edges,
    journal: Journal,
    spread: Spread,
    opening: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Measure the edges that a journal does not have, in the workers of ``spread``."""
    memory_bytes = _TIMES_WEIGHTS * _weight_bytes(builder.pipeline)
    parts = spread.room(memory_bytes)
    if parts < 2:
        return
    work = journal.path.parent
    left = builder.left(edges, journal)
    costs = {key: len(rows) * (builder.recording.steps - key[1]) for key, rows in left.items() if rows}
    given = [
        {
            "opening": dict(opening),
            "samples": [asdict(sample) for sample in builder.samples],
            "asked": builder.asked,
            "work": str(work.absolute()),
            "header": journal.header,
            "check": asdict(journal.check) if journal.check is not None else None,
            "limit": builder.limit,
            "edges": [list(edge) for edge in edges],
            "groups": [list(key) for key in keys],
            "number": number,
            "parts": parts,
        }
        for number, keys in enumerate(shared(costs, parts))
        if keys
    ]
    if len(given) > 1:
        spread.map(_FUNCTION, given, progress, memory_bytes=memory_bytes)
        merge(journal)


def measure(
    *,
    opening: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    asked: Mapping[str, Any],
    work: str,
    header: Mapping[str, Any],
    check: Mapping[str, Any],
    limit: int,
    edges: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    number: int,
    parts: int,
    progress: Progress,
) -> int:
    """Do one part in a process of its own, and return how many groups of edges it had."""
    import torch

    from profilers.device import memory_available_bytes

    pipeline = opened(opening)
    main_memory = memory_available_bytes(torch.device("cpu"))
    recording = Recording(Path(work) / "recording", main_memory // (4 * parts))
    given = tuple(Sample(**sample) for sample in samples)
    builder = graph.Builder(pipeline, given, recording, None, limit, dict(asked))
    builder.as_recorded = Check(**check).as_recorded
    journal = Journal(Path(work) / f"part-{number}.jsonl", header)
    wanted = [(start, end) for start, end in edges]
    with graph.encoding_prompts_once(pipeline):
        builder.run(wanted, journal, progress, only={(chunk, end) for chunk, end in groups})
    return len(groups)


def shared(costs: Mapping[tuple[int, int], int], parts: int) -> list[list[tuple[int, int]]]:
    """Deal out groups so that no part has much more to do than another; each part's in the order of ``costs``."""
    totals = [0] * parts
    owner: dict[tuple[int, int], int] = {}
    for key in sorted(costs, key=lambda item: -costs[item]):
        least = totals.index(min(totals))
        totals[least] += costs[key]
        owner[key] = least
    return [[key for key in costs if owner[key] == part] for part in range(parts)]


def _weight_bytes(pipeline: Any) -> int:
    from torch import nn

    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def merge(journal: Journal) -> None:
    """Take over what parts have measured, of this run or of one that was killed."""
    for path in sorted(journal.path.parent.glob("part-*.jsonl")):
        found = Journal(path, journal.header)
        for (start, end), errors in found.errors.items():
            journal.add(end, [(start, sample) for sample in errors], list(errors.values()))
        path.unlink()
