"""How close pictures are to those that they should equal: PSNR, SSIM, LPIPS, and the distance of latents.

Each sample gets its own figure, in float64, so that a mean can carry a confidence interval.

References: Wang, Bovik, Sheikh, Simoncelli 2004 (SSIM); Zhang, Isola, Efros, Shechtman, Wang 2018 (LPIPS).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F

from profilers.base import ProfilerError
from profilers.intervals import block_interval

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03

Lpips: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes pictures and references as :func:`psnr` does, returns LPIPS of each sample, shape (B,), float64."""


@dataclass(frozen=True)
class SampleSpread:
    """A mean over samples with its 95 % confidence interval.

    Attributes
    ----------
    mean : float
    low, high : float or None
        Student's t-interval of the mean; None for a single sample.
    samples : int
        Finite ones, those that the mean is over.
    infinite : int
        Samples left out: the PSNR of pictures that are the same to the bit. The mean is lower without them.
    """

    mean: float
    low: float | None
    high: float | None
    samples: int
    infinite: int


def spread(values: Iterable[float] | torch.Tensor) -> SampleSpread | None:
    """Return the mean of independent samples and its 95 % confidence interval (Student's t).

    Parameters
    ----------
    values : iterable of float, or torch.Tensor of shape (samples,)

    Returns
    -------
    SampleSpread or None
        None where every value is infinite.

    Raises
    ------
    ProfilerError
        If there is no value, or one is NaN.
    """
    given = [float(value) for value in values]
    if not given:
        raise ProfilerError("a mean over no samples does not exist; give at least one sample")
    if any(math.isnan(value) for value in given):
        raise ProfilerError("a sample's figure is NaN; look at the pictures that it was computed from")
    finite = [value for value in given if math.isfinite(value)]
    if not finite:
        return None
    mean, interval = block_interval(finite, [1] * len(finite))
    low, high = interval if interval is not None else (None, None)
    return SampleSpread(mean, low, high, len(finite), len(given) - len(finite))


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each sample in dB: -10 log10 of the mean squared error.

    The error of a video is the mean over all its frames, so that frames which are the same to the bit do not make the
    ratio infinite.

    Parameters
    ----------
    images, reference : torch.Tensor
        Values from 0 to 1; shape (B, C, H, W), or (B, F, C, H, W) with F frames.

    Returns
    -------
    torch.Tensor
        Shape (B,), float64, on the CPU. Infinite where a sample is the same as its reference to the bit.

    Raises
    ------
    ProfilerError
        If the shapes differ or are no pictures, or values are NaN or outside 0 … 1.
    """
    _check_pictures(images, reference)
    errors = [(_exact(ours) - _exact(theirs)).square().mean() for ours, theirs in zip(images, reference, strict=True)]
    return -10 * torch.stack(errors).cpu().log10()


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity of each sample, 1 for the same picture.

    As published: Gaussian window of 11 x 11 pixels with a standard deviation of 1.5, K1 = 0.01, K2 = 0.03, a data range
    of 1, weighted (biased) variances, windows that lie wholly inside the picture, the mean over windows and channels.
    Pictures that are smaller than 11 pixels get the largest window of odd size that fits, with the same deviation.

    Parameters
    ----------
    images, reference : torch.Tensor
        Values from 0 to 1; shape (B, C, H, W), or (B, F, C, H, W) with F frames, whose mean is taken.

    Returns
    -------
    torch.Tensor
        Shape (B,), float64, on the CPU.

    Raises
    ------
    ProfilerError
        If the shapes differ or are no pictures, or values are NaN or outside 0 … 1.
    """
    _check_pictures(images, reference)
    found = []
    for ours, theirs in zip(_with_frames(images), _with_frames(reference), strict=True):
        # Frame by frame: a whole video in float64, five times over, is gigabytes.
        frames = [_frame_ssim(_exact(a), _exact(b)) for a, b in zip(ours, theirs, strict=True)]
        found.append(torch.stack(frames).mean())
    return torch.stack(found).cpu()


