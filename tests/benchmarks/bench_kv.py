"""KV footprint: is the prediction the measurement, and what does a prediction cost?

Prints one JSON object a line: for every tiny architecture, predicted against measured bytes over batch × context,
after prefill and after decode; then time and peak memory of a prediction for a 405B-parameter shape, without weights.

    python -m tests.benchmarks.bench_kv
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from transformers import LlamaConfig

from profilers.kv_cache import measure_cache, measure_kv
from profilers.meta import meta_model
from tests.tiny_models import CONFIGS, WINDOW, build

BATCHES = (1, 3)
CONTEXTS = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 64, 300)
SHAPE_405B = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
TIME_LIMIT_SECONDS = 20
MEMORY_LIMIT_BYTES = 2 * 10**9


def compare(name: str, device: torch.device) -> dict[str, object]:
    """Return how many points of one architecture were compared, and those that differ."""
    model = build(name).to(device)
    twin = meta_model(model.config, torch.float32)
    differing = []
    for batch in BATCHES:
        for context in CONTEXTS:
            predicted, measured = measure_cache(twin, batch, context), measure_cache(model, batch, context)
            if (predicted.bytes, predicted.prefill_bytes) != (measured.bytes, measured.prefill_bytes):
                differing.append(
                    {
                        "batch": batch,
                        "context": context,
                        "predicted_bytes": [predicted.prefill_bytes, predicted.bytes],
                        "measured_bytes": [measured.prefill_bytes, measured.bytes],
                    }
                )
    return {
        "benchmark": "kv_predicted_equals_measured",
        "model": name,
        "device": str(device),
        "points": len(BATCHES) * len(CONTEXTS),
        "differing": differing,
        "must_reach": "equal to the byte at every point",
        "reached": not differing,
    }


def predict_405b() -> dict[str, object]:
    """Return time and peak memory of this process after predicting a 405B-parameter shape."""
    start = time.perf_counter()
    model = meta_model(LlamaConfig(**SHAPE_405B), torch.bfloat16)
    result = measure_kv(model, device=torch.device("cpu"))
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "benchmark": "kv_405b_config_only",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "peak_resident_bytes": peak,
        "bytes_per_token": result.bytes_per_token,
        "points": {point.context: point.predicted_bytes for point in result.points},
        "must_reach": f"< {TIME_LIMIT_SECONDS} s and < {MEMORY_LIMIT_BYTES} bytes",
        "reached": seconds < TIME_LIMIT_SECONDS and peak < MEMORY_LIMIT_BYTES,
    }


def main() -> int:
    """Print the results; return 1 if any of them missed its target."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reached = True
    # The large shape first: the peak is that of the whole process.
    for case in (predict_405b, *(lambda name=name: compare(name, device) for name in CONFIGS)):
        line = case()
        reached = reached and bool(line["reached"])
        print(json.dumps(line), flush=True)
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
