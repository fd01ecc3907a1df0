"""Replays of a recorded run in which a segment of steps reuses what its first step left.

::

    step       0 … i          i+1 … j−1                     j … T−1
    row        stored output  embedders, stored residual    the whole denoiser
                              of step i, heads

Stored outputs bring latents and the scheduler's memory to where they were, whatever the scheduler. The rows of a batch
share j; each has its own i and its own sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from passes.base import PassError
from passes.lemica.driving import Call, Residual, output_tensor, with_tensor
from passes.lemica.inputs import Output, Sample, generate
from passes.lemica.recording import Recording
from passes.lemica.schedule import Mode
from profilers.base import Task

if TYPE_CHECKING:
    import torch

Combine = Callable[[int, int, int, Residual], Residual]
"""``combine(full step, skipped step, branch, residual of the full step)`` returns what stands for the blocks at the
skipped step; the batch comes first in the residual's tensors and may be of any size."""


class RowsError(Exception):
    """The rows of a batch cannot be told apart, or do not fit a stored residual; a batch as recorded may do."""


class Replayer:
    """The driver of a replay.

    Parameters
    ----------
    recording : Recording
    chunk : int
    rows : sequence of (int, int)
        Of each row of the batch: the segment's first step i, and the number of its sample in the chunk. Rows of one i
        are neighbours, in ascending order of i.
    end : int
        j, the first full step after the segment.
    device : torch.device
    combine : Combine, optional
    task : Task, optional
        Advanced by the rows of the batch for each full step.

    Attributes
    ----------
    recording, chunk, rows
        As given.
    advanced : int
        What the task was advanced by.
    """

    def __init__(
        self,
        recording: Recording,
        chunk: int,
        rows: Sequence[tuple[int, int]],
        end: int,
        *,
        device: torch.device,
        combine: Combine | None = None,
        task: Task | None = None,
    ) -> None:
        self.advanced = 0
        self.recording, self.chunk, self.rows = recording, chunk, tuple(rows)
        self._end, self._device, self._combine, self._task = end, device, combine, task
        self._starts = [start for start, _ in rows]
        self._counts = list(Counter(self._starts).values())  # of rows, for each i
        self._samples = recording.chunks[chunk][1] - recording.chunks[chunk][0]
        # A batch as it was recorded needs no telling apart of rows.
        self._as_recorded = len(set(self._starts)) == 1 and [sample for _, sample in rows] == list(range(self._samples))
        self._forms: dict[int, Any] = {}
        # By branch: the first step since which calls are alike, what was computed there, what stands for the blocks
        # (by segment's first step), and the same for the whole batch where it is the same at every step.
        self._since: dict[int, int] = {}
        self._computed: dict[int, Residual] = {}
        self._parts: dict[int, list[tuple[int, Residual]]] = {}
        self._whole: dict[int, Residual] = {}

    def begin(self, steps: int) -> None:
        """Hear that the replay starts."""
        if steps != self.recording.steps:
            raise PassError(f"a replay has {steps} steps and the recorded run had {self.recording.steps}")

    def denoise(self, step: int, branch: int, call: Call) -> Any:
        """Answer each row of a call as its segment says."""
        if step >= self._end:
            self._parts.clear()
            self._whole.clear()
            return call.full(keep=False)[0]
        recording = self.recording
        if step == 0 or recording.signature(step, branch) != recording.signature(step - 1, branch):
            self._since[branch] = step
            self._parts.pop(branch, None)
            self._whole.pop(branch, None)
        if step <= self._starts[0]:
            return self._all_stored(step, branch, call)
        if self._since[branch] == step:
            # Another denoiser, or another shape: nothing fits that was left before, so a schedule runs this in full.
            output, kept = call.full(keep=True)
            if kept is None:
                raise RuntimeError("a full call that was asked to keep its residual returned none")
            self._computed[branch] = kept
        else:
            output = call.reuse(_fitting(self._residual(step, branch), call, step))
        return self._some_stored(output, step, branch)

    def stepped(self, step: int, sample: torch.Tensor) -> None:
        """Count the full steps."""
        if step >= self._end and self._task is not None:
            self._task.advance(len(self.rows))
            self.advanced += len(self.rows)

    def _all_stored(self, step: int, branch: int, call: Call) -> Any:
        """Return the stored output for every row."""
        samples, groups = [sample for _, sample in self.rows], self._groups(step, branch)
        if branch not in self._forms:
            # How outputs are wrapped is not stored; blocks that are identities tell it.
            self._forms[branch] = _form(self._reused(step, branch, call))
        tensor = self._pick(self.recording.output(self.chunk, step, branch), samples, groups)
        return with_tensor(self._forms[branch], tensor.to(self._device))

    def _reused(self, step: int, branch: int, call: Call) -> Any:
        """Return the output of a call whose blocks are replaced by the stored residual of this very step."""
        samples = [sample for _, sample in self.rows]
        residual = self._from_recording(step, branch, samples, self._groups(step, branch))
        return call.reuse(_fitting(residual, call, step))

    def _some_stored(self, output: Any, step: int, branch: int) -> Any:
        """Put stored outputs into the rows of an output whose segment starts at this step or later."""
        late = [index for index, start in enumerate(self._starts) if start >= step]
        if not late:
            return output
        groups = self._groups(step, branch)
        tensor = output_tensor(output).clone()
        stored = self.recording.output(self.chunk, step, branch)
        source = self._pick(stored, [self.rows[index][1] for index in late], groups).to(tensor)
        _by_row(tensor, len(self.rows), groups)[:, late] = _by_row(source, len(late), groups)
        return with_tensor(output, tensor)

    def _residual(self, step: int, branch: int) -> Residual:
        """Return what stands for the blocks at a skipped step, for the whole batch."""
        if branch in self._whole:
            return self._whole[branch]
        groups = self._groups(step, branch)
        parts = self._parts.get(branch) or self._find_parts(step, branch, groups)
        if self._combine is None:
            self._whole[branch] = _join([part for _, part in parts], self._counts, groups)
            return self._whole[branch]
        self._parts[branch] = parts
        combined = [self._combine(start, step, branch, part) if start < step else part for start, part in parts]
        return _join(combined, self._counts, groups)

    def _find_parts(self, step: int, branch: int, groups: int) -> list[tuple[int, Residual]]:
        """Return what is reused from this step on, of the rows of each i, with the step that it comes from."""
        recording, since = self.recording, self._since[branch]
        parts: list[tuple[int, Residual]] = []
        for start in sorted(set(self._starts)):
            rows = [index for index, other in enumerate(self._starts) if other == start]
            if start < since:
                part = _chosen(self._computed[branch], rows, len(self.rows), groups)
                parts.append((since, part))
            elif recording.signature(start, branch) == recording.signature(step, branch):
                parts.append((start, self._from_recording(start, branch, [self.rows[row][1] for row in rows], groups)))
            else:  # these rows take stored outputs for as long as calls are like this one; anything will do
                parts.append((start, _chosen(parts[0][1], [0] * len(rows), self._counts[0], groups)))
        return parts

    def _from_recording(self, step: int, branch: int, samples: list[int], groups: int) -> Residual:
        stored = self.recording.residual(self.chunk, step, branch)
        return stored.map(lambda item: self._pick(item, samples, groups).to(self._device))

    def _pick(self, stored: torch.Tensor, samples: list[int], groups: int) -> torch.Tensor:
        """Return the rows of some samples of a stored tensor, all branches of guidance."""
        return stored if self._as_recorded else _choose(stored, samples, self._samples, groups)

    def _groups(self, step: int, branch: int) -> int:
        """Return how many branches of guidance a call has in one batch."""
        if self._as_recorded:
            return 1
        groups = self.recording.groups(step, branch)
        if groups != int(groups):
            raise RowsError(f"the denoiser's output at step {step} has {groups} rows a sample")
        return int(groups)