def latent_l1(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of each sample.

    Parameters
    ----------
    latents, reference : torch.Tensor
        Shape (B, …), any range.

    Returns
    -------
    torch.Tensor
        Shape (B,), float64, on the CPU.

    Raises
    ------
    ProfilerError
        If the shapes differ, or values are NaN or infinite.
    """
    _check_same_shape(latents, reference)
    for name, tensor in (("latents", latents), ("reference latents", reference)):
        if not bool(torch.isfinite(tensor).all()):
            raise ProfilerError(f"the {name} hold NaN or infinity; try another --dtype or more sampling steps")
    differences = [
        (_exact(ours) - _exact(theirs)).abs().mean() for ours, theirs in zip(latents, reference, strict=True)
    ]
    return torch.stack(differences).cpu()


def load_lpips(device: torch.device) -> tuple[Lpips | None, str | None]:
    """Return LPIPS with an AlexNet on ``device``, or None and the reason; nothing is ever downloaded.

    It needs the package ``lpips`` or ``torchmetrics``, torchvision, and AlexNet's weights in torch's hub folder. Grey
    pictures are repeated over three channels, as the network wants colours.

    Parameters
    ----------
    device : torch.device
        Where the network runs, in float32.

    Returns
    -------
    tuple
        The function, and why there is none; one of both is None.
    """
    package = next((name for name in ("lpips", "torchmetrics") if importlib.util.find_spec(name)), None)
    if package is None:
        return None, "neither 'lpips' nor 'torchmetrics' is installed: pip install lpips"
    if importlib.util.find_spec("torchvision") is None:
        return None, f"'{package}' needs torchvision, which is not installed: pip install torchvision"
    weights = _alexnet_file()
    if not weights.is_file():
        return None, f"AlexNet's weights are not at '{weights}', and they are not downloaded unasked"
    network = _lpips_network(package, device)

    def measure(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        _check_pictures(images, reference)
        found = []
        with torch.inference_mode():
            for ours, theirs in zip(_with_frames(images), _with_frames(reference), strict=True):
                pairs = zip(_colours(ours, device), _colours(theirs, device), strict=True)
                frames = [network(a[None], b[None]).double().mean() for a, b in pairs]
                found.append(torch.stack(frames).mean().cpu())
        return torch.stack(found)

    return measure, None


def _alexnet_file() -> Path:
    """Return where torchvision keeps the weights of the AlexNet that LPIPS is built on."""
    weights = import_module("torchvision.models").AlexNet_Weights.IMAGENET1K_V1
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name


def _lpips_network(package: str, device: torch.device) -> Lpips:
    """Return either package's function of (pictures, references) from 0 to 1, both (1, 3, H, W)."""
    if package == "lpips":
        network = import_module("lpips").LPIPS(net="alex", verbose=False).to(device).eval()
        return functools.partial(network, normalize=True)
    similarity = import_module("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
    metric: Lpips = similarity(net_type="alex", normalize=True).to(device).eval()
    return metric


def _colours(frames: torch.Tensor, device: torch.device) -> torch.Tensor:
    if frames.shape[1] not in (1, 3):
        raise ProfilerError(f"LPIPS is for grey or colour pictures, not for {frames.shape[1]} channels; leave it out")
    return frames.to(device, torch.float32).expand(-1, 3, -1, -1)


def _with_frames(images: torch.Tensor) -> torch.Tensor:
    """Return the pictures as (B, F, C, H, W)."""
    return images if images.dim() == 5 else images.unsqueeze(1)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float64, where it is if that device has float64."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device).double()


def _frame_ssim(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the mean SSIM over windows and channels of one picture, shape (C, H, W)."""
    shortest = min(image.shape[-2:])
    window = min(SSIM_WINDOW, shortest - (shortest + 1) % 2)
    offsets = torch.arange(window, dtype=image.dtype, device=image.device) - (window - 1) / 2
    kernel = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()

    def weighted(values: torch.Tensor) -> torch.Tensor:
        rows = F.conv2d(values.unsqueeze(1), kernel.view(1, 1, -1, 1))
        return F.conv2d(rows, kernel.view(1, 1, 1, -1))

    mean, other_mean = weighted(image), weighted(reference)
    variance = weighted(image.square()) - mean.square()
    other_variance = weighted(reference.square()) - other_mean.square()
    covariance = weighted(image * reference) - mean * other_mean
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean * other_mean + c1) / (mean.square() + other_mean.square() + c1)
    return (luminance * (2 * covariance + c2) / (variance + other_variance + c2)).mean()


def _check_pictures(images: torch.Tensor, reference: torch.Tensor) -> None:
    _check_same_shape(images, reference)
    if images.dim() not in (4, 5):
        raise ProfilerError(
            f"shape {tuple(images.shape)} is neither (samples, channels, height, width) nor "
            "(samples, frames, channels, height, width); ask the pipeline for output_type='pt'"
        )
    for tensor in (images, reference):
        if not tensor.is_floating_point():
            raise ProfilerError(f"pictures of dtype {tensor.dtype} are not from 0 to 1; divide them by their maximum")
        low, high = (float(value) for value in torch.aminmax(tensor.detach()))
        if math.isnan(low) or math.isnan(high):
            raise ProfilerError("a picture holds NaN; try another --dtype or more sampling steps")
        if low < 0.0 or high > 1.0:
            raise ProfilerError(
                f"pictures must have values from 0 to 1, not from {low:.4g} to {high:.4g}; "
                "ask the pipeline for output_type='pt'"
            )


def _check_same_shape(ours: torch.Tensor, reference: torch.Tensor) -> None:
    if ours.shape != reference.shape:
        raise ProfilerError(
            f"shape {tuple(ours.shape)} is not that of the reference, {tuple(reference.shape)}; "
            "make both with the same height, width and frames"
        )
    if ours.numel() == 0:
        raise ProfilerError(f"shape {tuple(ours.shape)} holds no pictures; give at least one sample")
