"""Choose the fastest kernel that a device has for each quantized layer, and repack a model that was just read for it.

::

    from_pretrained(folder): weights still as stored ──repack──┬─> PackedLinear: the kernel reads low-bit weights
                                                               └─> nn.Linear: decompressed, with the reason

The file stays portable: what is packed here lives in memory only. Kernels, their conditions and how far each is from
float64: ``docs/passes/kernels.md``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from passes.base import KernelUse, LoadOptions, LoadRecord, MissingExtraError
from passes.quantize.linears import DynamicInt8Linear, Fp8Linear, Int4Linear, Int8Linear, PackedLinear
from passes.quantize.packing import Integers, int4_group_size, own_state, read_integers

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import PreTrainedModel

Kind = Literal["int", "int-dynamic", "float", "float-block", "float-group"]
"""Weights in integers with activations as they are (w4a16, w8a16) or in int8 (w8a8); weights and activations in float8
with scales by row and token (fp8) or by block (fp8-block); float4 in groups (nvfp4, mxfp4)."""

Head = Literal["int8", "keep"]

Picked: TypeAlias = tuple[str, str | None]
"""A kernel, and why it is none that reads packed weights."""
Uses: TypeAlias = Counter[tuple[str, str, str | None]]
"""How many layers, by class, kernel and reason."""

PLAIN = "aten.linear"
INT8_COLUMNS = 16
"""aten._weight_int8pack_mm reads past the end of rows that are no multiple of this long."""
INT_MM_TILE = 8
SCALED_MM_TILE = 16
FP8_CAPABILITY = (8, 9)
INT4_CAPABILITY = (8, 0)
SPREAD = "the weights are spread over several devices: compressed-tensors decompresses them at the first forward"
ROUNDED_ROWS = 4096
"""Rows of a weight that are rounded at a time."""


@dataclass(frozen=True)
class KernelChoice:
    """Which op multiplies by a weight of this shape on this device.

    Attributes
    ----------
    kernel : str
        ``aten._weight_int4pack_mm_for_cpu``, or :data:`PLAIN` where the weight is decompressed.
    reason : str or None
        Why it is decompressed.
    bits : int
    kind : str
        One of :data:`Kind`.
    group_size : int or None
        Columns that share a scale in the file; None for whole rows.
    out_features, in_features : int
    device : torch.device
    dtype : torch.dtype
        Of activations.
    """

    kernel: str
    reason: str | None
    bits: int
    kind: Kind
    group_size: int | None
    out_features: int
    in_features: int
    device: torch.device
    dtype: torch.dtype


def choose(
    bits: int,
    kind: Kind,
    group_size: int | None,
    out_features: int,
    in_features: int,
    device: torch.device,
    dtype: torch.dtype,
) -> KernelChoice:
    """Return the fastest kernel of this device for one layer.

    Parameters
    ----------
    bits : int
        Of one weight.
    kind : str
        One of :data:`Kind`; integers are taken as symmetric.
    group_size : int or None
        Columns that share a scale; None for whole rows.
    out_features, in_features : int
    device : torch.device
    dtype : torch.dtype
        Of activations.
    """
    picked: Picked
    if device.type not in ("cpu", "cuda"):
        picked = PLAIN, f"no low-bit kernel is used on {device.type}"
    elif kind == "int" and bits <= 4:
        picked = _int4(group_size, in_features, device, dtype)
    elif kind == "int":
        picked = _int8(bits, group_size, in_features, dtype)
    elif kind == "int-dynamic":
        picked = _dynamic_int8(bits, group_size, out_features, in_features, device)
    elif kind == "float":
        picked = _fp8(out_features, in_features, device)
    elif kind == "float-block":
        picked = PLAIN, "no kernel for float8 with scales by block is used"
    else:
        picked = PLAIN, f"no product with float4 weights is used on {device.type}"
    return KernelChoice(*picked, bits, kind, group_size, out_features, in_features, device, dtype)


def _int4(group_size: int | None, in_features: int, device: torch.device, dtype: torch.dtype) -> Picked:
    if int4_group_size(group_size, in_features) is None:
        size = f"groups of {group_size} columns" if group_size else f"rows of {in_features} columns"
        return PLAIN, f"the int4 kernel takes groups of 32, 64, 128 or 256 columns, and these are {size}"
    if device.type == "cpu":
        if dtype == torch.bfloat16:
            return "aten._weight_int4pack_mm_for_cpu", None
        return PLAIN, f"the CPU's int4 kernel is slow in {_name(dtype)} (fast in bfloat16)"
    if dtype != torch.bfloat16:
        return PLAIN, f"the CUDA int4 kernel takes bfloat16, not {_name(dtype)}"
    if torch.cuda.get_device_capability(device) < INT4_CAPABILITY:
        return PLAIN, "the CUDA int4 kernel needs compute capability 8.0"
    return "aten._weight_int4pack_mm", None


def _int8(bits: int, group_size: int | None, in_features: int, dtype: torch.dtype) -> Picked:
    if group_size is not None and group_size != in_features:
        return PLAIN, f"the int8 kernel takes one scale a row, and these {bits}-bit weights are in groups"
    if in_features % INT8_COLUMNS:
        return PLAIN, f"the int8 kernel takes multiples of {INT8_COLUMNS} columns, and there are {in_features}"
    if dtype != torch.bfloat16:
        return PLAIN, f"the int8 kernel is slow in {_name(dtype)} (fast in bfloat16)"
    return "aten._weight_int8pack_mm", None


def _dynamic_int8(
    bits: int, group_size: int | None, out_features: int, in_features: int, device: torch.device
) -> Picked:
    if group_size is not None and group_size != in_features:
        return PLAIN, f"the integer product takes one scale a row, and these {bits}-bit weights are in groups"
    if device.type == "cuda" and (out_features % INT_MM_TILE or in_features % INT_MM_TILE):
        return PLAIN, f"the integer product takes multiples of {INT_MM_TILE}, not {out_features} x {in_features}"
    return "aten._int_mm", None


def _fp8(out_features: int, in_features: int, device: torch.device) -> Picked:
    if device.type == "cpu":
        return PLAIN, "this CPU has no product of float8 matrices"
    if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return PLAIN, "products of float8 matrices need compute capability 8.9"
    if out_features % SCALED_MM_TILE or in_features % SCALED_MM_TILE:
        return PLAIN, f"the float8 kernel takes multiples of {SCALED_MM_TILE}, not {out_features} x {in_features}"
    return "aten._scaled_mm", None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_linear(choice: KernelChoice, *, bias: bool = False, seed: int = 0) -> nn.Module:
    """Return a layer of random weights that runs the chosen kernel, for timing it.

    Parameters
    ----------
    choice : KernelChoice
    bias : bool
    seed : int
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns, device, dtype = choice.out_features, choice.in_features, choice.device, choice.dtype
    offset = torch.zeros(rows, device=device, dtype=dtype) if bias else None
    if choice.kernel == PLAIN:
        return _plain_linear(torch.randn(rows, columns, generator=generator).to(device, dtype), offset)
    limit = 1 << (min(choice.bits, 8) - 1)
    values = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8).to(device)
    groups = columns // (choice.group_size or columns)
    scales = (0.5 + torch.rand(rows, groups, generator=generator)).to(device) / (limit * columns**0.5)
    weight = Integers(values, scales, None, choice.bits)
    if choice.kind == "float":
        return Fp8Linear(values.to(dtype).to(torch.float8_e4m3fn), scales, offset, dtype)
    return _packed(choice, weight, offset)


