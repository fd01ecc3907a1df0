"""The quantize pass: low-bit weights by llm-compressor's algorithms, in the compressed-tensors format.

See ``docs/passes/quantize.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from passes import calibration_text
from passes.base import (
    ActsOnPipelines,
    LayerRecord,
    LoadOptions,
    LoadRecord,
    ModelProfile,
    Pass,
    PassContext,
    PassError,
    PassRecord,
    PipelineContext,
    Prediction,
)
from passes.quantize.parameters import QuantizeParameters

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from passes.quantize.calibration import Calibrated
    from passes.quantize.targets import Targets

__all__ = ["QuantizeParameters", "QuantizePass"]

_IGNORED = "_effcli_not_quantized"
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "rtn": "round-to-nearest",
    "smoothquant+gptq": "SmoothQuant and GPTQ",
}


class QuantizePass(ActsOnPipelines, Pass):
    """Stores the weights of linear layers, experts included, in few bits."""

    name = "quantize"
    title = "Low-bit weights (GPTQ, AWQ, SmoothQuant, round-to-nearest)"
    papers = (
        "Frantar et al., GPTQ, arXiv:2210.17323",
        "Lin et al., AWQ, arXiv:2306.00978",
        "Xiao et al., SmoothQuant, arXiv:2211.10438",
        "Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433",
        "Rouhani et al., Microscaling Data Formats for Deep Learning, arXiv:2310.10537",
    )
    parameters_type = QuantizeParameters
    changes = frozenset({"weights"})
    excludes = ("quantize",)
    extra = "quantize"

    parameters: QuantizeParameters

    @classmethod
    def alternatives(cls) -> tuple[dict[str, Any], ...]:
        """Return one entry a scheme: what ``effcli plan`` compares."""
        schemes = get_args(QuantizeParameters.model_fields["scheme"].annotation)
        return tuple({"scheme": scheme} for scheme in schemes if scheme != "auto")

    @property
    def needs_calibration(self) -> bool:
        """Whether text is needed: not for round-to-nearest."""
        return self.parameters.needs_calibration

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that has nothing to quantize, whose shapes do not suit, or that cannot be calibrated."""
        self._checked(model)

    def _checked(self, model: PreTrainedModel) -> tuple[Targets, int | None]:
        from passes.quantize import targets
        from passes.quantize.quiet import quiet_libraries, require_extra

        parameters = self.parameters
        if getattr(model.config, "quantization_config", None) is not None:
            raise PassError("the model is quantized already (its config has a quantization_config); give the original")
        if "smoothquant" in parameters.chosen_method or parameters.chosen_method == "awq":
            _check_smoothed(model, parameters)
        found = targets.find(model, parameters)
        group_size = targets.choose_group_size(found.layers, parameters)
        require_extra()
        with quiet_libraries():
            from passes.quantize import saving

            if found.experts:
                saving.check_experts(model, parameters.scheme, symmetric=parameters.symmetric)
            if parameters.needs_calibration and model.config.is_encoder_decoder:
                raise PassError(
                    f"{type(model).__name__} has an encoder and a decoder, which calibration does not handle; "
                    "use method=rtn, which needs none"
                )
        if parameters.scheme in ("nvfp4", "mxfp4") and str(model.dtype) != "torch.bfloat16":
            raise PassError(
                f"scheme={parameters.scheme} is read back in bfloat16 only, and the model is {model.dtype}; "
                "give --dtype bfloat16"
            )
        if parameters.kv_cache != "none" and not any(name.endswith("self_attn") for name, _ in model.named_modules()):
            raise PassError(
                f"{type(model).__name__} has no self_attn module whose cache could be FP8; use kv_cache=none"
            )
        return found, group_size

    def plan(self, profile: ModelProfile) -> Prediction:
        """Predict bytes, times and memory; see :mod:`passes.quantize.plan`."""
        from passes.quantize.plan import predict

        return predict(self.parameters, profile)

    def apply(self, model: PreTrainedModel, context: PassContext) -> PassRecord:
        """Round the weights of the live model; a forward pass afterwards behaves as the stored model will."""
        import torch

        found, group_size = self._checked(model)
        from passes.quantize.quiet import quiet_libraries

        with quiet_libraries(), torch.random.fork_rng(devices=_cuda_indices(context.device)):
            torch.manual_seed(context.seed)
            return self._apply(model, context, found, group_size)

    def _apply(
        self, model: PreTrainedModel, context: PassContext, found: Targets, group_size: int | None
    ) -> PassRecord:
        from passes.quantize import calibration, modifiers, saving

        parameters = self.parameters
        notes: list[str] = []
        details: dict[str, Any] = {}
        batches: list[torch.Tensor] = []
        if parameters.needs_calibration:
            batches = calibration_text.batches(
                context,
                parameters.samples,
                parameters.length,
                without=f"method={parameters.chosen_method} needs calibration text; give one, or use method=rtn",
            )
            text = context.calibration
            assert text is not None
            tokens = parameters.samples * parameters.length
            details["calibration"] = {
                "text": text.name,
                "samples": parameters.samples,
                "length": parameters.length,
                "tokens": tokens,
            }
            identity = calibration.fingerprint(
                model, parameters.model_dump(), context.seed, _versions(), [batch.tolist() for batch in batches]
            )
        else:
            for _ in calibration.scanned(model):
                pass
        if found.experts:
            saving.linearize_experts(model)

        layouts: Mapping[str, modifiers.Layout] = {layer.name: (None, group_size) for layer in found.layers}
        if parameters.scheme == "auto":
            from passes.quantize.sensitivity import allocate

            allocation = allocate(model, parameters, context, found.layers)
            layouts = dict(allocation.layouts)
            details["allocation"] = allocation.plain()
            notes += allocation.notes

        recipe = modifiers.build(parameters, found.layers, found.skipped, layouts)
        if parameters.needs_calibration:
            result = calibration.with_text(
                model,
                recipe,
                batches,
                folder=calibration.folder_for(context.work, identity, sorted(layouts.items())),
                device=context.device,
                progress=context.progress,
            )
        else:
            result = calibration.without_text(model, recipe, context.progress)
        setattr(model, _IGNORED, tuple(item.name for item in found.skipped))

        records = _records(found, layouts, result, parameters)
        details |= {
            "group_size": group_size,
            "error_of": "outputs" if "gptq" in parameters.chosen_method else "weights",
        }
        notes += _notes(found, result, parameters)
        return PassRecord(
            name=self.name,
            parameters=parameters.model_dump(mode="json"),
            summary=_summary(records, parameters),
            seed=context.seed,
            layers=records,
            skipped=found.skipped,
            notes=tuple(notes),
            details=details,
            versions=_versions(),
        )

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Compress the model in place, layer by layer, and write it shard by shard. It cannot run afterwards."""
        from passes.quantize.quiet import quiet_libraries, require_extra

        require_extra()
        with quiet_libraries():
            from passes.quantize import saving

            saving.compress(model)
            saving.write(model, folder, saving.quantization_config(model, getattr(model, _IGNORED, ())))

    def load(self, folder: Path, model: PreTrainedModel, options: LoadOptions) -> LoadRecord:
        """Repack the stored weights for the fastest kernels that the device has; see :mod:`passes.quantize.kernels`."""
        from passes.quantize.kernels import repack

        return repack(model, options)

    def check_pipeline(self, pipeline: Any) -> None:
        """Refuse a pipeline whose denoiser has nothing to round, or a method that needs text."""
        from passes.quantize import denoiser
        from passes.quantize.quiet import require_extra

        denoiser.check(pipeline, self.parameters)
        require_extra()

    def apply_pipeline(self, pipeline: Any, context: PipelineContext) -> PassRecord:
        """Round the weights of the denoiser's blocks to the nearest; see :mod:`passes.quantize.denoiser`."""
        self.check_pipeline(pipeline)
        from passes.quantize import denoiser
        from passes.quantize.quiet import quiet_libraries

        with quiet_libraries():
            rounded = denoiser.round_weights(pipeline, self.parameters, context.progress)
        return PassRecord(
            name=self.name,
            parameters=self.parameters.model_dump(mode="json"),
            summary=_summary(rounded.layers, self.parameters),
            seed=context.seed,
            layers=rounded.layers,
            skipped=rounded.skipped,
            details={"group_size": rounded.group_sizes, "error_of": "weights"},
            versions=_versions() | {"diffusers": version("diffusers")},
        )

    def save_pipeline(self, pipeline: Any, folder: Path) -> None:
        """Compress the denoiser and write it over its files in a folder; see :func:`passes.quantize.denoiser.save`."""
        from passes.quantize.quiet import quiet_libraries, require_extra

        require_extra()
        with quiet_libraries():
            from passes.quantize import denoiser

            denoiser.save(pipeline, folder)


