"""Attention over product-quantized keys and values on the CPU, and encoding, as a small C++ operator.

Its sources stand beside this file and are built once, by torch's extension loader, into torch's extension cache; where
they cannot be, :func:`available` says why and the plain-torch path of :mod:`passes.kv_pq.attention` serves.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from passes.base import PassError
from passes.kv_pq import residual
from passes.kv_pq.by_identity import by_identity
from passes.kv_pq.codebooks import LayerCodebooks
from passes.kv_pq.quantizer import CENTROIDS, VectorQuantizer
from passes.kv_pq.rope import Rope

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_kernels.cpp", "cpu_encoding.cpp"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("cpu_vectors.h", "cpu_decoding.h"))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-std=c++20")
ROPE_BLOCK = 64
"""Tokens that the operator takes at a time (``kBlock`` in ``cpu_vectors.h``)."""
LONGEST = 2047
"""Of a vector in integers of twelve bits (``kLongest`` in ``cpu_vectors.h``)."""
REACH = 2.0
"""How much longer than the longest centroid a vector may be to be encoded in integers."""
_FIRST_ROPE_BLOCKS = 64
_DONE = "loaded"
"""File beside a build that has been loaded once: one that was cut off is never taken for it."""


class Tables(NamedTuple):
    """How the operator reads one side of a layer.

    Attributes
    ----------
    centroids : torch.Tensor
        Where look-up tables fit registers (AVX-512 VBMI): shape (H, D, 3, 256), uint8, the upper three bytes of each
        float32, lowest first. Elsewhere: shape (H, E, 256, 2), float32, two channels of one part together.
    entries : torch.Tensor
        Shape (H, E or D, 3), int32: the part of its head, its first channel's place, its second's (D if there is none).
        Entries of residual parts come last; a place of theirs is D + 1 plus that of the channel they are added to.
    gains : torch.Tensor
        Shape (H, 256), or empty.
    mean : torch.Tensor
        Shape (H, D), or empty if there is none to add.
    inverse : torch.Tensor
        Shape (H, D, D), or empty.
    offsets : torch.Tensor
        Shape (H + 1,), int32: where the codes of each head begin among those of a token.
    """

    centroids: torch.Tensor
    entries: torch.Tensor
    gains: torch.Tensor
    mean: torch.Tensor
    inverse: torch.Tensor
    offsets: torch.Tensor


class EncoderTables(NamedTuple):
    """How the operator seeks nearest centroids.

    Attributes
    ----------
    tables : torch.Tensor
        Shape (H, 256 (D + M)), float32: part after part (256, S + 1), -2 · weight · centroid and its weighted length;
        for a part of one channel 255 middles of sorted centroids, infinity, and the sorted centroids' numbers.
    order : torch.Tensor
        Shape (H, D), int32: channels sorted by part.
    first : torch.Tensor
        Shape (H, M + 1), int32: where each part begins in ``order``; M is the largest of all heads'.
    weight, mean : torch.Tensor
        Shape (H, D).
    basis : torch.Tensor
        Shape (H, D, D), or empty.
    gains : torch.Tensor
        Shape (H, 2, 256), gains and the middles between them, or empty.
    offsets : torch.Tensor
        As in :class:`Tables`.
    scale : torch.Tensor
        Where the processor multiplies integers in pairs (AVX-512 VNNI), else empty: shape (H, D), what channels, in
        ``order``, are multiplied by to become integers of twelve bits.
    pairs : torch.Tensor
        Shape (H, P, 256), int32: two channels of minus a centroid, 16 bits each, the pairs of part after part.
    lengths : torch.Tensor
        Shape (H, M, 256), int32: half of a centroid's square, and in the last eight bits its number.
    """

    tables: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor
    weight: torch.Tensor
    mean: torch.Tensor
    basis: torch.Tensor
    gains: torch.Tensor
    offsets: torch.Tensor
    scale: torch.Tensor
    pairs: torch.Tensor
    lengths: torch.Tensor


class RopeTables(NamedTuple):
    """Rotations within a block (P, 64), of blocks' first positions (blocks, P), and the order of channels (D,)."""

    cos: torch.Tensor
    sin: torch.Tensor
    block_cos: torch.Tensor
    block_sin: torch.Tensor
    order: torch.Tensor


def available() -> str | None:
    """Return why the operator cannot be used here, or None; the first call builds it, which takes about a minute."""
    return _built()


