"""Load a component whose weights are quantized, which diffusers cannot: the rest of the pipeline is diffusers' own.

::

    config.json ──class.from_config──> on meta ──schemes, compressed──> names and shapes as stored
    *.safetensors ─────────────────────────────────────checked, assigned─────────┘
                                                              └──kernels.repack──> runs

A component counts as quantized where its ``config.json`` has a ``quantization_config`` of compressed-tensors. Plain
diffusers refuses such a folder, since it does not know that method.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effcli.checkpoint_files import CONFIG, read_json
from effcli.errors import SourceError
from passes.base import KernelUse, LoadOptions, MissingExtraError

if TYPE_CHECKING:
    import torch

QUANTIZATION = "quantization_config"
METHOD = "compressed-tensors"
NOT_QUANTIZED = "it is not quantized in the file"
"""What :func:`passes.quantize.kernels.repack` says of the other linear layers."""
_SCALES = ("_scale", "_zero_point", "_shape")
_NOT_SCHEMES = ("version", "quant_method", "quantization_status")


@dataclass(frozen=True)
class QuantizedComponent:
    """A component as loaded.

    Attributes
    ----------
    module : torch.nn.Module
        On its device, in evaluation mode, ready to run.
    kernels : tuple of KernelUse
        What its linear layers run on.
    """

    module: Any
    kernels: tuple[KernelUse, ...]

    def note(self, name: str) -> str:
        """Return one line that says how many layers are quantized and what runs them."""
        counted: Counter[tuple[str, str | None]] = Counter()
        for use in self.kernels:
            if use.fallback_reason != NOT_QUANTIZED:
                counted[use.kernel, use.fallback_reason] += use.layers
        parts = [
            f"{layers} on {kernel}" + ("" if reason is None else f", decompressed: {reason}")
            for (kernel, reason), layers in counted.items()
        ]
        return f"{name} has {sum(counted.values())} quantized layers: {'; '.join(parts)}"


def find(folder: Path, components: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """Return the names of a pipeline's quantized components that are models of diffusers.

    Parameters
    ----------
    folder : Path
        Of the pipeline.
    components : mapping
        Library and class by name.
    """
    found = []
    for name, (library, _) in components.items():
        path = folder / name / CONFIG
        if library == "diffusers" and path.is_file():
            config = read_json(path).get(QUANTIZATION)
            if isinstance(config, dict) and config.get("quant_method") == METHOD:
                found.append(name)
    return tuple(found)


def elements(files: Sequence[Path]) -> Counter[str]:
    """Count elements by stored dtype without scales, which are no weights and say nothing about their dtype."""
    from safetensors import safe_open

    counted: Counter[str] = Counter()
    for path in files:
        with safe_open(path, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if not name.endswith(_SCALES):
                    stored = opened.get_slice(name)
                    count = 1
                    for size in stored.get_shape():
                        count *= size
                    counted[stored.get_dtype()] += count
    return counted


def load(
    folder: Path,
    kind: str,
    files: Sequence[Path],
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernels: Literal["auto", "plain"] = "auto",
) -> QuantizedComponent:
    """Load a quantized component.

    Parameters
    ----------
    folder : Path
        Of the component.
    kind : str
        Its class in diffusers.
    files : sequence of Path
        Its safetensors files.
    device : torch.device
    dtype : torch.dtype
        Of activations, and of weights that are not quantized; what the class keeps in float32 stays so.
    kernels : str
        ``auto``: the fastest that the device has; ``plain``: weights as plain ``dtype`` tensors.

    Raises
    ------
    SourceError
        If the files do not hold the tensors that the configuration describes.
    MissingExtraError
        If compressed-tensors is not installed.
    """
    from passes.quantize.kernels import repack
    from passes.quantize.quiet import quiet_libraries

    config = read_json(folder / CONFIG)
    _require_compressed_tensors()
    with quiet_libraries():
        module = _compressed_on_meta(kind, config, dtype)
        _fill(module, folder, files, device, dtype)
        record = repack(module, LoadOptions(device, dtype, kernels), head="keep")
    # In the configuration as diffusers would have it, so that nobody takes the module for a plain one.
    module.register_to_config(**{QUANTIZATION: config[QUANTIZATION]})
    return QuantizedComponent(module.to(device).eval(), record.kernels)


def _require_compressed_tensors() -> None:
    try:
        import compressed_tensors  # noqa: F401 - whether it can be imported is the question
    except ImportError as error:
        raise MissingExtraError(
            f"a quantized pipeline needs compressed-tensors ({error}); pip install 'effcli[quantize]'"
        ) from None


def _compressed_on_meta(kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return the module with the parameters of the compressed format, without storage; its own buffers have theirs."""
    import diffusers
    from accelerate import init_empty_weights
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    described = {key: value for key, value in config[QUANTIZATION].items() if key not in _NOT_SCHEMES}
    with _default_dtype(dtype), init_empty_weights():
        module = getattr(diffusers, kind).from_config(
            {key: value for key, value in config.items() if key != QUANTIZATION}
        )
    apply_quantization_config(module, QuantizationConfig.model_validate(described))
    for layer in list(module.modules()):
        if getattr(layer, "quantization_scheme", None) is not None:
            compress_module(layer)
            _pack_zero_points(layer)
    return module


def _pack_zero_points(layer: Any) -> None:
    """Give packed zero points their shape as stored, which compressed-tensors leaves out on the meta device."""
    import torch

    zero_points = getattr(layer, "weight_zero_point", None)
    if zero_points is None or not hasattr(layer, "weight_packed"):
        return
    rows, groups = zero_points.shape
    packed = torch.empty(
        math.ceil(rows * layer.quantization_scheme.weights.num_bits / 32), groups, dtype=torch.int32, device="meta"
    )
    layer.weight_zero_point = torch.nn.Parameter(packed, requires_grad=False)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fill(module: Any, folder: Path, files: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
    """Assign every stored tensor, after names, shapes and kinds of number were held against the module's.

    Raises
    ------
    SourceError
        Naming the first tensor that is missing, not known, or of another shape or kind.
    """
    from safetensors.torch import load_file

    expected = module.state_dict()
    stored: dict[str, torch.Tensor] = {}
    for path in files:
        stored.update(load_file(path, device=str(device)))
    if missing := sorted(expected.keys() - stored.keys()):
        raise SourceError(
            f"the weights of '{folder}' lack {len(missing)} tensors, first '{missing[0]}'; fetch the pipeline again"
        )
    if strange := sorted(stored.keys() - expected.keys()):
        raise SourceError(
            f"the weights of '{folder}' hold {len(strange)} tensors that its {CONFIG} does not describe, "
            f"first '{strange[0]}'; fetch the pipeline again"
        )
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in stored.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.is_floating_point() != wanted.is_floating_point():
            raise SourceError(
                f"'{name}' in '{folder}' is {tuple(tensor.shape)} of {tensor.dtype}, and its {CONFIG} describes "
                f"{tuple(wanted.shape)} of {wanted.dtype}; fetch the pipeline again"
            )
        stored[name] = _as_held(name, tensor, wanted, dtype, wide)
    module.load_state_dict(stored, strict=True, assign=True)
    module.requires_grad_(False)


def _as_held(name: str, tensor: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, wide: set[str]) -> torch.Tensor:
    """Return a tensor in the dtype that it is held in: quantized values and their scales as they are stored."""
    import torch

    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or name.endswith(_SCALES):
        return tensor
    return tensor.to(torch.float32 if wide & set(name.split(".")) else dtype)
