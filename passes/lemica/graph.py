"""The error graph of a pipeline: what each segment of reuse does to its final result.

::

    samples ──recording.py──> one full pass on disk ──replay.py──> errors of each edge (i, j), edges of one j in batches
                                                   └─ check: do replays give the recorded result back?
    work/journal.jsonl: fingerprint, check, one line for each edge of a batch; a killed run goes on from it

Source: LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation (NeurIPS 2025).
Departure: each edge is replayed from its own full step on, the steps before it are answered from the recording.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from passes.base import PassDoesNotFitError, PassError, Spread
from passes.lemica.inputs import Output, Sample, takes_batches
from passes.lemica.journal import Check, Journal
from passes.lemica.memory import free, ran_out
from passes.lemica.recording import Recording, record
from passes.lemica.replay import Combine, OwnResiduals, Replayer, RowsError, replay
from passes.lemica.schedule import Distance, ErrorGraph, Mode, Reuse
from profilers.base import Progress, SilentProgress, Task

ROWS = 64
"""Rows of a replay's batch, where no batch is given and memory suffices."""
ROW_WORKING_SET = 24
"""What a row of a batch takes of memory at its peak, in residuals of one row; roughly."""
REPLAY_TOLERANCE = 1e-3
"""Largest error of a replay from stored outputs, relative to the mean magnitude of the result."""
RESIDUAL_TOLERANCE = 0.1
"""The same of a replay from each step's own residual, which is rounded once more at each step."""

ENCODED_KEPT = 4
"""Results of ``encode_prompt`` kept during a build; batches repeat a few lists of prompts."""


def build(
    pipeline: Any,
    samples: Sequence[Sample],
    *,
    steps: int,
    max_gap: int,
    arguments: Mapping[str, Any],
    work: Path,
    distance: Distance = "latent",
    mode: Literal["auto", "residual", "output"] = "auto",
    reuse: Reuse = "last",
    combine: Combine | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
    spread: Spread | None = None,
    opening: Mapping[str, Any] | None = None,
) -> ErrorGraph:
    """Measure every edge up to a gap, by replay; goes on from what a killed build left in ``work``.

    Parameters
    ----------
    pipeline : DiffusionPipeline
    samples : sequence of Sample
        What the errors are measured on.
    steps : int
        ``num_inference_steps``. The graph has as many steps as the scheduler makes of it.
    max_gap : int
        K, the largest j − i; at least 2.
    arguments : mapping
        Of the pipeline's call: guidance, height, width, frames.
    work : Path
        Folder for the recording and the journal; what is there of another pipeline, sample or argument is replaced.
    distance : {"latent", "decoded"}
        Whether the final latents are compared, or what is decoded from them (which then runs in every replay).
    mode : {"auto", "residual", "output"}
        What is reused, see :func:`passes.lemica.targets.find`.
    reuse : {"last", "linear", "fitted"}
        What ``combine`` does; "last" without.
    combine : callable, optional
        ``combine(full step, skipped step, branch, residual)`` returns what stands for the blocks.
    batch : int, optional
        Rows of one replay at most; default :data:`ROWS`, fewer where memory is short. Halved when memory runs out.
    progress : Progress, optional
    spread, opening : optional
        As in :class:`passes.base.PipelineContext`. Without ``combine``, edges are measured side by side.

    Returns
    -------
    ErrorGraph
        ``noise`` is the largest error of replays in which nothing is lost: every step answered by its stored output,
        and every step answered by its own residual. ``forwards`` counts full calls, not the embedders and heads that
        skipped steps run.

    Raises
    ------
    PassError
        If ``max_gap`` < 2, there are fewer than 3 steps, sampling is not deterministic, or a result is not finite.
    PassDoesNotFitError
        If memory runs out and the batch cannot be halved.
    """
    if max_gap < 2:
        raise PassError(f"largest gap {max_gap}; give at least 2, so that one step can be skipped")
    if not samples:
        raise PassError("no samples to calibrate on; give at least one prompt or class")
    if (combine is None) != (reuse == "last"):
        raise ValueError(f"reuse '{reuse}' and combine {combine!r}: 'last' needs none, the others need one")
    import torch

    from passes.lemica import spreading
    from profilers.device import memory_available_bytes

    progress = progress or SilentProgress()
    output: Output = "latent" if distance == "latent" else "pt"
    work.mkdir(parents=True, exist_ok=True)
    main_memory = memory_available_bytes(torch.device("cpu"))
    identity = _fingerprint(pipeline, samples, steps, arguments, distance, mode)
    with encoding_prompts_once(pipeline):
        recording = record(
            pipeline,
            samples,
            steps=steps,
            arguments=arguments,
            folder=work / "recording",
            fingerprint=identity,
            mode=mode,
            output=output,
            batch=batch,
            memory_bytes=main_memory // 4,
            progress=progress,
        )
        if recording.steps < 3:
            raise PassError(f"{recording.steps} steps leave none to skip between full ones; give more")
        found_mode: Mode = "output" if recording.whole_output else "residual"
        journal = Journal(work / "journal.jsonl", {"recording": identity, "reuse": reuse})
        builder = Builder(
            pipeline,
            tuple(samples),
            recording,
            combine,
            batch or _rows_that_fit(pipeline, recording),
            {"inference_steps": steps, "arguments": dict(arguments), "mode": found_mode, "output": output},
        )
        check = journal.check or builder.check()
        if journal.check is None:
            journal.add_check(check)
        builder.as_recorded = check.as_recorded
        edges = edges_of(recording.steps, max_gap)
        spreading.merge(journal)
        if spread is not None and opening is not None and combine is None:
            spreading.run(builder, edges, journal, spread, opening, progress)
        builder.run(edges, journal, progress)
    return ErrorGraph(
        steps=recording.steps,
        max_gap=max_gap,
        edges=tuple(edges),
        errors=tuple(tuple(journal.errors[edge][number] for number in range(len(samples))) for edge in edges),
        distance=distance,
        reuse=reuse,
        forwards=recording.steps + sum(_cost(recording, edge) for edge in edges),
        noise=check.noise,
    )


