"""What may stand in a jobs file, key by key; :mod:`effcli.batch.jobs_file` checks what belongs together."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from effcli import gates
from effcli.batch.search_space import SearchSpec, Seconds
from effcli.devices import check_dtype_name
from effcli.errors import BadInputError, did_you_mean
from effcli.recipes import Calibration, Evaluation

VERSION = 1
GATED = {**gates.METRICS, **gates.PIPELINE_METRICS}
"""What gates may ask for; whether it is measured of a model shows when its job runs."""
LAYOUT_FIELDS = ("model", "part", "kind", "device")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_LEAST_BYTES = 1_000_000
_SIZE = TypeAdapter(ByteSize)


class Strict(BaseModel):
    """Root of everything in the file: no key but these, no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _size(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"is {value!r}, no amount of memory; write e.g. 20GB or 512MB")
    try:
        size = int(_SIZE.validate_python(value))
    except ValidationError:
        raise ValueError(f"is {value!r}, no amount of memory; write e.g. 20GB or 512MB") from None
    if size < _LEAST_BYTES:
        raise ValueError(f"is {value!r}, less than 1 MB; write the unit, e.g. {value}GB")
    return size


def _gate(value: str) -> str:
    try:
        return gates.parse(value, GATED).text
    except BadInputError as error:
        raise ValueError(str(error)) from None


def _device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        near = did_you_mean(value, ("auto", "cpu", "mps", "cuda", "cuda:0"))
        raise ValueError(f"is '{value}', no device{near}; write auto, cpu, mps, cuda or cuda:NUMBER")
    return value


def _dtype(value: str) -> str:
    try:
        check_dtype_name(value)
    except BadInputError as error:
        raise ValueError(str(error)) from None
    return value


def _layout(value: str) -> str:
    fields = re.findall(r"\{([^{}]*)\}", value)
    for name in fields:
        if name not in LAYOUT_FIELDS:
            known = ", ".join(f"{{{field}}}" for field in LAYOUT_FIELDS)
            raise ValueError(f"has the unknown field '{{{name}}}'{did_you_mean(name, LAYOUT_FIELDS)}; known: {known}")
    if not fields or re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", value)):
        raise ValueError(f"is '{value}', which names no job; write e.g. '{{model}}.{{part}}'")
    return value


