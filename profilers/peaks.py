r"""Measured ceilings of one device: memory bandwidth and matrix-product rate, the two lines of its roofline.

::

    bytes/s                                     FLOP/s
      |----\  L2                                  |         ________  flops_per_second[dtype]
      |     \----\  L3                            |       /
      |           \                               |     /  slope = memory_bytes_per_second
      |            \------ main memory            |   /
      +-------------------- working set           +------------------ FLOP/byte

Never taken from a datasheet. See ``docs/profilers/peaks.md``.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.nn.functional as F

from profilers.base import SilentProgress
from profilers.device import device_name, memory_available_bytes, synchronize

if TYPE_CHECKING:
    from profilers.base import Progress

SMALLEST_WORKING_SET = 256 << 10
"""Bytes; below this, an op's fixed cost hides the bandwidth."""
LARGEST_WORKING_SET = {"cpu": 1 << 30, "cuda": 4 << 30}
"""Bytes; upper bound of the main-memory measurement by device type."""
CACHE_MULTIPLE = 4
"""The main-memory working set is at least this many last-level caches, where memory allows."""
MEMORY_FRACTION = 8
"""No more than one part in this many of the available memory is used."""
GEMV_COLUMNS = 2048
BANDWIDTH_SECONDS = 0.008
"""Timed for each candidate op at each working set, beyond the first run."""
MINIMUM_ROUNDS = 2
GEMM_SECONDS = 2.0
"""Spent on matrix products, all dtypes together."""
GEMM_ROUNDS = 2
"""Times that all shapes are tried: a shared machine can be slow for some tenths of a second."""
GEMM_SHAPES = (
    # (tokens, inputs, outputs) of a linear layer, fewest FLOPs first
    (256, 256, 256),
    (512, 1024, 1024),
    (1024, 1024, 1024),
    (512, 2048, 2048),
    (512, 4096, 4096),
    (2048, 2048, 2048),
    (2048, 4096, 4096),
    (4096, 4096, 4096),
    (2048, 8192, 8192),
    (8192, 8192, 8192),
)
OVERHEAD_SECONDS = 0.02
BUSY_SHARE = 0.1
"""Share of all CPU time taken by other processes, above which a CPU's peaks carry a note."""
TILE_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class WorkingSetBandwidth:
    """Best bandwidth measured with a working set of this size (caches make small ones faster)."""

    working_set_bytes: int
    bytes_per_second: float


