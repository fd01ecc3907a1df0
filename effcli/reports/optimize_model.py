"""The saved report of ``effcli optimize`` and ``effcli plan``: plain data that every renderer reads.

``before`` and ``after`` are whole ``effcli.profile/1`` reports, measured with the same instruments in fresh processes.
Numbers are SI base units with the unit in the name. What is not known is None beside a reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from effcli.reports.model import OPTIMIZE_SCHEMA as OPTIMIZE_SCHEMA
from effcli.reports.model import PLAN_SCHEMA as PLAN_SCHEMA
from effcli.reports.model import Environment, ModelInfo, plain
from passes.base import Figures, KernelUse, Measured, PassRecord, Prediction


@dataclass(frozen=True)
class PlannedPass:
    """One pass of a plan: what it is predicted to do after the passes before it."""

    name: str
    parameters: dict[str, Any]
    label: str  # "quantize:scheme=w4a16", as --pass takes it
    prediction: Prediction | None  # None where the pass does not apply
    reason: str | None  # why not


@dataclass(frozen=True)
class PlanReport:
    """What passes would buy on this device, before any of them runs.

    Attributes
    ----------
    alternatives : bool
        True when each pass is planned from the measured model (``effcli plan MODEL``); False when each follows the
        ones before it, as ``effcli optimize`` runs them.
    measured : Figures
        Of the model as it is, at ``batch`` and ``context``.
    """

    schema: str
    created: str
    command: str
    seconds_spent: float
    model: ModelInfo
    environment: Environment
    batch: int
    context: int
    measured: Figures
    alternatives: bool
    passes: tuple[PlannedPass, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data


@dataclass(frozen=True)
class Size:
    """Bytes of the weights before and after.

    Attributes
    ----------
    before_bytes : int
        Of the model in the dtype that it was measured in, each shared tensor once.
    after_bytes : int
        Of the weights in the written files, scales included.
    bits_per_parameter : float
        8 x ``after_bytes`` / ``parameters``.
    parameters : int
        Of the original model, each shared tensor once.
    before_file_bytes : int or None
        Of the source's weight files.
    after_file_bytes : int
        Of the written weight files, headers included.
    source_quantized : str or None
        How the source was quantized already (``"Q4_1, Q6_K GGUF types"``).
    source_bits_per_parameter : float or None
        Of such a source.
    """

    before_bytes: int
    after_bytes: int
    bits_per_parameter: float
    parameters: int
    before_file_bytes: int | None
    after_file_bytes: int
    source_quantized: str | None = None
    source_bits_per_parameter: float | None = None


@dataclass(frozen=True)
class PredictedMetric:
    """One predicted figure beside what was measured.

    Attributes
    ----------
    metric : str
        Field of :class:`passes.base.Figures`.
    relative_error : float or None
        predicted / measured - 1.
    explanation : str or None
        Where the prediction missed by more than 20 %: why, or that it is not known.
    """

    metric: str
    before: float | None
    predicted: float | None
    measured: float | None
    relative_error: float | None
    explanation: str | None


@dataclass(frozen=True)
class Predicted:
    """What the plan said, held against what came out."""

    figures: Figures
    metrics: tuple[PredictedMetric, ...]
    pass_seconds: float | None
    measured_pass_seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AuditedClass:
    """Tensors of one class as they lie on disk.

    Attributes
    ----------
    tensor_class : str
        Last part of the module's name: ``q_proj``, ``embed_tokens``, ``input_layernorm``.
    dtype : str
        What the values are stored as: ``int4``, ``fp8_e4m3``, ``bfloat16``.
    bits : float
        Stored bits per parameter, scales and zero points included.
    modules : int
    parameters : int
        Of the original tensors.
    stored_bytes : int
    quantized : bool
    reason : str or None
        Why a layer that could have been quantized was not.
    """

    tensor_class: str
    dtype: str
    bits: float
    modules: int
    parameters: int
    stored_bytes: int
    quantized: bool
    reason: str | None


@dataclass(frozen=True)
class GateResult:
    """One gate and whether it was passed."""

    gate: str  # as given, "ppl<=+3%"
    metric: str
    measured: float | None
    limit: float
    passed: bool
    explanation: str  # "perplexity rose by 2.1 %, at most 3 % allowed"


@dataclass(frozen=True)
class KernelAgreement:
    """How far logits of the fast kernels are from those of plain weights, on the same text.

    Attributes
    ----------
    tokens : int
    relative_error : float
        ||fast - plain|| / ||plain|| over all logits.
    max_absolute_error : float
    top1_agreement : float
    """

    tokens: int
    relative_error: float
    max_absolute_error: float
    top1_agreement: float


@dataclass(frozen=True)
class CompiledDecode:
    """Decode with ``torch.compile`` beside without."""

    context: int
    eager_tpot_seconds: float
    compiled_tpot_seconds: float | None
    compile_seconds: float | None
    reason: str | None  # why it was not compiled


@dataclass(frozen=True)
class StageTime:
    """How long one stage of the pipeline took."""

    stage: str  # "before", "plan", "pass: quantize", "save", "audit", "after", "quality", ...
    seconds: float
    own: bool  # the pipeline's own overhead: neither a pass, nor a profile, nor quality


@dataclass(frozen=True)
class OnnxResult:
    """The result as an ONNX export, measured on ONNX Runtime beside torch.

    Attributes
    ----------
    folder : str
        Of the export, in that of the checkpoint.
    profile : dict
        ``effcli.profile/1`` of the export: latency, and what else can be measured from outside.
    quality : QualityResult or None
        Against the original, on the text that the checkpoint was measured on in torch.
    quality_reason : str or None
    provider, provider_reason : str
        What of ONNX Runtime ran it (``CPUExecutionProvider``), and why.
    opset : int
    dtype, dtype_reason : str
        Of activations and of weights that are not quantized.
    quantization : str or None
        Of the integers that graphs keep from the checkpoint.
    weight_bytes : int
        Of the weights that the graph reads, each shared tensor once.
    file_bytes : int
        Of the graphs and the file of weights.
    tolerance, max_absolute_error, mean_absolute_error : float
        Difference of logits from torch's in the same dtype: let pass, found.
    positions : int
        That these were compared at.
    notes : tuple of str
    """

    folder: str
    profile: dict[str, Any]
    quality: Any
    quality_reason: str | None
    provider: str
    provider_reason: str
    opset: int
    dtype: str
    dtype_reason: str
    quantization: str | None
    weight_bytes: int
    file_bytes: int
    tolerance: float
    max_absolute_error: float
    mean_absolute_error: float
    positions: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class OptimizeReport:
    """One run of ``effcli optimize``.

    ``quality`` is :class:`profilers.quality.QualityResult`; ``before`` and ``after`` are ``effcli.profile/1``.
    """

    schema: str
    created: str  # ISO 8601, UTC
    command: str
    seconds_spent: float
    status: str  # "passed" | "gate failed"
    source: dict[str, Any]  # as in effcli.json: spec, kind, revision, licence, base_model, sha256 of files
    recipe: dict[str, Any]
    seed: int
    before: dict[str, Any]
    after: dict[str, Any]
    batch: int
    context: int
    figures_before: Figures
    figures_after: Figures
    quality: Any
    quality_reason: str | None
    size: Size
    predicted: Predicted | None
    predicted_reason: str | None
    passes: tuple[PassRecord, ...]
    audit: tuple[AuditedClass, ...]
    audit_notes: tuple[str, ...]
    gates: tuple[GateResult, ...]
    kernels: tuple[KernelUse, ...]
    kernel_agreement: KernelAgreement | None
    compiled: CompiledDecode | None
    stages: tuple[StageTime, ...]
    overhead_fraction: float
    warnings: tuple[str, ...]
    output: str | None = None  # the folder as the user named it
    measured: tuple[Measured | None, ...] = ()  # by pass: what it measured of the result itself
    after_onnx: OnnxResult | None = None  # with --export onnx

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
