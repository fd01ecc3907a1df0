"""What measuring quality costs: time beside plain forwards, and memory as context and vocabulary grow.

``python -m tests.benchmarks.bench_quality [--model FOLDER] [--tokens N] [--context T] [--repeats N]``; without
``--model`` the built-in model. A plain forward computes every logit of a window, as any measurement of perplexity must;
quality computes those of some positions at a time, of one model or (against a reference) of two heads and one model.
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

TOKENS, CONTEXT, REPEATS = 2_048, 512, 3
TIME_LIMIT, AGAINST_LIMIT = 1.10, 1.60
SIZES = ((1_024, 32_000), (4_096, 32_000), (1_024, 128_000), (4_096, 128_000))  # context, vocabulary
MEMORY_LIMIT = 0.10
"""How much the peak may grow from the first of SIZES to the last, as a share of the logits of the last in float32."""
MMAP_THRESHOLD_BYTES = 1 << 20


def bench_time(folder: str, tokens: int, context: int, repeats: int) -> dict[str, object]:
    """Time plain forwards and both kinds of measurement over the same windows, in turn, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from profilers.quality import measure_quality, record_reference
    from profilers.text import split_texts

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    stream = split_texts(AutoTokenizer.from_pretrained(folder), model.config.vocab_size).evaluation
    windows = stream.separate_windows(tokens // context, context)
    reference = record_reference(model, windows)

    @torch.no_grad()
    def plain() -> None:
        for window in windows:
            model(window[None], use_cache=False)

    runs: dict[str, Callable[[], object]] = {
        "plain": plain,
        "alone": lambda: measure_quality(model, windows, text_name="default"),
        "against": lambda: measure_quality(model, windows, reference, text_name="default"),
        "record": lambda: record_reference(model, windows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name in sorted(runs, reverse=repeat % 2 == 1):  # none always follows the same other
            started = time.perf_counter()
            runs[name]()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {name: median[name] / median["plain"] for name in ("alone", "against", "record")}
    return {
        "benchmark": "quality_time",
        "tokens": windows.numel(),
        "context": context,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": seconds,
        "ratios": ratios,
        "must_reach": f"alone <= {TIME_LIMIT}, against <= {AGAINST_LIMIT}",
        "reached": ratios["alone"] <= TIME_LIMIT and ratios["against"] <= AGAINST_LIMIT,
    }


def bench_memory() -> dict[str, object]:
    """Compare the peaks of processes that each measure one model of random weights; weights are taken off."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES)}
    command = [sys.executable, "-m", "tests.benchmarks.bench_quality"]
    rows = []
    for context, vocabulary in SIZES:
        sizes = ["--context", str(context), "--peak-of-vocabulary", str(vocabulary)]
        process = subprocess.run([*command, *sizes], check=True, stdout=subprocess.PIPE, text=True, env=environment)
        rows.append(json.loads(process.stdout) | {"logits_bytes": context * vocabulary * 4})
    growth = rows[-1]["peak_bytes"] - rows[0]["peak_bytes"]
    return {
        "benchmark": "quality_memory",
        "peaks": rows,
        "growth_bytes": growth,
        "growth_over_logits": growth / rows[-1]["logits_bytes"],
        "must_reach": f"<= {MEMORY_LIMIT}",
        "reached": growth / rows[-1]["logits_bytes"] <= MEMORY_LIMIT,
    }


def peak_of(vocabulary: int, context: int) -> dict[str, int]:
    """Measure quality against a reference once; return the peak while doing so, less what there was before."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from profilers.device import track_peak_memory
    from profilers.quality import measure_quality, record_reference

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    windows = torch.randint(0, vocabulary, (2, context), generator=torch.Generator().manual_seed(0))
    measure_quality(model, windows[:, :64], record_reference(model, windows[:, :64]), text_name="warm up")
    with track_peak_memory(model.device) as peak:
        measure_quality(model, windows, record_reference(model, windows), text_name="random")
    if peak.bytes is None or peak.before_bytes is None:
        raise SystemExit(f"no peak memory: {peak.reason}")
    return {"context": context, "vocabulary": vocabulary, "peak_bytes": peak.bytes - peak.before_bytes}


def main() -> int:
    """Run both benchmarks and print one JSON line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--peak-of-vocabulary", type=int)
    options = parser.parse_args()
    if options.peak_of_vocabulary is not None:
        print(json.dumps(peak_of(options.peak_of_vocabulary, options.context)))
        return 0
    folder = options.model
    if folder is None:
        from effcli import builtin_models

        folder = str(builtin_models.fetch("smollm2-135m"))
    results = [bench_memory(), bench_time(folder, options.tokens, options.context, options.repeats)]
    for result in results:
        print(json.dumps(result), flush=True)
    return sum(not result["reached"] for result in results)


if __name__ == "__main__":
    sys.exit(main())
