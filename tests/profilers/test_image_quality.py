"""PSNR, SSIM and the spread of figures against closed forms and brute force in float64."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy import stats

from profilers import image_quality
from profilers.base import ProfilerError
from profilers.image_quality import latent_l1, load_lpips, psnr, spread, ssim


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def brute_force_ssim(image: torch.Tensor, reference: torch.Tensor, window: int) -> float:
    """One picture (C, H, W): every window by itself, means and central moments by plain loops over its pixels."""
    weights = torch.tensor(
        [
            [math.exp(-((y - window // 2) ** 2 + (x - window // 2) ** 2) / (2 * 1.5**2)) for x in range(window)]
            for y in range(window)
        ],
        dtype=torch.float64,
    )
    weights = weights / weights.sum()
    values = []
    for ours, theirs in zip(image.double(), reference.double(), strict=True):
        for top in range(ours.shape[0] - window + 1):
            for left in range(ours.shape[1] - window + 1):
                a, b = (item[top : top + window, left : left + window] for item in (ours, theirs))
                mean_a, mean_b = float((weights * a).sum()), float((weights * b).sum())
                variance_a = float((weights * (a - mean_a) ** 2).sum())
                variance_b = float((weights * (b - mean_b) ** 2).sum())
                covariance = float((weights * (a - mean_a) * (b - mean_b)).sum())
                values.append(
                    (2 * mean_a * mean_b + 0.01**2)
                    * (2 * covariance + 0.03**2)
                    / ((mean_a**2 + mean_b**2 + 0.01**2) * (variance_a + variance_b + 0.03**2))
                )
    return sum(values) / len(values)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 3, 8, 8)])
@pytest.mark.parametrize("offset", [0.5, 0.125, 2.0**-10])
def test_psnr_of_a_constant_offset(shape: tuple[int, ...], offset: float) -> None:
    reference = torch.full(shape, 0.25)
    assert psnr(reference + offset, reference).tolist() == pytest.approx([-20 * math.log10(offset)] * 2, abs=1e-12)


def test_psnr_of_a_video_is_that_of_the_error_over_all_frames() -> None:
    reference = torch.zeros(1, 2, 3, 8, 8)
    images = reference.clone()
    images[:, 1] = 0.5  # the first frame is the same to the bit
    assert psnr(images, reference).item() == pytest.approx(-10 * math.log10(0.25 / 2), abs=1e-12)


def test_identical_pictures() -> None:
    images = pictures(2, 3, 16, 16)
    assert psnr(images, images).tolist() == [math.inf, math.inf]
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert latent_l1(images, images).tolist() == [0.0, 0.0]
    assert spread(psnr(images, images)) is None


@pytest.mark.parametrize(("height", "width", "window"), [(16, 13, 11), (11, 11, 11), (10, 14, 9), (7, 8, 7), (2, 5, 1)])
def test_ssim_is_that_of_every_window_by_itself(height: int, width: int, window: int) -> None:
    reference = pictures(2, 3, height, width)
    images = (reference + 0.2 * (pictures(2, 3, height, width, seed=1) - 0.5)).clamp(0, 1)
    expected = [brute_force_ssim(a, b, window) for a, b in zip(images, reference, strict=True)]
    assert ssim(images, reference).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_of_flat_pictures_is_their_luminance() -> None:
    images, reference = torch.full((1, 1, 12, 12), 0.75), torch.full((1, 1, 12, 12), 0.25)
    expected = (2 * 0.75 * 0.25 + 0.01**2) / (0.75**2 + 0.25**2 + 0.01**2)
    assert ssim(images, reference).item() == pytest.approx(expected, abs=1e-9)


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    reference = pictures(1, 3, 40, 33)
    images = (reference + 0.2 * (pictures(1, 3, 40, 33, seed=1) - 0.5)).clamp(0, 1)
    expected = metrics.structural_similarity(
        images[0].double().numpy(), reference[0].double().numpy(), channel_axis=0, data_range=1.0,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(images, reference).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("measure", [psnr, ssim, latent_l1])
@pytest.mark.parametrize("shape", [(3, 3, 12, 12), (3, 2, 3, 12, 12)])
def test_each_sample_is_measured_by_itself(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    images, reference = pictures(*shape), pictures(*shape, seed=1)
    whole = measure(images, reference)
    assert whole.dtype == torch.float64 and whole.shape == (3,)
    alone = [measure(images[i : i + 1], reference[i : i + 1]).item() for i in range(3)]
    assert whole.tolist() == alone
    assert len(set(alone)) == 3


def test_ssim_of_a_video_is_the_mean_over_its_frames() -> None:
    images, reference = pictures(2, 3, 1, 12, 12), pictures(2, 3, 1, 12, 12, seed=1)
    frames = torch.stack([ssim(images[:, frame], reference[:, frame]) for frame in range(3)])
    assert ssim(images, reference).tolist() == pytest.approx(frames.mean(dim=0).tolist(), abs=1e-12)


def test_low_precision_is_compared_exactly() -> None:
    images, reference = pictures(2, 3, 12, 12).bfloat16(), pictures(2, 3, 12, 12, seed=1).bfloat16()
    for measure in (psnr, ssim, latent_l1):
        assert measure(images, reference).tolist() == measure(images.double(), reference.double()).tolist()


def test_latent_l1_is_the_mean_absolute_difference() -> None:
    latents = torch.tensor([[1.0, -2.0], [3.0, 3.0]])
    assert latent_l1(latents, torch.zeros(2, 2)).tolist() == [1.5, 3.0]


@pytest.mark.parametrize("count", [2, 3, 20])
def test_spread_is_students_interval(count: int) -> None:
    values = pictures(count).double()
    found = spread(values)
    low, high = stats.t.interval(
        0.95, count - 1, loc=float(values.mean()), scale=float(values.std()) / math.sqrt(count)
    )
    assert found is not None and found.low is not None and found.high is not None
    assert (found.mean, found.low, found.high) == pytest.approx((float(values.mean()), low, high), abs=1e-9)
    assert (found.samples, found.infinite) == (count, 0)


def test_spread_of_one_sample_has_no_interval() -> None:
    found = spread([30.0])
    assert found is not None
    assert (found.mean, found.low, found.high) == (30.0, None, None)


def test_spread_leaves_infinite_samples_out_and_counts_them() -> None:
    found = spread([30.0, math.inf, 32.0])
    assert found is not None
    assert (found.mean, found.samples, found.infinite) == (31.0, 2, 1)


@pytest.mark.parametrize(("values", "message"), [([], "no samples"), ([1.0, math.nan], "NaN")])
def test_spread_refuses_what_has_no_mean(values: list[float], message: str) -> None:
    with pytest.raises(ProfilerError, match=message):
        spread(values)


@pytest.mark.parametrize(
    ("images", "reference", "message"),
    [
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9), "shape"),
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), "output_type"),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), "no pictures"),
        (torch.full((1, 3, 8, 8), -1.0), torch.zeros(1, 3, 8, 8), "from -1 to -1"),
        (torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 255.0), "from 255 to 255"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), math.nan), torch.zeros(1, 3, 8, 8), "NaN"),
    ],
)
@pytest.mark.parametrize("measure", [psnr, ssim])
def test_what_is_no_picture_is_refused(
    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    reference: torch.Tensor,
    message: str,
) -> None:
    with pytest.raises(ProfilerError, match=message):
        measure(images, reference)


def test_latents_with_nan_are_refused() -> None:
    with pytest.raises(ProfilerError, match="NaN"):
        latent_l1(torch.full((1, 2), math.nan), torch.zeros(1, 2))


def test_lpips_is_absent_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(image_quality, "_alexnet_file", lambda: tmp_path / "alexnet.pth")
    for package, message in ((None, "lpips"), ("torchmetrics", "torchvision"), ("torchvision", "alexnet.pth")):
        installed.add(package or "")
        measure, reason = load_lpips(torch.device("cpu"))
        assert measure is None and reason is not None and message in reason


@pytest.mark.parametrize("package", ["lpips", "torchmetrics"])
@pytest.mark.parametrize("shape", [(2, 1, 12, 12), (2, 3, 12, 12), (2, 4, 3, 12, 12)])
def test_lpips_is_asked_for_each_sample_in_colour(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, shape: tuple[int, ...]
) -> None:
    class Network(torch.nn.Module):
        def __init__(self, **settings: object) -> None:
            super().__init__()
            self.told = settings

        def forward(self, ours: torch.Tensor, theirs: torch.Tensor, **settings: object) -> torch.Tensor:
            told = self.told | settings
            assert told.get("net", told.get("net_type")) == "alex" and told["normalize"] is True
            assert ours.shape == theirs.shape == (1, 3, 12, 12)
            return (ours - theirs).square().mean(dim=(1, 2, 3), keepdim=True)

    path = "torchmetrics.image.lpip" if package == "torchmetrics" else "lpips"
    module = types.ModuleType(path)
    module.__dict__.update({"LPIPS": Network, "LearnedPerceptualImagePatchSimilarity": Network})
    pieces = path.split(".")
    for index in range(1, len(pieces)):
        monkeypatch.setitem(sys.modules, ".".join(pieces[:index]), types.ModuleType(pieces[index - 1]))
    monkeypatch.setitem(sys.modules, path, module)
    installed = {package, "torchvision"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    (tmp_path / "alexnet.pth").touch()
    monkeypatch.setattr(image_quality, "_alexnet_file", lambda: tmp_path / "alexnet.pth")

    measure, reason = load_lpips(torch.device("cpu"))

    images, reference = pictures(*shape), pictures(*shape, seed=1)
    assert measure is not None and reason is None
    expected = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    assert measure(images, reference).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_lpips_refuses_what_is_not_grey_or_colour() -> None:
    with pytest.raises(ProfilerError, match="4 channels"):
        image_quality._colours(torch.zeros(1, 4, 8, 8), torch.device("cpu"))
