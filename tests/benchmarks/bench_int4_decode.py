"""Int4 decode on this device: the original through transformers against ``effcli.load``, eager and compiled.

Prints one JSON object a line. Batch 1, context 128; the models take turns, eight steps each, so that what else the
machine does falls on all of them. The int4 weights are round-to-nearest in groups of 64 columns: a kernel's speed does
not depend on their values.

    python -m tests.benchmarks.bench_int4_decode [builtin] [1b]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from effcli import checkpoint
from effcli.devices import choose_device, native_dtypes
from passes.base import LoadOptions
from passes.quantize.kernels import pack_head, quantize_linear
from passes.quantize.quiet import quiet_libraries
from profilers.compiled import CompiledDecode
from profilers.phases import prefill, token_ids
from profilers.timing import next_token
from profilers.weights import weight_bytes_and_parameters
from tests.passes.quantize.compressed import save_compressed

CONTEXT = 128
GROUP_SIZE = 64
ROUNDS = 8
STEPS = 8
WARM_UP = 3
BUILT_IN = "smollm2-135m"
EAGER_FACTOR = 1.8
COMPILED_FACTOR = 2.5
BILLION_FACTOR = 2.5
LLAMA_CPP_FACTOR = 4.9
"""llama.cpp with its 4-bit file of the built-in model, against transformers in bfloat16, on the same machine."""
SHAPE_1B = {  # of TinyLlama 1.1B
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}

Step = Callable[[], object]


def eager(model: PreTrainedModel) -> Step:
    """Return a function that decodes one token after another."""
    ids = token_ids(model, 1, CONTEXT)
    state = prefill(model, 1, CONTEXT, input_ids=ids)
    token = state.logits[:, -1].argmax(dim=-1, keepdim=True)

    def step() -> None:
        nonlocal state, token
        state, token = next_token(model, state, token)

    return step


def compiled(model: PreTrainedModel) -> tuple[Step, float]:
    """Return a compiled decode step, and the seconds that compiling it took."""
    decode = CompiledDecode(model, token_ids(model, 1, CONTEXT), WARM_UP + ROUNDS * STEPS + 1)
    start = time.perf_counter()
    decode.step()
    return decode.step, time.perf_counter() - start


def take_turns(steps: dict[str, Step]) -> dict[str, float]:
    """Return the median seconds of each step, run in turns."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            for _ in range(STEPS):
                _synchronize()
                start = time.perf_counter()
                step()
                _synchronize()
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def results(name: str, original: PreTrainedModel, quantized: PreTrainedModel, dtype: torch.dtype) -> dict[str, object]:
    """Time the three and put them side by side."""
    compiled_step, compile_seconds = compiled(quantized)
    seconds = take_turns({"original": eager(original), "int4": eager(quantized), "int4_compiled": compiled_step})
    return {
        "benchmark": name,
        "device": str(quantized.device),
        "threads": torch.get_num_threads(),
        "context": CONTEXT,
        "original_dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": [weight_bytes_and_parameters(model).bytes for model in (original, quantized)],
        "compile_seconds": compile_seconds,
        "milliseconds": {key: 1e3 * value for key, value in seconds.items()},
        "eager_factor": seconds["original"] / seconds["int4"],
        "compiled_factor": seconds["original"] / seconds["int4_compiled"],
    }


def built_in(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Compare the built-in model with its int4 checkpoint."""
    name = str(dtype).removeprefix("torch.")
    original = checkpoint.load(BUILT_IN, device=str(device), dtype=name).model
    with tempfile.TemporaryDirectory() as folder:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP_SIZE}
        copy = checkpoint.load(BUILT_IN, device="cpu", dtype=name).model
        with quiet_libraries():
            save_compressed(copy, Path(folder), weights, dtype=dtype)
        del copy
        quantized = checkpoint.load(folder, device=str(device), dtype=name).model
    found = results("int4_decode_built_in", original, quantized, dtype)
    reached = float(str(found["compiled_factor"]))
    return found | {
        "llama_cpp_factor": LLAMA_CPP_FACTOR,
        "share_of_llama_cpp": reached / LLAMA_CPP_FACTOR,
        "must_reach": f"eager {EAGER_FACTOR} x, compiled {COMPILED_FACTOR} x",
        "reached": float(str(found["eager_factor"])) >= EAGER_FACTOR and reached >= COMPILED_FACTOR,
    }


def billion(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Compare a 1.1B-parameter llama of random weights with itself in int4, packed without a file between."""
    with torch.device(device):
        torch.manual_seed(0)
        original = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE_1B), dtype=dtype).eval()
        quantized = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE_1B), dtype=dtype).eval()
    head = quantized.get_output_embeddings()
    for module_name, module in list(quantized.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            quantized.set_submodule(module_name, quantize_linear(module, 4, GROUP_SIZE, dtype))
    pack_head(quantized, LoadOptions(device, dtype))
    found = results("int4_decode_1b", original, quantized, dtype)
    best = max(float(str(found["eager_factor"])), float(str(found["compiled_factor"])))
    return found | {"must_reach": f"{BILLION_FACTOR} x, eager or compiled", "reached": best >= BILLION_FACTOR}


def main(names: list[str]) -> int:
    """Run the benchmarks named, or both, and return how many missed what they must reach."""
    device, _ = choose_device("auto")
    dtype = torch.bfloat16 if torch.bfloat16 in native_dtypes(device) else torch.float32
    missed = 0
    for name, run in {"builtin": built_in, "1b": billion}.items():
        if names and name not in names:
            continue
        found = run(device, dtype)
        print(json.dumps(found), flush=True)
        missed += not found["reached"]
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