def _packed(choice: KernelChoice, weight: Integers, bias: torch.Tensor | None) -> PackedLinear:
    """Pack an integer weight for the kernel chosen."""
    if choice.kind == "int-dynamic":
        return DynamicInt8Linear(weight, bias, choice.dtype)
    if choice.bits > 4:
        return Int8Linear(weight, bias, choice.dtype)
    size = int4_group_size(choice.group_size, choice.in_features)
    assert size is not None, "choose() has refused this shape"
    return Int4Linear(weight, size, bias, choice.dtype)


def _plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer.eval()


def repack(model: PreTrainedModel | nn.Module, options: LoadOptions, *, head: Head = "int8") -> LoadRecord:
    """Put each compressed layer of a model that transformers has just read on the fastest kernel of its device.

    Layer by layer: at its peak memory holds the checkpoint and one layer. The hook that decompresses the whole model
    at its first forward is taken off.

    Parameters
    ----------
    model : PreTrainedModel or torch.nn.Module
        As ``from_pretrained`` returns it, its compressed-tensors weights still as stored. Changed in place. A model
        that is none of transformers' has no output head to pack: ``head="keep"``.
    options : LoadOptions
        ``kernels="plain"`` decompresses every layer.
    head : str
        ``"int8"``: where packed kernels run on a CPU, an output head that is not quantized runs from a copy rounded
        to int8 with one scale a row. ``"keep"``: it runs as it is stored.

    Returns
    -------
    LoadRecord
        The kernel of every class of linear layers, with the reason where it is not a packed one.

    Raises
    ------
    MissingExtraError
        If the model is compressed and compressed-tensors is not installed.
    """
    uses: Uses = Counter()
    notes: list[str] = []
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            places.setdefault(id(module), []).append(name)
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    for names in places.values():
        module = model.get_submodule(names[0])
        if not _is_compressed(module):
            continue
        if spread:
            uses[layer_class(names[0]), _plain_op(module), SPREAD] += 1
            continue
        ready, kernel, reason = _ready(module, options)
        for name in names:
            model.set_submodule(name, ready)
        uses[layer_class(names[0]), kernel, reason] += 1
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None and not spread:
        hook.remove()
        del model.ct_decompress_hook
    uses.update(_fused_experts(model))
    if head == "int8" and options.kernels == "auto":
        notes += pack_head(model, options)
    if uses:
        uses.update(_others(model, uses))
    kernels = tuple(
        KernelUse(layer_class, kernel, layers, reason) for (layer_class, kernel, reason), layers in uses.items()
    )
    return LoadRecord(kernels=kernels, notes=tuple(notes))


