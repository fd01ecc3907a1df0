"""The handwritten digits that scikit-learn ships, as pictures for a diffusion model, and back to their own size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effcli.errors import BadInputError

if TYPE_CHECKING:
    import torch

SIZE = 32
_SMALL_SIZE = 8
_INK_LEVELS = 16
# A quarter of a small pixel: more would push strokes out of pictures that digits fill from top to bottom.
_SHIFTS = (-1, 0, 1)


@dataclass(frozen=True)
class Digits:
    """The data.

    Attributes
    ----------
    small : Tensor, shape (count, 8, 8), float32
        Ink from 0 to 1.
    labels : Tensor, shape (count,), int64
        The digit.
    sha256 : str
        Of the ink levels and the labels as bytes.
    """

    small: torch.Tensor
    labels: torch.Tensor
    sha256: str


def load() -> Digits:
    """Read the data from the installed scikit-learn; nothing is downloaded.

    Raises
    ------
    BadInputError
        If scikit-learn is not installed.
    """
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadInputError(f"the digits come with scikit-learn ({error}); pip install scikit-learn") from None
    bunch = load_digits()
    levels, labels = bunch.images.astype("uint8"), bunch.target.astype("uint8")
    return Digits(
        torch.from_numpy(levels).float() / _INK_LEVELS,
        torch.from_numpy(labels).long(),
        hashlib.sha256(levels.tobytes() + labels.tobytes()).hexdigest(),
    )


def pictures(small: torch.Tensor) -> torch.Tensor:
    """Return digits as dark ink on white paper.

    Parameters
    ----------
    small : Tensor, shape (count, 8, 8)
        Ink from 0 to 1.

    Returns
    -------
    Tensor, shape (count, 3, 32, 32)
        From -1 (ink) to 1 (paper), three equal channels.
    """
    import torch.nn.functional as functional

    ink = functional.interpolate(small[:, None], size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    return (1 - 2 * ink).repeat(1, 3, 1, 1)


def ink_of(shown: torch.Tensor) -> torch.Tensor:
    """Return the ink of pictures at the size of the data.

    Parameters
    ----------
    shown : Tensor, shape (count, 3, 32, 32)
        From 0 (ink) to 1 (paper), as a pipeline gives with ``output_type="pt"``.

    Returns
    -------
    Tensor, shape (count, 8, 8)
        Ink from 0 to 1.
    """
    import torch.nn.functional as functional

    return 1 - functional.interpolate(shown, size=(_SMALL_SIZE, _SMALL_SIZE), mode="area").mean(dim=1)


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Return every picture moved by up to a pixel each way, paper coming in at the edges.

    Parameters
    ----------
    images : Tensor, shape (count, 3, 32, 32)

    Returns
    -------
    Tensor, shape (9 * count, 3, 32, 32)
        Shift by shift, so that labels repeat as a whole.
    """
    import torch
    import torch.nn.functional as functional

    margin = max(_SHIFTS)
    wide = functional.pad(images, (margin,) * 4, value=1.0)
    height, width = images.shape[-2:]
    moved = [
        wide[..., margin + down : margin + down + height, margin + right : margin + right + width]
        for down in _SHIFTS
        for right in _SHIFTS
    ]
    return torch.cat(moved)
