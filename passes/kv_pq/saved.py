"""Hold a file of codebooks against the model that it is for, from the bytes on disk and apart from what wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import PassError

if TYPE_CHECKING:
    import torch

    from passes.kv_pq.targets import Targets

CENTROIDS = 256
KINDS = ("keys", "values")
NEEDED = ("centroids", "part", "weight", "mean")
INVERSE_TOLERANCE = 1e-2
"""Largest entry of basis x inverse - 1 that float32 explains."""


def check(path: Path, found: Targets) -> tuple[str, ...]:
    """Check every tensor: that it is there, its type and shape, and that its values can be what they are for.

    Parameters
    ----------
    path : Path
    found : Targets
        Of the model.

    Returns
    -------
    tuple of str
        One line on what the file holds.

    Raises
    ------
    PassError
        Naming the tensor and what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PassError(f"'{path.name}' cannot be read: {error}") from error
    codes = 0
    expected = {f"layers.{layer}.{kind}" for layer in found.layers for kind in KINDS}
    ropes = {f"layers.{layer}.rope" for layer in found.layers}
    strangers = [name for name in tensors if name.rpartition(".")[0] not in expected and name not in ropes]
    if strangers:
        raise PassError(f"'{path.name}' holds '{sorted(strangers)[0]}', which belongs to no compressed layer")
    for side in sorted(expected):
        parts = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{side}.")}
        codes += _check_side(path.name, side, parts, found.shape.kv_heads, found.shape.head_dim)
    for name in ropes & set(tensors):
        _check_rope(path.name, name, tensors[name], found.shape.head_dim)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    bits = 8 * codes / (len(expected) * found.shape.kv_heads * found.shape.head_dim)
    return (
        f"{path.name}: codebooks of {len(found.layers)} layers, {size / 1e6:.3g} MB, {bits:.4g} bits a cached value; "
        "not counted with the weights",
    )


def _check_side(file: str, side: str, parts: dict[str, torch.Tensor], heads: int, size: int) -> int:
    """Check the tensors of one side of a layer; return its codes a token."""
    import torch

    shapes = {
        "centroids": (heads, CENTROIDS, size),
        "part": (heads, size),
        "weight": (heads, size),
        "mean": (heads, size),
        "gains": (heads, CENTROIDS),
        "basis": (heads, size, size),
        "inverse": (heads, size, size),
        "residual_part": (heads, size),
        "residual_centroids": (heads, CENTROIDS, size),
    }

    def wrong(name: str, what: Any) -> PassError:
        return PassError(f"'{side}.{name}' in '{file}' {what}")

    for name in NEEDED:
        if name not in parts:
            raise wrong(name, "is missing")
    for one, other in (("basis", "inverse"), ("residual_part", "residual_centroids")):
        if (one in parts) != (other in parts):
            raise wrong(other if one in parts else one, "is missing")
    for name, tensor in parts.items():
        if name not in shapes:
            raise wrong(name, "is no part of a codebook")
        kind = torch.int64 if name in ("part", "residual_part") else torch.float32
        if tensor.dtype != kind:
            raise wrong(name, f"is {tensor.dtype}, not {kind}")
        if tuple(tensor.shape) != shapes[name]:
            raise wrong(name, f"has shape {list(tensor.shape)}, the model needs {list(shapes[name])}")
        if not bool(torch.isfinite(tensor).all()):
            raise wrong(name, "holds NaN or infinity")
    part = parts["part"]
    if not all(torch.equal(row.unique(), torch.arange(int(row.max()) + 1)) for row in part):
        raise wrong("part", "does not number the parts of every head from 0 on without a gap")
    codes = int((part.amax(1) + 1).sum()) + heads * ("gains" in parts)
    if "residual_part" in parts:
        refining = parts["residual_part"]
        if (
            not all(torch.equal(row.unique(), torch.arange(int(row.min()), int(row.max()) + 1)) for row in refining)
            or int(refining.min()) < -1
        ):
            raise wrong("residual_part", "does not number the residual parts of every head from 0 on without a gap")
        if bool((parts["residual_centroids"] * (refining < 0)[:, None]).any()):
            raise wrong("residual_centroids", "adds to channels that no residual part refines")
        codes += int((refining.amax(1) + 1).sum())
    if bool((parts["weight"] < 0).any()) or bool((parts["weight"].sum(1) <= 0).any()):
        raise wrong("weight", "has a negative entry, or a head of zeros")
    if "gains" in parts and not (bool((parts["gains"] > 0).all()) and bool((parts["gains"].diff(dim=1) >= 0).all())):
        raise wrong("gains", "are not positive and ascending")
    if "basis" in parts:
        error = (parts["basis"].double() @ parts["inverse"].double() - torch.eye(size)).abs().max().item()
        if not error <= INVERSE_TOLERANCE:
            raise wrong("inverse", f"is not the inverse of the basis (off by {error:.2g})")
    return codes


def _check_rope(file: str, name: str, frequencies: torch.Tensor, size: int) -> None:
    import torch

    if frequencies.dtype != torch.float32 or frequencies.ndim != 1 or not 0 < 2 * frequencies.numel() <= size:
        raise PassError(
            f"'{name}' in '{file}' is {frequencies.dtype} of shape {list(frequencies.shape)}, not at most {size // 2} "
            "float32 frequencies"
        )
    if not bool(torch.isfinite(frequencies).all()):
        raise PassError(f"'{name}' in '{file}' holds NaN or infinity")
