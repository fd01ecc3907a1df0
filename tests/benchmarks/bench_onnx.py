"""ONNX Runtime beside transformers: time to the first and to each further token, logits, size, memory.

Both run the same model in float32 in one process with equally many threads, and take turns, so that what else the
machine does falls on both. Prints one JSON object a line.

    python -m tests.benchmarks.bench_onnx [--folder out-onnx] [--model smollm2-135m] [--contexts 128 512]

``--folder`` is an export of ``--model`` in float32; without it one is made in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import effcli
from effcli.evaluation import evaluation_windows
from effcli.export.exporting import export
from effcli.recipes import Calibration, Evaluation
from profilers.device import return_freed_memory
from profilers.phases import token_ids
from profilers.timing import Distribution, first_token, next_token

BUILT_IN = "smollm2-135m"
ROUNDS, STEPS, WARM_UP = 8, 6, 2
LOGITS_WITHIN, SIZE_OVER = 1e-3, 1.02


def main() -> int:
    """Measure and print; return how many bounds do not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "out-onnx"
            export(given.model, folder, dtype="float32")
        return _measure(folder, given.model, given.contexts, given.device)


def _measure(folder: Path, name: str, contexts: list[int], device: str) -> int:
    effcli.load(folder, device=device)  # imports what is imported, which is not the model's memory
    gc.collect()
    return_freed_memory()
    held = _held_bytes()
    started = time.perf_counter()
    exported = effcli.load(folder, device=device)
    seconds = time.perf_counter() - started
    return_freed_memory()
    memory = None if held is None else (_held_bytes() or 0) - held
    weights = exported.model.weight_size.bytes
    print(json.dumps({
        "benchmark": "onnx", "part": "opened", "runtime": exported.model.notes[0], "open_seconds": seconds,
        "memory_bytes": memory, "memory_over_weights": memory and memory / weights,
    }), flush=True)  # fmt: skip

    model, tokenizer = effcli.load(name, device=device, dtype="float32")
    loaded = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in model.parameters()}.values())
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(json.dumps({"benchmark": "onnx", "part": "size", "bytes": size, "over_weights": size / loaded}), flush=True)
    failed = size > SIZE_OVER * loaded

    windows = evaluation_windows(
        tokenizer, model.config.vocab_size, Evaluation(tokens=1024, context=256), Calibration(), 0
    )
    difference = 0.0
    with torch.inference_mode():
        for window in windows.windows.to(model.device).split(1):
            theirs, ours = model(window).logits, exported.model(window).logits
            difference = max(difference, (theirs - ours).abs().max().item())
    print(json.dumps({"benchmark": "onnx", "part": "logits", "max_difference": difference}), flush=True)
    failed += difference > LOGITS_WITHIN

    contenders = {"torch eager": model, "torch sdpa": model, "onnxruntime": exported.model}
    for context in contexts:
        times = _take_turns(contenders, context, {"torch eager": "eager", "torch sdpa": "sdpa"})
        tpot = {who: Distribution.of(samples["tpot"]) for who, samples in times.items()}
        ttft = {who: Distribution.of(samples["ttft"]) for who, samples in times.items()}
        print(json.dumps({
            "benchmark": "onnx", "part": "time", "context": context, "threads": torch.get_num_threads(),
            "ttft_seconds": {who: timing.p50 for who, timing in ttft.items()},
            "tpot_seconds": {who: timing.p50 for who, timing in tpot.items()},
            "tpot_fastest_seconds": {who: timing.minimum for who, timing in tpot.items()},
            "tpot_spread": {who: timing.relative_spread for who, timing in tpot.items()},
            "as_fast": {who: timing.p50 / tpot["onnxruntime"].p50 for who, timing in tpot.items()},
        }), flush=True)  # fmt: skip
        failed += tpot["onnxruntime"].p50 > tpot["torch eager"].p50
    return int(failed)


def _take_turns(
    contenders: dict[str, Any], context: int, attention: dict[str, str]
) -> dict[str, dict[str, list[float]]]:
    """Prefill and decode a few steps with each in turn, round after round; return the seconds of each."""
    times: dict[str, dict[str, list[float]]] = {who: {"ttft": [], "tpot": []} for who in contenders}
    for round_ in range(ROUNDS):
        for who, model in contenders.items():
            if who in attention:
                model.set_attn_implementation(attention[who])
            ids = token_ids(model, 1, context, seed=round_)
            seconds, run = _timed(lambda model=model, ids=ids: first_token(model, ids))
            if round_:
                times[who]["ttft"].append(seconds)
            for step in range(WARM_UP + STEPS):
                seconds, run = _timed(lambda model=model, run=run: next_token(model, *run))
                if round_ and step >= WARM_UP:
                    times[who]["tpot"].append(seconds)
    return times


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _held_bytes() -> int | None:
    """Return the memory of this process, each shared page by its share; None where Linux does not say."""
    path = Path("/proc/self/smaps_rollup")
    if not path.is_file():
        return None
    return next(1024 * int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("Pss:"))


if __name__ == "__main__":
    sys.exit(main())
