"""What the command line costs: help against importing typer and rich, the default profile, a 405B config."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 20
LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def seconds_of(*command: str) -> float:
    """Return the wall time of a process, in seconds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def bench_help() -> dict[str, object]:
    """Compare ``effcli --help`` with a process that imports typer and rich; interleaved, medians."""
    effcli = str(Path(sys.executable).with_name("effcli"))
    imports, helps = [], []
    for _ in range(REPEATS):
        imports.append(seconds_of(sys.executable, "-c", "import typer, rich"))
        helps.append(seconds_of(effcli, "--help"))
    base, ours = statistics.median(imports), statistics.median(helps)
    return {
        "benchmark": "help",
        "import_seconds": base,
        "help_seconds": ours,
        "ratio": ours / base,
        "must_reach": "<= 2",
        "reached": ours / base <= 2,
    }


def bench_default_profile() -> dict[str, object]:
    """Time the default profile of the built-in model, cached."""
    effcli = str(Path(sys.executable).with_name("effcli"))
    seconds_of(effcli, "models", "--fetch", "smollm2-135m", "--quiet")
    spent = seconds_of(effcli, "profile", "smollm2-135m", "--format", "json")
    return {
        "benchmark": "default_profile",
        "seconds": spent,
        "cores": os.cpu_count(),
        "must_reach": "< 60 on 2 CPU cores",
        "reached": spent < 60,
    }


def bench_config_only() -> dict[str, object]:
    """Time a config-only profile of a 405B-parameter model and the memory of its process."""
    effcli = str(Path(sys.executable).with_name("effcli"))
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(LLAMA_405B))
        started = time.perf_counter()
        process = subprocess.Popen([effcli, "profile", str(config), "--format", "json"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        spent = time.perf_counter() - started
    scale = 1 if sys.platform == "darwin" else 1024
    peak: int = usage.ru_maxrss * scale
    assert isinstance(usage, resource.struct_rusage) and os.waitstatus_to_exitcode(status) == 0
    return {
        "benchmark": "config_only_405b",
        "seconds": spent,
        "peak_resident_bytes": peak,
        "must_reach": "< 20 s and < 2e9 bytes",
        "reached": spent < 20 and peak < 2e9,
    }


def main() -> None:
    """Print one JSON line a benchmark."""
    for bench in (bench_help, bench_default_profile, bench_config_only):
        print(json.dumps(bench()), flush=True)


if __name__ == "__main__":
    main()
