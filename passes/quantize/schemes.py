"""The schemes that the quantize pass knows: bits, formats, group sizes, and which methods may compute them.

=========== ======== =================================== ============================== ======================
scheme      weights  scale of weights                    activations                    format on disk
=========== ======== =================================== ============================== ======================
w4a16       int4     one a group (128, 64 or 32 columns) as they are                    pack-quantized
w8a16       int8     one a row                           as they are                    pack-quantized
w8a8        int8     one a row                           int8, one scale a token        int-quantized
fp8         e4m3     one a row                           e4m3, one scale a token        float-quantized
fp8-block   e4m3     one a block of 128 x 128            e4m3, one scale a 128 columns  float-quantized
nvfp4       e2m1     e4m3 a group of 16, fp32 a tensor   as they are                    nvfp4-pack-quantized
mxfp4       e2m1     e8m0 (a power of two) a group of 32 as they are                    mxfp4-pack-quantized
auto        int      one a group, bits by layer          as they are                    pack-quantized
=========== ======== =================================== ============================== ======================

Nothing here imports torch: ``effcli passes`` reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

SchemeName = Literal["w4a16", "w8a16", "w8a8", "fp8", "fp8-block", "nvfp4", "mxfp4", "auto"]
Method = Literal["gptq", "awq", "rtn", "smoothquant+gptq"]

# Group sizes that fast int4 kernels take (CPU: aten._weight_int4pack_mm_for_cpu; CUDA: Marlin takes 32, 64, 128).
KERNEL_GROUP_SIZES = (32, 64, 128, 256)
# What is tried, in this order, where no group size is asked for: the published presets use 128.
PREFERRED_GROUP_SIZES = (128, 64, 32)
BLOCK = 128
NVFP4_GROUP = 16
MXFP4_GROUP = 32
SCALE_BITS = 16  # of a group's or a row's scale, stored in the dtype of the weights (bf16, fp16)


@dataclass(frozen=True)
class Scheme:
    """One scheme.

    Attributes
    ----------
    name : str
    weight_bits : int or None
        None for ``auto``.
    number : str
        ``int`` or ``float``.
    scales : str
        What shares one scale: ``group``, ``row`` or ``block``.
    fixed_group : int or None
        A group size that the format prescribes.
    methods : tuple of str
        Those allowed, the default first.
    """

    name: str
    weight_bits: int | None
    number: Literal["int", "float"]
    scales: Literal["group", "row", "block"]
    fixed_group: int | None
    methods: tuple[Method, ...]

    @property
    def packed(self) -> bool:
        """Whether a layer is stored as ``weight_packed``, without a plain ``weight``."""
        return self.name not in ("w8a8", "fp8", "fp8-block")


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w4a16", 4, "int", "group", None, ("gptq", "awq", "rtn")),
        Scheme("w8a16", 8, "int", "row", None, ("rtn", "gptq", "awq")),
        Scheme("w8a8", 8, "int", "row", None, ("smoothquant+gptq", "gptq", "rtn")),
        Scheme("fp8", 8, "float", "row", None, ("rtn", "gptq")),
        Scheme("fp8-block", 8, "float", "block", None, ("rtn",)),
        Scheme("nvfp4", 4, "float", "group", NVFP4_GROUP, ("gptq", "rtn")),
        Scheme("mxfp4", 4, "float", "group", MXFP4_GROUP, ("gptq", "rtn")),
        Scheme("auto", None, "int", "group", None, ("gptq", "awq", "rtn")),
    )
}


def stored_bits(
    scheme: str,
    out_features: int,
    in_features: int,
    *,
    bits: int | None,
    group_size: int | None,
    symmetric: bool = True,
) -> float:
    """Return the bits that one layer's weight takes on disk, scales and zero points included.

    Parameters
    ----------
    scheme : str
        Key of :data:`SCHEMES`.
    out_features, in_features : int
        Shape of the weight.
    bits : int or None
        Of one weight; None takes the scheme's.
    group_size : int or None
        Columns that share a scale; None for whole rows.
    symmetric : bool
        Without, each scale comes with a zero point of ``bits`` bits, padded to 32-bit words down the rows.

    Notes
    -----
    Packed integers fill 32-bit words along a row: ``32 ceil(in * bits / 32)`` bits each. The two int64 of
    ``weight_shape`` that the packed format adds to each layer are counted.
    """
    kind = SCHEMES[scheme]
    width = bits or kind.weight_bits
    if width is None:
        raise ValueError(f"scheme '{scheme}' needs the bits of each layer")
    weights = out_features * in_features
    if kind.scales == "block":
        blocks = math.ceil(out_features / BLOCK) * math.ceil(in_features / BLOCK)
        return 8.0 * weights + SCALE_BITS * blocks
    groups = in_features // group_size if group_size else 1
    scales = out_features * groups
    if scheme == "nvfp4":
        return 4.0 * weights + 8 * scales + 32
    if scheme == "mxfp4":
        return 4.0 * weights + 8 * scales
    if kind.number == "float" or scheme == "w8a8":
        return 8.0 * weights + SCALE_BITS * scales
    packed = 32.0 * out_features * math.ceil(in_features * width / 32)
    zero_points = 0 if symmetric else 32 * math.ceil(out_features * width / 32) * groups
    return packed + SCALE_BITS * scales + zero_points + 2 * 64


def weight_arguments(scheme: str, *, bits: int | None, group_size: int | None, symmetric: bool) -> dict[str, Any]:
    """Return the fields of compressed-tensors' ``QuantizationArgs`` for the weights.

    For ``nvfp4`` and ``mxfp4`` the library's presets say more (dtypes of the scales): see :func:`preset`.
    """
    kind = SCHEMES[scheme]
    if kind.scales == "block":
        return {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]}
    strategy = "group" if group_size else "channel"
    arguments: dict[str, Any] = {
        "num_bits": bits or kind.weight_bits,
        "type": kind.number,
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": False,
    }
    return arguments | ({"group_size": group_size} if group_size else {})


def preset(scheme: str) -> str | None:
    """Return the name of compressed-tensors' preset that a scheme is, where it is one as a whole."""
    return {
        "w8a8": "W8A8",
        "fp8": "FP8_DYNAMIC",
        "fp8-block": "FP8_BLOCK",
        "nvfp4": "NVFP4A16",
        "mxfp4": "MXFP4A16",
    }.get(scheme)
