"""Load a resolved source onto a device: choose device and dtype, say why, refuse what does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from effcli.sources import Source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from profilers.base import Progress


@dataclass
class LoadedModel:
    """A model ready to be measured, with everything a report says about where it came from."""

    model: PreTrainedModel
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    source: Source
    device: torch.device
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str
    load_seconds: float | None
    notes: tuple[str, ...]
    fingerprint: str | None
    revision: str | None


def choose_device(name: str) -> tuple[torch.device, str]:
    """Return the device called ``name`` (``auto``: the best one here) and why it was chosen."""
    raise NotImplementedError


def choose_dtype(name: str, config: PreTrainedConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype called ``name`` (``auto``: the checkpoint's where the device has it) and why it was chosen."""
    raise NotImplementedError


def load(
    source: Source,
    *,
    device: str = "auto",
    dtype: str = "auto",
    config_only: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the model, its config and its tokenizer."""
    raise NotImplementedError