def attend(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    layer: LayerCodebooks,
    *,
    start: torch.Tensor,
    stop: int,
    offset: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over the coded history of one layer.

    Every query sees the slots from ``start`` of its row up to ``stop``. Codes are read once for a KV head, however
    many query heads share it; dequantized vectors exist 64 tokens at a time. Sums are float32; where look-up tables fit
    registers, centroids have 16 significant bits (bfloat16 has 8).

    Parameters
    ----------
    query : torch.Tensor
        Shape (B, Hq, Tq, D), any floating type, with rotary embedding applied.
    key_codes, value_codes : torch.Tensor
        Shape (B, capacity, codes), uint8.
    layer : LayerCodebooks
    start : torch.Tensor
        Shape (B,), int64: the first slot that counts; at least ``offset``.
    stop : int
        The slot after the last that counts.
    offset : torch.Tensor
        Shape (B,), int64: left padding; a key's position is its slot minus this.
    scale : float
        Of scores.
    softcap : float or None
        Scores become ``softcap * tanh(score / softcap)``.

    Returns
    -------
    out : torch.Tensor
        Shape (B, Hq, Tq, D), float32: normalized over the history; 0 where the history is empty.
    lse : torch.Tensor
        Shape (B, Hq, Tq), float32: logarithm of the sum of exponentiated scores; -inf where it is empty.

    Raises
    ------
    PassError
        If the operator cannot be built; :func:`available` says so beforehand.
    """
    _require()
    keys, values = _key_tables(layer), _value_tables(layer.values)
    rope: list[torch.Tensor] = []
    if layer.rope is not None:
        rope = [*_rope_tables(layer.rope, query.shape[-1], stop)]
    out, lse = torch.ops.effcli_kv_pq.attend(
        query, key_codes, value_codes, [*keys], [*values], rope, start, stop, offset, scale, softcap or 0.0
    )
    return out, lse


def encode(x: torch.Tensor, quantizer: VectorQuantizer) -> torch.Tensor:
    """Return the codes of vectors, as :meth:`VectorQuantizer.encode` but for near ties.

    Ties are within float32 rounding; where the processor multiplies integers in pairs, within rounding to a 1,024th of
    the longest centroid's length.

    Parameters
    ----------
    x : torch.Tensor
        Shape (B, H, T, D), any floating type and strides.
    quantizer : VectorQuantizer

    Returns
    -------
    torch.Tensor
        Shape (B, T, codes), uint8.

    Raises
    ------
    PassError
        If the operator cannot be built.
    """
    _require()
    if quantizer.residual_part is not None:
        return residual.encode(x, quantizer, encode)
    codes = torch.ops.effcli_kv_pq.encode(x, *_encoder_tables(quantizer))
    assert torch.is_tensor(codes)
    return codes


def _require() -> None:
    reason = _built()
    if reason is not None:
        raise PassError(f"kv-pq's CPU operator cannot be used ({reason}); use passes.kv_pq.attention instead")


@functools.cache
def _built() -> str | None:
    """Build and load the operator once a process; return why that failed."""
    from filelock import FileLock
    from torch.utils import cpp_extension

    if platform.system() == "Windows":
        return "it needs GCC's or Clang's vector extensions, and this is Windows"
    name = f"effcli_kv_pq_{_digest()}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "filelock"):
            if (folder / _DONE).is_file():
                torch.ops.load_library(folder / f"{name}.so")  # type: ignore[no-untyped-call]
                return None
            if not _ninja_found():
                return "ninja is not installed"
            # torch's own lock outlives a process that was killed, and the next would wait for it for ever.
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name,
                [str(source) for source in SOURCES],
                extra_cflags=[*FLAGS],
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
            (folder / _DONE).touch()
    except (OSError, RuntimeError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()] or str(error).splitlines()
        return f"building it failed: {lines[0].strip() if lines else type(error).__name__}"
    return None


def _ninja_found() -> bool:
    """Say whether torch will find ninja; a virtual environment's own counts, activated or not."""
    from torch.utils import cpp_extension

    own = str(Path(sys.executable).parent)
    if not cpp_extension.is_ninja_available() and (Path(own) / "ninja").is_file():
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), own])
    return bool(cpp_extension.is_ninja_available())


