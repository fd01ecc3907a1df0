"""What every instrument shares: the request, the context it runs in, and how it announces itself.

::

    ProfileRequest (what the user asked)  ─┐
    model / config / tokenizer / device   ─┼─> ProfileContext ──> Profiler.run ──> frozen dataclass of plain numbers
    Peaks (measured on this device)       ─┘

An instrument is usable without any of this on a live model (each module has a plain function for that);
the classes here are how the command line finds and feeds it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from profilers.peaks import Peaks
    from profilers.timing import PhaseTimings


class ProfilerError(Exception):
    """A measurement that the user asked for cannot be made; the message names the value and the remedy."""


class DoesNotFitError(ProfilerError):
    """The work asked for needs more memory than the device has."""


class NotApplicableError(ProfilerError):
    """The model has nothing that this instrument measures; a run of all instruments records the reason and goes on."""


class Task(Protocol):
    """One running progress line."""

    def advance(self, steps: float = 1.0) -> None:
        """Move the line forward by ``steps``."""

    def describe(self, text: str) -> None:
        """Change the line's text: which layer, with what error."""


class Progress(Protocol):
    """Where instruments report how far they are; the renderer decides what to show."""

    def task(self, description: str, total: float | None = None) -> contextlib.AbstractContextManager[Task]:
        """Open a progress line of ``total`` steps (``None``: unknown)."""


class _SilentTask:
    def advance(self, steps: float = 1.0) -> None:
        return None

    def describe(self, text: str) -> None:
        return None


class SilentProgress:
    """Progress that shows nothing: for notebooks, tests and ``--quiet``."""

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Yield a task that ignores its steps."""
        yield _SilentTask()


@dataclass(frozen=True)
class ProfileRequest:
    """What the user asked for, the same for every instrument.

    Attributes
    ----------
    batches : tuple of int
        Batch sizes, in sequences.
    contexts : tuple of int or None
        Context lengths, in tokens; ``None`` lets each instrument use its own default.
    epsilons : tuple of float
        Sink thresholds ε; the first is the one that verdicts quote.
    sequences : int
        Number of text sequences the sink rate averages over.
    seed : int
        Seed of everything random.
    text : str or None
        Text to measure on; ``None`` means the offline default text.
    """

    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] | None = None
    epsilons: tuple[float, ...] = (0.3,)
    sequences: int = 100
    seed: int = 0
    text: str | None = None


@dataclass
class ProfileContext:
    """A model on a device, ready to be measured.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode. With ``config_only`` its tensors are on the meta device: shapes without storage.
    config : PreTrainedConfig
    tokenizer : PreTrainedTokenizerBase or None
    device : torch.device
        The device being profiled (also with ``config_only``, where the model itself is on meta).
    dtype : torch.dtype
        Floating-point type of the weights.
    request : ProfileRequest
    peaks : Peaks or None
        This device's measured ceilings.
    timings : PhaseTimings
        Measured prefill and decode times, shared so that no instrument times the same point twice.
    config_only : bool
    load_seconds : float or None
        Time it took to load the weights.
    progress : Progress
    results : dict
        What the instruments that ran before returned, by profiler name.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    dtype: torch.dtype
    request: ProfileRequest
    peaks: Peaks | None
    timings: PhaseTimings
    config_only: bool = False
    load_seconds: float | None = None
    progress: Progress = field(default_factory=SilentProgress)
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Profiler:
    """How an instrument announces itself through the ``effcli.profilers`` entry point group.

    Attributes
    ----------
    name : str
        What ``--only`` takes and the key under ``profiles`` in the report.
    title : str
        Heading in reports.
    run : callable
        Takes a :class:`ProfileContext`, returns a frozen dataclass of plain numbers (an instance of ``result_type``).
        Raises :class:`ProfilerError` when the request cannot be met.
    result_type : type
        The dataclass, from which the report's JSON Schema is made.
    needs_weights : bool
        False when it also runs on the meta device (``--config-only``).
    requires : tuple of str
        Names of instruments whose results it reads when they run too; they run first.
    paper : str
        Source of the method.
    default : bool
        Whether it runs when the user names no instruments; False for one that takes long or that few need.
    """

    name: str
    title: str
    run: Callable[[ProfileContext], Any]
    result_type: type
    needs_weights: bool = True
    requires: tuple[str, ...] = ()
    paper: str = ""
    default: bool = True
