"""The baselines of the KV-cache benchmarks against closed forms and brute force."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

from tests.benchmarks.kv_baselines.base import Baseline, collect
from tests.benchmarks.kv_baselines.fake import fake_quantized
from tests.benchmarks.kv_baselines.fp8 import FP8
from tests.benchmarks.kv_baselines.kmeans import assign, kmeans
from tests.benchmarks.kv_baselines.million import Million
from tests.benchmarks.kv_baselines.rotated import Rotated, gaussian_grid, lloyd_max, random_rotation
from tests.benchmarks.kv_baselines.transformers_caches import TransformersCache
from tests.benchmarks.kv_baselines.uniform import KIVI, HalfQuadratic, PerToken
from tests.tiny_models import build

Pair = tuple[torch.Tensor, torch.Tensor]
POSITIONS = torch.arange(0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- attention over quantized keys and values -----------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_a_transform_that_changes_nothing_changes_nothing(name: str, implementation: str) -> None:
    model = build(name)
    model.set_attn_implementation(implementation)
    ids = torch.arange(3, 43)[None] % 97
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with fake_quantized(model, lambda layer, keys, values, positions: (keys, values)):
            same = model(ids, use_cache=False).logits
    assert torch.equal(plain, same)
    assert model.config._attn_implementation == implementation


def test_fake_quantized_attention_is_attention_over_what_the_transform_gives() -> None:
    model = build("llama", dtype=torch.float64)
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    layer = model.model.layers[0].self_attn
    outputs = []
    seen = {}

    def transform(index: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> Pair:
        assert positions.tolist() == list(range(4, 20))
        seen[index] = (keys, values)
        return keys.round(decimals=2), values * 0.5

    handle = layer.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with torch.no_grad(), fake_quantized(model, transform):
        model(ids, use_cache=False)
    handle.remove()

    captured: dict[int, Pair] = {}

    def capture(index: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> Pair:
        captured[index] = (keys, values)
        return keys, values

    with torch.no_grad(), fake_quantized(model, capture, kept=0):
        model(ids, use_cache=False)
    keys, values = (x.clone() for x in captured[0])
    assert torch.equal(keys[:, :, 4:], seen[0][0])
    keys[:, :, 4:] = keys[:, :, 4:].round(decimals=2)
    values[:, :, 4:] *= 0.5
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    with torch.no_grad():
        query = layer.q_proj(hidden).view(2, 20, 4, 8).transpose(1, 2)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(20)[None])
        turned = torch.cat([-query[..., 4:], query[..., :4]], -1)
        query = query * cos[:, None] + turned * sin[:, None]
    expected = torch.zeros(2, 20, 4, 8, dtype=torch.float64)
    for row in range(2):
        for head in range(4):
            for position in range(20):
                scores = keys[row, head // 2, : position + 1] @ query[row, head, position] / math.sqrt(8)
                expected[row, position, head] = scores.softmax(0) @ values[row, head // 2, : position + 1]
    assert torch.allclose(outputs[0].view(2, 20, 4, 8), expected, atol=1e-12)


def test_only_the_layers_asked_for_are_transformed() -> None:
    model = build("gemma3")
    seen = set()

    def transform(layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> Pair:
        seen.add(layer)
        return keys, values

    with torch.no_grad(), fake_quantized(model, transform, layers={1, 3}):
        model(torch.ones(1, 12, dtype=torch.long), use_cache=False)
    assert seen == {1, 3}


def test_a_model_that_goes_past_the_interface_is_refused() -> None:
    model = build("falcon")
    with (
        pytest.raises(RuntimeError, match="does not use transformers' attention interface"),
        torch.no_grad(),
        fake_quantized(model, lambda layer, keys, values, positions: (keys, values)),
    ):
        model(torch.ones(1, 12, dtype=torch.long), use_cache=False)


def test_a_cache_and_broken_transforms_are_refused() -> None:
    model = build("llama")
    ids = torch.ones(1, 12, dtype=torch.long)
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        with (
            pytest.raises(ValueError, match="use_cache=False"),
            fake_quantized(model, lambda layer, keys, values, positions: (keys, values)),
        ):
            model(ids, past_key_values=past)
        for broken in (lambda x: x * torch.nan, lambda x: x[:, :, 1:]):
            with (
                pytest.raises(ValueError, match="layer 0: the transform made values"),
                fake_quantized(model, lambda layer, keys, values, positions, f=broken: (keys, f(values))),
            ):
                model(ids, use_cache=False)
    assert model.config._attn_implementation == "sdpa"


def test_collected_keys_are_those_a_cache_holds() -> None:
    model = build("qwen3")
    windows = torch.randint(3, 97, (2, 15), generator=torch.Generator().manual_seed(2))
    samples = collect(model, windows, kept=4)
    with torch.no_grad():
        caches = [model(window[None], use_cache=True).past_key_values for window in windows]
    for layer, (keys, values) in samples.items():
        assert torch.allclose(keys, torch.cat([cache.layers[layer].keys[0, :, 4:] for cache in caches], 1), atol=1e-6)
        held = torch.cat([cache.layers[layer].values[0, :, 4:] for cache in caches], 1)
        assert torch.allclose(values, held, atol=1e-6)
    assert sorted(samples) == [0, 1]


# --- uniform --------------------------------------------------------------------------------------------------------


def uniform_error(group: np.ndarray, bits: int) -> np.ndarray:
    """Return the distance of each element to the nearest of the group's levels."""
    scale = np.float32(np.float16((group.max() - group.min()) / (2**bits - 1)))
    zero = np.float32(np.float16(group.min()))
    levels = zero + scale * np.arange(2**bits)
    return np.asarray(np.abs(group[:, None] - levels).min(1))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (2, 8)])
