"""What the optimize pipeline costs beyond its pass, profiles and quality, on the built-in model."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOST_OVERHEAD = 0.05
MODEL = "smollm2-135m"
RUNS = {
    # The default first; round-to-nearest has the shortest pass, so overhead weighs most.
    "overhead_gptq": ("quantize:scheme=w4a16", True),
    "overhead_round_to_nearest": ("quantize:scheme=w4a16,method=rtn", False),
}


def bench(name: str, step: str, judged: bool) -> dict[str, object]:
    """Optimize in a process of its own and read the time of each stage from its report."""
    effcli = str(Path(sys.executable).with_name("effcli"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        started = time.perf_counter()
        command = [effcli, "optimize", MODEL, "--pass", step, "-o", str(out), "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    own = {stage["stage"]: round(stage["seconds"], 3) for stage in report["stages"] if stage["own"]}
    work = {stage["stage"]: round(stage["seconds"], 3) for stage in report["stages"] if not stage["own"]}
    result: dict[str, object] = {
        "benchmark": name,
        "pass": step,
        "wall_seconds": wall,
        "accounted_seconds": report["seconds_spent"],
        "own_seconds": own,
        "work_seconds": work,
        "overhead_fraction": report["overhead_fraction"],
        # Everything that no stage accounts for (starting Python, rendering, the rename) counted as overhead too.
        "overhead_fraction_of_wall": (sum(own.values()) + wall - report["seconds_spent"]) / wall,
    }
    if judged:
        result |= {
            "must_reach": f"overhead_fraction < {MOST_OVERHEAD}",
            "reached": report["overhead_fraction"] < MOST_OVERHEAD,
        }
    return result


def main() -> None:
    """Print one JSON line a benchmark."""
    effcli = str(Path(sys.executable).with_name("effcli"))
    subprocess.run([effcli, "models", "--fetch", MODEL, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    for name, (step, judged) in RUNS.items():
        print(json.dumps(bench(name, step, judged)), flush=True)


if __name__ == "__main__":
    main()
