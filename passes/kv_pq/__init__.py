"""The kv-pq pass: a KV cache that holds codes of product quantization instead of keys and values.

See ``docs/passes/kv-pq.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes import calibration_text
from passes.base import (
    LayerRecord,
    LoadOptions,
    LoadRecord,
    ModelProfile,
    Pass,
    PassContext,
    PassError,
    PassRecord,
    Prediction,
)
from passes.kv_pq.codebooks import FILE, KINDS
from passes.kv_pq.parameters import KVPQParameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes.kv_pq.cache import PQCache as PQCache
    from passes.kv_pq.codebooks import Codebooks
    from passes.kv_pq.targets import Targets

__all__ = ["KVPQParameters", "KVPQPass", "PQCache"]

_CODEBOOKS = "_effcli_kv_codebooks"


class KVPQPass(Pass):
    """Trains codebooks for keys and values, and makes the model keep its cache as codes."""

    name = "kv-pq"
    title = "Product-quantized KV cache"
    papers = (
        "Wang et al., MILLION, DAC 2025, arXiv:2504.03661",
        "Jégou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011",
        "Ge et al., Optimized Product Quantization, CVPR 2013",
    )
    parameters_type = KVPQParameters
    changes = frozenset({"kv-cache"})
    excludes = ("kv-pq",)
    files = (FILE,)
    gentler = "bits=8"

    parameters: KVPQParameters

    @classmethod
    def alternatives(cls) -> tuple[dict[str, Any], ...]:
        """Return what ``effcli plan`` compares: 4, 3 and 2 bits."""
        return ({"bits": 4}, {"bits": 3}, {"bits": 2})

    @property
    def needs_calibration(self) -> bool:
        """Always: codebooks are trained on the keys and values of text."""
        return True

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model without a cache that grows by keys and values, or whose heads are too small for the bits."""
        self._targets(model)

    def _targets(self, model: PreTrainedModel) -> Targets:
        from passes.kv_pq import layout, targets

        found = targets.find(model)
        size = found.shape.head_dim
        least = math.ceil(size / layout.MOST_CHANNELS) + self.parameters.gains
        if self.parameters.codes(size) < least:
            raise PassError(
                f"bits={self.parameters.bits:g} is {self.parameters.codes(size)} codes a vector of head_dim {size}, "
                f"and it takes at least {least}; give bits={8 * least / size:g} or more"
            )
        return found

    def plan(self, profile: ModelProfile) -> Prediction:
        """Predict bytes, times and memory; see :mod:`passes.kv_pq.plan`."""
        from passes.kv_pq.plan import predict

        return predict(self.parameters, profile, self._targets(profile.model))

    def apply(self, model: PreTrainedModel, context: PassContext) -> PassRecord:
        """Train codebooks and attach them: afterwards the model makes product-quantized caches."""
        from passes.kv_pq import fit, selfcheck

        parameters, found = self.parameters, self._targets(model)
        text = context.calibration
        batches = calibration_text.batches(
            context, parameters.samples, parameters.length, without="kv-pq trains on text; give a calibration text"
        )
        assert text is not None
        codebooks, trained = fit.train(model, batches, parameters, seed=context.seed, progress=context.progress)
        codebooks.check(model.config)
        selfcheck.check_runs(model, codebooks)
        _attach(model, codebooks)
        setattr(model, _CODEBOOKS, codebooks)
        details = {
            **trained,
            "calibration": {
                "text": text.name,
                "samples": parameters.samples,
                "length": parameters.length,
                "tokens": parameters.samples * parameters.length,
                "random_share": parameters.random,
            },
            "bits_per_value": codebooks.bits_per_value,
            "codebook_bytes": codebooks.bytes,
            "kept_tokens": codebooks.kept_tokens,
            "recent_tokens": codebooks.recent_tokens,
        }
        records = _records(codebooks, trained)
        return PassRecord(
            name=self.name,
            parameters=parameters.model_dump(mode="json"),
            summary=_summary(codebooks),
            seed=context.seed,
            layers=records,
            skipped=found.skipped,
            notes=_notes(codebooks, found),
            details=details,
            versions={name: version(name) for name in ("torch", "transformers")},
        )

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the codebooks beside the weights."""
        codebooks: Codebooks = getattr(model, _CODEBOOKS)
        codebooks.save(folder)

    def check_files(self, folder: Path, model: PreTrainedModel) -> tuple[str, ...]:
        """Hold the codebooks on disk against the model that they are for."""
        from passes.kv_pq.saved import check

        return check(folder / FILE, self._targets(model))

    def load(self, folder: Path, model: PreTrainedModel, options: LoadOptions) -> LoadRecord:
        """Make the model keep its cache as codes, whoever calls it."""
        from passes.kv_pq import cache
        from passes.kv_pq.codebooks import Codebooks

        codebooks = Codebooks.load(folder)
        codebooks.check(model.config)
        _attach(model, codebooks)
        return LoadRecord(notes=(_summary(codebooks), *cache.describe(model)))


def _attach(model: PreTrainedModel, codebooks: Codebooks) -> None:
    """Make the model keep its cache as codes, and say so to instruments."""
    from passes.kv_pq.cache import attach
    from passes.kv_pq.footprint import Footprint
    from profilers import own_cache

    attach(model, codebooks)
    setattr(model, own_cache.ATTRIBUTE, Footprint(model, codebooks))


def _records(codebooks: Codebooks, trained: Mapping[str, Any]) -> tuple[LayerRecord, ...]:
    """Return one record for the keys and one for the values of each layer, with their relative squared error."""
    errors = trained["distortion"]
    return tuple(
        LayerRecord(
            name=f"layers.{index}.{kind}",
            kind=kind,
            bits=getattr(layer, kind).bits_per_value,
            group_size=None,
            error=errors[kind][str(index)],
        )
        for index, layer in codebooks.layers.items()
        for kind in KINDS
    )


def _summary(codebooks: Codebooks) -> str:
    count = len(codebooks.layers)
    return (
        f"KV cache of {count} layer{'s' if count > 1 else ''} in {codebooks.bits_per_value:.4g} bits a value "
        f"(product quantization), the first {codebooks.kept_tokens} and latest {codebooks.recent_tokens} tokens in "
        "full precision"
    )


def _notes(codebooks: Codebooks, found: Targets) -> tuple[str, ...]:
    turned = sum(layer.rope is not None for layer in codebooks.layers.values())
    notes = [
        f"codebooks take {codebooks.bytes / 1e6:.3g} MB, in memory and in {FILE}, whatever the context and the batch; "
        "they are not counted in the bits a value",
        "quality of the result is measured with every key and value quantized but those of the first "
        f"{codebooks.kept_tokens} tokens: stricter than generation, where the prompt attends to itself exactly and the "
        "latest tokens are kept too",
    ]
    if turned:
        notes.append(f"keys of {turned} layers are stored before rotary embedding, and turned when they are read")
    if found.skipped:
        notes.append(f"the cache of {len(found.skipped)} layers is as transformers makes it")
    return tuple(notes)


def __getattr__(name: str) -> Any:
    if name == "PQCache":
        from passes.kv_pq.cache import PQCache

        return PQCache
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