def _digest() -> str:
    """Return what a build depends on, shortened: a cache folder may be shared by machines that differ."""
    parts = [
        *(path.read_text() for path in SOURCES + HEADERS),
        *FLAGS,
        torch.__version__,
        platform.machine(),
        platform.processor(),
    ]
    about = Path("/proc/cpuinfo")
    if about.is_file():
        parts += sorted({line for line in about.read_text().splitlines() if line.startswith(("flags", "Features"))})
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@by_identity
def _key_tables(layer: LayerCodebooks) -> Tables:
    return _tables(layer.keys, layer.rope)


@by_identity
def _value_tables(values: VectorQuantizer) -> Tables:
    return _tables(values, None)


def _tables(side: VectorQuantizer, rope: Rope | None) -> Tables:
    heads, _, dim = side.centroids.shape
    order = torch.arange(dim) if rope is None else _pair_order(rope, dim)
    # Channels of y; those of x are in the order of rotated pairs, and without a basis y's are x's.
    place = order.argsort() if side.inverse is None else torch.arange(dim)
    planes = torch.ops.effcli_kv_pq.planes()
    width = 1 if planes else 2
    per_head: list[list[tuple[int, list[int]]]] = []
    refining: list[list[tuple[int, list[int]]]] = []
    for head, parts in enumerate(side.parts):
        per_head.append(_entries(side.part[head], 0, width))
        if side.residual_part is not None:
            refining.append(_entries(side.residual_part[head], parts, width))
    first_added = max(map(len, per_head))
    count = first_added + max(map(len, refining), default=0)
    entries = torch.zeros(heads, count, 3, dtype=torch.int32)
    entries[..., 1:] = dim
    centroids = torch.zeros(heads, count, CENTROIDS, width)
    for head, found in enumerate(per_head):
        for index, (part, of) in enumerate(found):
            entries[head, index, 0] = part
            entries[head, index, 1 : 1 + len(of)] = place[of].int()
            centroids[head, index, :, : len(of)] = side.centroids[head][:, of]
    if side.residual_centroids is not None:
        for head, found in enumerate(refining):
            for index, (part, of) in enumerate(found, start=first_added):
                entries[head, index, 0] = part
                entries[head, index, 1 : 1 + len(of)] = dim + 1 + place[of].int()
                centroids[head, index, :, : len(of)] = side.residual_centroids[head][:, of]
    none = torch.empty(0)
    mean = side.mean.float()[:, order]
    if rope is not None and side.gains is None and side.inverse is None:  # part of every centroid
        padded = torch.cat([mean, mean.new_zeros(heads, 1)], -1)
        at = entries[:, :first_added, 1 : 1 + width].long()
        centroids[:, :first_added] += padded[torch.arange(heads)[:, None, None], at][:, :, None]
        mean = none
    return Tables(
        _planes(centroids[..., 0], planes) if planes else centroids,
        entries,
        none if side.gains is None else side.gains.float().contiguous(),
        mean.contiguous(),
        none if side.inverse is None else side.inverse.float()[:, :, order].contiguous(),
        torch.tensor(side.offsets, dtype=torch.int32),
    )


def _entries(part: torch.Tensor, first: int, width: int) -> list[tuple[int, list[int]]]:
    """Return codes, numbered from ``first`` on, with at most ``width`` channels (D,) of their parts each."""
    channels = [(part == index).nonzero().flatten().tolist() for index in range(int(part.max()) + 1)]
    return [(first + index, of[i : i + width]) for index, of in enumerate(channels) for i in range(0, len(of), width)]


def _planes(values: torch.Tensor, planes: int) -> torch.Tensor:
    """Return the upper bytes of float32 values (..., 256), rounded, as (..., planes, 256)."""
    dropped = 8 * (4 - planes)
    bits = values.contiguous().view(torch.int32) + (1 << dropped >> 1)
    return torch.stack([bits >> (dropped + 8 * plane) & 0xFF for plane in range(planes)], -2).to(torch.uint8)


def _pair_order(rope: Rope, dim: int) -> torch.Tensor:
    """Return channels: first of all pairs, second of all pairs, those that are not rotated."""
    turned = rope.pairs().t().flatten()
    return torch.cat([turned, torch.arange(rope.width, dim)])


@by_identity
def _kept_ropes(_rope: Rope) -> dict[int, RopeTables]:
    return {}