def test_kivi_quantizes_keys_by_channel_and_values_by_token(bits: int, group: int) -> None:
    keys, values = random(2, 3, 70, 16, seed=1), random(2, 3, 70, 16, seed=2)
    got_keys, got_values = KIVI(bits, group)(0, keys, values, POSITIONS)
    for row in range(2):
        for head in range(3):
            for channel in range(16):
                for start in range(0, 70, group):
                    place = (row, head, slice(start, start + group), channel)
                    error = (keys[place] - got_keys[place]).abs().numpy()
                    assert np.allclose(error, uniform_error(keys[place].numpy(), bits), atol=1e-5)
            for token in range(70):
                for start in range(0, 16, group):
                    place = (row, head, token, slice(start, start + group))
                    error = (values[place] - got_values[place]).abs().numpy()
                    assert np.allclose(error, uniform_error(values[place].numpy(), bits), atol=1e-5)


def test_by_token_quantizes_keys_as_kivi_quantizes_values() -> None:
    keys, values = random(1, 2, 9, 128, seed=1), random(1, 2, 9, 128, seed=2)
    got_keys, got_values = PerToken(4)(0, keys, values, POSITIONS)
    kivi = KIVI(4, 64)
    assert torch.equal(got_keys, kivi(0, values, keys, POSITIONS)[1])
    assert torch.equal(got_values, kivi(0, keys, values, POSITIONS)[1])


@pytest.mark.parametrize("bits", [4, 2])
def test_half_quadratic_moves_zeros_to_lower_absolute_error(bits: int) -> None:
    """Its levels are as far apart as round-to-nearest's, in each group, and lie elsewhere."""
    x = torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(1, 2, 50, 64, generator=torch.Generator().manual_seed(8)).clamp(1e-4, 1 - 1e-4)
    )
    plain, _ = PerToken(bits)(0, x, x, POSITIONS)
    moved, _ = HalfQuadratic(bits)(0, x, x, POSITIONS)
    assert (moved - x).abs().mean() < (plain - x).abs().mean()
    for got, before in zip(moved.reshape(-1, 64), x.reshape(-1, 64), strict=True):
        levels = got.unique()
        step = np.float32(np.float16((before.max() - before.min()).item() / (2**bits - 1)))
        steps = levels.diff() / step
        steps = steps[steps > 0.5]  # the same level may come out with two roundings
        assert torch.allclose(steps, steps.round(), atol=0.02)
        assert round((steps.sum()).item()) <= 2**bits - 1


def test_constant_groups_come_back() -> None:
    x = torch.full((1, 1, 8, 8), 0.25)
    for got in (*KIVI(2, 4)(0, x, -x, POSITIONS), *PerToken(2)(0, x, -x, POSITIONS)):
        assert torch.allclose(got.abs(), x, atol=2e-4)


def test_effective_bits_count_scales_zeros_and_norms() -> None:
    expected: list[tuple[Baseline, int, float]] = [
        (KIVI(4, 64), 64, 4.5),
        (KIVI(4, 32), 64, 5.0),
        (KIVI(3, 32), 128, 4.0),
        (KIVI(2, 64), 32, 2.75),  # values of 32 channels have a scale each: 2.5 and 3
        (PerToken(4), 64, 4.5),
        (PerToken(2), 128, 2.5),
        (FP8(), 64, 8.0),
        (Rotated(4), 64, 4.25),
        (Rotated(3, 2), 128, 3.125),
        (Million(3), 64, 3.0),
    ]
    for method, head_dim, bits in expected:
        assert method.effective_bits(head_dim) == bits


