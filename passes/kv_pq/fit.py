"""Train the codebooks of a model.

::

    text ──> keys, values, Fisher information ──> expected error of each side, by number of codes ──> codes of each side
                                                            └──> parts of each head ──> k-means ──> VectorQuantizer

Everything is weighed by the Fisher information (:mod:`passes.kv_pq.collect`), so a code goes where it lowers the loss
most: to channels, to keys or to values, to one layer or another.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from passes.base import PassError
from passes.kv_pq import layout, residual, targets
from passes.kv_pq.codebooks import KINDS, Codebooks, LayerCodebooks
from passes.kv_pq.collect import Side, collect
from passes.kv_pq.kmeans import train_centroids
from passes.kv_pq.parameters import KVPQParameters
from passes.kv_pq.quantizer import CENTROIDS, VectorQuantizer, nearest
from passes.kv_pq.rope import Rope, find_ropes
from profilers.base import Progress, SilentProgress

VECTORS = 16384
"""Of each head that k-means sees, at most."""
GRADIENT_TOKENS = 4096
"""Of text that is run backwards."""
LEAST_VECTORS = 4 * CENTROIDS
_FLOOR = 1e-3
"""Least weight of a channel, as a share of the mean: Fisher information is estimated from few tokens."""
_NO_WEIGHT = 1e-20
"""Of channels that the loss does not depend on."""


@dataclass
class _Prepared:
    """One side of one layer, ready for k-means but for the number of parts of each head.

    Attributes
    ----------
    y : torch.Tensor
        Shape (H, N, D): centred, in its basis, divided by its gain.
    sample_weight : torch.Tensor
        Shape (H, N).
    weight : torch.Tensor
        Shape (H, D): Fisher information.
    """

    y: torch.Tensor
    sample_weight: torch.Tensor
    weight: torch.Tensor
    mean: torch.Tensor
    gains: torch.Tensor | None
    basis: torch.Tensor | None
    covariances: torch.Tensor
    heads: list[layout.Uneven]


def train(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    parameters: KVPQParameters,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Codebooks, dict[str, Any]]:
    """Return codebooks for a model, and how they were trained.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, on any device.
    batches : sequence of torch.Tensor
        Token ids of calibration text, shape (B, T) each.
    parameters : KVPQParameters
    seed : int
    progress : Progress, optional

    Raises
    ------
    PassError
        If the model cannot be compressed, or the text is too short.
    """
    shown = progress or SilentProgress()
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    found = targets.find(model)
    tokens = sum(batch.shape[0] * (batch.shape[1] - parameters.kept) for batch in batches)
    if tokens < LEAST_VECTORS:
        raise PassError(
            f"{tokens} tokens of calibration text are too few for {CENTROIDS} centroids, which need {LEAST_VECTORS}; "
            "give more samples, or longer ones"
        )
    ropes = _ropes(model, found.layers, parameters)
    batches = _partly_random(batches, parameters.random, _vocabulary(model), generator)
    backward = max(1, GRADIENT_TOKENS // batches[0].numel()) if parameters.weighting == "attention" else 0
    samples = collect(
        model, batches, ropes, kv_heads=found.shape.kv_heads, kept=parameters.kept, vectors=VECTORS,
        gradient_batches=backward, generator=generator, progress=shown,
    )  # fmt: skip
    collected = time.perf_counter()
    budget = parameters.codes(found.shape.head_dim)
    if not parameters.per_head:
        samples = _pooled(samples, generator)
    keys = [(layer, kind) for layer in samples for kind in KINDS]
    # One thread a side: most of the work is in operators that use one core.
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:

        def prepare(key: tuple[int, str]) -> _Prepared:
            layer, kind = key
            return _prepare(samples[layer][kind], ropes[layer] if kind == "keys" else None, parameters, budget, seed)

        prepared = dict(zip(keys, pool.map(prepare, keys), strict=True))
        parts = _shared_out(prepared, budget, parameters)

        def finish(key: tuple[int, str]) -> tuple[VectorQuantizer, float]:
            layer, kind = key
            own = torch.Generator().manual_seed(seed + keys.index(key))  # whichever thread comes first
            quantizer = _trained(prepared[key], parts[key], ropes[layer], kind, parameters, own)
            lost = _distortion(quantizer, samples[layer][kind].x)
            return quantizer if parameters.per_head else _shared(quantizer, found.shape.kv_heads), lost

        quantizers: dict[tuple[int, str], VectorQuantizer] = {}
        distortion: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
        with shown.task("k-means", total=len(keys)) as task:
            for (layer, kind), (quantizer, lost) in zip(keys, pool.map(finish, keys), strict=True):
                for member in [layer] if parameters.per_head else found.layers:
                    quantizers[member, kind] = quantizer
                    distortion[kind][str(member)] = lost
                task.advance()
    layers = {
        layer: LayerCodebooks(quantizers[layer, "keys"], quantizers[layer, "values"], ropes[layer])
        for layer in found.layers
    }
    about = {
        "collect_seconds": collected - started,
        "train_seconds": time.perf_counter() - collected,
        "vectors": next(iter(samples.values()))["keys"].x.shape[1],
        "parts": {kind: {str(layer): _parts_of(quantizers[layer, kind]) for layer in found.layers} for kind in KINDS},
        "distortion": distortion,
    }
    books = Codebooks(
        layers, found.shape, parameters.kept, parameters.recent, {"parameters": parameters.model_dump(mode="json")}
    )
    return books, about


def _partly_random(
    batches: Sequence[torch.Tensor], share: float, vocabulary: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return text (B, T) whose last windows are random tokens: the first ones, text, give the Fisher information."""
    windows = torch.cat(list(batches))
    count = int(share * len(windows))
    if count:
        windows[-count:] = torch.randint(vocabulary, windows[-count:].shape, generator=generator)
    return list(torch.split(windows, len(batches[0])))


