"""Which layers of a model keep keys and values that can be product-quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.base import PassError, Skipped
from passes.kv_pq.codebooks import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 3
FULL = "full"
_REASONS = {
    "sliding": "keeps a sliding window, whose cache does not grow with the context",
    "hybrid": "keeps recurrent state beside its keys and values",
    "hybrid_sliding": "keeps recurrent state and a sliding window",
    "linear": "linear attention: it keeps a state, not keys and values",
    "none": "keeps nothing between tokens",
}


@dataclass(frozen=True)
class Targets:
    """The layers of a model by what becomes of their cache.

    Attributes
    ----------
    layers : tuple of int
        Indices of the layers that are compressed.
    skipped : tuple of Skipped
        The others, and why.
    shape : ModelShape
    other_bytes_per_token : int
        That layers which stay as they are keep for one token, sliding windows while they fill not counted.
    """

    layers: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    shape: ModelShape
    other_bytes_per_token: int

    def bytes_per_token(self, itemsize: int) -> int:
        """Return what the compressed layers keep for one token in full precision."""
        return 2 * len(self.layers) * self.shape.kv_heads * self.shape.head_dim * itemsize


def find(model: PreTrainedModel) -> Targets:
    """Return a model's targets, from the cache that it makes on the meta device.

    Parameters
    ----------
    model : PreTrainedModel
        On any device; only its config is used.

    Raises
    ------
    PassError
        If no layer can be compressed, or the attention cannot be reached.
    """
    from profilers.attention_capture import uses_attention_interface
    from profilers.base import ProfilerError
    from profilers.cache_prediction import measure_cache
    from profilers.meta import meta_model

    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise PassError(f"{name} is an encoder-decoder; kv-pq compresses the cache of decoders only")
    if not uses_attention_interface(type(model)):
        raise PassError(f"{name} does not use transformers' attention interface, which kv-pq needs to run over codes")
    bare = model if model.device.type == "meta" else meta_model(model.config, model.dtype)
    try:
        found = measure_cache(bare, 1, PROBE_TOKENS).layers
    except ProfilerError as error:
        raise PassError(f"the cache of {name} is not known: {error}") from error
    shape = ModelShape.of(model.config)
    width = 2 * PROBE_TOKENS * shape.kv_heads * shape.head_dim * model.dtype.itemsize
    layers, skipped, others = [], [], 0
    for layer in found:
        where = f"layers.{layer.index}"
        if layer.kind == FULL and layer.bytes == width:
            layers.append(layer.index)
        elif layer.kind == FULL:
            reason = f"keeps {layer.bytes // PROBE_TOKENS} bytes a token, which are not keys and values of its heads"
            skipped.append(Skipped(where, f"{reason} (a latent, or keys and values of different sizes)"))
            others += layer.bytes // PROBE_TOKENS
        else:
            skipped.append(Skipped(where, _REASONS.get(layer.kind, f"its cache is of kind '{layer.kind}'")))
    if not layers:
        reasons = "; ".join(sorted({item.reason for item in skipped}))
        raise PassError(f"{name} has no layer whose cache could be product-quantized: {reasons}")
    if shape.head_dim % 2:
        raise PassError(f"{name} has head_dim {shape.head_dim}, and kv-pq needs an even one; leave kv-pq out")
    return Targets(tuple(layers), tuple(skipped), shape, others)
