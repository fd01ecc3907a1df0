"""Write a quantized model as transformers and vLLM read it: compressed-tensors' format in plain safetensors files.

::

    module by module: weight, scale ──> weight_packed (or fp8 weight), weight_scale      in place, one at a time
    state dict ──> names as in published checkpoints ──> shard by shard ──> model-0000x-of-0000y.safetensors
    schemes on modules ──> config.json: quantization_config

Imported only where compressed-tensors is known to be there (:func:`passes.quantize.quiet.require_extra`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.compressors.format import infer_model_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

from passes.base import PassError
from passes.quantize.targets import is_fused_experts

SHARD_BYTES = 2 * 10**9
# Formats in which transformers merges per-expert tensors back into one (integrations/compressed_tensors.py).
EXPERT_SCHEMES = ("w4a16", "w8a16", "fp8", "auto")


def linearize_experts(model: PreTrainedModel) -> None:
    """Replace fused experts by one linear layer each, and keep the names that published checkpoints use.

    Raises
    ------
    PassError
        If transformers could not read such a checkpoint of this architecture back.
    """
    from llmcompressor.modeling.moe.linearize import linearize_moe

    if not any(is_fused_experts(module) for module in model.modules()):
        return
    renamings = _expert_renamings(model)
    before, model.config.dtype = model.config.dtype, model.dtype  # new layers are made in the config's dtype
    try:
        with torch.no_grad():
            linearize_moe(model)
    finally:
        model.config.dtype = before
    model._weight_conversions = renamings


def check_experts(model: PreTrainedModel, scheme: str, *, symmetric: bool) -> None:
    """Refuse experts that transformers could not read back.

    Raises
    ------
    PassError
        Naming the scheme or architecture and the remedy.
    """
    if scheme not in EXPERT_SCHEMES:
        raise PassError(
            f"transformers cannot read experts in scheme={scheme} back; use scheme={' or '.join(EXPERT_SCHEMES[:3])}, "
            "or leave them as they are with experts=skip"
        )
    if not symmetric:
        raise PassError("transformers drops the zero points of experts; leave symmetric out, or give experts=skip")
    if any(is_fused_experts(module) for module in model.modules()):
        _expert_renamings(model)


def _expert_renamings(model: PreTrainedModel) -> list[Any]:
    """Return the model's checkpoint conversions with those that fuse experts turned into plain renamings.

    ``experts.*.w1.weight, experts.*.w3.weight -> experts.gate_up_proj`` becomes
    ``experts.N.w1. -> experts.N.gate_proj.`` and ``experts.N.w3. -> experts.N.up_proj.``
    """
    kept: list[Any] = []
    parts: dict[str, str] = {}
    for item in _conversions(model):
        if not _fuses_experts(item):
            kept.append(item)
            continue
        sources = [pattern for pattern in item._original_source_patterns if ".*." in pattern]
        target = item.target_patterns[0].rstrip("$").rpartition(".")[2]
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}.get(
            target
        )
        if names is None or len(sources) != len(names):
            continue
        for name, source in zip(names, sources, strict=True):
            parts[name] = source.removesuffix(".weight").removesuffix(".weight$").rpartition(".")[2]
    if "down_proj" not in parts or "up_proj" not in parts:
        raise PassError(
            f"transformers reads the experts of model_type '{model.config.model_type}' as fused tensors only, which "
            "the compressed format does not hold; leave them as they are with experts=skip"
        )
    renamings = [
        WeightRenaming(rf"\.experts\.(\d+)\.{stored}\.", rf".experts.\1.{name}.")
        for name, stored in parts.items()
        if name != stored
    ]
    return [*kept, *renamings]


def _conversions(model: PreTrainedModel) -> list[Any]:
    """Return how names and tensors of a checkpoint become the model's, as transformers would invert it on saving."""
    known: list[Any] | None = getattr(model, "_weight_conversions", None)
    if known is not None:
        return known
    return [
        item for item in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(item, PrefixChange)
    ]


def _fuses_experts(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and any("experts" in item for item in conversion.target_patterns)


def compress(model: PreTrainedModel) -> None:
    """Turn every quantized layer into what is stored, in place and one at a time. The model cannot run afterwards."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        status = getattr(module, "quantization_status", None)
        if scheme is not None and scheme.weights is not None and status != QuantizationStatus.COMPRESSED:
            compress_module(module)


def quantization_config(model: PreTrainedModel, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a compressed model.

    Parameters
    ----------
    model : PreTrainedModel
    ignore : sequence of str
        Layers that were left as they are, by the names that the model has.
    """
    config = QuantizationConfig.from_pretrained(model)
    if config is None:
        raise PassError("the model has no quantized layer; run the pass before saving")
    config.format = infer_model_format(model)
    config.quantization_status = QuantizationStatus.COMPRESSED
    data: dict[str, Any] = config.model_dump(mode="json", exclude={"quant_method"})
    data["ignore"] = sorted({*data["ignore"], *ignore})
    return {"version": compressed_tensors.__version__, "quant_method": "compressed-tensors", **data}


def write(model: PreTrainedModel, folder: Path, config: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write weights, ``config.json`` with the quantization, and ``generation_config.json``.

    Peak memory is the model and one shard: transformers' own saving walks over references, and each shard is
    serialized by itself.
    """
    if any(is_fused_experts(module) for module in model.modules()):
        # Transformers reads plain experts beside packed layers only as it holds them: fused.
        model._weight_conversions = [item for item in _conversions(model) if not _fuses_experts(item)]
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    path = folder / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["quantization_config"] = dict(config)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