@pytest.mark.parametrize("backend", ["quanto", "HQQ"])
def test_a_backend_of_transformers_is_used_or_its_absence_is_said(backend: str) -> None:
    wanted = {"quanto": ("optimum", "optimum.quanto"), "HQQ": ("hqq",)}[backend]
    if not all(importlib.util.find_spec(module) for module in wanted):
        with pytest.raises(ImportError, match="pip install"):
            TransformersCache(backend, 4)
        return
    x = random(1, 2, 64, 64)
    for got in TransformersCache(backend, 4)(0, x, x, POSITIONS):
        assert 1e-4 < (got - x).square().mean() < 0.02


# --- FP8 ------------------------------------------------------------------------------------------------------------


def test_fp8_takes_the_nearest_e4m3_number_and_saturates() -> None:
    numbers = (
        [0.0]
        + [math.ldexp(1 + mantissa / 8, exponent) for exponent in range(-6, 9) for mantissa in range(8)]
        + [math.ldexp(mantissa / 8, -6) for mantissa in range(1, 8)]
    )
    numbers.remove(480.0)  # its code is NaN
    table = np.array(sorted({sign * number for number in numbers for sign in (-1, 1)}))
    keys = random(2, 40, 8, seed=1)
    method = FP8()
    method.fit({5: (keys, 3 * keys)})
    scale = keys.abs().max().item() / 448
    x = random(1, 2, 40, 8, seed=2) * 2  # some are past what was seen
    got, got_values = method(5, x, 3 * x, POSITIONS)
    error = np.abs(x.double().numpy()[..., None] / scale - table).min(-1)
    assert np.allclose(np.abs((got - x).double().numpy()) / scale, error, rtol=1e-3, atol=1e-4)
    assert got.abs().max().item() == pytest.approx(448 * scale)
    assert torch.allclose(got_values, 3 * got, rtol=1e-5)


# --- rotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_distortion_is_that_of_the_literature(bits: int, distortion: float) -> None:
    """Max 1960, table I. For the optimal quantizer E[x · q(x)] = E[q(x)^2], so distortion = 1 - E[q^2]."""
    levels = lloyd_max(2**bits)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-9)
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    nearest = levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    found = torch.trapezoid((x - nearest).square() * density, x).item()
    assert found == pytest.approx(distortion, rel=1e-3)
    assert 1 - torch.trapezoid(nearest.square() * density, x).item() == pytest.approx(distortion, rel=1e-3)


def test_a_grid_of_pairs_beats_scalars_and_not_the_bound() -> None:
    grid = gaussian_grid(64, 2)
    x = random(1, 20_000, 2, seed=5)
    error = (x[0] - grid[assign(x, grid[None])[0]]).square().mean().item()
    assert 2.0**-6 < error < 0.03454


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_rotations_are_orthogonal_and_random(dim: int) -> None:
    rotation = random_rotation(dim, seed=3)
    assert torch.allclose(rotation @ rotation.T, torch.eye(dim), atol=1e-5)
    assert torch.equal(rotation, random_rotation(dim, seed=3))
    assert not torch.equal(rotation, random_rotation(dim, seed=4))
    if dim == 64:
        assert torch.allclose(rotation.abs(), torch.full((64, 64), 1 / 8))


def distortion_on_the_sphere(levels: torch.Tensor, dim: int) -> float:
    """Of a coordinate of a random vector of length sqrt(dim): its density is that of a Beta variable."""
    x = torch.linspace(-math.sqrt(dim), math.sqrt(dim), 400_001, dtype=torch.float64)
    density = (1 - x.square() / dim).clamp_min(0) ** ((dim - 3) / 2)
    nearest = levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return (torch.trapezoid((x - nearest).square() * density, x) / torch.trapezoid(density, x)).item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turboquant_reaches_the_distortion_of_a_random_direction(bits: int) -> None:
    expected = distortion_on_the_sphere(lloyd_max(2**bits), 64)
    assert expected == pytest.approx({2: 0.1175, 3: 0.03454, 4: 0.009497}[bits], rel=0.1)
    x = random(1, 2, 4000, 64, seed=6) * torch.logspace(-2, 2, 4000)[:, None]
    for sign, got in zip((1, -1), Rotated(bits)(0, x, -x, POSITIONS), strict=True):
        relative = ((got - sign * x).square().sum(-1) / x.square().sum(-1)).mean().item()
        assert relative == pytest.approx(expected, rel=0.01)


