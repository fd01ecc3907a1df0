"""Sensitivities measured by several processes: each has a copy of the model and takes some of the groups of layers.

::

    groups not measured yet ── every N-th to a part ──> one process a part
    work/sensitivity-part-N.json <── each stores for itself ──> merged into work/sensitivity.json, also after a kill

A group's figures depend on no other group's, so they are those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.opening import opened
from passes.quantize import sensitivity
from profilers.base import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from passes.base import PassContext
    from passes.quantize.parameters import QuantizeParameters

_FUNCTION = "passes.quantize.spreading:measure"
_TIMES_WEIGHTS = 2
"""What a part takes, in bytes of the model: a measurement needs some beside it."""


def run(
    model: PreTrainedModel,
    parameters: QuantizeParameters,
    context: PassContext,
    ids: torch.Tensor,
    missing: Sequence[str],
    store: sensitivity.Store,
) -> tuple[str, ...]:
    """Measure what the store does not have in the workers of ``context.spread``; return notes."""
    spread = context.spread
    if spread is None or context.opening is None or len(missing) < 2:
        return ()
    memory_bytes = _TIMES_WEIGHTS * sum(parameter.nbytes for parameter in model.parameters())
    workers = min(spread.room(memory_bytes), len(missing))
    if workers < 2:
        return ("sensitivity was measured by one process: two copies of the model do not fit",)
    parts: list[dict[str, Any]] = [
        {
            "opening": dict(context.opening),
            "parameters": parameters.model_dump(mode="json"),
            "device": context.device.type,
            "ids": ids.tolist(),
            "names": missing[number::workers],
            "identity": store.identity,
            "path": str(_path(context.work, number).absolute()),
        }
        for number in range(workers)
    ]
    found = spread.map(_FUNCTION, parts, context.progress, memory_bytes=memory_bytes)
    merge(context.work, store)
    return tuple(dict.fromkeys(note for notes in found for note in notes))


def measure(
    *,
    opening: Mapping[str, Any],
    parameters: Mapping[str, Any],
    device: str,
    ids: Sequence[Sequence[int]],
    names: Sequence[str],
    identity: str,
    path: str,
    progress: Progress,
) -> list[str]:
    """Do one part in a process of its own, and return notes."""
    import torch

    from passes.quantize import saving, targets
    from passes.quantize.parameters import QuantizeParameters
    from passes.quantize.quiet import quiet_libraries

    wanted = QuantizeParameters.model_validate(dict(parameters))
    store = sensitivity.Store(Path(path), identity)
    notes: list[str] = []
    with quiet_libraries():
        model = opened(opening)
        found = targets.find(model, wanted)
        if found.experts:
            saving.linearize_experts(model)
        left = [name for name in names if name not in store.found]
        sensitivity.measure_groups(
            model, wanted, torch.device(device), torch.tensor(ids), found.layers, left, store, notes, progress
        )
    return notes


def merge(work: Path, store: sensitivity.Store) -> None:
    """Take over what parts have measured, of this run or of one that was killed."""
    for path in sorted(work.glob("sensitivity-part-*.json")):
        for name, entry in sensitivity.Store(path, store.identity).found.items():
            store.add(name, entry["kl"], entry["errors"])
        path.unlink()


def _path(work: Path, number: int) -> Path:
    return work / f"sensitivity-part-{number}.json"
