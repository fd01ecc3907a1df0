"""Looping against plain tying and against dropping layers, at the same share of the layers' parameters.

``python -m tests.benchmarks.bench_loop [--model MODEL] [--text FILE ...] [--windows N] [--share S] [--only NAME ...]``;
without ``--model`` the built-in one. Each way is one line: its share of the layers' parameters, seconds, and on each
text (the held-out part of the default one, and any given) perplexity over the original's and KL divergence. Nothing is
healed: healing comes on top, and is measured by ``effcli optimize MODEL --pass loop:…,heal_tokens=…``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARE = 0.8
WINDOWS, LENGTH = 16, 512
DAMAGE_WINDOWS = 4
DRAWN = 32 * 512
EDGE = 2
"""Layers left alone at either end where pairs of neighbours share."""


def ways(structure: Any, share: float) -> dict[str, dict[str, Any] | None]:
    """Return the loop parameters of each way; None for dropping layers."""
    layers = sum(structure.layer_parameters)
    target = 1 - (1 - share) * layers / structure.parameters
    pairs = (structure.layers - 2 * EDGE) // 2
    linears = structure.linears[EDGE].values()
    whole, one = sum(item.parameters for item in linears), sum(item.rank_parameters for item in linears)
    rank = int((whole - (1 - share) * layers / pairs) / (2 * one))  # of both layers of a pair
    whole_pairs = structure.layers // 2
    density = 1 - (1 - share) * layers / (whole_pairs * whole)
    masks = 1 / (8 * next(iter(linears)).itemsize)  # a bit an entry, in entries
    sparse = {"blocks": whole_pairs, "loops": 2, "keep_last": structure.layers - 2 * whole_pairs}
    regular = {"blocks": pairs, "loops": 2, "keep_first": EDGE, "keep_last": structure.layers - EDGE - 2 * pairs}
    return {
        "plain tying": {"target": target, "rank": 0, "init": "average", "align": False},
        "layers dropped": None,
        "pairs, no order, one kind of error": regular | {"rank": rank, "align": False},
        "pairs": regular | {"rank": rank},
        "pairs, sparse parts": sparse | {"density": density},
        "pairs, sparse parts, bytes of masks counted": sparse | {"density": density - masks},
        "pairs, drawn text": regular | {"rank": rank, "drawn": DRAWN},
        "chosen": {"target": target},
        "chosen, drawn text": {"target": target, "drawn": DRAWN},
    }


@contextlib.contextmanager
def looped(model: Any, values: dict[str, Any], tokenizer: Any, calibration: Any) -> Iterator[tuple[Any, float]]:
    """Loop a copy of a model; give it with its share of the layers' parameters."""
    import copy

    from passes.base import PassContext
    from passes.loop import LoopPass

    changed = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        record = LoopPass.from_mapping(values).apply(
            changed, PassContext(tokenizer, model.device, calibration, Path(folder))
        )
    yield changed, record.details["sizes"]["layers_share"]


@contextlib.contextmanager
def dropped(model: Any, share: float, batches: Any) -> Iterator[tuple[Any, float]]:
    """Skip the layers that cost least one by one, as many as the share asks for; all together they cost more."""
    from profilers.layer_damage import skip_damage
    from profilers.layer_exchange import skipping

    layers = len(model.model.layers)
    count = round((1 - share) * layers)
    damages = skip_damage(model, batches, tuple(range(layers)))
    cheapest = sorted(range(layers), key=lambda index: damages[index])[:count]
    with skipping(model, cheapest):
        yield model, 1 - count / layers


def main() -> int:
    """Print one JSON line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", action="append", default=[], type=Path)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--only", action="append", default=[])
    options = parser.parse_args()

    from effcli import loading, sources
    from passes.loop import targets
    from profilers.quality import measure_quality
    from profilers.reference import record_reference
    from profilers.text import split_texts, token_stream

    found = loading.load(sources.resolve(options.model), device="auto", dtype="auto")
    model, tokenizer = found.model, found.tokenizer
    vocabulary = model.config.get_text_config().vocab_size
    split = split_texts(tokenizer, vocabulary)
    texts = {"default": split.evaluation.separate_windows(options.windows, LENGTH)}
    for path in options.text:
        stream = token_stream(tokenizer, vocabulary, path.read_text(encoding="utf-8"))
        texts[path.name] = stream.separate_windows(options.windows, LENGTH)
    references = {name: record_reference(model, windows) for name, windows in texts.items()}
    batches = [split.calibration.windows(DAMAGE_WINDOWS, LENGTH)]
    for name, values in ways(targets.find(model), options.share).items():
        if options.only and name not in options.only:
            continue
        started = time.perf_counter()
        if values is None:
            way = dropped(model, options.share, batches)
        else:
            way = looped(model, values, tokenizer, split.calibration)
        with way as (changed, share):
            seconds = time.perf_counter() - started
            line: dict[str, Any] = {
                "benchmark": "loop", "model": options.model, "way": name, "parameters": values,
                "layers_share": round(share, 4), "seconds": round(seconds, 1),
            }  # fmt: skip
            for text, windows in texts.items():
                quality = measure_quality(changed, windows, references[text], text_name=text)
                line[text] = {
                    "perplexity_ratio": quality.perplexity.ratio,
                    "perplexity_ratio_interval": quality.perplexity.ratio_interval,
                    "kl": quality.kl.mean,
                    "kl_interval": quality.kl.interval,
                }
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
