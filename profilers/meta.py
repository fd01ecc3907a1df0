"""Models without weights: every architecture on the meta device, where tensors have shapes but no storage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

aten = torch.ops.aten


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that ``config`` describes on the meta device, in evaluation mode.

    Parameters
    ----------
    config : PreTrainedConfig
        Of a causal language model, or of an encoder-decoder when ``config.is_encoder_decoder``. It is not changed.
    dtype : torch.dtype
        Floating-point type of the parameters.

    Returns
    -------
    PreTrainedModel
        No tensor of it has storage.

    Raises
    ------
    ValueError
        From transformers, if it has no such architecture.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    return model.to("meta").eval()  # some constructors (torch.normal) do not heed the default device


def _grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Shape of a grouped matrix product: (S, k) x (E, k, n) -> (S, n); torch's own refuses all but bfloat16."""
    groups = offs.shape[0] if offs is not None else a.shape[0]
    shape: tuple[int, ...]
    if a.dim() == 2 and b.dim() == 2:
        shape = (groups, a.shape[0], b.shape[1])
    elif a.dim() == 2:
        shape = (a.shape[0], b.shape[2])
    elif b.dim() == 2:
        shape = (a.shape[1], b.shape[1])
    else:
        shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.empty(shape, dtype=out_dtype or a.dtype, device="meta")


# Ops whose meta kernel in torch refuses what the real kernels take.
META_KERNELS: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: _grouped_mm}


_active: ContextVar[bool] = ContextVar("meta_kernels_active", default=False)


class _MetaKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = META_KERNELS.get(func)
        if kernel is not None and args[0].device.type == "meta":
            return kernel(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def meta_compatible() -> Iterator[None]:
    """Inside this block, ops that torch refuses on the meta device for their dtype work there; others are untouched.

    Nested blocks do nothing: a dispatch mode entered between the two still sees every op.
    """
    if _active.get():
        yield
        return
    token = _active.set(True)
    try:
        with _MetaKernels():  # type: ignore[no-untyped-call]
            yield
    finally:
        _active.reset(token)
