"""What ``effcli export`` reports: ``effcli.export/1``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from effcli.reports.model import Environment, ModelInfo, plain


@dataclass(frozen=True)
class GraphInfo:
    """One graph file.

    Attributes
    ----------
    name : str
        ``prefill``, ``decode`` or ``model``.
    file : str
    file_bytes : int
        Of the graph alone; its weights are in the file that all graphs share.
    nodes : int
    operators : dict of str to int
        How often each op occurs, those of other domains with the domain.
    export_seconds : float
    """

    name: str
    file: str
    file_bytes: int
    nodes: int
    operators: dict[str, int]
    export_seconds: float


@dataclass(frozen=True)
class Agreement:
    """How far outputs of the written files are from torch's, over one kind of run.

    Attributes
    ----------
    phase : str
        ``prefill``, ``decode``, ``padded batch`` or ``encode``.
    output : str
        Which output: ``logits``, ``last_hidden_state``.
    positions : int
    max_absolute_error, mean_absolute_error : float
    kl_mean : float or None
        Nats a position; None where the output is no distribution over tokens.
    top1_agreement : float or None
        Share of positions with the same top token.
    """

    phase: str
    output: str
    positions: int
    max_absolute_error: float
    mean_absolute_error: float
    kl_mean: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Speed:
    """Times of torch eager and of onnxruntime, measured in turns.

    Attributes
    ----------
    context : int
        Tokens of the prompt.
    threads : int or None
        Of both, on a CPU.
    torch_ttft_seconds, onnx_ttft_seconds : float
        Medians of one prefill.
    torch_tpot_seconds, onnx_tpot_seconds : float or None
        Medians of one decode step; None for a model that does not decode.
    rounds : int
    """

    context: int
    threads: int | None
    torch_ttft_seconds: float
    onnx_ttft_seconds: float
    torch_tpot_seconds: float | None
    onnx_tpot_seconds: float | None
    rounds: int


@dataclass(frozen=True)
class QuantizedLayers:
    """Layers of one kind that keep the integers of the checkpoint.

    Attributes
    ----------
    layer_class : str
        ``q_proj``.
    operator : str
        ``MatMulNBits`` or ``DequantizeLinear``.
    bits : int
    block : int or None
        Columns that share a scale; None for whole rows.
    layers : int
    """

    layer_class: str
    operator: str
    bits: int
    block: int | None
    layers: int


@dataclass(frozen=True)
class ExportReport:
    """One run of ``effcli export``.

    Attributes
    ----------
    weight_bytes : int
        Of the weights as the graphs need them, each shared tensor once.
    file_bytes : int
        Of the graphs and the file of weights.
    size_overhead : float
        ``file_bytes / weight_bytes - 1``.
    provider : str
        Of onnxruntime: ``CPUExecutionProvider``.
    """

    schema: str
    created: str  # ISO 8601, UTC
    command: str
    seconds_spent: float
    format: str  # "effcli.onnx/1"
    model: ModelInfo
    environment: Environment
    task: str
    task_reason: str
    opset: int
    opset_reason: str
    dtype: str
    dtype_reason: str
    quantization: str | None
    quantized_layers: tuple[QuantizedLayers, ...]
    graphs: tuple[GraphInfo, ...]
    weight_bytes: int
    file_bytes: int
    size_overhead: float
    provider: str
    provider_reason: str
    text: str
    tolerance: float
    tolerance_reason: str
    max_absolute_error: float
    mean_absolute_error: float
    agreement: tuple[Agreement, ...]
    speed: Speed | None
    speed_reason: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    output: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
