"""What measuring sinks costs beside one plain forward pass, in time and memory, and how exact it is.

``python -m tests.benchmarks.bench_sinks [--model FOLDER] [--context T] [--repeats N]``; without ``--model`` the
built-in model. Both passes use fused attention and keep the logits of the last token only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CONTEXT = 8_192
REPEATS = 3
EXACTNESS_CONTEXT = 512
MMAP_THRESHOLD_BYTES = 1 << 20
TIME_LIMIT, MEMORY_LIMIT, ALPHA_LIMIT = 1.15, 1.10, 1e-4


def load(folder: str, implementation: str = "sdpa", dtype: str = "auto") -> Any:
    """Load the model, in its stored dtype unless told otherwise, without a progress bar."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation).eval()


def tokens(folder: str, length: int) -> Any:
    """Return one sequence of the default text, shape (1, length)."""
    from transformers import AutoTokenizer

    from profilers.text import token_stream

    return token_stream(AutoTokenizer.from_pretrained(folder), 0).windows(1, length)


def passes(model: Any, ids: Any) -> dict[str, Callable[[], object]]:
    """Return the plain forward and the sink-measuring one."""
    import torch

    from profilers.sinks import sink_alphas

    @torch.no_grad()
    def plain() -> object:
        return model(ids, use_cache=False, logits_to_keep=1)

    return {"plain": plain, "sinks": lambda: sink_alphas(model, ids)}


def bench_time(folder: str, context: int, repeats: int) -> dict[str, object]:
    """Time both passes in turn, in this process."""
    model = load(folder)
    for warm in passes(model, tokens(folder, EXACTNESS_CONTEXT)).values():
        warm()
    both = passes(model, tokens(folder, context))
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for repeat in range(repeats):
        for name in sorted(both, reverse=repeat % 2 == 1):  # neither always follows the other
            started = time.perf_counter()
            both[name]()
            seconds[name].append(time.perf_counter() - started)
    plain, sinks = (statistics.median(seconds[name]) for name in ("plain", "sinks"))
    return {
        "benchmark": "sinks_time",
        "context": context,
        "dtype": str(model.dtype).removeprefix("torch."),
        "plain_seconds": seconds["plain"],
        "sinks_seconds": seconds["sinks"],
        "ratio": sinks / plain,
        "must_reach": f"<= {TIME_LIMIT}",
        "reached": sinks / plain <= TIME_LIMIT,
    }


def bench_memory(folder: str, context: int, repeats: int) -> dict[str, object]:
    """Compare the peak memory of processes that each run one of the passes once; medians.

    glibc's adaptive threshold is fixed for both, because otherwise holes in its heap move the peak of one and the same
    pass by up to a fifth from run to run; with it, freed tensors leave the process and the peak is of what is in use.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES)}
    command = [sys.executable, "-m", "tests.benchmarks.bench_sinks", "--model", folder, "--context", str(context)]
    peaks: dict[str, list[int]] = {"plain": [], "sinks": []}
    for _ in range(repeats):
        for name, found in peaks.items():
            process = subprocess.run(
                [*command, "--peak-of", name], check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            found.append(json.loads(process.stdout)["peak_bytes"])
    ratio = statistics.median(peaks["sinks"]) / statistics.median(peaks["plain"])
    return {
        "benchmark": "sinks_memory",
        "context": context,
        "plain_peak_bytes": peaks["plain"],
        "sinks_peak_bytes": peaks["sinks"],
        "ratio": ratio,
        "must_reach": f"<= {MEMORY_LIMIT}",
        "reached": ratio <= MEMORY_LIMIT,
    }


def peak_of(name: str, folder: str, context: int) -> dict[str, int]:
    """Run one pass and return the peak memory during it, weights included and loading excluded.

    Not ``ru_maxrss``: that one starts at the peak of the process that started this one.
    """
    from profilers.device import track_peak_memory

    model = load(folder)
    run = passes(model, tokens(folder, context))[name]
    with track_peak_memory(model.device) as peak:
        run()
    if peak.bytes is None:
        raise SystemExit(f"no peak memory: {peak.reason}")
    return {"peak_bytes": peak.bytes}


def bench_exactness(folder: str) -> dict[str, object]:
    """Compare alpha_1 of every head, in float32, with the full matrices of transformers' eager attention."""
    import torch

    from profilers.sinks import sink_alphas

    ids = tokens(folder, EXACTNESS_CONTEXT)
    measured = sink_alphas(load(folder, dtype="float32"), ids)
    with torch.no_grad():
        matrices = load(folder, "eager", "float32")(ids, use_cache=False, output_attentions=True).attentions
    worst = max(
        (alpha.double() - weights[..., 0].double().mean(dim=-1)).abs().max().item()
        for alpha, weights in zip(measured, matrices, strict=True)
        if alpha is not None
    )
    return {
        "benchmark": "sinks_exactness",
        "context": EXACTNESS_CONTEXT,
        "largest_alpha_difference": worst,
        "must_reach": f"<= {ALPHA_LIMIT}",
        "reached": worst <= ALPHA_LIMIT,
    }


def main() -> None:
    """Print one JSON line a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="transformers folder (default: the built-in model)")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--peak-of", choices=("plain", "sinks"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.model
    if folder is None:
        from effcli.builtin_models import fetch

        folder = str(fetch("smollm2-135m"))
    if arguments.peak_of:
        print(json.dumps(peak_of(arguments.peak_of, folder, arguments.context)))
        return
    print(json.dumps(bench_exactness(folder)), flush=True)
    print(json.dumps(bench_memory(folder, arguments.context, arguments.repeats)), flush=True)
    print(json.dumps(bench_time(folder, arguments.context, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