def edges_of(steps: int, max_gap: int) -> list[tuple[int, int]]:
    """Return the edges (i, j) that skip a step: 2 ≤ j − i ≤ ``max_gap``, ordered by j, then i."""
    return [(start, end) for end in range(2, steps) for start in range(max(0, end - max_gap), end - 1)]


class Builder:
    """Replays in batches as large as memory allows.

    Attributes
    ----------
    limit : int
        Rows of a batch at most.
    as_recorded : bool
        Whether a batch has to be the recorded one.
    asked : dict
        What :func:`passes.lemica.replay.replay` is asked for, JSON-ready.
    """

    def __init__(
        self,
        pipeline: Any,
        samples: tuple[Sample, ...],
        recording: Recording,
        combine: Combine | None,
        limit: int,
        asked: dict[str, Any],
    ) -> None:
        self.pipeline = pipeline
        self.samples = samples
        self.recording = recording
        self.limit = limit
        self.as_recorded = not takes_batches(pipeline)
        self._combine = combine
        self.asked = asked

    def check(self) -> Check:
        """Replay what was recorded without losing anything, in a batch of another size, else in the recorded one.

        Raises
        ------
        PassError
            If not even the latter gives the recorded result back.
        """
        recording = self.recording
        own = recording.chunks[0][1] - recording.chunks[0][0]
        scale = float(recording.final(0).abs().double().mean())
        for as_recorded in (True,) if self.as_recorded else (False, True):
            self.as_recorded = as_recorded
            repeated = reused = math.inf
            rows = [(recording.steps - 1, number % own) for number in range(2 * own)]
            with contextlib.suppress(RowsError):
                repeated = max(self._first(Replayer, rows)[1])
                reused = max(self._first(OwnResiduals, rows)[1])
                if repeated <= REPLAY_TOLERANCE * scale and reused <= RESIDUAL_TOLERANCE * scale:
                    return Check(max(repeated, reused), self.as_recorded)
        raise PassError(self._why(repeated, reused, scale))

    def left(self, edges: Sequence[tuple[int, int]], journal: Journal) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Return the rows (i, sample in the chunk) that a journal does not have, by chunk and j."""
        starts: dict[int, list[int]] = {}
        for start, end in edges:
            starts.setdefault(end, []).append(start)
        return {
            (chunk, end): [
                (start, sample - first)
                for start in starts[end]
                for sample in range(first, stop)
                if sample not in journal.errors.get((start, end), {})
            ]
            for chunk, (first, stop) in enumerate(self.recording.chunks)
            for end in starts
        }

    def run(
        self,
        edges: Sequence[tuple[int, int]],
        journal: Journal,
        progress: Progress,
        *,
        only: Collection[tuple[int, int]] | None = None,
    ) -> None:
        """Measure the edges that a journal does not have, or of these the ones of some chunks and steps j."""
        recording = self.recording
        found = self.left(edges, journal)
        left = {key: rows for key, rows in found.items() if only is None or key in only}
        total = sum(len(rows) * (recording.steps - end) for (_, end), rows in left.items())
        with progress.task("error graph", total=total) as task:
            for (chunk, end), rows in left.items():
                first = recording.chunks[chunk][0]
                while rows:
                    task.describe(f"error graph, edges to step {end} of {recording.steps - 1}")
                    try:
                        done, errors = self._first(Replayer, rows, chunk=chunk, end=end, task=task)
                    except RowsError:
                        if self.as_recorded:
                            raise
                        self.as_recorded = True  # texts padded to the longest of a batch, for example
                        if journal.check is not None:
                            journal.add_check(replace(journal.check, as_recorded=True))
                        continue
                    journal.add(end, [(start, first + sample) for start, sample in done], errors)
                    measured = set(done)
                    rows = [row for row in rows if row not in measured]

    def _first(
        self,
        kind: type[Replayer],
        rows: Sequence[tuple[int, int]],
        *,
        chunk: int = 0,
        end: int | None = None,
        task: Task | None = None,
    ) -> tuple[list[tuple[int, int]], list[float]]:
        """Replay as many of the rows as one batch may have; return these and their errors."""
        recording = self.recording
        first, stop = recording.chunks[chunk]
        end = recording.steps if end is None else end
        while True:
            taken = list(rows[: self.limit])
            if self.as_recorded:
                taken = [(rows[0][0], sample) for sample in range(stop - first)]
            driver = kind(
                recording,
                chunk,
                taken,
                end,
                device=self.pipeline._execution_device,
                combine=self._combine if kind is Replayer else None,
                task=task,
            )
            try:
                errors = replay(self.pipeline, self.samples[first:stop], driver, **self.asked).tolist()
                break
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
            if task is not None:
                task.advance(-driver.advanced)
            del driver
            free()
            if self.as_recorded or len(taken) == 1:
                raise PassDoesNotFitError(
                    f"a replay of {len(taken)} rows runs out of memory; give a smaller batch, height or width"
                )
            self.limit = len(taken) // 2
        for (start, sample), found_error in zip(taken, errors, strict=True):
            if not math.isfinite(found_error):
                found = self.samples[first + sample]
                raise PassError(
                    f"the result of edge ({start}, {end}) is not finite for {found.condition!r}, seed {found.seed}; "
                    "load the pipeline in bfloat16 or float32"
                )
        return taken, errors

    def _why(self, repeated: float, reused: float, scale: float) -> str:
        """Say why replays do not give the recorded result back."""
        if repeated > REPLAY_TOLERANCE * scale and math.isfinite(repeated):
            return (
                f"sampling is not deterministic: the same outputs of the denoiser, given to "
                f"{type(self.pipeline.scheduler).__name__} again, end {repeated:.2g} away (results are {scale:.2g} in "
                "the mean); use a scheduler that draws no noise, such as DPMSolverMultistepScheduler, DDIMScheduler "
                "with eta=0, or FlowMatchEulerDiscreteScheduler"
            )
        return (
            f"the block stack of {type(self.pipeline).__name__} does more than add to its hidden states: with each "
            f"step's own residual the result is {reused:.2g} away (results are {scale:.2g} in the mean); cache the "
            "whole output instead (mode=output)"
        )


def _cost(recording: Recording, edge: tuple[int, int]) -> int:
    """Return the full calls of an edge's replay, for one sample."""
    start, end = edge
    return recording.steps - end + sum(recording.changes(step) for step in range(start + 1, end))