def _or(key: str, entry: type[BaseModel]) -> BeforeValidator:
    """Take a text for a mapping with this one key."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=str | entry
    )


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, StringConstraints(min_length=1)]
Bytes = Annotated[int, BeforeValidator(_size, json_schema_input_type=int | str)]
Duration = Annotated[Seconds, WithJsonSchema({"type": ["number", "string"]})]
Gate = Annotated[str, BeforeValidator(lambda value: _gate(value) if isinstance(value, str) else value)]
Device = Annotated[str, BeforeValidator(lambda value: _device(value) if isinstance(value, str) else value)]
Dtype = Annotated[str, BeforeValidator(lambda value: _dtype(value) if isinstance(value, str) else value)]
Layout = Annotated[str, BeforeValidator(lambda value: _layout(value) if isinstance(value, str) else value)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
OneOrMore = Annotated[
    tuple[Text, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_one_or_more, json_schema_input_type=Text | tuple[Text, ...]),
]
Gates = Annotated[tuple[Gate, ...], Field(strict=False)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class LimitsEntry(Strict):
    """What a job may take; what is not given here comes from the next wider limits."""

    time: Duration | None = Field(default=None, description="A job that takes longer is stopped and fails: 2h, 90s.")
    memory: Bytes | None = Field(default=None, description="To reserve, instead of an estimate: 20GB.")
    retries: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="New attempts after a lost worker or too little memory; default 1."
    )


class ModelEntry(Strict):
    """A model; a text alone is its source."""

    source: Text | None = Field(default=None, description="Folder, .gguf file, config.json, built-in name or hub id.")
    output_of: Text | None = Field(default=None, description="Instead: name of the job whose output is the model.")
    dtype: Dtype = Field(default="auto", description="auto or a torch name.")
    revision: Text | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the checkpoint.")
    allow_pickle: bool = Field(default=False, description="Read pickled weights, which can run code.")
    limits: LimitsEntry = LimitsEntry()

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        if (self.source is None) == (self.output_of is None):
            raise ValueError("needs one of source and output_of, like: {source: smollm2-135m}")
        if self.output_of is not None and self.revision is not None:
            raise ValueError(f"has a revision, and the output of job '{self.output_of}' has none; leave it out")
        return self


class ProfileEntry(Strict):
    """What to measure; the options of ``effcli profile``."""

    only: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="Profilers to run, see 'effcli profilers'; default: all."
    )
    context: Counts | None = Field(default=None, description="Context lengths in tokens.")
    batch: Counts | None = Field(default=None, description="Batch sizes in sequences; default 1.")
    epsilon: Annotated[tuple[Share, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="Sink thresholds; default 0.3."
    )
    sequences: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Sequences for the sink rate.")
    text: Text | None = Field(default=None, description="UTF-8 file to measure on, relative to the working directory.")
    seed: int | None = Field(default=None, description="Of everything random; default 0.")
    config_only: bool | None = Field(default=None, description="Count from the config, without weights.")


class RecipeEntry(Strict):
    """Passes and how their result is measured; a text alone is a recipe file, relative to the jobs file."""

    file: Text | None = Field(default=None, description="Recipe file, relative to the jobs file; or give passes here.")
    passes: Annotated[tuple[Any, ...], Field(strict=False)] | None = Field(
        default=None, description="Passes in order, see 'effcli passes'."
    )
    seed: int | None = Field(default=None, description="Of everything random; default 0.")
    calibration: Calibration | None = Field(default=None, description="Text that passes are calibrated on.")
    evaluation: Evaluation | None = Field(default=None, description="Text that quality is measured on.")
    gates: Gates = Field(default=(), description="Rules that the result must keep: ppl<=+3%. They add to the file's.")
    context: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Tokens; default 512.")
    batch: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Sequences; default 1.")
    kernels: Literal["auto", "plain"] | None = Field(
        default=None, description="Kernels the result is measured with: the fastest, or plain."
    )
    compile: bool | None = Field(default=None, description="Measure decode with torch.compile too.")

    @model_validator(mode="after")
    def _file_or_passes(self) -> RecipeEntry:
        if (self.file is None) == (self.passes is None):
            raise ValueError("needs one of file and passes, like: {passes: [{quantize: {scheme: w4a16}}]}")
        inside = [name for name in ("seed", "calibration", "evaluation") if getattr(self, name) is not None]
        if self.file is not None and inside:
            raise ValueError(f"has a file and {inside[0]}; write {inside[0]} into '{self.file}'")
        return self


class ExportEntry(Strict):
    """What to write, the options of ``effcli export``; a text alone is the format."""

    format: Literal["onnx"] = Field(description="What to write.")
    opset: Annotated[int, Field(ge=1)] | None = Field(default=None, description="ONNX opset; default: chosen.")


class MatrixEntry(Strict):
    """Every model with every profile, recipe and export on every device; what is left out stands for all there are."""

    models: Names | None = Field(default=None, description="Names of models.")
    profiles: Names | None = Field(default=None, description="Names of profiles.")
    recipes: Names | None = Field(default=None, description="Names of recipes.")
    exports: Names | None = Field(default=None, description="Names of exports.")
    devices: Annotated[tuple[Device, ...], Field(strict=False)] = Field(
        default=("auto",), description="auto, cpu, mps, cuda or cuda:NUMBER."
    )


class ExcludeEntry(Strict):
    """A rule; jobs of the matrix that fit all of its keys are left out. A list fits any of its items."""

    model: OneOrMore | None = None
    profile: OneOrMore | None = None
    recipe: OneOrMore | None = None
    export: OneOrMore | None = None
    device: OneOrMore | None = None

    @model_validator(mode="after")
    def _some_key(self) -> ExcludeEntry:
        if not self.model_fields_set:
            raise ValueError("is an empty rule, which would exclude everything; write e.g. {model: tiny, recipe: w4}")
        return self


class JobEntry(Strict):
    """One job besides those of the matrix."""

    name: Text | None = Field(default=None, description="Default: as the layout says.")
    model: Text = Field(description="Name of a model of this file.")
    profile: Text | None = Field(default=None, description="Name of a profile; one of profile, recipe and export.")
    recipe: Text | None = Field(default=None, description="Name of a recipe.")
    export: Text | None = Field(default=None, description="Name of an export.")
    device: Device | None = Field(default=None, description="Default: auto.")
    gates: Gates = Field(default=(), description="Added to the recipe's and the file's.")
    limits: LimitsEntry = LimitsEntry()
    labels: dict[str, str] = Field(default={}, description="Labels that a Ray node must have.")
    gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="GPUs to reserve; default 1 on a cuda device, else 0."
    )
    after: Names = Field(default=(), description="Names of jobs that must have passed.")

    @model_validator(mode="after")
    def _one_part(self) -> JobEntry:
        given = [name for name in ("profile", "recipe", "export") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "says nothing to do"
            raise ValueError(f"{what}; give one of profile, recipe and export")
        if self.gates and self.recipe is None:
            raise ValueError(f"has gates, which hold a recipe's result, and a {given[0]} has none; leave them out")
        return self


ModelOrSource = Annotated[ModelEntry, _or("source", ModelEntry)]
RecipeOrFile = Annotated[RecipeEntry, _or("file", RecipeEntry)]
ExportOrFormat = Annotated[ExportEntry, _or("format", ExportEntry)]


class Entries(Strict):
    """The whole file."""

    version: Literal[1] = Field(description="Of the file's format.")
    output: Text = Field(description="Folder, relative to the working directory, or fsspec URL.")
    workers: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Jobs side by side; default: fitting."
    )
    layout: Layout | None = Field(
        default=None, description="Names of jobs and of their folders; fields {model}, {part}, {kind}, {device}."
    )
    environment: Names = Field(default=(), description="Names of environment variables that jobs get.")
    limits: LimitsEntry = LimitsEntry()
    models: dict[str, Annotated[ModelEntry, _or("source", ModelEntry)]] = Field(
        description="Models by name.", min_length=1
    )
    profiles: dict[str, ProfileEntry] = Field(default={}, description="Profiles by name.")
    recipes: dict[str, Annotated[RecipeEntry, _or("file", RecipeEntry)]] = Field(
        default={}, description="Recipes by name."
    )
    exports: dict[str, Annotated[ExportEntry, _or("format", ExportEntry)]] = Field(
        default={}, description="Exports by name."
    )
    matrix: MatrixEntry = MatrixEntry()
    exclude: Annotated[tuple[ExcludeEntry, ...], Field(strict=False)] = Field(
        default=(), description="What of the matrix not to run."
    )
    jobs: Annotated[tuple[JobEntry, ...], Field(strict=False)] = Field(
        default=(), description="Jobs besides the matrix."
    )
    gates: Gates = Field(default=(), description="Added to every recipe's.")
    search: dict[str, SearchSpec] = Field(default={}, description="Searches by name, see docs/batch-search.md.")
