"""Are the measured peaks ceilings? Against NumPy's copy and matrix product, and against ops that models run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from profilers.device import synchronize
from profilers.peaks import Peaks, measure_peaks

REPEATS = 15
CPU_SECONDS = 4.0
NOISE = 1.05
"""Two timings of one thing in one run agree this well on a quiet machine."""
LINEAR_SHAPES = (
    (1, 576, 1536),
    (1, 4096, 4096),
    (16, 2048, 8192),
    (512, 576, 576),
    (512, 2048, 5632),
    (1024, 4096, 4096),
)
ELEMENTS = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)


def best_seconds(device: torch.device, function: Callable[[], object]) -> float:
    """Return the shortest of several runs, in seconds."""
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def bench_spent(peaks: Peaks, device: torch.device) -> dict[str, object]:
    """Report how long measuring took."""
    return {
        "benchmark": "peaks_seconds",
        "seconds": peaks.seconds_spent,
        "flops_per_second": peaks.flops_per_second,
        "memory_bytes_per_second": peaks.memory_bytes_per_second,
        "must_reach": f"<= {CPU_SECONDS} on a CPU",
        "reached": device.type != "cpu" or peaks.seconds_spent <= CPU_SECONDS,
    }


def bench_numpy(peaks: Peaks) -> dict[str, object]:
    """Compare the CPU's float32 peaks with NumPy's (one thread for copies, its BLAS for products)."""
    cpu = torch.device("cpu")
    source = np.random.default_rng(0).standard_normal(1 << 26, dtype=np.float32)
    target = np.empty_like(source)
    copy = 2 * source.nbytes / best_seconds(cpu, lambda: np.copyto(target, source))
    matrix = source[: 2048 * 2048].reshape(2048, 2048)
    product = 2 * 2048**3 / best_seconds(cpu, lambda: matrix @ matrix)
    copy_ratio = peaks.copy_bytes_per_second / copy
    product_ratio = peaks.flops_per_second["float32"] / product
    return {
        "benchmark": "peaks_against_numpy",
        "copy_ratio": copy_ratio,
        "matrix_product_ratio": product_ratio,
        "must_reach": f">= {1 / NOISE:.2f}: a peak is not below what another library reaches",
        "reached": min(copy_ratio, product_ratio) >= 1 / NOISE,
    }


def bench_ceiling(peaks: Peaks, device: torch.device) -> dict[str, object]:
    """Return the largest share of its ceiling that any op of a model reaches."""
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
        compute = peaks.flops_per_second.get(name)
        for tokens, inputs, outputs in LINEAR_SHAPES:
            if compute is None:
                continue
            x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
            x, weight = x.to(device, dtype), weight.to(device, dtype)
            moved = size * (tokens * inputs + inputs * outputs + tokens * outputs)
            needed = max(2 * tokens * inputs * outputs / compute, moved / peaks.bandwidth(moved))
            seconds = best_seconds(device, lambda x=x, weight=weight: F.linear(x, weight))  # type: ignore[misc]
            shares[f"linear {tokens}x{inputs}x{outputs} {name}"] = needed / seconds
        for elements in ELEMENTS:
            a, b = torch.randn(2, elements).to(device, dtype)
            for op, function, moved in (
                ("add", lambda a=a, b=b: a + b, 3 * elements * size),  # type: ignore[misc]
                ("copy", lambda a=a, b=b: a.copy_(b), 2 * elements * size),  # type: ignore[misc]
                ("silu", lambda a=a: F.silu(a), 2 * elements * size),  # type: ignore[misc]
            ):
                needed = moved / peaks.bandwidth(moved)
                shares[f"{op} {elements} {name}"] = needed / best_seconds(device, function)
    highest = max(shares, key=shares.__getitem__)
    return {
        "benchmark": "highest_share_of_a_ceiling",
        "op": highest,
        "share": shares[highest],
        "must_reach": f"<= {NOISE}",
        "reached": shares[highest] <= NOISE,
    }


def main() -> None:
    """Print one JSON line a benchmark."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = measure_peaks(device, [torch.bfloat16, torch.float32])
    print(json.dumps(bench_spent(peaks, device)), flush=True)
    print(json.dumps(bench_ceiling(peaks, device)), flush=True)
    on_cpu = peaks if device.type == "cpu" else measure_peaks(torch.device("cpu"), [torch.float32])
    print(json.dumps(bench_numpy(on_cpu)), flush=True)


if __name__ == "__main__":
    main()
