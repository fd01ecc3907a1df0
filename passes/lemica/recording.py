"""One full pass of a pipeline on disk, step by step: what its denoiser returned, and what its blocks added.

::

    samples ── chunks of rows ── full pass ──> 0000-0012.safetensors   output, hidden, context of each branch
                                              0000-final.safetensors  the uncached result
                                              recording.json          what was recorded, and in which chunks
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from passes.base import PassDoesNotFitError, PassError
from passes.lemica.driving import Call, Residual, output_tensor
from passes.lemica.inputs import Sample, generate, takes_batches
from passes.lemica.memory import free, ran_out
from profilers.base import Progress, Task

if TYPE_CHECKING:
    import torch

ROWS_RECORDED = 8
"""Samples recorded in one batch, where no batch is given."""

Signature = tuple[Any, ...]
"""Which denoiser answered a call, rows a sample of its output and of its residual, the latter's other dimensions. A
residual fits calls of the same signature only."""


class Recording:
    """What one full pass left, read from disk as it is needed.

    Parameters
    ----------
    folder : Path
    memory_bytes : int
        What read tensors may keep of main memory; the one in use comes on top.

    Attributes
    ----------
    steps : int
        Steps of the scheduler.
    whole_output : bool
        Whether what is reused is the denoiser's whole output.
    chunks : tuple of (int, int)
        First sample and the one after the last, of each batch that was recorded.
    reads : int
        Steps' outputs or residuals that were read from disk.
    held_bytes : int
        What read tensors keep of main memory now.
    """

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        content = json.loads((folder / "recording.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.whole_output: bool = content["whole_output"]
        self.chunks: tuple[tuple[int, int], ...] = tuple((start, stop) for start, stop in content["chunks"])
        self.reads = 0
        self.held_bytes = 0
        self._memory_bytes = memory_bytes
        self._held: OrderedDict[tuple[int, int, str], dict[str, torch.Tensor]] = OrderedDict()
        self._signatures: list[dict[int, Signature]] = [
            {int(branch): tuple(found) for branch, found in branches.items()} for branches in content["signatures"]
        ]
        self.steps = len(self._signatures)

    def signature(self, step: int, branch: int) -> Signature | None:
        """Return what a residual must agree with to stand in for this call; None if there was no such call."""
        return self._signatures[step].get(branch)

    def changes(self, step: int) -> bool:
        """Say whether a step calls the denoiser otherwise than the step before, so that nothing can be reused."""
        before = self._signatures[step - 1]
        return any(before.get(branch) != found for branch, found in self._signatures[step].items())

    def groups(self, step: int, branch: int) -> float:
        """Return the rows of a call's output by sample: branches of guidance that it has in one batch."""
        return cast("float", self._signatures[step][branch][1])

    def output(self, chunk: int, step: int, branch: int) -> torch.Tensor:
        """Return the tensor that the denoiser returned, in main memory: (G·P, …), G branches of a chunk's P samples."""
        return self._read(chunk, step, "output")[f"output.{branch}"]

    def residual(self, chunk: int, step: int, branch: int) -> Residual:
        """Return what the blocks added (in whole-output mode: the output), in main memory."""
        if self.whole_output:
            return Residual(self.output(chunk, step, branch))
        found = self._read(chunk, step, "residual")
        return Residual(found[f"hidden.{branch}"], found.get(f"context.{branch}"))

    def final(self, chunk: int) -> torch.Tensor:
        """Return the result without reuse, of a chunk's samples."""
        from safetensors.torch import load_file

        return load_file(self.folder / _final_name(self.chunks[chunk][0]))["final"]

    def _read(self, chunk: int, step: int, kind: str) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        key = (chunk, step, kind)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        path = self.folder / _step_name(self.chunks[chunk][0], step)
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("output.") == (kind == "output")]  # noqa: SIM118
            found = {name: file.get_tensor(name) for name in names}
        self.reads += 1
        size = _bytes(found)
        while self._held and self.held_bytes + size > self._memory_bytes:
            _, dropped = self._held.popitem(last=False)
            self.held_bytes -= _bytes(dropped)
        if size <= self._memory_bytes:
            self._held[key] = found
            self.held_bytes += size
        return found