def _vocabulary(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size


def _ropes(model: PreTrainedModel, layers: Sequence[int], parameters: KVPQParameters) -> dict[int, Rope | None]:
    """Return the rotary embedding that keys are turned back from, by layer; None where they are kept as they are."""
    ropes: dict[int, Rope | None] = {layer: None for layer in layers}
    if parameters.keys == "after-rope":
        return ropes
    for layer, rope in find_ropes(model, layers).items():
        if isinstance(rope, Rope):
            ropes[layer] = rope.to(torch.device("cpu"))
        elif parameters.keys == "before-rope":
            raise PassError(f"keys of layer {layer} cannot be stored before rotary embedding: {rope}; use keys=auto")
    return ropes


def _prepare(side: Side, rope: Rope | None, parameters: KVPQParameters, budget: int, seed: int) -> _Prepared:
    x = side.x
    heads, count, dim = x.shape
    mean = x.mean(1)
    y = x - mean[:, None]
    basis = None if rope is not None else _basis(y, parameters, seed)
    if basis is not None:
        y = y @ basis
    if side.gradient is None:
        weight = torch.ones(heads, dim)
    else:  # the basis is orthogonal, so gradients turn as vectors do
        weight = (side.gradient if basis is None else side.gradient @ basis).square().mean(1)
        if rope is not None:  # a query meets a pair at every angle, so both channels matter alike
            pairs = rope.pairs()
            weight[:, pairs] = weight[:, pairs].mean(-1, keepdim=True)
        weight = weight.clamp_min(max(_FLOOR * float(weight.mean()), _NO_WEIGHT))
    gains, sample_weight = None, torch.ones(heads, count)
    if parameters.gains:
        size = ((y.square() * weight[:, None]).sum(-1) / weight.sum(-1, keepdim=True)).sqrt()
        gains = _levels(size)
        y = y / gains.gather(1, nearest(size, gains))[..., None]
        sample_weight = size.square()
    z = y * weight.sqrt()[:, None]
    covariances = (z * sample_weight[..., None]).transpose(1, 2) @ z / count
    uneven = [layout.Uneven(covariance, _most_parts(dim, budget)) for covariance in covariances]
    return _Prepared(y, sample_weight, weight, mean, gains, basis, covariances, uneven)


def _basis(y: torch.Tensor, parameters: KVPQParameters, seed: int) -> torch.Tensor | None:
    """Return an orthogonal matrix for each head (H, D, D), or None.

    ``opq``: principal axes (the parametric solution of Optimized Product Quantization, section 3.2). ``hadamard``:
    random signs, then a Hadamard matrix.
    """
    heads, _, dim = y.shape
    if parameters.rotation == "opq":
        axes: torch.Tensor = torch.linalg.eigh(y.transpose(1, 2) @ y).eigenvectors
        return axes.contiguous()
    if parameters.rotation == "hadamard":
        if dim & (dim - 1):
            raise PassError(f"rotation=hadamard needs a head_dim that is a power of two, not {dim}; use rotation=opq")
        signs = torch.randint(0, 2, (heads, dim, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        turned: torch.Tensor = signs * layout.hadamard(dim) / math.sqrt(dim)
        return turned
    return None


def _levels(size: torch.Tensor) -> torch.Tensor:
    """Return 256 ascending gains for sizes (H, N): quantiles, the ends included."""
    ranks = torch.linspace(0, 1, CENTROIDS)
    levels = torch.stack([torch.quantile(row, ranks) for row in size]).clamp_min(1e-6)
    steps = torch.arange(CENTROIDS) * 1e-6 * levels[:, -1:]
    return levels + steps  # strictly ascending where many are equal


def _most_parts(dim: int, budget: int) -> int:
    """Return the most parts of a head, residual ones included."""
    return min(dim + dim // 2, 2 * budget)


def _shared_out(
    prepared: Mapping[tuple[int, str], _Prepared], budget: int, parameters: KVPQParameters
) -> dict[tuple[int, str], list[int]]:
    """Return the number of parts of each head: one code after another goes where it lowers the loss most."""
    overhead = int(parameters.gains)
    dim = next(iter(prepared.values())).y.shape[-1]
    if parameters.allocation == "even":
        return {key: [min(dim, budget - overhead)] * len(side.heads) for key, side in prepared.items()}
    least = math.ceil(dim / layout.MOST_CHANNELS)
    most = _most_parts(dim, budget)
    parts = {key: [least] * len(side.heads) for key, side in prepared.items()}

    def gain(key: tuple[int, str], head: int) -> tuple[float, tuple[int, str], int]:
        now, error = parts[key][head], prepared[key].heads[head].error
        return error(now + 1) - error(now), key, head

    queue = [gain(key, head) for key, heads in parts.items() for head in range(len(heads))]
    left = (budget - overhead - least) * len(queue)
    heapq.heapify(queue)
    while left > 0 and queue:
        _, key, head = heapq.heappop(queue)
        parts[key][head] += 1
        left -= 1
        if parts[key][head] < most:
            heapq.heappush(queue, gain(key, head))
    return parts


def _trained(
    side: _Prepared,
    parts: list[int],
    rope: Rope | None,
    kind: str,
    parameters: KVPQParameters,
    generator: torch.Generator,
) -> VectorQuantizer:
    turned = rope if kind == "keys" else None
    dim = side.y.shape[-1]
    part = torch.stack([_part(side, head, min(dim, count), turned, parameters) for head, count in enumerate(parts)])
    centroids, _ = train_centroids(
        side.y, part, side.weight, side.sample_weight, iterations=parameters.iterations,
        generator=generator,
    )  # fmt: skip
    inverse = None if side.basis is None else side.basis.transpose(1, 2).contiguous()
    found = VectorQuantizer(centroids, part, side.weight, side.mean, side.gains, side.basis, inverse)
    if max(parts) <= dim:
        return found
    refining = torch.stack([side.heads[head].residual_part(count) for head, count in enumerate(parts)])
    return residual.refine(
        found, refining, side.y, side.sample_weight, iterations=parameters.iterations, generator=generator
    )


def _parts_of(quantizer: VectorQuantizer) -> list[int]:
    """Return the parts of each head, residual ones included."""
    return [sum(of) for of in zip(quantizer.parts, quantizer.residual_parts, strict=True)]


def _part(side: _Prepared, head: int, parts: int, rope: Rope | None, parameters: KVPQParameters) -> torch.Tensor:
    """Return the part of each channel of a head: as asked for, else what has the least expected error."""
    dim = side.y.shape[-1]
    covariance = side.covariances[head]
    candidates = {"neighbours": layout.neighbours(dim, parts)}
    if rope is not None:
        candidates["rope"] = layout.rope_pairs(rope.pairs(), dim, parts)
    if parameters.pairing in ("auto", "correlation"):
        candidates["correlation"] = layout.correlated(covariance, parts)
    if parameters.pairing != "auto":
        return candidates.get(parameters.pairing, candidates["neighbours"])
    candidates["uneven"] = side.heads[head].part(parts)
    return min(candidates.values(), key=lambda part: layout.error_of(covariance, part))


def _pooled(samples: Mapping[int, Mapping[str, Side]], generator: torch.Generator) -> dict[int, dict[str, Side]]:
    """Return one layer with one head that has a share of the vectors of all, under the first layer's index."""
    first = next(iter(samples))
    pooled = {}
    for kind in KINDS:
        sides = [layer[kind] for layer in samples.values()]
        everything = torch.cat([side.x.flatten(0, 1) for side in sides])
        chosen = torch.randperm(everything.shape[0], generator=generator)[:VECTORS]
        gradients = [side.gradient.flatten(0, 1) for side in sides if side.gradient is not None]
        pooled[kind] = Side(everything[chosen][None], torch.cat(gradients)[None] if gradients else None)
    return {first: pooled}


def _shared(quantizer: VectorQuantizer, heads: int) -> VectorQuantizer:
    """Return a quantizer of one head for many."""
    tensors = quantizer.tensors().items()
    return VectorQuantizer(**{name: tensor.expand(heads, *tensor.shape[1:]).contiguous() for name, tensor in tensors})


def _distortion(quantizer: VectorQuantizer, x: torch.Tensor) -> float:
    """Return the relative squared error of vectors (H, N, D), their mean taken off."""
    from passes.kv_pq import attention

    back = quantizer.decode(attention.encode(x[None], quantizer), torch.float32)[0]
    return float((back - x).square().sum() / (x - quantizer.mean[:, None]).square().sum())
