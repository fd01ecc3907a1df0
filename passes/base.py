"""The contract of a pass: what it needs, what it predicts, what it does, how it is saved and read back.

::

    parameters (typed, unknown keys refused) ──> Pass ─┬─ plan(profile)          -> Prediction   before it runs
                                                       ├─ apply(model, context)  -> PassRecord   changes the model
                                                       ├─ save(model, folder)                    what it changed
                                                       ├─ load(folder, model, options) -> LoadRecord   back, fast
                                                       └─ measure(model, context) -> Measured   of the loaded result

A pass may make the model that it starts from by itself, from a config alone: :meth:`Pass.build_source`.

A pass is found by name through the entry point group ``effcli.passes`` (:mod:`passes.registry`), the built-in ones
included. See ``docs/adding-a-pass.md``.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from profilers.base import Progress, SilentProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from profilers.peaks import Peaks


class PassError(Exception):
    """A pass cannot do what was asked; the message names the value and the remedy."""


class MissingExtraError(PassError):
    """A pass needs a package that is not installed; the message has the command that installs it."""


class PassDoesNotFitError(PassError):
    """A pass needs more memory or disk than there is."""


class PassParameters(BaseModel):
    """Root of every pass's parameters: immutable, and a key that is not a field is an error.

    Each field carries a ``description``; ``effcli passes`` shows name, type, default and description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Figures:
    """What a model costs on a device at one batch and context, measured or predicted; None where it is not known.

    Attributes
    ----------
    weight_bytes : int or None
        As held in memory when the model runs, each shared tensor once.
    kv_bytes_per_token : float or None
        Of one sequence.
    ttft_seconds, tpot_seconds : float or None
        Median time of prefill, and of one decode step.
    peak_memory_bytes : int or None
    """

    weight_bytes: int | None = None
    kv_bytes_per_token: float | None = None
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class ModelProfile:
    """What :meth:`Pass.plan` is told: the model's shapes, the device's ceilings, and what was measured.

    Attributes
    ----------
    model : PreTrainedModel
        On the meta device: shapes without storage.
    dtype : torch.dtype
        Of the weights as the model was measured.
    device : torch.device
        The device that the plan is for.
    peaks : Peaks
        Its measured ceilings.
    batch, context : int
        Of the point that ``figures`` holds.
    figures : Figures
        Measured, or predicted after the passes before this one.
    report : dict
        The whole profile, ``effcli.profile/1`` as plain data.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    device: torch.device
    peaks: Peaks
    batch: int
    context: int
    figures: Figures
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """What a pass will do to the figures, and what it costs to run.

    Attributes
    ----------
    figures : Figures
        After the pass.
    bits_per_parameter : float or None
        As stored, scales included, over all parameters.
    pass_seconds : float or None
        Time that the pass itself takes.
    pass_memory_bytes : int or None
        Memory that it needs at its peak, the model included.
    fits : bool or None
        Whether that memory is there; None if not known.
    slower : bool or None
        Whether decode is predicted to become slower on this device.
    notes : tuple of str
        How each figure was arrived at and what is not known, one line each.
    """

    figures: Figures
    bits_per_parameter: float | None = None
    pass_seconds: float | None = None
    pass_memory_bytes: int | None = None
    fits: bool | None = None
    slower: bool | None = None
    notes: tuple[str, ...] = ()


class CalibrationText(Protocol):
    """Where a pass gets calibration samples from; never the text that the result is evaluated on."""

    @property
    def name(self) -> str:
        """What the text is, for the record."""

    def windows(self, count: int, length: int) -> torch.Tensor:
        """Return ``count`` windows of ``length`` tokens, shape (count, length), int64, on the CPU.

        Raises
        ------
        profilers.base.ProfilerError
            If the text is too short.
        """


class Spread(Protocol):
    """Several workers that do independent parts of one pass."""

    def room(self, memory_bytes: int) -> int:
        """Return how many parts run side by side that take this much memory each, of the pass's device."""

    def map(
        self,
        function: str,
        parts: Sequence[Mapping[str, Any]],
        progress: Progress | None = None,
        *,
        memory_bytes: int = 0,
    ) -> list[Any]:
        """Call a function once a part, each in a worker of its own, and return the results in the order of the parts.

        Parameters
        ----------
        function : str
            ``"module:name"``, importable where the workers run; called with the part's items as keyword arguments,
            and with ``progress`` where it takes that. What it takes and returns is JSON-ready.
        parts : sequence of mapping
        progress : Progress, optional
        memory_bytes : int
            Of the pass's device, to reserve for each part besides what any process takes.

        Raises
        ------
        PassError
            If a part fails; the message is that of the first one that did.
        """