@dataclass(frozen=True)
class Seen:
    """Something that ran on the device: what it did and how long it took."""

    name: str
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings.

    Attributes
    ----------
    device : str
        Name of the device they were measured on.
    copy_bytes_per_second : float
        Large copy, bytes read plus bytes written.
    read_bytes_per_second : float
        Large read-only reduction or matrix-vector product, bytes read.
    memory_bytes_per_second : float
        The larger of the two: the slanted line of the roofline, used for MBU and attainable times.
    by_working_set : tuple of WorkingSetBandwidth
        Ascending by size; never increasing in bandwidth (an envelope), ending at the main-memory figure.
    flops_per_second : dict of str to float
        Large matrix product by dtype name (``"bfloat16"``), a multiply-add being 2 FLOPs. A dtype that this device
        cannot multiply is left out.
    op_overhead_seconds : float
        Time of one tiny op, launched back to back: what an op costs when it does nothing.
    seconds_spent : float
        How long measuring took.
    notes : tuple of str
        What makes the figures doubtful: a CPU that other programs used meanwhile, a model that ran faster.
    """

    device: str
    copy_bytes_per_second: float
    read_bytes_per_second: float
    memory_bytes_per_second: float
    by_working_set: tuple[WorkingSetBandwidth, ...]
    flops_per_second: dict[str, float]
    op_overhead_seconds: float
    seconds_spent: float
    notes: tuple[str, ...] = ()

    def bandwidth(self, working_set_bytes: int) -> float:
        """Return the bandwidth ceiling in bytes/s for ops that touch this many bytes.

        Between two measured sizes it is that of the smaller one, so that it is a ceiling and not a fit.
        """
        ceiling = self.by_working_set[0].bytes_per_second
        for level in self.by_working_set:
            if level.working_set_bytes > working_set_bytes:
                break
            ceiling = level.bytes_per_second
        return ceiling

    def merged(self, other: Peaks) -> Peaks:
        """Return the better of two measurements of one device, figure by figure: on a shared machine both vary."""
        copy = max(self.copy_bytes_per_second, other.copy_bytes_per_second)
        read = max(self.read_bytes_per_second, other.read_bytes_per_second)
        sizes = [level.working_set_bytes for level in self.by_working_set]
        rates = self.flops_per_second | {
            dtype: max(rate, self.flops_per_second.get(dtype, 0.0)) for dtype, rate in other.flops_per_second.items()
        }
        return dataclasses.replace(
            self,
            copy_bytes_per_second=copy,
            read_bytes_per_second=read,
            memory_bytes_per_second=max(self.memory_bytes_per_second, other.memory_bytes_per_second),
            by_working_set=_envelope(sizes, [max(self.bandwidth(size), other.bandwidth(size)) for size in sizes]),
            flops_per_second=rates,
            op_overhead_seconds=min(self.op_overhead_seconds, other.op_overhead_seconds),
            seconds_spent=self.seconds_spent + other.seconds_spent,
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    def raised(self, dtype: str, seen: Sequence[Seen]) -> Peaks:
        """Return ceilings that nothing in ``seen`` passes: whatever ran faster than a ceiling shows it was too low.

        Parameters
        ----------
        dtype : str
            Whose matrix-product rate ``seen`` counts towards.
        seen : sequence of Seen
        """
        notes = list(self.notes)
        rates = dict(self.flops_per_second)
        fastest = max(seen, key=lambda run: run.flops / run.seconds, default=None)
        if fastest is not None and dtype in rates and fastest.flops / fastest.seconds > rates[dtype]:
            reached = fastest.flops / fastest.seconds
            notes.append(
                f"the {dtype} ceiling was raised from {rates[dtype]:.3g} to {reached:.3g} FLOP/s, "
                f"at which {fastest.name} ran; the device was slower while its peaks were measured"
            )
            rates[dtype] = reached
        faster = [run for run in seen if run.bytes > self.bandwidth(run.bytes) * run.seconds]
        if faster:
            notes.append(
                f"the bandwidth ceilings were raised to what {len(faster)} kinds of ops reached, "
                f"{faster[0].name} among them; the device was slower while its peaks were measured"
            )
        levels = [
            WorkingSetBandwidth(
                level.working_set_bytes,
                max(
                    [level.bytes_per_second, *(run.bytes / run.seconds for run in faster if self._level(run) >= index)]
                ),
            )
            for index, level in enumerate(self.by_working_set)
        ]
        return dataclasses.replace(
            self,
            by_working_set=tuple(levels),
            memory_bytes_per_second=levels[-1].bytes_per_second,
            flops_per_second=rates,
            notes=tuple(notes),
        )

    def _level(self, run: Seen) -> int:
        """Return the index of the level that :meth:`bandwidth` takes for this run."""
        return max(sum(level.working_set_bytes <= run.bytes for level in self.by_working_set) - 1, 0)


def measure_peaks(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    progress: Progress | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Peaks:
    """Measure this device's ceilings.

    Every figure is the best of several runs and of several ops: a ceiling, not a typical value. It takes about four
    seconds on a CPU whatever the CPU, because slow products stop the search early.

    Parameters
    ----------
    device : torch.device
    dtypes : sequence of torch.dtype
        Floating-point types whose matrix-product rate is wanted; the first is also the type of the matrix-vector
        product among the read-only candidates.
    progress : Progress, optional
    clock : callable
        Returns seconds.

    Returns
    -------
    Peaks
    """
    start = clock()
    cpu_use = _OthersCpuUse()
    stopwatch = _Stopwatch(device, clock)
    supported = [dtype for dtype in dict.fromkeys(dtypes) if _has_matrix_product(device, dtype)]
    sizes = _working_sets(device)
    with (progress or SilentProgress()).task("measuring this device's peaks", len(sizes) + len(supported)) as task:
        buffer = _random((sizes[-1] // torch.bfloat16.itemsize,), torch.bfloat16, device)
        read_dtype = supported[0] if supported else None
        copies, reads, adds = [], [], []
        for size in sizes:
            copies.append(_copy_bandwidth(stopwatch, buffer, size))
            reads.append(_read_bandwidth(stopwatch, buffer, size, read_dtype))
            if size != sizes[-1]:
                adds.append(_add_bandwidth(stopwatch, buffer, size))
            task.advance()
        del buffer
        flops = {}
        for dtype in supported:
            seconds = GEMM_SECONDS / len(supported) / GEMM_ROUNDS
            rates = [_gemm_rate(stopwatch, dtype, seconds) for _ in range(GEMM_ROUNDS)]
            flops[str(dtype).removeprefix("torch.")] = max(rates)
            task.advance()
    memory = max(copies[-1], reads[-1])
    best = [max(at_size) for at_size in zip(copies[:-1], reads[:-1], adds, strict=True)]
    return Peaks(
        device=device_name(device),
        copy_bytes_per_second=copies[-1],
        read_bytes_per_second=reads[-1],
        memory_bytes_per_second=memory,
        by_working_set=_envelope(sizes, [*best, memory]),
        flops_per_second=flops,
        op_overhead_seconds=_op_overhead(stopwatch),
        seconds_spent=clock() - start,
        notes=_busy_note(cpu_use.share()) if device.type == "cpu" else (),
    )


class _OthersCpuUse:
    """Share of all CPU time, since this was made, that other processes took: 0 to 1."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # its next call covers the time since this one
        self._process = psutil.Process()
        self._start, self._own = time.perf_counter(), self._own_seconds()

    def share(self) -> float:
        busy = psutil.cpu_percent() / 100
        capacity = (time.perf_counter() - self._start) * (psutil.cpu_count() or 1)
        return max(0.0, busy - (self._own_seconds() - self._own) / capacity)

    def _own_seconds(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def _busy_note(share: float) -> tuple[str, ...]:
    if share <= BUSY_SHARE:
        return ()
    return (
        f"other programs used {share:.0%} of the CPUs while the peaks were measured, which makes them too low; "
        "measure again on a quiet machine",
    )


class _Stopwatch:
    """Best time of a function: warmed up, synchronized before start and stop."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device = device
        self.clock = clock
        # A GPU runs behind the host: one interval must hold many launches. On a CPU only the clock's own cost counts.
        self.interval = 1e-3 if device.type != "cpu" else 1e-4

    def run(self, function: Callable[[], object], calls: int) -> float:
        """Return the seconds that this many calls back to back take."""
        synchronize(self.device)
        start = self.clock()
        for _ in range(calls):
            function()
        synchronize(self.device)
        return self.clock() - start

    def best(self, function: Callable[[], object], seconds: float) -> float:
        """Return the shortest time of one call, in at least ``MINIMUM_ROUNDS`` and about this many seconds."""
        self.run(function, 1)
        calls = 1
        while (elapsed := self.run(function, calls)) < self.interval:
            calls *= 2
        shortest, spent, done = elapsed, elapsed, 1
        while done < MINIMUM_ROUNDS or spent < seconds:
            elapsed = self.run(function, calls)
            shortest, spent, done = min(shortest, elapsed), spent + elapsed, done + 1
        return shortest / calls


def _copy_bandwidth(stopwatch: _Stopwatch, buffer: torch.Tensor, size: int) -> float:
    half = size // 2 // buffer.itemsize
    source, target = buffer[:half], buffer[half : 2 * half]
    return size / stopwatch.best(lambda: target.copy_(source), BANDWIDTH_SECONDS)


def _read_bandwidth(stopwatch: _Stopwatch, buffer: torch.Tensor, size: int, dtype: torch.dtype | None) -> float:
    part = buffer[: size // buffer.itemsize]
    as_float = part.view(torch.float32)
    seconds = [stopwatch.best(as_float.sum, BANDWIDTH_SECONDS)]
    if dtype is not None:
        matrix = part.view(dtype).view(-1, GEMV_COLUMNS)
        vector = matrix[:1].clone()
        seconds.append(stopwatch.best(lambda: F.linear(vector, matrix), BANDWIDTH_SECONDS))
    return size / min(seconds)


def _add_bandwidth(stopwatch: _Stopwatch, buffer: torch.Tensor, size: int) -> float:
    third = size // 3 // buffer.itemsize // 2 * 2
    left, right, target = (buffer[i * third : (i + 1) * third].view(torch.float32) for i in range(3))
    return size / stopwatch.best(lambda: torch.add(left, right, out=target), BANDWIDTH_SECONDS)


def _gemm_rate(stopwatch: _Stopwatch, dtype: torch.dtype, seconds: float) -> float:
    """Return the best FLOP/s over the shapes that fit in time and memory, smallest first."""
    device = stopwatch.device
    memory = memory_available_bytes(device) // MEMORY_FRACTION
    start, rate, spent = stopwatch.clock(), 0.0, 0.0
    for tokens, inputs, outputs in GEMM_SHAPES:
        flops = 2 * tokens * inputs * outputs
        needed = (tokens * inputs + inputs * outputs + tokens * outputs) * dtype.itemsize
        if needed > memory or (rate and spent + flops / rate > seconds):
            break
        activations, weight = _random((tokens, inputs), dtype, device), _random((outputs, inputs), dtype, device)
        shortest = stopwatch.best(lambda x=activations, w=weight: F.linear(x, w), seconds / 20)  # type: ignore[misc]
        rate = max(rate, flops / shortest)
        spent = stopwatch.clock() - start
    return rate


def _op_overhead(stopwatch: _Stopwatch) -> float:
    one = torch.ones(1, device=stopwatch.device)
    return stopwatch.best(lambda: torch.add(one, one), OVERHEAD_SECONDS)


def _has_matrix_product(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        probe = torch.ones(16, 16, device=device, dtype=dtype)
        F.linear(probe, probe)
    except (RuntimeError, NotImplementedError):  # "addmm not implemented for 'Float8_e4m3fn'"
        return False
    return True


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Fill a tensor with repeated blocks of normal values, at the speed of a copy.

    Random, because zero pages share one physical page on a CPU and zeros draw less power (higher clocks) on a GPU.
    The bits of bfloat16 normal values are also ordinary numbers when viewed as float16, float32 or float64: no NaN and
    no subnormal, which would slow a CPU down.
    """
    count = math.prod(shape)
    tile = torch.randn(min(count, TILE_ELEMENTS), generator=torch.Generator().manual_seed(0))
    tensor = torch.empty(count, dtype=dtype, device=device)
    blocks = count // tile.numel()
    tile = tile.to(device, dtype)
    tensor[: blocks * tile.numel()].view(blocks, -1).copy_(tile)
    tensor[blocks * tile.numel() :].copy_(tile[: count - blocks * tile.numel()])
    return tensor.view(shape)


def _envelope(sizes: Sequence[int], bandwidths: Sequence[float]) -> tuple[WorkingSetBandwidth, ...]:
    """Raise each bandwidth to the best of any larger working set: a small one can always run as fast."""
    levels, best = [], 0.0
    for size, bandwidth in zip(reversed(sizes), reversed(bandwidths), strict=True):
        best = max(best, bandwidth)
        levels.append(WorkingSetBandwidth(size, best))
    return tuple(reversed(levels))


def _working_sets(device: torch.device) -> list[int]:
    """Return the sizes to measure in bytes: powers of two, the last one in main memory."""
    largest = LARGEST_WORKING_SET.get(device.type, 1 << 30)
    cache = last_level_cache_bytes(device)
    if cache is not None and device.type == "cpu":
        largest = min(largest, max(CACHE_MULTIPLE * cache, 256 << 20))
    largest = max(min(largest, memory_available_bytes(device) // MEMORY_FRACTION), SMALLEST_WORKING_SET)
    doublings = (largest // SMALLEST_WORKING_SET).bit_length()
    return [SMALLEST_WORKING_SET << power for power in range(doublings)]


def last_level_cache_bytes(device: torch.device) -> int | None:
    """Return the size of the device's last-level cache, or None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()  # "32K", "307200K"
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
        sizes.append(int(text[:-1]) * unit if unit else int(text))
    return max(sizes, default=None)
