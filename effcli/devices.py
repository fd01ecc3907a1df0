"""Choose the device and the dtype to compute in, and say why."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from effcli.errors import BadInputError, did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
_BFLOAT16_CAPABILITY = (8, 0)


def choose_device(name: str) -> tuple[torch.device, str]:
    """Return the device called ``name`` (``auto``: the GPU where there is one) and why it was chosen.

    Raises
    ------
    BadInputError
        For a name that is no device of this machine.
    """
    import torch

    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        why_no_cuda = ""
    elif torch.version.cuda is None and torch.version.hip is None:
        why_no_cuda = f"{build} is built without CUDA"
    else:
        why_no_cuda = (
            f"{build} is built for CUDA {torch.version.cuda or torch.version.hip} but sees no GPU or no driver for it"
        )
    mps = torch.backends.mps.is_available()
    known = ["auto", "cpu", *(["mps"] if mps else [])]
    if not why_no_cuda:
        known += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in known:
        because = f" ({why_no_cuda})" if name.startswith("cuda") and why_no_cuda else did_you_mean(name, known)
        raise BadInputError(f"no device '{name}' here{because}; use one of: {', '.join(known)}")
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device()), "asked for"
    if name != "auto":
        return torch.device(name), "asked for"
    if not why_no_cuda:
        return torch.device("cuda", torch.cuda.current_device()), "a CUDA GPU is there"
    also = "; the Apple GPU is only used when asked for: --device mps" if mps else ""
    return torch.device("cpu"), f"no CUDA GPU: {why_no_cuda}{also}"


def native_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the floating-point types that ``device`` multiplies matrices in without converting them first."""
    import torch

    native = [torch.float32]
    if device.type == "cuda":
        native.append(torch.float16)
        if torch.cuda.get_device_capability(device) >= _BFLOAT16_CAPABILITY:
            native.append(torch.bfloat16)
    elif device.type == "mps":
        native.append(torch.float16)
    elif device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        if platform.machine().lower() in ("aarch64", "arm64"):
            bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        else:  # the check above also says yes where AVX-512 only emulates bfloat16
            bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if bfloat16:
            native.append(torch.bfloat16)
    return tuple(native)


def choose_dtype(
    name: str,
    config: PreTrainedConfig,
    device: torch.device,
    *,
    stored: str | None = None,
    dequantized_from: str = "",
) -> tuple[torch.dtype, str]:
    """Return the dtype called ``name`` and why it was chosen.

    ``auto`` is the checkpoint's own dtype where the device computes in it natively, else float32. Weights that were
    dequantized have no dtype of their own: bfloat16 where that is native, else float32.

    Parameters
    ----------
    name : str
        ``auto`` or a key of ``DTYPES``.
    config : PreTrainedConfig
    device : torch.device
    stored : str or None
        dtype of the weight files, for a config that names none.
    dequantized_from : str
        The quantized types that the weights had, where they had.

    Raises
    ------
    BadInputError
        For an unknown name.
    """
    import torch

    check_dtype_name(name)
    if name != "auto":
        return getattr(torch, DTYPES[name]), "asked for"
    native = native_dtypes(device)
    if dequantized_from:
        if torch.bfloat16 in native:
            return torch.bfloat16, f"dequantized from {dequantized_from}; {device.type} computes in bfloat16 natively"
        return torch.float32, f"dequantized from {dequantized_from}; {device.type} has no native bfloat16"
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    where = "the config says"
    if own is None and stored is not None:
        own, where = stored, "the weights are stored in"
    if own is None:
        return torch.float32, "neither config nor weights name a dtype"
    if isinstance(own, str):
        own = getattr(torch, own.removeprefix("torch."), torch.float32)
    short = str(own).removeprefix("torch.")
    if own in native:
        return own, f"{where} {short} and {device.type} computes in it natively"
    return torch.float32, f"{where} {short}, in which {device.type} does not compute natively"


def check_dtype_name(name: str) -> None:
    """Refuse a dtype name that is not known, before anything slow.

    Raises
    ------
    BadInputError
    """
    known = ("auto", *DTYPES)
    if name not in known:
        raise BadInputError(f"unknown dtype '{name}'{did_you_mean(name, known)}; use one of: {', '.join(known)}")