def _rows_that_fit(pipeline: Any, recording: Recording) -> int:
    """Return how many rows a replay may begin with."""
    from profilers.device import memory_available_bytes

    own = recording.chunks[0][1] - recording.chunks[0][0]
    row_bytes = max(1, recording.residual(0, 0, 0).bytes // own)
    available = memory_available_bytes(pipeline._execution_device)
    return max(1, min(ROWS, available // (ROW_WORKING_SET * row_bytes)))


def _fingerprint(
    pipeline: Any, samples: Sequence[Sample], steps: int, arguments: Mapping[str, Any], distance: str, mode: Any
) -> str:
    """Return a hash of everything that a recording depends on; of the weights, the first elements of each tensor."""
    from passes.lemica import targets

    scheduler = pipeline.scheduler
    content: dict[str, Any] = {
        "samples": [asdict(item) for item in samples],
        "steps": steps,
        "arguments": dict(arguments),
        "distance": distance,
        "pipeline": type(pipeline).__name__,
        "scheduler": type(scheduler).__name__,
        "scheduler_config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
    }
    target = targets.find(pipeline, mode)
    content["mode"] = target.mode
    for name in target.denoisers:
        content[name] = [
            (key, str(tensor.dtype), list(tensor.shape), _beginning(tensor))
            for key, tensor in targets.denoiser(pipeline, name).state_dict().items()
        ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _beginning(tensor: Any) -> list[float]:
    """Return a tensor's first elements; none of those that have no plain storage here (offloaded, quantized)."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type == "meta":
        return []
    return [float(item) for item in tensor.detach().flatten()[:4].tolist()]


@contextlib.contextmanager
def encoding_prompts_once(pipeline: Any) -> Iterator[None]:
    """Let the pipeline's ``encode_prompt`` remember the last few lists of prompts: every replay asks for the same."""
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None:
        yield
        return
    known: OrderedDict[str, Any] = OrderedDict()

    @functools.wraps(encode)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        if not all(map(_is_plain, (*args, *kwargs.values()))):
            return encode(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key not in known:
            while len(known) >= ENCODED_KEPT:
                known.popitem(last=False)
            known[key] = encode(*args, **kwargs)
        known.move_to_end(key)
        return known[key]

    pipeline.encode_prompt = remembered
    try:
        yield
    finally:
        del pipeline.encode_prompt


def _is_plain(value: Any) -> bool:
    """Say whether the text of a value tells everything about it."""
    import torch

    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, torch.device, torch.dtype))