def test_the_rotation_makes_outlier_channels_gaussian() -> None:
    x = random(1, 1, 2000, 128, seed=7) * torch.logspace(-1, 1, 128)
    (got, _) = Rotated(4)(0, x, x, POSITIONS)
    assert ((got - x).square().sum(-1) / x.square().sum(-1)).mean().item() < 1.02 * 0.009497
    assert all(torch.isfinite(part).all() for part in Rotated(4)(0, 0 * x, x, POSITIONS))


# --- k-means and MILLION --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "centroids"), [(4, 37), (2, 256), (4, 1024), (1, 256), (3, 300)])
def test_assignment_is_the_nearest_by_brute_force(dim: int, centroids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.kv_baselines.kmeans.BLOCK_CANDIDATES", 3 * 190)  # blocks of unequal size
    x, book = random(3, 500, dim, seed=1), random(3, centroids, dim, seed=2)
    distance = (x[:, :, None].double() - book[:, None].double()).square().sum(-1)
    for points, expected in ((x, distance.argmin(-1)), (x[:, :1], distance[:, :1].argmin(-1))):
        found = assign(points, book)
        assert found.dtype == torch.int64
        # within the operator's rounding: two centroids may be as near as each other
        least, got = (distance[:, : points.shape[1]].gather(2, index[..., None]) for index in (expected, found))
        assert (got - least).max() < 0.01 and (found == expected).float().mean() > 0.98
        assert (got - least).mean() < 1e-4 * least.mean()


def test_assignment_in_torch_and_in_the_operator_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, centroids = random(3, 300, 4, seed=3), random(3, 512, 4, seed=4)
    found = assign(x, centroids)
    monkeypatch.setattr("tests.benchmarks.kv_baselines.kmeans.cpu_kernels.available", lambda: "none here")
    assert (assign(x, centroids) == found).float().mean() > 0.98


def test_kmeans_finds_separate_clusters_and_leaves_no_centroid_empty() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    x = (centres[:, None] + 0.1 * random(4, 50, 2)).reshape(1, 200, 2)
    x = torch.cat([x, x[:, :1].expand(1, 100, 2)], 1)  # equal points: a random start takes some of them twice
    for seed in range(5):
        found = kmeans(x, 8, rounds=30, seed=seed)
        assert torch.equal(found, kmeans(x, 8, rounds=30, seed=seed))
        nearest = assign(x, found)[0]
        error = (x[0] - found[0, nearest]).square().sum(-1).mean().item()
        assert error < 0.05
    few = random(1, 40, 2)
    assert torch.equal(kmeans(few, 40, rounds=3)[0].sort(0).values, few[0].sort(0).values)


def test_million_shares_one_codebook_between_layers_and_heads() -> None:
    samples = {layer: (random(2, 300, 16, seed=layer), random(2, 300, 16, seed=10 + layer)) for layer in range(2)}
    method = Million(4, rounds=10)
    method.fit(samples)
    assert method.codebook_bytes == 2 * 2 * 256 * 16
    keys, values = samples[0][0][None], samples[0][1][None]
    got_keys, got_values = method(0, keys, values, POSITIONS)
    assert torch.equal(got_keys, method(1, keys, values, POSITIONS)[0])
    assert len({tuple(pair) for pair in got_keys[..., 4:6].reshape(-1, 2).tolist()}) <= 256
    for before, after in ((keys, got_keys), (values, got_values)):
        # 1,200 points on 256 centroids of 2 dimensions; a Gaussian's bound for 8 bits on 2 values is 2^-8
        assert (before - after).square().mean() < 0.02
    swapped = method(0, keys.flip(1), values.flip(1), POSITIONS)
    assert torch.equal(swapped[0], got_keys.flip(1))


@pytest.mark.parametrize("method", [KIVI(4, 64), PerToken(4), Rotated(4), Million(4, rounds=2), FP8()])
def test_more_error_than_none_reaches_the_logits_and_less_than_noise(method: Baseline) -> None:
    model = build("llama")
    ids = torch.randint(3, 97, (4, 80), generator=torch.Generator().manual_seed(3))
    if method.needs_samples:
        method.fit(collect(model, ids))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with fake_quantized(model, method):
            found = model(ids, use_cache=False).logits
        with fake_quantized(model, lambda layer, keys, values, positions: (keys * 0, values * 0)):
            nothing = model(ids, use_cache=False).logits
    assert 0 < (found - plain).norm() < 0.2 * (nothing - plain).norm()