def _is_compressed(module: nn.Module) -> bool:
    status = getattr(module, "quantization_status", None)
    scheme = getattr(module, "quantization_scheme", None)
    return scheme is not None and scheme.weights is not None and getattr(status, "value", status) == "compressed"


def layer_class(name: str) -> str:
    """Return a layer's class for reports: ``experts``, or the last part of its name that is no number."""
    if ".experts." in name:
        return "experts"
    parts = name.split(".")
    return next((part for part in reversed(parts) if not part.isdigit()), parts[-1])


def _ready(module: Any, options: LoadOptions) -> tuple[nn.Module, str, str | None]:
    """Return what replaces a compressed layer, the op that it runs, and why that is no packed kernel."""
    scheme: QuantizationScheme = module.quantization_scheme
    kind, reason = _kind(module, scheme)
    if options.kernels == "plain":
        reason = "plain weights were asked for"
    state = own_state(module)
    if reason is None and kind is not None:
        bits, group_size = int(scheme.weights.num_bits), scheme.weights.group_size
        group_size = group_size if group_size is not None and group_size > 0 else None
        choice = choose(
            bits, kind, group_size, module.out_features, module.in_features, state["weight_scale"].device, options.dtype
        )
        reason = choice.reason
        if reason is None:
            bias = state.get("bias")
            if kind == "float":
                return Fp8Linear(state["weight"], state["weight_scale"], bias, options.dtype), choice.kernel, None
            return _packed(choice, read_integers(state, scheme), bias), choice.kernel, None
    return _decompressed(module, scheme, options), _plain_op(module), reason


def _plain_op(module: nn.Module) -> str:
    return "aten.embedding" if isinstance(module, nn.Embedding) else PLAIN


def _kind(module: Any, scheme: QuantizationScheme) -> tuple[Kind | None, str | None]:
    """Return what kind of product a layer's scheme describes, or why no kernel computes it."""
    weights, inputs = scheme.weights, scheme.input_activations
    if not isinstance(module, nn.Linear):
        return None, "a quantized embedding is looked up in decompressed rows"
    if scheme.output_activations is not None:
        return None, "its outputs are rounded too"
    by_token = inputs is not None and inputs.dynamic is True and inputs.strategy == "token" and inputs.symmetric
    if weights.type == "float":
        if weights.num_bits == 4:
            return "float-group", None
        if weights.strategy == "block":
            return "float-block", None
        return ("float", None) if by_token else (None, "its activations have no scale by token, as the kernel needs")
    if inputs is None:
        if weights.num_bits > 4 and not weights.symmetric:
            return None, "the int8 kernel has no zero points, and these weights have"
        return "int", None
    if not by_token or inputs.num_bits != 8 or inputs.type != "int" or not weights.symmetric:
        return None, "the integer product takes symmetric weights and int8 activations with a scale by token"
    return "int-dynamic", None


def _decompressed(module: Any, scheme: QuantizationScheme, options: LoadOptions) -> nn.Module:
    """Decompress a layer; where activations are rounded too, compressed-tensors' own forward goes on doing that."""
    try:
        from compressed_tensors.compressors.base import decompress_module
    except ImportError:
        raise MissingExtraError(
            "a compressed checkpoint needs compressed-tensors; install it with: pip install 'effcli[quantize]'"
        ) from None
    decompress_module(module)
    for name in [name for name in own_state(module) if name.startswith("weight_")]:
        delattr(module, name)
    weight = module.weight.data.to(options.dtype)
    if isinstance(module, nn.Linear) and scheme.input_activations is None and scheme.output_activations is None:
        return _plain_linear(weight, None if module.bias is None else module.bias.data)
    module.weight = nn.Parameter(weight, requires_grad=False)
    ready: nn.Module = module
    return ready


