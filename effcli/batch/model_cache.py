"""What the jobs of one worker share: the model that the last profile loaded, and the device's measured ceilings.

A model is that of the files as they lie on the disk: one byte written to them, and it is loaded again. Only one is
kept, so that a job has the memory that it would have alone, and the peak memory of a CPU process is its own.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from effcli.loading import LoadedModel
    from effcli.sources import Source
    from profilers.base import Progress
    from profilers.peaks import Peaks

PEAKS_SECONDS = 600.0
"""Ceilings are measured again after this time, which takes four seconds; the better figures are kept."""


class ModelCache:
    """Keeps one model between profiles; see :class:`effcli.api.Kept`.

    Attributes
    ----------
    loads : int
        How often a model was really loaded.
    """

    def __init__(self) -> None:
        self.loads = 0
        self._key: tuple[Any, ...] | None = None
        self._model: LoadedModel | None = None
        self._peaks: dict[tuple[Any, ...], tuple[float, Peaks]] = {}

    def load(self, source: Source, **options: Any) -> LoadedModel:
        """Return the model of a source, loaded now unless it is the last one and its files have not changed."""
        from effcli import loading

        described = tuple(sorted((name, value) for name, value in options.items() if name != "progress"))
        key = (source, described, _files_as_they_are(source.path))
        if self._model is None or key != self._key:
            self.clear()
            self._model = loading.load(source, **options)
            self._key = key
            self.loads += 1
        return self._model

    def peaks(self, device: torch.device, dtypes: Sequence[torch.dtype], progress: Progress) -> Peaks:
        """Return the device's ceilings, measured at most ten minutes ago."""
        import torch

        from profilers.peaks import measure_peaks

        key = (device, tuple(dtypes), torch.get_num_threads())
        measured, known = self._peaks.get(key, (0.0, None))
        if known is None or time.monotonic() - measured > PEAKS_SECONDS:
            found = measure_peaks(device, dtypes, progress)
            known = found if known is None else found.merged(known)
            self._peaks[key] = time.monotonic(), known
        return known

    def keep_only(self, spec: str) -> None:
        """Drop the model unless it is of this source: nothing of it may take part in another's measurements."""
        if self._model is not None and self._model.source.spec != spec:
            self.clear()

    def clear(self) -> None:
        """Drop the model and give its memory back."""
        if self._model is None:
            return
        on_gpu = self._model.device.type == "cuda"
        self._key = self._model = None
        release_memory(on_gpu=on_gpu)


def release_memory(*, on_gpu: bool) -> None:
    """Give what was freed back to the system, so that the next job, or another process, has it."""
    from profilers.device import return_freed_memory

    gc.collect()
    return_freed_memory()
    if on_gpu:
        import torch

        torch.cuda.empty_cache()


def _files_as_they_are(path: Path | None) -> tuple[tuple[str, int, int, int], ...]:
    """Return name, size, time of change and inode of a source's files."""
    if path is None:
        return ()
    found = []
    for file in sorted(path.iterdir()) if path.is_dir() else (path,):
        with contextlib.suppress(OSError):  # a link to nothing; what reads it says so
            about = file.stat()
            found.append((file.name, about.st_size, about.st_mtime_ns, about.st_ino))
    return tuple(found)