def record(
    pipeline: Any,
    samples: Sequence[Sample],
    *,
    steps: int,
    arguments: Mapping[str, Any],
    folder: Path,
    fingerprint: str,
    mode: Any,
    output: Any,
    batch: int | None,
    memory_bytes: int,
    progress: Progress,
) -> Recording:
    """Run each sample in full once and keep each step; batches that a killed run finished are not run again.

    Parameters
    ----------
    pipeline : DiffusionPipeline
    samples : sequence of Sample
    steps : int
    arguments : mapping
    folder : Path
        Made where it is missing; emptied where it has a recording of another fingerprint.
    fingerprint : str
        Of everything that the recording depends on.
    mode : {"auto", "residual", "output"}
    output : {"latent", "pt"}
        What the final result is.
    batch : int or None
        Samples at once; default :data:`ROWS_RECORDED`, less where memory runs out.
    memory_bytes : int
    progress : Progress

    Raises
    ------
    PassError
        If the result is not finite.
    PassDoesNotFitError
        If one sample by itself runs out of memory, or the disk has no room for all.
    """
    from passes.lemica.hook import attach

    folder.mkdir(parents=True, exist_ok=True)
    state = _state(folder, fingerprint)
    size = (batch or ROWS_RECORDED) if takes_batches(pipeline) else 1
    with progress.task("recording the uncached run", total=steps * len(samples)) as task:
        task.advance(steps * sum(stop - start for start, stop in state["chunks"] if _finished(folder, start)))
        while True:
            chunks = state["chunks"]
            if not chunks or _finished(folder, chunks[-1][0]):
                start = chunks[-1][1] if chunks else 0
                if start == len(samples):
                    break
                chunks.append([start, min(start + size, len(samples))])
                write_json(folder / "recording.json", state)
            start, stop = chunks[-1]
            driver = _Recorder(folder, start, stop - start, len(samples) - start, task)
            crowded = False
            try:
                with attach(pipeline, driver, mode=mode) as attached:
                    driver.whole_output = state["whole_output"] = attached.target.mode == "output"
                    final = generate(pipeline, samples[start:stop], steps=steps, arguments=arguments, output=output)
            except (RuntimeError, MemoryError) as error:
                crowded = ran_out(error)
                if not crowded:
                    raise
            if crowded:
                if stop - start == 1:
                    raise PassDoesNotFitError("one sample by itself runs out of memory; give a smaller height or width")
                size = (stop - start) // 2
                task.advance(-driver.advanced)
                chunks.pop()
                _clear(folder, f"{start:04d}-*")
                free()
                continue
            check_finite(final, samples[start:stop], "without reuse")
            if not all(driver.signatures):
                made = sum(map(bool, driver.signatures))
                raise PassError(
                    f"the denoiser ran at {made} of the {len(driver.signatures)} steps that were set; all must"
                )
            state["signatures"] = [
                {str(branch): found for branch, found in branches.items()} for branches in driver.signatures
            ]
            write_json(folder / "recording.json", state)
            _save({"final": _stored(final)}, folder / _final_name(start))
    return Recording(folder, memory_bytes)


class _Recorder:
    """The driver of a full pass: writes each step's outputs and residuals to disk, in one file a step."""

    def __init__(self, folder: Path, start: int, rows: int, left: int, task: Task) -> None:
        self.signatures: list[dict[int, Signature]] = []
        self.whole_output = False
        self.advanced = 0
        self._folder, self._start, self._rows, self._left, self._task = folder, start, rows, left, task
        self._found: dict[str, torch.Tensor] = {}

    def begin(self, steps: int) -> None:
        """Hear that the pass starts."""
        self.signatures = [{} for _ in range(steps)]
        self._found = {}

    def denoise(self, step: int, branch: int, call: Call) -> Any:
        """Run a call in full and keep it."""
        output, residual = call.full(keep=True)
        if residual is None:
            raise RuntimeError("a full call that was asked to keep its residual returned none")
        tensor = output_tensor(output)
        self._found[f"output.{branch}"] = _stored(tensor)
        if not self.whole_output:  # else the output is the residual
            self._found[f"hidden.{branch}"] = _stored(residual.hidden)
            if residual.context is not None:
                self._found[f"context.{branch}"] = _stored(residual.context)
        rows, *shape = residual.hidden.shape
        owner = getattr(residual, "denoiser", "")
        self.signatures[step][branch] = (owner, len(tensor) / self._rows, rows / self._rows, *shape)
        return output

    def stepped(self, step: int, sample: torch.Tensor) -> None:
        """Write the step."""
        if step == 0:
            _check_disk(self._folder, _bytes(self._found) * len(self.signatures) * self._left // self._rows)
        _save(self._found, self._folder / _step_name(self._start, step))
        self._found = {}
        self._task.advance(self._rows)
        self.advanced += self._rows


def check_finite(result: torch.Tensor, samples: Sequence[Sample], where: str) -> None:
    """Refuse a result that has NaN or infinite elements.

    Parameters
    ----------
    result : torch.Tensor
        (P, …).
    samples : sequence of Sample
        P samples.
    where : str
        What was run, for the message.

    Raises
    ------
    PassError
        Naming the first sample whose result is not finite.
    """
    finite = result.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        found = samples[finite.index(False)]
        raise PassError(
            f"the result {where} of {found.condition!r}, seed {found.seed}, is not finite in {result.dtype}; load the "
            "pipeline in bfloat16 or float32"
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old content or the new one, never a part."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _check_disk(folder: Path, needed: int) -> None:
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise PassDoesNotFitError(
            f"the recording takes {needed / 1e9:.1f} GB and '{folder}' has {available / 1e9:.1f} GB; give fewer "
            "samples, a smaller height or width, or a folder with more room"
        )


def _state(folder: Path, fingerprint: str) -> dict[str, Any]:
    """Return what a folder's recording says of itself; a new one where there is none of this fingerprint."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found: dict[str, Any] = json.loads((folder / "recording.json").read_text(encoding="utf-8"))
        if found["fingerprint"] == fingerprint:
            return found
    _clear(folder, "*")
    return {"fingerprint": fingerprint, "chunks": [], "signatures": [], "whole_output": False}


def _clear(folder: Path, pattern: str) -> None:
    for suffix in (".safetensors", ".part", ".json"):
        for path in folder.glob(pattern + suffix):
            path.unlink()


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    draft = path.with_name(path.name + ".part")
    save_file(dict(tensors), draft)
    os.replace(draft, path)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    # A copy of its own: pipelines may change an output in place, and files refuse memory that is shared.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _step_name(start: int, step: int) -> str:
    return f"{start:04d}-{step:04d}.safetensors"


def _final_name(start: int) -> str:
    return f"{start:04d}-final.safetensors"


def _finished(folder: Path, start: int) -> bool:
    return (folder / _final_name(start)).is_file()


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(item.numel() * item.element_size() for item in tensors.values())
