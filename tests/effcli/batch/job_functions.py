"""What ``call`` jobs of the tests do, in a worker."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def speak() -> dict[str, int]:
    """Print on every way that a process has."""
    print("said by Python")
    sys.stderr.write("said to stderr\n")
    ctypes.CDLL(None).printf(b"said by printf\n")
    os.write(1, b"said by write\n")
    subprocess.run(["/bin/echo", "said by a child"], check=True)
    return {"process": os.getpid()}


def variable(key: str) -> str | None:
    """Return a variable of the environment."""
    return os.environ.get(key)


def die(how: int) -> None:
    """End this process by a signal."""
    os.kill(os.getpid(), how)


def fill_memory() -> None:
    """Allocate until the system refuses."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20), resource.RLIM_INFINITY))
    held = []
    while True:
        held.append(bytearray(16 << 20))


def wait_with_child(pids: str) -> None:
    """Start a measuring process as an optimize does, write down both processes, and wait."""
    from effcli.worker import Worker

    with Worker() as worker:
        Path(f"{pids}.new").write_text(f"{os.getpid()} {worker._process.pid}")
        Path(f"{pids}.new").rename(pids)
        time.sleep(600)


def wait(seconds: float) -> float:
    """Wait."""
    time.sleep(seconds)
    return seconds


def count(numbers: int) -> int:
    """Keep one core busy."""
    return sum(number % 7 for number in range(numbers))