def _check_smoothed(model: PreTrainedModel, parameters: QuantizeParameters) -> None:
    """Refuse to move scales between norms and linears that several norms feed."""
    from passes.loop.modeling_looped import LoopedLinear

    if any(isinstance(module, LoopedLinear) for module in model.modules()):
        raise PassError(
            f"method={parameters.chosen_method} moves scales from each layer's norm into the linears after it, and "
            f"those of {type(model).__name__} are shared by several layers; use method=gptq, or method=rtn"
        )


def _records(
    found: Targets, layouts: Mapping[str, Any], result: Calibrated, parameters: QuantizeParameters
) -> tuple[LayerRecord, ...]:
    bits = parameters.kind.weight_bits
    return tuple(
        LayerRecord(
            layer.name,
            layer.kind,
            layouts[layer.name][0] or float(bits or math.nan),
            layouts[layer.name][1],
            result.errors.get(layer.name),
        )
        for layer in found.layers
    )


def _notes(found: Targets, result: Calibrated, parameters: QuantizeParameters) -> list[str]:
    notes = []
    if result.fallbacks:
        shown = ", ".join(result.fallbacks[:3]) + (", …" if len(result.fallbacks) > 3 else "")
        notes.append(
            f"{len(result.fallbacks)} layers were rounded to nearest because their Hessian could not be inverted: "
            f"{shown}; more samples or a larger dampening help"
        )
    if result.resumed_layers:
        notes.append(f"the first {result.resumed_layers} parts of the model were taken over from an interrupted run")
    if any("experts=skip" in item.reason for item in found.skipped):
        notes.append("experts are stored fused, as transformers holds them; other engines may expect them one by one")
    if found.experts and parameters.scheme == "fp8":
        notes.append(
            "transformers turns FP8 experts into bfloat16 when it reads them, and leaves their inputs as they are"
        )
    if parameters.kv_cache == "fp8":
        notes.append("the FP8 scales of the KV cache are for engines such as vLLM; transformers ignores them")
    return notes


def _summary(records: tuple[LayerRecord, ...], parameters: QuantizeParameters) -> str:
    widths = sorted({record.bits for record in records})
    bits = f"{widths[0]:g}" if len(widths) == 1 else f"{widths[0]:g} to {widths[-1]:g}"
    groups = sorted({record.group_size for record in records if record.group_size is not None})
    grouped = f" in groups of {' and '.join(map(str, groups))}" if groups else ""
    return f"{len(records)} layers to {bits} bits{grouped} ({_METHODS[parameters.chosen_method]}, {parameters.scheme})"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}


def _cuda_indices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
