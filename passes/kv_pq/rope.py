"""Rotary position embedding (RoFormer, section 3.4) taken off keys and put back on.

A key before rotation has the same distribution at every position, so codebooks fit it better. Only embeddings whose
angles are ``position * frequency`` with fixed frequencies can be undone from the position alone; others are refused by
:func:`find_ropes`, and their keys are kept as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PROBE_TOKENS = 16
_TOLERANCE = 0.02
"""Of cosines and sines, which models compute in their own dtype."""


@dataclass(frozen=True)
class Rope:
    """A rotary embedding with fixed frequencies.

    Attributes
    ----------
    frequencies : torch.Tensor
        Shape (R / 2,), float32, radians a position; the first R channels are rotated, the rest are not.
    interleaved : bool
        Channels 2i and 2i + 1 form a pair; otherwise i and i + R / 2.
    """

    frequencies: torch.Tensor
    interleaved: bool = False

    @property
    def width(self) -> int:
        """R."""
        return 2 * self.frequencies.numel()

    def pairs(self) -> torch.Tensor:
        """Return the channels of each pair, shape (R / 2, 2)."""
        import torch

        count = self.frequencies.numel()
        first = torch.arange(count, device=self.frequencies.device)
        return torch.stack([2 * first, 2 * first + 1] if self.interleaved else [first, first + count], -1)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, shape (..., R / 2), float32, of positions (...)."""
        # In float64 a position of 10^6 keeps its angle; float32 would lose 0.06 radians.
        turned = positions.double()[..., None] * self.frequencies.double()
        return turned.cos().float(), turned.sin().float()

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Return vectors turned to their positions, or back from them.

        Parameters
        ----------
        x : torch.Tensor
            Shape (B, H, T, D).
        positions : torch.Tensor
            Shape (T,) or (B, T), integer.
        back : bool

        Returns
        -------
        torch.Tensor
            As ``x``, in its dtype; computed in float32.
        """
        import torch

        cos, sin = self.angles(positions)
        if positions.ndim == 2:
            cos, sin = cos[:, None], sin[:, None]
        if back:
            sin = -sin
        half, width = self.frequencies.numel(), self.width
        first = slice(0, width, 2) if self.interleaved else slice(0, half)
        second = slice(1, width, 2) if self.interleaved else slice(half, width)
        one, other = x[..., first].float(), x[..., second].float()
        out = torch.empty_like(x)
        out[..., first] = one * cos - other * sin
        out[..., second] = other * cos + one * sin
        out[..., width:] = x[..., width:]
        return out

    def to(self, device: torch.device) -> Rope:
        """Return the same on another device."""
        return Rope(self.frequencies.to(device), self.interleaved)


def find_ropes(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, Rope | str]:
    """Return each layer's rotary embedding, or why its keys cannot be turned back.

    What the model hands its attention for a few tokens is held against ``position * frequency`` of its own buffers,
    and its own function that applies it against both orders of channels; nothing is looked up by architecture.

    Parameters
    ----------
    model : PreTrainedModel
        With weights, in evaluation mode.
    layers : iterable of int
        Indices as the attention modules' ``layer_idx``.
    """
    import torch

    given: dict[int, Any] = {}
    modules: dict[int, torch.nn.Module] = {}
    handles = []

    def note(module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_embeddings") is not None:
            given[module.layer_idx] = kwargs["position_embeddings"]  # type: ignore[index]
            modules[module.layer_idx] = module  # type: ignore[index]

    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            ids = torch.arange(_PROBE_TOKENS, device=model.device)[None] % 7 + 1
            model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    buffers = [
        tensor.detach().float()
        for name, tensor in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and tensor.ndim == 1
    ]
    return {layer: _rope_of(modules.get(layer), given.get(layer), buffers) for layer in layers}


def _rope_of(module: torch.nn.Module | None, given: Any, buffers: list[torch.Tensor]) -> Rope | str:
    import torch

    if module is None or not isinstance(given, tuple) or len(given) != 2:
        return "its attention is given no rotary angles"
    cos, sin = (item.float()[0] if item.ndim == 3 else item.float() for item in given)
    positions = torch.arange(_PROBE_TOKENS, device=cos.device)
    scale = torch.hypot(cos, sin).mean()  # YaRN's attention factor stays on the keys
    for frequencies in buffers:
        for interleaved in (False, True):
            rope = Rope(frequencies, interleaved)
            wanted_cos, wanted_sin = rope.angles(positions)
            if cos.shape[-1] != rope.width:
                continue
            widened = [
                item.repeat_interleave(2, -1) if interleaved else torch.cat([item, item], -1)
                for item in (wanted_cos, wanted_sin)
            ]
            close = all(
                torch.allclose(got / scale, want, atol=_TOLERANCE)
                for got, want in zip((cos, sin), widened, strict=True)
            )
            if close and _applies(module, rope, cos / scale, sin / scale):
                return rope
    return "its angles are not position times a fixed frequency, or its channels are paired in an unknown way"


def _applies(module: torch.nn.Module, rope: Rope, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Say whether the architecture's own function turns a vector as ``rope`` does."""
    import torch

    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    width = getattr(module, "head_dim", None) or rope.width
    if apply is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, _PROBE_TOKENS, max(width, rope.width), generator=generator).to(cos.device)
    try:
        turned = apply(x, x, cos[None], sin[None])[1]
    except (RuntimeError, TypeError, ValueError):
        try:  # partial rotation outside the function
            turned = torch.cat(
                [apply(x[..., : rope.width], x[..., : rope.width], cos[None], sin[None])[1], x[..., rope.width :]], -1
            )
        except (RuntimeError, TypeError, ValueError):
            return False
    expected = rope.rotate(x, torch.arange(_PROBE_TOKENS, device=cos.device))
    return bool(torch.allclose(turned.float(), expected, atol=_TOLERANCE * 5))