class OwnResiduals(Replayer):
    """The driver of a replay that gives every step its own stored residual: blocks are skipped, and nothing is lost."""

    def denoise(self, step: int, branch: int, call: Call) -> Any:
        """Reuse the residual of this very step."""
        return self._reused(step, branch, call)


def replay(
    pipeline: Any,
    samples: Sequence[Sample],
    driver: Replayer,
    *,
    inference_steps: int,
    arguments: Mapping[str, Any],
    mode: Mode,
    output: Output,
) -> torch.Tensor:
    """Run a replay.

    Parameters
    ----------
    pipeline : DiffusionPipeline
    samples : sequence of Sample
        Of the driver's chunk.
    driver : Replayer
    inference_steps : int
        ``num_inference_steps`` of the recorded run.
    arguments : mapping
        Those of the recorded run.
    mode : {"residual", "output"}
    output : {"latent", "pt"}

    Returns
    -------
    torch.Tensor
        Mean absolute difference of each row's result to the recorded one, (R,), in float64; NaN where a result is not
        finite.

    Raises
    ------
    RowsError
        If the pipeline's batches are not laid out as those that were recorded.
    """
    import torch

    from passes.lemica.hook import attach

    chosen = [sample for _, sample in driver.rows]
    with attach(pipeline, driver, mode=mode):
        asked = [samples[sample] for sample in chosen]
        result = generate(pipeline, asked, steps=inference_steps, arguments=arguments, output=output)
    expected = driver.recording.final(driver.chunk)[chosen]
    difference: torch.Tensor = result.cpu().to(torch.float64) - expected.to(torch.float64)
    return difference.abs().flatten(1).mean(1)


def _fitting(residual: Residual, call: Call, step: int) -> Residual:
    if not call.fits(residual):
        raise RowsError(f"a residual of shape {tuple(residual.hidden.shape)} does not fit step {step}")
    return residual


def _form(output: Any) -> Any:
    """Return an output of the same form that holds next to nothing."""
    return with_tensor(output, output_tensor(output)[:1].clone())


def _by_row(tensor: torch.Tensor, count: int, groups: int) -> torch.Tensor:
    """View a batch of ``count`` rows by branch of guidance and row: (G · count · r, …) -> (G, count, r, …)."""
    folded, rest = divmod(tensor.shape[0], groups * count)
    if rest:
        raise RowsError(f"a tensor of {tensor.shape[0]} rows holds {groups} branches of {count} samples")
    return tensor.view(groups, count, folded, *tensor.shape[1:])


def _choose(tensor: torch.Tensor, rows: list[int], count: int, groups: int) -> torch.Tensor:
    """Return some rows of a batch: (G · count · r, …) -> (G · len(rows) · r, …)."""
    return _by_row(tensor, count, groups)[:, rows].flatten(0, 2)


def _chosen(residual: Residual, rows: list[int], count: int, groups: int) -> Residual:
    return residual.map(lambda item: _choose(item, rows, count, groups))


def _join(parts: Sequence[Residual], counts: Sequence[int], groups: int) -> Residual:
    """Return one residual of the rows of all parts; the inverse of choosing each part's rows."""
    if len(parts) == 1:
        return parts[0]

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        split = [_by_row(item, count, groups) for item, count in zip(tensors, counts, strict=True)]
        return torch.cat(split, dim=1).flatten(0, 2)

    contexts = [part.context for part in parts if part.context is not None]
    return Residual(joined([part.hidden for part in parts]), joined(contexts) if contexts else None)