def _fused_experts(model: PreTrainedModel) -> Uses:
    """Find experts that transformers decompressed itself while it fused them."""
    from passes.quantize.targets import is_fused_experts

    uses: Uses = Counter()
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    config = getattr(compressor, "quantization_config", None)
    if config is None:
        return uses
    from compressed_tensors.utils.match import is_match

    reason = "transformers fuses the experts while it reads them, and decompresses them for that"
    for name, module in model.named_modules():
        expert = f"{name}.0.down_proj"
        if is_fused_experts(module) and any(
            is_match(expert, nn.Linear(1, 1, device="meta"), group.targets, config.ignore or ())
            for group in config.config_groups.values()
            if group.weights is not None
        ):
            uses["experts", "grouped product of transformers", reason] += 1
    return uses


def pack_head(model: PreTrainedModel, options: LoadOptions) -> list[str]:
    """Run an output head that is not quantized from an int8 copy, where the layers run packed on a CPU.

    Returns
    -------
    list of str
        A note that says so; empty where the head stays as it is.
    """
    layer = model.get_output_embeddings()
    packed = any(isinstance(module, PackedLinear) for module in model.modules())
    if type(layer) is not nn.Linear or not packed or layer.weight.device.type != "cpu":
        return []
    choice = choose(8, "int", None, layer.out_features, layer.in_features, layer.weight.device, options.dtype)
    if choice.reason is not None:
        return []
    tied = layer.weight is getattr(model.get_input_embeddings(), "weight", None)
    ready = Int8Linear(round_rows(layer.weight.data, 8, None, options.dtype), layer.bias, options.dtype)
    if tied:
        ready.packed_parameters -= layer.weight.numel()
    model.set_output_embeddings(ready)
    beside = " beside the embedding that it is tied to" if tied else ""
    return [
        f"the output head, {layer.out_features} x {layer.in_features}, runs from an int8 copy with one scale a row, "
        f"made while loading{beside}"
    ]


def quantize_linear(layer: nn.Linear, bits: int, group_size: int | None, dtype: torch.dtype) -> nn.Module:
    """Round a layer's weight to the nearest and put it on the kernel of its device, without a file between.

    Parameters
    ----------
    layer : nn.Linear
    bits : int
        2 to 8.
    group_size : int or None
        Columns that share a scale; None for whole rows.
    dtype : torch.dtype
        Of activations.

    Returns
    -------
    nn.Module
        A :class:`passes.quantize.linears.PackedLinear`, or a plain layer where no kernel takes the shape.
    """
    weight = layer.weight.data
    choice = choose(bits, "int", group_size, layer.out_features, layer.in_features, weight.device, dtype)
    rounded = round_rows(weight, bits, group_size, weight.dtype)
    bias = None if layer.bias is None else layer.bias.data
    if choice.reason is not None:
        return _plain_linear(rounded.dequantize(dtype), bias)
    return _packed(choice, rounded, bias)


def round_rows(weight: torch.Tensor, bits: int, group_size: int | None, scale_dtype: torch.dtype) -> Integers:
    """Round a weight to the nearest integers, in blocks of rows so that no float32 copy of the whole is made.

    A scale is the largest absolute value of its group / (2^(bits-1) - 1), rounded to ``scale_dtype`` before the group
    is divided by it.

    Parameters
    ----------
    weight : torch.Tensor
        Shape (out_features, in_features).
    bits : int
    group_size : int or None
        Columns that share a scale; None for whole rows.
    scale_dtype : torch.dtype
    """
    rows, columns = weight.shape
    size = group_size or columns
    limit = (1 << (bits - 1)) - 1
    values = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, columns // size, dtype=scale_dtype, device=weight.device)
    for start in range(0, rows, ROUNDED_ROWS):
        block = weight[start : start + ROUNDED_ROWS].float().view(-1, columns // size, size)
        scale = (block.abs().amax(dim=-1) / limit).clamp_min(torch.finfo(scale_dtype).tiny).to(scale_dtype)
        rounded = (block / scale.float().unsqueeze(-1)).round().clamp_(-limit, limit)
        scales[start : start + ROUNDED_ROWS] = scale
        values[start : start + ROUNDED_ROWS] = rounded.to(torch.int8).view(-1, columns)
    return Integers(values, scales, None, bits)


def _others(model: PreTrainedModel, known: Uses) -> Uses:
    """Count the linear layers that are stored in floating point, and an output head that was packed here."""
    uses: Uses = Counter()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if module is head and isinstance(module, Int8Linear) and not any(key[0] == layer_class(name) for key in known):
            uses[layer_class(name), module.kernel, None] += 1
        elif isinstance(module, nn.Linear) and not any(key[0] == layer_class(name) for key in known):
            uses[layer_class(name), PLAIN, "it is not quantized in the file"] += 1
    return uses
