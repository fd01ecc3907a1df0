"""Run every benchmark, each in its own process so that none inherits another's memory; print JSON lines.

``python -m tests.benchmarks [NAME ...]`` runs all, or those named (``cli``, ``sinks``, …).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """Run the benchmarks and return how many failed."""
    import torch

    from profilers.device import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {
        "benchmark": "environment",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("effcli", "torch", "transformers")},
    }
    print(json.dumps(about), flush=True)
    failed = 0
    for path in sorted(HERE.glob("bench_*.py")):
        name = path.stem.removeprefix("bench_")
        if names and name not in names:
            continue
        code = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{path.stem}"], cwd=HERE.parents[1]).returncode
        failed += code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