def _rope_tables(rope: Rope, dim: int, stop: int) -> RopeTables:
    """Return rotations for slots up to ``stop``; the table doubles when it is too short."""
    kept = _kept_ropes(rope)
    needed = stop // ROPE_BLOCK + 1
    found = kept.get(dim)
    if found is None or found.block_cos.shape[0] < needed:
        blocks = max(_FIRST_ROPE_BLOCKS, needed if found is None else max(needed, 2 * found.block_cos.shape[0]))
        cos, sin = rope.angles(torch.arange(ROPE_BLOCK))
        block_cos, block_sin = rope.angles(torch.arange(blocks) * ROPE_BLOCK)
        order = _pair_order(rope, dim).int()
        found = RopeTables(cos.t().contiguous(), sin.t().contiguous(), block_cos, block_sin, order)
        kept[dim] = found
    return found


@by_identity
def _encoder_tables(side: VectorQuantizer) -> EncoderTables:
    heads, _, dim = side.centroids.shape
    order = side.part.argsort(dim=-1, stable=True)
    most = max(side.parts)
    sizes = torch.stack([torch.bincount(row, minlength=most) for row in side.part])
    first = torch.cat([sizes.new_zeros(heads, 1), sizes.cumsum(-1)], -1)
    levels, numbers = side.centroids.float().transpose(1, 2).sort(dim=-1, stable=True)  # (H, D, 256)
    bounds = torch.nn.functional.pad((levels[..., 1:] + levels[..., :-1]) / 2, (0, 1), value=torch.inf)
    of_one = torch.cat([bounds, numbers.float()], -1)
    weighted = side.centroids.float() * side.weight[:, None]
    lengths = weighted * side.centroids
    tables = torch.zeros(heads, CENTROIDS * (dim + most))
    for head, parts in enumerate(side.parts):
        at = 0
        for part in range(parts):
            of = order[head, first[head, part] : first[head, part + 1]]
            if of.numel() == 1:
                table = of_one[head, of[0]]
            else:
                length = lengths[head][:, of].sum(-1, keepdim=True)
                table = torch.cat([-2 * weighted[head][:, of], length], -1).flatten()
            tables[head, at : at + table.numel()] = table
            at += table.numel()
    none = torch.empty(0)
    gains = none
    if side.gains is not None:
        middle = (side.gains[:, 1:] + side.gains[:, :-1]) / 2
        gains = torch.stack([side.gains, torch.cat([middle, middle[:, -1:]], -1)], 1).float().contiguous()
    return EncoderTables(
        tables,
        order.int().contiguous(),
        first.int().contiguous(),
        side.weight.float().contiguous(),
        side.mean.float().contiguous(),
        none if side.basis is None else side.basis.float().contiguous(),
        gains,
        torch.tensor(side.offsets, dtype=torch.int32),
        *(_integers(side, order, first) if torch.ops.effcli_kv_pq.integers() else (none,) * 3),
    )


def _integers(
    side: VectorQuantizer, order: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scale, pairs and lengths of :class:`EncoderTables`."""
    heads, _, dim = side.centroids.shape
    root = side.weight.float().sqrt()
    weighted = side.centroids.float() * root[:, None]
    of_channel = side.part[:, None].expand(-1, CENTROIDS, -1)
    squares = weighted.new_zeros(heads, CENTROIDS, max(side.parts)).scatter_add_(2, of_channel, weighted.square())
    to_integers = LONGEST / REACH / squares.amax(1).sqrt().clamp_min(1e-30)  # (H, M)
    whole = (weighted * to_integers.gather(1, side.part)[:, None]).round()
    halves = squares.zero_().scatter_add_(2, of_channel, whole.square()) / 2  # below 2^23: exact
    number = torch.arange(CENTROIDS, dtype=torch.int32)
    lengths = (halves.round().int() << 8 | number[:, None]).transpose(1, 2).contiguous()
    slots = []
    for head, parts in enumerate(side.parts):
        own, bounds = order[head].tolist(), first[head].tolist()
        taken = []
        for begin, end in zip(bounds[:parts], bounds[1:], strict=False):
            taken += own[begin:end] + [dim] * ((end - begin) % 2)
        slots.append(taken)
    most = max(map(len, slots))
    index = torch.tensor([taken + [dim] * (most - len(taken)) for taken in slots])
    minus = torch.nn.functional.pad(-16 * whole, (0, 1)).int()  # a channel of zeros for parts of odd size
    chosen = minus.gather(2, index[:, None].expand(-1, CENTROIDS, -1)).view(heads, CENTROIDS, -1, 2)
    pairs = chosen[..., 0] & 0xFFFF | chosen[..., 1] << 16
    scale = (root * to_integers.gather(1, side.part)).gather(1, order)
    return scale.contiguous(), pairs.transpose(1, 2).contiguous(), lengths
