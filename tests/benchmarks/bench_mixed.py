"""Mixed bits against uniform bits of the same stored size, both by GPTQ, on text that neither was calibrated on.

``python -m tests.benchmarks.bench_mixed [--model MODEL] [--text FILE ...] [--windows N] [--bits B]``; without
``--model`` the built-in one. ``bits=4.5`` is what uniform w4a16 in groups of 32 takes, scales included. Each text
(the held-out part of the default one, and any given) is one line; the last line says whether mixed won on all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

BITS = 4.5
GROUP_SIZE = 32
WINDOWS, LENGTH = 16, 512
VARIANTS: dict[str, dict[str, Any]] = {
    "uniform": {"scheme": "w4a16", "group_size": GROUP_SIZE},
    "mixed": {"scheme": "auto", "bits": BITS},
}


def quantize(model: str, values: dict[str, Any], texts: dict[str, Any], references: dict[str, Any], calibration: Any):
    """Return the pass's record and the quality of the quantized model on every text."""
    from effcli import loading, sources
    from passes.base import PassContext
    from passes.quantize import QuantizePass
    from profilers.quality import measure_quality

    loaded = loading.load(sources.resolve(model), device="auto", dtype="auto")
    item = QuantizePass.from_mapping(values)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        context = PassContext(loaded.tokenizer, loaded.device, calibration, Path(folder))
        record = item.apply(loaded.model, context)
        seconds = time.perf_counter() - started
    found = {
        name: measure_quality(loaded.model, windows, references[name], text_name=name)
        for name, windows in texts.items()
    }
    return record, found, seconds


def main() -> int:
    """Print one JSON line for each text and a verdict; return 1 if mixed bits did not win everywhere."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", action="append", default=[], type=Path)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--bits", type=float, default=BITS)
    options = parser.parse_args()

    from effcli import loading, sources
    from passes.quantize.schemes import stored_bits
    from profilers.reference import record_reference
    from profilers.text import split_texts, token_stream

    loaded = loading.load(sources.resolve(options.model), device="auto", dtype="auto")
    vocabulary = loaded.config.get_text_config(decoder=True).vocab_size
    split = split_texts(loaded.tokenizer, vocabulary, calibration_text=None, evaluation_text=None, seed=0)
    streams = {"held-out part of the default text": split.evaluation}
    for path in options.text:
        streams[path.name] = token_stream(loaded.tokenizer, vocabulary, path.read_text(encoding="utf-8"))
    texts = {name: stream.separate_windows(options.windows, LENGTH) for name, stream in streams.items()}
    references = {name: record_reference(loaded.model, windows) for name, windows in texts.items()}
    shapes = {name: tuple(module.weight.shape) for name, module in loaded.model.named_modules() if _linear(module)}
    del loaded

    results = {}
    for variant, values in VARIANTS.items():
        values = values | ({"bits": options.bits} if "bits" in values else {})
        record, found, seconds = quantize(options.model, values, texts, references, split.calibration)
        stored = sum(
            stored_bits("auto", *shapes[layer.name], bits=int(layer.bits), group_size=layer.group_size)
            for layer in record.layers
        )
        results[variant] = {"stored_bits": stored, "seconds": seconds, "quality": found, "notes": record.notes}
    won = results["mixed"]["stored_bits"] <= results["uniform"]["stored_bits"]
    for name in texts:
        line: dict[str, Any] = {"benchmark": "mixed_bits", "text": name, "windows": options.windows, "length": LENGTH}
        for variant, result in results.items():
            quality = result["quality"][name]
            line[variant] = {
                "stored_bits": result["stored_bits"],
                "perplexity_before": quality.perplexity.before,
                "perplexity": quality.perplexity.after,
                "kl": quality.kl.mean,
                "kl_interval": quality.kl.interval,
                "top1_agreement": quality.top1_agreement,
                "pass_seconds": result["seconds"],
            }
        won = won and line["mixed"]["kl"] < line["uniform"]["kl"]
        won = won and line["mixed"]["perplexity"] < line["uniform"]["perplexity"]
        print(json.dumps(line, default=str), flush=True)
    must = "no more stored bits, lower perplexity and lower KL on every text"
    print(json.dumps({"benchmark": "mixed_bits", "must_reach": must, "reached": won}), flush=True)
    return 0 if won else 1


def _linear(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


if __name__ == "__main__":
    raise SystemExit(main())
