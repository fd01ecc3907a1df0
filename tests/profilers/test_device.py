import mmap
import platform
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest
import torch

from profilers import device as module
from profilers.base import ProfilerError
from profilers.device import (
    device_name,
    memory_available_bytes,
    memory_total_bytes,
    synchronize,
    track_peak_memory,
)

CPU = torch.device("cpu")
MIB = 1 << 20


def test_name_of_this_processor():
    name = device_name(CPU)
    assert name
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert name in subprocess.run(["cat", "/proc/cpuinfo"], capture_output=True, text=True, check=True).stdout


def test_memory_of_this_machine():
    assert 0 < memory_available_bytes(CPU) <= memory_total_bytes(CPU) <= psutil.virtual_memory().total


def test_memory_of_another_kind_of_device_is_refused():
    with pytest.raises(ProfilerError, match="'meta'"):
        memory_total_bytes(torch.device("meta"))


def _groups(monkeypatch, tmp_path, own, files):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(module, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(module, "_GROUP_ROOT", tmp_path / "root")


def test_version_2_limit_of_a_parent_group_counts(monkeypatch, tmp_path):
    _groups(
        monkeypatch,
        tmp_path,
        "0::/outer/inner\n",
        {
            "outer/memory.max": f"{300 * MIB}\n",
            "outer/memory.current": f"{120 * MIB}\n",
            "outer/memory.stat": f"anon 5\ninactive_file {20 * MIB}\n",
            "outer/inner/memory.max": "max\n",
            "outer/inner/memory.current": "1\n",
            "outer/inner/memory.stat": "inactive_file 0\n",
        },
    )
    assert memory_total_bytes(CPU) == 300 * MIB
    assert memory_available_bytes(CPU) == 200 * MIB


def test_version_1_limit_mounted_at_the_root_counts(monkeypatch, tmp_path):
    _groups(
        monkeypatch,
        tmp_path,
        "4:cpu:/x\n3:memory:/docker/not-visible-here\n",
        {
            "memory/memory.limit_in_bytes": f"{64 * MIB}\n",
            "memory/memory.usage_in_bytes": f"{80 * MIB}\n",
            "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {6 * MIB}\n",
        },
    )
    assert memory_total_bytes(CPU) == 64 * MIB
    assert memory_available_bytes(CPU) == 0  # over its limit: nothing left, never negative


def test_peak_memory_sees_what_was_freed_before_the_end():
    # The system's own pages: allocators reuse what they hold, and keep it.
    with track_peak_memory(CPU) as peak, mmap.mmap(-1, 64 * MIB) as block:
        np.frombuffer(block, dtype=np.uint8)[:] = 1
        held = psutil.Process().memory_info().rss
    if peak.bytes is None:
        assert peak.reason
        pytest.skip(peak.reason)
    assert peak.before_bytes is not None
    # Less than the block may come on top: the system takes back other pages that are not in use.
    assert held - MIB < peak.bytes < peak.before_bytes + 96 * MIB
    assert psutil.Process().memory_info().rss < held - 60 * MIB
    with track_peak_memory(CPU) as idle:
        pass
    assert idle.bytes is not None and idle.bytes < peak.bytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_memory_and_synchronize():
    gpu = torch.device("cuda", 0)
    assert 0 < memory_available_bytes(gpu) <= memory_total_bytes(gpu)
    assert device_name(gpu) == torch.cuda.get_device_name(0)
    with track_peak_memory(gpu) as peak:
        torch.ones(64 * MIB // 4, device=gpu)
    assert peak.bytes - peak.before_bytes >= 64 * MIB
    torch.cuda._sleep(50_000_000)
    synchronize(gpu)
    start = time.perf_counter()
    synchronize(gpu)
    assert time.perf_counter() - start < 0.005


def test_synchronize_on_the_cpu_returns():
    assert synchronize(CPU) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory and can return it")
def test_freed_heap_pages_are_given_back():
    code = """
        import psutil
        from profilers.device import return_freed_memory
        resident = lambda: psutil.Process().memory_info().rss
        kept = []
        pieces = []
        for index in range(200_000):  # small pieces come from the heap, and one kept at the end holds it in place
            pieces.append(bytes(1000))
        kept.append(bytes(1000))
        del pieces
        held = resident()
        return_freed_memory()
        print(held - resident())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50e6
