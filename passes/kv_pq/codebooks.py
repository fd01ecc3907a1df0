"""The codebooks of a model's KV cache, as one object and as one safetensors file.

``kv_codebooks.safetensors`` holds, for each compressed layer, the tensors of two
:class:`~passes.kv_pq.quantizer.VectorQuantizer` (``layers.3.keys.centroids``, …) and, where keys are stored before
rotary embedding, its frequencies (``layers.3.rope``). Everything else is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import PassError
from passes.kv_pq.quantizer import VectorQuantizer
from passes.kv_pq.rope import Rope

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FILE = "kv_codebooks.safetensors"
FORMAT = "effcli.kv_codebooks/1"
KINDS = ("keys", "values")


@dataclass(frozen=True)
class ModelShape:
    """What a model must have for codebooks to be its own."""

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> ModelShape:
        """Return the shape of a model's text decoder."""
        text = config.get_text_config(decoder=True)
        return cls(
            model_type=text.model_type,
            layers=text.num_hidden_layers,
            kv_heads=_cached_heads(text),
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        )


def _cached_heads(text: PreTrainedConfig) -> int:
    """Return how many heads of keys a layer caches.

    Falcon says by two switches whether all query heads share one, and repeats those that fewer share before it caches
    them: its ``num_kv_heads`` is not what is cached.
    """
    named = getattr(text, "num_key_value_heads", None)
    if named:
        return int(named)
    shared = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    return 1 if shared else int(text.num_attention_heads)


@dataclass(frozen=True)
class LayerCodebooks:
    """How one layer's cache is stored.

    Attributes
    ----------
    keys, values : VectorQuantizer
    rope : Rope or None
        Given if ``keys`` are of keys before rotary embedding: they are turned back before they are encoded, and
        turned again when they are decoded.
    """

    keys: VectorQuantizer
    values: VectorQuantizer
    rope: Rope | None = None

    def to(self, device: torch.device) -> LayerCodebooks:
        """Return the same on another device."""
        rope = None if self.rope is None else self.rope.to(device)
        return LayerCodebooks(self.keys.to(device), self.values.to(device), rope)


@dataclass(frozen=True)
class Codebooks:
    """The codebooks of a model.

    Attributes
    ----------
    layers : mapping of int to LayerCodebooks
        By layer index; a layer that is not there is not compressed.
    model : ModelShape
    kept_tokens : int
        First tokens of each sequence that stay in full precision.
    recent_tokens : int
        Latest tokens that stay in full precision; they are encoded when that many have gathered.
    about : dict
        How they were trained, JSON-ready.
    """

    layers: Mapping[int, LayerCodebooks]
    model: ModelShape
    kept_tokens: int = 4
    recent_tokens: int = 128
    about: Mapping[str, Any] | None = None

    @property
    def bits_per_value(self) -> float:
        """Stored bits a channel over keys and values of compressed layers: codes and gains."""
        sides = [side for layer in self.layers.values() for side in (layer.keys, layer.values)]
        return 8 * sum(side.codes for side in sides) / sum(side.heads * side.head_dim for side in sides)

    @property
    def bytes(self) -> int:
        """Of all codebooks."""
        return sum(layer.keys.bytes + layer.values.bytes for layer in self.layers.values())

    def to(self, device: torch.device) -> Codebooks:
        """Return the same on another device."""
        return replace(self, layers={index: layer.to(device) for index, layer in self.layers.items()})

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a model that they were not made for.

        Raises
        ------
        PassError
            Naming what differs.
        """
        found = ModelShape.of(config)
        for name, made in asdict(self.model).items():
            has = getattr(found, name)
            if has != made:
                raise PassError(
                    f"these codebooks are for a model with {name} {made}, and this one has {has}; run kv-pq on this "
                    "model"
                )

    def save(self, folder: Path) -> Path:
        """Write ``kv_codebooks.safetensors`` into a folder."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}  # copies: layers may share codebooks, and safetensors refuses that
        for index, layer in self.layers.items():
            for kind in KINDS:
                for name, tensor in getattr(layer, kind).tensors().items():
                    tensors[f"layers.{index}.{kind}.{name}"] = tensor.cpu().contiguous().clone()
            if layer.rope is not None:
                tensors[f"layers.{index}.rope"] = layer.rope.frequencies.cpu().contiguous().clone()
        said = {
            "format": FORMAT,
            "model": asdict(self.model),
            "kept_tokens": self.kept_tokens,
            "recent_tokens": self.recent_tokens,
            "interleaved": [
                index for index, layer in self.layers.items() if layer.rope is not None and layer.rope.interleaved
            ],
            "about": dict(self.about or {}),
        }
        path = folder / FILE
        save_file(tensors, path, metadata={"effcli": json.dumps(said)})
        return path

    @classmethod
    def load(cls, folder: Path) -> Codebooks:
        """Read ``kv_codebooks.safetensors`` from a folder, onto the CPU.

        Raises
        ------
        PassError
            If it is missing, damaged, or of another format.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / FILE
        if not path.is_file():
            raise PassError(f"'{folder}' has no {FILE}; make one with: effcli optimize MODEL --pass kv-pq -o OUT")
        try:
            with safe_open(path, framework="pt") as opened:
                said = json.loads((opened.metadata() or {}).get("effcli", "{}"))
                if said.get("format") != FORMAT:
                    raise PassError(f"'{path}' has format {said.get('format')!r}, and this effcli reads {FORMAT!r}")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return cls._assembled(said, tensors)
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise PassError(f"'{path}' is damaged ({error}); make it again with kv-pq") from error

    @classmethod
    def _assembled(cls, said: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Codebooks:
        sides: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
        ropes = {}
        for name, tensor in tensors.items():
            _, number, *rest = name.split(".")
            if rest == ["rope"]:
                ropes[int(number)] = Rope(tensor, int(number) in said["interleaved"])
            else:
                sides.setdefault(int(number), {kind: {} for kind in KINDS})[rest[0]][rest[1]] = tensor
        layers = {
            index: LayerCodebooks(
                VectorQuantizer(**found["keys"]), VectorQuantizer(**found["values"]), ropes.get(index)
            )
            for index, found in sorted(sides.items())
        }
        return cls(layers, ModelShape(**said["model"]), said["kept_tokens"], said["recent_tokens"], said["about"])
