"""A whole pass in one file, as a third party would write it: zero the smallest weights of every linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from passes.base import LayerRecord, ModelProfile, Pass, PassContext, PassError, PassParameters, PassRecord, Prediction


class MagnitudeParameters(PassParameters):
    """Parameters of the pass."""

    sparsity: float = Field(default=0.1, ge=0.0, lt=1.0, description="Share of each layer's weights that become zero.")


class MagnitudePass(Pass):
    """Unstructured magnitude pruning: no smaller file, no faster kernel, but a changed model."""

    name = "magnitude"
    title = "Magnitude pruning"
    papers = ("Han et al. 2015, Learning both Weights and Connections (NeurIPS)",)
    parameters_type = MagnitudeParameters
    changes = frozenset({"weights"})
    before: ClassVar[tuple[str, ...]] = ("quantize",)

    parameters: MagnitudeParameters

    def check(self, model: Any) -> None:
        """Refuse a model without linear layers."""
        if not _linear_layers(model):
            raise PassError("the model has no linear layer to prune")

    def plan(self, profile: ModelProfile) -> Prediction:
        """Predict no change: zeros are stored and multiplied like any other weight."""
        return Prediction(figures=profile.figures, notes=("zeros are stored like any other weight",))

    def apply(self, model: Any, context: PassContext) -> PassRecord:
        """Zero the weights below each layer's own quantile."""
        import torch

        records = []
        with torch.no_grad():
            for name, layer in _linear_layers(model).items():
                magnitude = layer.weight.abs().float()
                count = int(magnitude.numel() * self.parameters.sparsity)
                if count:
                    layer.weight.masked_fill_(magnitude <= magnitude.flatten().kthvalue(count).values, 0.0)
                records.append(LayerRecord(name, name.rpartition(".")[2], 8.0 * layer.weight.itemsize, None, None))
        return PassRecord(
            name=self.name,
            parameters=self.parameters.model_dump(),
            summary=f"{self.parameters.sparsity:.0%} of the weights of {len(records)} layers set to zero",
            layers=tuple(records),
        )

    def save(self, model: Any, folder: Path) -> None:
        """Write the model as transformers does."""
        model.save_pretrained(folder)


def _linear_layers(model: Any) -> dict[str, Any]:
    import torch

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
