"""A product-quantized cache on disk: one safetensors file.

``kv_cache.safetensors`` holds the tensors of every layer, cut to the tokens there are (``layers.3.key_codes``,
``layers.0.conv_states.0``, …), and the left padding of the rows; everything else is JSON in the file's metadata. The
codebooks are not in it: their digest is, so that no other ones are taken to read it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from passes.base import PassError
from passes.kv_pq.codebooks import KINDS, Codebooks
from passes.kv_pq.layer import PQLayer
from passes.kv_pq.layer_views import Rows

if TYPE_CHECKING:
    from passes.kv_pq.cache import PQCache

FILE = "kv_cache.safetensors"
FORMAT = "effcli.kv_cache/1"
_STATES = ("conv_states", "recurrent_states")
_PER_STATE = ("has_previous_state", "conv_kernel_size")


def save(cache: PQCache, folder: Path) -> Path:
    """Write what a cache holds into a folder, which is made if need be.

    Raises
    ------
    PassError
        If it holds a layer of a kind that this format does not know.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        held, said = _taken(index, layer)
        layers.append({"class": type(layer).__name__} | said)
        tensors |= {f"layers.{index}.{name}": tensor.contiguous().cpu() for name, tensor in held.items()}
    compressed = cache.compressed
    if compressed and compressed[0].is_initialized:
        tensors["padding"] = compressed[0].rows.padding.cpu()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    said = {"format": FORMAT, "codebooks": digest(cache.codebooks), "layers": layers}
    save_file(tensors, path, metadata={"effcli": json.dumps(said)})
    return path


def fill(cache: PQCache, folder: Path, device: torch.device) -> None:
    """Fill an empty cache with what :func:`save` wrote.

    Raises
    ------
    PassError
        If there is no file, if it is damaged, or if its codebooks or layers are others.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        raise PassError(f"'{folder}' has no {FILE}; write one with PQCache.save")
    try:
        with safe_open(path, framework="pt", device=str(device)) as opened:
            said = json.loads((opened.metadata() or {}).get("effcli", "{}"))
            if said.get("format") != FORMAT:
                raise PassError(f"'{path}' has format {said.get('format')!r}, and this effcli reads {FORMAT!r}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        if said["codebooks"] != digest(cache.codebooks):
            raise PassError(f"'{path}' was made with other codebooks; give those that the cache was made with")
        found, here = [item["class"] for item in said["layers"]], [type(layer).__name__ for layer in cache.layers]
        if found != here:
            raise PassError(f"'{path}' is the cache of a model with other layers ({found}, here {here})")
        for index, (layer, numbers) in enumerate(zip(cache.layers, said["layers"], strict=True)):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            _put(layer, own, numbers, tensors.get("padding"))
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise PassError(f"'{path}' is damaged ({error}); write it again with PQCache.save") from error


def digest(codebooks: Codebooks) -> str:
    """Return what tells codebooks from others: sha256 over all their tensors and both counts of tokens."""
    found = hashlib.sha256(f"{codebooks.kept_tokens} {codebooks.recent_tokens}".encode())
    for index, layer in sorted(codebooks.layers.items()):
        for kind in KINDS:
            for name, tensor in sorted(getattr(layer, kind).tensors().items()):
                found.update(f"{index} {kind} {name} {tuple(tensor.shape)}".encode())
                found.update(tensor.cpu().contiguous().numpy().tobytes())
        if layer.rope is not None:
            found.update(f"{index} rope {layer.rope.interleaved}".encode())
            found.update(layer.rope.frequencies.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _taken(index: int, layer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the numbers of one layer."""
    if isinstance(layer, PQLayer):
        return layer.saved()
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        held = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
        length = getattr(layer, "cumulative_length", None)
        return held, {} if length is None else {"cumulative_length": length}
    if type(layer) is LinearAttentionLayer:
        held = {
            f"{name}.{state}": tensor
            for name in _STATES
            for state, tensor in getattr(layer, name).items()
            if tensor is not None
        }
        return held, {name: {str(state): value for state, value in getattr(layer, name).items()} for name in _PER_STATE}
    raise PassError(f"layer {index} keeps a '{type(layer).__name__}', which this format does not know; it is not saved")


def _put(layer: Any, tensors: dict[str, torch.Tensor], numbers: dict[str, Any], padding: torch.Tensor | None) -> None:
    """Put back what :func:`_taken` gave."""
    if isinstance(layer, PQLayer):
        if tensors:
            assert padding is not None
            layer.restore(tensors, numbers, Rows.of(padding, layer.kept_tokens))
    elif isinstance(layer, LinearAttentionLayer):
        for name in _PER_STATE:
            setattr(layer, name, {int(state): value for state, value in numbers[name].items()})
        for name, tensor in tensors.items():
            kind, state = name.split(".")
            getattr(layer, kind)[int(state)] = tensor
            getattr(layer, f"is_{kind}_initialized")[int(state)] = True
            if kind == "conv_states":
                layer.dtype, layer.device = tensor.dtype, tensor.device
    elif tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if "cumulative_length" in numbers:
            layer.cumulative_length = numbers["cumulative_length"]