@dataclass
class PassContext:
    """What :meth:`Pass.apply` runs with.

    Attributes
    ----------
    tokenizer : PreTrainedTokenizerBase or None
    device : torch.device
        Where to compute.
    calibration : CalibrationText or None
        None for a pass that says it needs none.
    work : Path
        A folder of the pass's own that outlives an interruption: what is put there is found again by the next
        ``apply`` of the same work. Removed when the pass is saved.
    seed : int
        Of everything random.
    progress : Progress
    source : Path or None
        Folder that the model was read from; None where that is no folder, or not known.
    spread : Spread or None
        Workers that may do independent parts, with the same result as without; None where there is one process.
    opening : mapping or None
        How a worker gets what the pass is applied to, as it is before: ``function`` (``"module:name"``) and its
        JSON-ready keyword ``arguments``; None where it cannot.
    """

    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    calibration: CalibrationText | None
    work: Path
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)
    source: Path | None = None
    spread: Spread | None = None
    opening: Mapping[str, Any] | None = None


@dataclass
class PipelineContext:
    """What :meth:`ActsOnPipelines.apply_pipeline` runs with.

    Attributes
    ----------
    device : torch.device
        Where the pipeline is.
    work : Path
        As in :class:`PassContext`.
    seed : int
        Of everything random.
    progress : Progress
    spread : Spread or None
        As in :class:`PassContext`.
    opening : mapping or None
        As in :class:`PassContext`.
    """

    device: torch.device
    work: Path
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)
    spread: Spread | None = None
    opening: Mapping[str, Any] | None = None


