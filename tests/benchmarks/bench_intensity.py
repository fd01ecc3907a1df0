"""Intensity: are the counts torch's own, does LLaMA-2-7B come out as published, and what does counting cost?

Prints one JSON object a line and exits with 1 if a goal is missed:

- FLOPs against ``FlopCounterMode`` for every tiny architecture, both phases, on meta;
- the reference figures of LLaMA-2-7B's public config;
- time and peak memory of a 405B-parameter config, a fresh process with all imports: under 20 s and 2 GB;
- time of a traced forward over that of a plain one, on this device.

    python -m tests.benchmarks.bench_intensity
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from profilers.intensity import count, measure_intensity
from profilers.meta import meta_compatible, meta_model
from profilers.op_trace import OpTracer
from profilers.phases import decode_step, prefill, token_ids
from tests.tiny_models import CONFIGS

BATCH, CONTEXT = 2, 64
OURS_ALONE = ("_grouped_mm", "grouped_mm_fallback", "linalg_solve_triangular")
LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
# phase, module -> FLOPs, bytes, FLOP/byte; 16 bits, batch 1, context 2,048
PUBLISHED = {
    ("prefill", "model.layers.0.self_attn.q_proj"): (68.72e9, 67.1e6, 1024.0),
    ("decode", "model.layers.0.self_attn.q_proj"): (33.55e6, 33.57e6, 1.00),
    ("prefill", "model.layers.0.mlp.gate_proj"): (184.7e9, 152.0e6, 1214.7),
    ("decode", "(model)"): (14.17e9, 14.31e9, 0.99),
}
TOLERANCE = 0.01
SHAPE_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
TIME_LIMIT_SECONDS = 20
MEMORY_LIMIT_BYTES = 2 * 10**9
ROUNDS = 5
TRACED_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}

CHILD = f"""
import json, resource
import torch
from transformers import LlamaConfig
from profilers.intensity import measure_intensity
from profilers.meta import meta_model
model = meta_model(LlamaConfig(**{SHAPE_405B}), torch.bfloat16)
points = measure_intensity(model, contexts=(2048,)).points
print(json.dumps({{
    "parameters": sum(p.numel() for p in model.parameters()),
    "decode_flops_per_byte": points[1].flops_per_byte,
    "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}}))
"""


def compare_flops(name: str) -> dict[str, object]:
    """Return both phases' FLOPs by our count (without what torch has no formula for) and by torch's."""
    config = CONFIGS[name]()
    model = meta_model(config, torch.float32)
    with meta_compatible(), FlopCounterMode(display=False) as first:
        state = prefill(model, BATCH, CONTEXT)
    with meta_compatible(), FlopCounterMode(display=False) as second:
        decode_step(model, state)
    row: dict[str, object] = {"benchmark": "intensity_flops_equal_torchs", "model": name}
    good = True
    for phase, counter in (("prefill", first), ("decode", second)):
        trace = count(model, phase, BATCH, CONTEXT)
        alone = sum(cost.flops for group, cost in trace.ops.items() if group.name.split(" ")[0] in OURS_ALONE)
        row[phase] = {"ours": trace.total.flops - alone, "torch": counter.get_total_flops(), "ours_alone": alone}
        good &= trace.total.flops - alone == counter.get_total_flops()
    return row | {"ok": good}


def published() -> list[dict[str, object]]:
    """Return LLaMA-2-7B's figures beside the published ones."""
    points = measure_intensity(meta_model(LlamaConfig(**LLAMA2_7B), torch.bfloat16), contexts=(2048,)).points
    rows = {(point.phase, module.name): module for point in points for module in point.modules}
    found = []
    for key, expected in PUBLISHED.items():
        row = rows[key]
        ours = (row.flops, row.bytes, row.flops / row.bytes)
        good = all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(ours, expected, strict=True))
        found.append(
            {"benchmark": "intensity_llama2_7b", "phase": key[0], "module": key[1], "ours": ours, "published": expected}
            | {"ok": good}
        )
    return found


def config_only() -> dict[str, object]:
    """Return what a 405B-parameter config costs in a fresh process."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begun
    row = json.loads(done.stdout)
    good = seconds < TIME_LIMIT_SECONDS and row["peak_memory_bytes"] < MEMORY_LIMIT_BYTES
    return {"benchmark": "intensity_405b_config_only", "seconds": round(seconds, 2), **row, "ok": good}


def tracing_cost(device: torch.device) -> dict[str, object]:
    """Return the time of a traced prefill over that of a plain one, alternating (random weights of a 135M shape)."""
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TRACED_SHAPE), dtype=torch.bfloat16).eval()
    ids = token_ids(model, 1, 512)
    plain, traced = [], []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        prefill(model, 1, 512, input_ids=ids).logits.sum().item()
        plain.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        with OpTracer(model, timed=True) as tracer:
            prefill(model, 1, 512, input_ids=ids).logits.sum().item()
        tracer.result()
        traced.append(time.perf_counter() - begun)
    return {
        "benchmark": "intensity_tracing_cost",
        "device": str(device),
        "plain_seconds": round(min(plain), 4),
        "traced_seconds": round(min(traced), 4),
        "ratio": round(min(traced) / min(plain), 3),
        "ok": True,
    }


def main() -> int:
    """Print all rows; 1 if a goal is missed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [*(compare_flops(name) for name in CONFIGS), *published(), config_only(), tracing_cost(device)]
    for row in rows:
        print(json.dumps(row), flush=True)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
