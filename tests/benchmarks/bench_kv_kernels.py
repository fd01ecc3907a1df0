"""The CPU operator of kv-pq for one layer: attention over codes against full precision, and encoding.

What is compared takes turns in one process, so that what else the machine does falls on all of it. Prints one JSON
object a line.

    python -m tests.benchmarks.bench_kv_kernels [--tokens 1024 8192 32768] [--threads 2] [--heads 9 3 64]

``full_seconds`` is ``scaled_dot_product_attention`` over bfloat16 keys and values; ``with_append_seconds`` also appends
one token to both as transformers' DynamicCache does, by copying them. With one thread, seconds are the processor's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from passes.kv_pq import cpu_kernels
from passes.kv_pq.codebooks import LayerCodebooks
from tests.passes.kv_pq import random_codebooks

TOKENS = (1_024, 8_192, 32_768)
HEADS = (9, 3, 64)
"""Query heads, KV heads and head size of the built-in model."""
ROUNDS, WARM_UP = 40, 3
ENCODED_TOKENS = 1_024


def in_turns(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each of some functions, called in turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(WARM_UP + ROUNDS):
        for name, run in runs.items():
            started = clock()
            run()
            spent[name].append(clock() - started)
    return {name: statistics.median(times[WARM_UP:]) for name, times in spent.items()}


def bench_attention(layer: LayerCodebooks, query_heads: int, tokens: int) -> dict[str, object]:
    """Time one decode step of one layer over ``tokens`` tokens."""
    heads, dim = layer.keys.heads, layer.keys.head_dim
    query = torch.randn(1, query_heads, 1, dim, dtype=torch.bfloat16)
    keys, values, new = torch.randn(3, 1, heads, tokens, dim, dtype=torch.bfloat16)
    new = new[:, :, :1]
    codes = [random_codebooks.random_codes(side, 1, tokens) for side in (layer.keys, layer.values)]
    nothing = torch.zeros(1, dtype=torch.int64)

    def full(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, k, v, enable_gqa=True)

    found = in_turns(
        {
            "codes_seconds": lambda: cpu_kernels.attend(
                query, *codes, layer, start=nothing, stop=tokens, offset=nothing, scale=dim**-0.5
            ),
            "full_seconds": lambda: full(keys, values),
            "with_append_seconds": lambda: full(torch.cat([keys, new], 2), torch.cat([values, new], 2)),
        }
    )
    return {
        "benchmark": "attention",
        "tokens": tokens,
        **found,
        "ratio_to_full": found["codes_seconds"] / found["full_seconds"],
        "ratio_with_append": found["codes_seconds"] / found["with_append_seconds"],
    }


def bench_encoding(layer: LayerCodebooks) -> dict[str, object]:
    """Time encoding of the keys and values of one layer."""
    x = torch.randn(1, layer.keys.heads, ENCODED_TOKENS, layer.keys.head_dim, dtype=torch.bfloat16)
    found = in_turns(
        {
            "operator": lambda: (cpu_kernels.encode(x, layer.keys), cpu_kernels.encode(x, layer.values)),
            "torch": lambda: (layer.keys.encode(x), layer.values.encode(x)),
        }
    )
    return {
        "benchmark": "encoding",
        "codes": [layer.keys.codes, layer.values.codes],
        "seconds_a_token": found["operator"] / ENCODED_TOKENS,
        "torch_seconds_a_token": found["torch"] / ENCODED_TOKENS,
    }


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--heads", nargs=3, type=int, default=HEADS, metavar=("QUERY", "KV", "SIZE"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reason = cpu_kernels.available()
    if reason is not None:
        raise SystemExit(f"the CPU operator cannot be used: {reason}")
    query_heads, heads, dim = options.heads
    layer = LayerCodebooks(
        random_codebooks.quantizer(heads, dim, dim // 2, gains=True, seed=1),
        random_codebooks.quantizer(heads, dim, dim // 2, gains=True, basis=True, seed=2),
        random_codebooks.rope(dim),
    )
    about = {"heads": options.heads, "threads": options.threads, "capability": torch.backends.cpu.get_cpu_capability()}
    for tokens in options.tokens:
        print(json.dumps(bench_attention(layer, query_heads, tokens) | about), flush=True)
    print(json.dumps(bench_encoding(layer) | about), flush=True)


if __name__ == "__main__":
    main()