@dataclass
class SourceContext:
    """What :meth:`Pass.build_source` runs with.

    Attributes
    ----------
    model : PreTrainedModel
        Of the config, on the meta device.
    tokenizer : PreTrainedTokenizerBase or None
        Of the files beside the config; None where there are none.
    device : torch.device
        Where to compute.
    work : Path
        As in :class:`PassContext`.
    evaluation_window : int
        Tokens of one window of the evaluation text; a text that the pass leaves for that has as many at least.
    seed : int
        Of everything random.
    progress : Progress
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device
    work: Path
    evaluation_window: int = 0
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)


@dataclass(frozen=True)
class SourceTexts:
    """Texts of a source that a pass made, for use where the user names none; None: the general default.

    Attributes
    ----------
    calibration, evaluation : Path or None
        UTF-8 files. The second holds text that the source was not trained on.
    """

    calibration: Path | None = None
    evaluation: Path | None = None


@dataclass(frozen=True)
class LayerRecord:
    """What was done to one layer.

    Attributes
    ----------
    name : str
        Dotted name of the module.
    kind : str
        Its class for reports: the last part of the name, ``q_proj``, ``down_proj``, ``experts``.
    bits : float
        Of one weight, scales and zero points not counted.
    group_size : int or None
        Weights that share a scale; None for whole rows, tensors or blocks.
    error : float or None
        Relative squared error of the layer's output on calibration text where that is known, else of its weights.
    """

    name: str
    kind: str
    bits: float
    group_size: int | None
    error: float | None


@dataclass(frozen=True)
class Skipped:
    """A layer that the pass could have changed and did not, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class PassRecord:
    """What a pass did; goes into ``effcli.json`` and the report as it is, so it holds plain values only.

    Attributes
    ----------
    name : str
        Of the pass.
    parameters : dict
        Every parameter, defaults included.
    summary : str
        One line: ``"210 layers to 4 bits in groups of 64 (GPTQ)"``.
    seed : int
    seconds : float
        Filled in by the pipeline where the pass leaves 0.
    layers : tuple of LayerRecord
    skipped : tuple of Skipped
    notes : tuple of str
    details : dict
        What else belongs to the record, JSON-ready.
    versions : dict
        Of the packages that did the work.
    """

    name: str
    parameters: dict[str, Any]
    summary: str
    seed: int = 0
    seconds: float = 0.0
    layers: tuple[LayerRecord, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadOptions:
    """How to read a checkpoint back.

    Attributes
    ----------
    device : torch.device
    dtype : torch.dtype
        Of activations and of weights that are not quantized.
    kernels : str
        ``auto``: the fastest that the device has; ``plain``: weights as plain ``dtype`` tensors.
    """

    device: torch.device
    dtype: torch.dtype
    kernels: Literal["auto", "plain"] = "auto"


@dataclass(frozen=True)
class KernelUse:
    """Which kernel runs one class of layers.

    Attributes
    ----------
    layer_class : str
        As in :attr:`LayerRecord.kind`.
    kernel : str
        The op, ``aten._weight_int4pack_mm_for_cpu``, or ``aten.linear`` where the weight was decompressed.
    layers : int
        How many.
    fallback_reason : str or None
        Why no faster kernel runs.
    """

    layer_class: str
    kernel: str
    layers: int
    fallback_reason: str | None = None


@dataclass(frozen=True)
class LoadRecord:
    """What reading back did."""

    kernels: tuple[KernelUse, ...] = ()
    notes: tuple[str, ...] = ()


MeasuredUnit = Literal["text", "number", "bytes", "seconds", "fraction"]
"""What a column of a :class:`MeasuredTable` holds: text, or numbers in an SI base unit."""


@dataclass(frozen=True)
class MeasureContext:
    """What :meth:`Pass.measure` runs with, in the process that verifies the result.

    Attributes
    ----------
    before, after : dict
        Profiles of the original and of the result, ``effcli.profile/1`` as plain data.
    peaks : Peaks
        The device's ceilings, as measured beside the result.
    batch, context : int
        Of the point that both profiles hold.
    seed : int
        Of everything random.
    progress : Progress
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    peaks: Peaks
    batch: int
    context: int
    seed: int = 0
    progress: Progress = field(default_factory=SilentProgress)


@dataclass(frozen=True)
class MeasuredColumn:
    """Heading of a column and what its cells hold."""

    title: str
    unit: MeasuredUnit


@dataclass(frozen=True)
class MeasuredTable:
    """Figures of a pass's own; a cell is None where it is not known.

    Attributes
    ----------
    title : str
    columns : tuple of MeasuredColumn
    rows : tuple of tuple
        One cell a column.
    """

    title: str
    columns: tuple[MeasuredColumn, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]


@dataclass(frozen=True)
class Measured:
    """What a pass measured of the result, beyond the figures that every result has; goes into the report.

    Attributes
    ----------
    summary : str
        What was found, in a sentence or two; names what could not be measured.
    tables : tuple of MeasuredTable
    notes : tuple of str
        How it was measured, one line each.
    details : dict
        What else belongs to it, JSON-ready.
    """

    summary: str
    tables: tuple[MeasuredTable, ...] = ()
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


class Pass(ABC):
    """One technique with its parameters.

    Class attributes announce it; an instance is bound to validated parameters.

    Attributes
    ----------
    name : str
        The entry point's name, and what ``--pass`` takes.
    title : str
    papers : tuple of str
    parameters_type : type of PassParameters
    changes : frozenset of str
        Of ``weights``, ``structure``, ``kv-cache``, ``schedule``. A pass that changes weights or structure saves all
        weights; for others the pipeline carries the weights over and :meth:`save` adds to them.
    before, after : tuple of str
        Names of passes that it must come before or after, where both are in the recipe.
    excludes : tuple of str
        Names of passes that it cannot be combined with; its own name if it runs once only.
    files : tuple of str
        Safetensors files that :meth:`save` puts beside the weights; any other fails the audit.
    extra : str or None
        The optional dependency that it needs, ``pip install 'effcli[EXTRA]'``.
    gentler : str or None
        Parameters that cost less quality, as ``--pass`` takes them, advised where a result lost too much.
    from_config : str or None
        Parameters with which it starts from a config without weights, as ``--pass`` takes them, advised where there
        are no weights; None if it cannot.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    papers: ClassVar[tuple[str, ...]] = ()
    parameters_type: ClassVar[type[PassParameters]]
    changes: ClassVar[frozenset[str]]
    before: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    excludes: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    gentler: ClassVar[str | None] = None
    from_config: ClassVar[str | None] = None

    def __init__(self, parameters: PassParameters) -> None:
        self.parameters = parameters

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Pass:
        """Return the pass with these parameters.

        Raises
        ------
        PassError
            For an unknown key (with the closest known one), or a value of the wrong type or range.
        """
        try:
            return cls(cls.parameters_type.model_validate(dict(values)))
        except ValidationError as error:
            raise PassError(_explain(cls.name, cls.parameters_type, error)) from None

    @classmethod
    def alternatives(cls) -> tuple[dict[str, Any], ...]:
        """Return the parameters that ``effcli plan MODEL`` compares when the user names no pass."""
        return ({},)

    @property
    def needs_calibration(self) -> bool:
        """Whether :meth:`apply` needs calibration text, with these parameters."""
        return False

    @property
    def needs_gpu(self) -> bool:
        """Whether :meth:`apply` needs a CUDA device, with these parameters."""
        return False

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that the pass cannot change, before any weight is loaded.

        Parameters
        ----------
        model : PreTrainedModel
            On the meta device.

        Raises
        ------
        PassError
            Naming what the model lacks, a shape that does not suit, or (:class:`MissingExtraError`) a package.
        """
        return None

    def check_complete(self) -> None:
        """Refuse parameters that are enough to plan with and not enough to run with.

        Raises
        ------
        PassError
        """
        return None

    @property
    def source_recipe(self) -> Mapping[str, Any] | None:
        """What the source that it makes from a config depends on, JSON-ready; None where it takes one with weights.

        Texts enter it by their sha256. What is not in it can change and the source is still the same.

        Raises
        ------
        PassError
            If a file that it needs cannot be read.
        """
        return None

    def build_source(self, folder: Path, context: SourceContext) -> tuple[str, ...]:
        """Make the model that this pass starts from, and write it with a tokenizer as transformers does.

        Called where :attr:`source_recipe` is not None, before anything is measured. Must go on from what it left in
        ``context.work``, and give the same files for the same context.

        Returns
        -------
        tuple of str
            How it was made, one line each, for the report.

        Raises
        ------
        PassError
        """
        raise PassError(f"pass '{self.name}' makes no model of a config; give one with weights")

    def source_texts(self, source: Path) -> SourceTexts:
        """Return the texts of a source that :meth:`build_source` wrote."""
        return SourceTexts()

    @abstractmethod
    def plan(self, profile: ModelProfile) -> Prediction:
        """Predict what the pass will do on this device."""

    def shapes_after(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model as later passes of a chain plan from it, where this one changes its structure.

        Parameters
        ----------
        model : PreTrainedModel
            On the meta device; left as it is.
        """
        return model

    @abstractmethod
    def apply(self, model: PreTrainedModel, context: PassContext) -> PassRecord:
        """Change the live model in place."""

    @abstractmethod
    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write what :meth:`apply` changed into a folder, as safetensors and JSON."""

    def check_files(self, folder: Path, model: PreTrainedModel) -> tuple[str, ...]:
        """Hold what :meth:`save` put beside the weights against the model, from the bytes on disk.

        Parameters
        ----------
        folder : Path
        model : PreTrainedModel
            The checkpoint's, on the meta device.

        Returns
        -------
        tuple of str
            What was found, one line each, for the audit's notes.

        Raises
        ------
        PassError
            Naming the tensor and what is wrong with it.
        """
        return ()

    @classmethod
    def register_model(cls, folder: Path) -> None:
        """Make the classes of a checkpoint that this pass wrote known to transformers, before its config is read.

        They come from the pass's own package: no code of the folder may run.

        Parameters
        ----------
        folder : Path

        Raises
        ------
        PassError
            If this installation has not what the checkpoint needs.
        """
        return None

    def load(self, folder: Path, model: PreTrainedModel, options: LoadOptions) -> LoadRecord:
        """Prepare a model that transformers has just read from ``folder`` to run as this pass means it to.

        Parameters
        ----------
        folder : Path
        model : PreTrainedModel
            As ``from_pretrained(folder)`` returns it: quantized weights still as stored. Changed in place.
        options : LoadOptions
        """
        return LoadRecord()

    def measure(self, model: PreTrainedModel, context: MeasureContext) -> Measured | None:
        """Measure what this pass's own claims rest on, of the result as loaded by the process that verifies it.

        Called after every profiler, for each pass of the run in its order. The model must be left as it is.

        Parameters
        ----------
        model : PreTrainedModel
            After all passes, on its device, in evaluation mode.
        context : MeasureContext

        Returns
        -------
        Measured or None
            None for a pass that the common figures say everything about.
        """
        return None


class ActsOnPipelines(ABC):
    """What a pass does with a diffusion pipeline; mixed into a :class:`Pass`."""

    @abstractmethod
    def check_pipeline(self, pipeline: Any) -> None:
        """Refuse a pipeline that the pass cannot change, before anything is measured.

        Parameters
        ----------
        pipeline : diffusers.DiffusionPipeline

        Raises
        ------
        PassError
            Naming what the pipeline lacks.
        """

    @abstractmethod
    def apply_pipeline(self, pipeline: Any, context: PipelineContext) -> PassRecord:
        """Work out what changes. The live pipeline may be left changed; it is not used again.

        Parameters
        ----------
        pipeline : diffusers.DiffusionPipeline
            On its device.
        context : PipelineContext
        """

    @abstractmethod
    def save_pipeline(self, pipeline: Any, folder: Path) -> None:
        """Write what :meth:`apply_pipeline` changed over the pipeline's files in a folder, as safetensors and JSON.

        Parameters
        ----------
        pipeline : diffusers.DiffusionPipeline
            As :meth:`apply_pipeline` left it.
        folder : Path
            Holds all files of the pipeline before this pass; weights may be hard links, to be replaced, never written
            into.
        """


class PipelinePass(ActsOnPipelines, Pass):
    """A technique for diffusion pipelines, and for no language model."""

    changes = frozenset({"schedule"})

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a language model."""
        raise self._not_for(model)

    def plan(self, profile: ModelProfile) -> Prediction:
        """Refuse a language model."""
        raise self._not_for(profile.model)

    def apply(self, model: PreTrainedModel, context: PassContext) -> PassRecord:
        """Refuse a language model."""
        raise self._not_for(model)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Refuse a language model."""
        raise self._not_for(model)

    def _not_for(self, model: PreTrainedModel) -> PassError:
        return PassError(f"pass '{self.name}' works on diffusers pipelines; {type(model).__name__} is none")


def _explain(name: str, parameters: type[PassParameters], error: ValidationError) -> str:
    """Return one line for the first thing that is wrong with a pass's parameters."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    known = tuple(parameters.model_fields)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"
        return f"pass '{name}' has no parameter '{key}'; {hint}"
    where = f"parameter '{key}'" if key else "its parameters"
    message = first["msg"].removeprefix("Value error, ")
    given = f" (given: {first['input']!r})" if key else ""
    return f"pass '{name}', {where}: {message}{given}; see: effcli passes {name}"
