"""Decoding over different KV caches: time of a token by context, bytes held, what encoding adds to prefill, agreement.

The caches take turns on one model in one process, so that what else the machine does falls on all of them. Prints one
JSON object a line.

    python -m tests.benchmarks.bench_kv_decode [--codebooks FOLDER] [--contexts 512 2048 8192]
    python -m tests.benchmarks.bench_kv_decode --agreement [--questions FILE]

Codebooks are those of ``--codebooks``, or trained here. ``--agreement`` generates greedily with a full-precision cache
and with a kv-pq cache at 8 bits, in float32, and counts the prompts whose tokens are all the same: windows of the
held-out default text, or the first ``question`` values of a file of JSON lines, put as a user's turn of the model's
chat template and answered until the model ends its answer.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    QuantizedCache,
    StaticCache,
)
from transformers.utils.logging import disable_progress_bar

from effcli.devices import choose_device, native_dtypes
from passes.calibration_text import BATCH_TOKENS
from passes.kv_pq.cache import PQCache, attach, describe, detach
from passes.kv_pq.codebooks import Codebooks
from passes.kv_pq.layer import PQLayer
from profilers.cache_contents import cache_bytes
from profilers.compiled import CompiledDecode
from profilers.device import device_name, synchronize
from profilers.phases import context_limit, token_ids
from profilers.text import TextSplit, split_texts

BUILT_IN = "smollm2-135m"
CONTEXTS = (512, 2_048, 8_192)
BITS, AGREEMENT_BITS = 4.0, 8.0
ROUNDS, STEPS, WARM_UP, PREFILLS = 5, 8, 3, 2
FILLED_CONTEXT, FILL_TOKENS = 32_768, 4_096
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 256, 256
SAMPLES, LENGTH = 32, 512
CPU_SLOWER, GPU_CONTEXT, GPU_FASTER = 1.5, 32_768, 2.5
"""Most times the time of DynamicCache on a CPU; at this context and beyond, least times faster on a GPU."""
ENCODING_SHARE, BYTES_SHARE, AGREEMENT = 0.10, 0.27, 0.90


@dataclass
class Contender:
    """A kind of cache.

    Attributes
    ----------
    name : str
    make : callable
        Takes the slots that it must have room for, returns an empty cache.
    codebooks : Codebooks or None
        The model attends over codes while this cache is used.
    cache, token : Cache, torch.Tensor
        Once prefilled.
    """

    name: str
    make: Callable[[int], Cache]
    codebooks: Codebooks | None = None
    cache: Cache | None = None
    token: torch.Tensor | None = None
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Have the model attend as this cache needs it."""
        if self.codebooks is None:
            yield
            return
        attach(model, self.codebooks)
        try:
            yield
        finally:
            detach(model)

    def prefill(self, model: PreTrainedModel, ids: torch.Tensor, slots: int) -> None:
        """Process a prompt into a new cache, timed."""
        self.cache = self.make(slots)
        with self.on(model):
            self.prefill_seconds.append(_timed(model.device, lambda: self._forward(model, ids)))

    def decode(self, model: PreTrainedModel, steps: int) -> list[float]:
        """Return the seconds of each of so many greedy steps."""
        with self.on(model):
            return [_timed(model.device, lambda: self._forward(model, self.token)) for _ in range(steps)]

    def _forward(self, model: PreTrainedModel, ids: torch.Tensor | None) -> None:
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.token = output.logits[:, -1].argmax(-1, keepdim=True)


def _timed(device: torch.device, run: Callable[[], Any]) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


@contextlib.contextmanager
def encoding_time(device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds that cache layers spend on encoding, rotary embedding taken off included."""
    seconds: list[float] = []
    inner = PQLayer._write_codes

    def timed(layer: PQLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        seconds.append(_timed(device, lambda: inner(layer, keys, values)))

    with mock.patch.object(PQLayer, "_write_codes", timed):
        yield seconds


def contenders(model: PreTrainedModel, codebooks: Codebooks) -> tuple[list[Contender], dict[str, str]]:
    """Return the caches that can be made here, and why others cannot."""
    config = model.config
    found = [
        Contender("dynamic", lambda slots: DynamicCache(config=config)),
        Contender("static", lambda slots: StaticCache(config=config, max_cache_len=slots)),
        Contender("kv-pq", lambda slots: PQCache(config, codebooks), codebooks),
    ]
    missing = {}
    for backend in ("quanto", "hqq"):
        axis = 0 if backend == "quanto" else 1
        for bits in (4, 2):
            made = {"nbits": bits, "axis_key": axis, "axis_value": axis}
            try:
                QuantizedCache(backend, config, **made)
            except (ImportError, ValueError) as error:
                missing[f"{backend} int{bits}"] = str(error).splitlines()[0].strip()
                continue
            found.append(
                Contender(f"{backend} int{bits}", lambda slots, b=backend, m=made: QuantizedCache(b, config, **m))
            )
    return found, missing


def bench_decode(
    model: PreTrainedModel, codebooks: Codebooks, context: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Prefill and decode with each cache in turns; the last step that is timed sees ``context`` tokens."""
    steps = WARM_UP + options.rounds * options.steps
    ids = token_ids(model, 1, context - steps)
    found, missing = contenders(model, codebooks)
    by_name = {item.name: item for item in found}
    encoding = []
    for repeat in range(options.prefills):
        for item in found[:: 1 if repeat % 2 == 0 else -1]:
            with encoding_time(model.device) as seconds:
                item.prefill(model, ids, context)
            if item.codebooks is not None:
                encoding.append(sum(seconds))
    for item in found:
        item.decode(model, WARM_UP)
    for turn in range(options.rounds):
        for item in found[:: 1 if turn % 2 == 0 else -1]:
            item.step_seconds += item.decode(model, options.steps)
    median = {item.name: statistics.median(item.step_seconds) for item in found}
    compiled = _compiled(model, ids, options) if options.compile else None
    share = statistics.median(encoding) / statistics.median(by_name["dynamic"].prefill_seconds)
    slower = median["kv-pq"] / median["dynamic"]
    if model.device.type == "cpu":
        limit = CPU_SLOWER if context >= max(CONTEXTS) else None
    else:
        limit = 1 / GPU_FASTER if context >= GPU_CONTEXT else 1.0
    return {
        "benchmark": "kv_decode",
        "context": context,
        "milliseconds": {name: 1e3 * seconds for name, seconds in median.items()},
        "compiled_static_milliseconds": compiled,
        "over_dynamic": {name: seconds / median["dynamic"] for name, seconds in median.items()},
        "prefill_seconds": {item.name: item.prefill_seconds for item in found},
        "encoding_seconds": encoding,
        "encoding_share_of_prefill": share,
        "held_bytes": {item.name: cache_bytes(item.cache) for item in found},
        "not_measured": missing,
        "must_reach": f"encoding <= {ENCODING_SHARE} of prefill"
        + ("" if limit is None else f", kv-pq <= {limit} x dynamic"),
        "reached": share <= ENCODING_SHARE and (limit is None or slower <= limit),
    }


def _compiled(model: PreTrainedModel, ids: torch.Tensor, options: argparse.Namespace) -> float:
    """Return the median milliseconds of a compiled step over a static cache."""
    decode = CompiledDecode(model, ids, WARM_UP + options.rounds * options.steps)
    for _ in range(WARM_UP):
        decode.step()
    return 1e3 * statistics.median(_timed(model.device, decode.step) for _ in range(options.rounds * options.steps))


def bench_bytes(model: PreTrainedModel, codebooks: Codebooks, context: int) -> dict[str, Any]:
    """Fill caches with random keys and values of ``context`` tokens and count what they hold."""
    text = model.config.get_text_config(decoder=True)
    heads, size = codebooks.model.kv_heads, codebooks.model.head_dim
    generator = torch.Generator().manual_seed(0)
    caches: dict[str, Cache] = {
        "dynamic": DynamicCache(config=model.config),
        "kv-pq": PQCache(model.config, codebooks),
    }
    attach(model, codebooks)  # so that the cache takes tokens without decoding those before them
    try:
        for start in range(0, context, FILL_TOKENS):
            shape = (1, heads, min(FILL_TOKENS, context - start), size)
            for index in range(text.num_hidden_layers):
                keys, values = (
                    torch.randn(shape, generator=generator).to(model.device, torch.bfloat16) for _ in range(2)
                )
                for cache in caches.values():
                    cache.update(keys, values, index)
                    layer = cache.layers[index]
                    if isinstance(layer, PQLayer):
                        layer.settle()
    finally:
        detach(model)
    held = {name: cache_bytes(cache) for name, cache in caches.items()}
    share = held["kv-pq"] / held["dynamic"]
    return {
        "benchmark": "kv_bytes",
        "context": context,
        "dtype": "bfloat16",
        "held_bytes": held,
        "codebook_bytes": codebooks.bytes,
        "share": share,
        "must_reach": f"<= {BYTES_SHARE}",
        "reached": share <= BYTES_SHARE,
    }


def bench_agreement(
    model: PreTrainedModel, codebooks: Codebooks, prompts: list[torch.Tensor], tokens: int, *, to_the_end: bool
) -> dict[str, Any]:
    """Generate greedily with a full-precision cache and with a kv-pq cache; compare token by token.

    ``prompts`` are batches of shape (n, T); ``to_the_end`` ends an answer where the model does, instead of after
    ``tokens``.
    """

    def generate(batch: torch.Tensor, cache: Cache) -> torch.Tensor:
        found: torch.Tensor = model.generate(
            batch.to(model.device),
            attention_mask=torch.ones_like(batch).to(model.device),
            past_key_values=cache,
            do_sample=False,
            min_new_tokens=None if to_the_end else tokens,
            max_new_tokens=tokens,
        )
        return found[:, batch.shape[1] :].cpu()

    expected = [row for batch in prompts for row in generate(batch, DynamicCache(config=model.config))]
    attach(model, codebooks)
    try:
        found = [row for batch in prompts for row in generate(batch, PQCache(model.config, codebooks))]
    finally:
        detach(model)
    first = [_first_difference(*pair) for pair in zip(expected, found, strict=True)]
    share = first.count(None) / len(first)
    return {
        "benchmark": "kv_agreement",
        "prompts": len(first),
        "prompt_tokens": sorted({batch.shape[1] for batch in prompts}),
        "new_tokens": [len(row) for row in expected],
        "effective_bits": codebooks.bits_per_value,
        "recent_tokens": codebooks.recent_tokens,
        "first_difference": first,
        "share_of_prompts_that_match": share,
        "must_reach": f">= {AGREEMENT}",
        "reached": share >= AGREEMENT,
    }


def _first_difference(one: torch.Tensor, other: torch.Tensor) -> int | None:
    both = min(len(one), len(other))
    different = (one[:both] != other[:both]).nonzero()
    if len(different):
        return int(different[0])
    return None if len(one) == len(other) else both


def questions(file: Path, count: int, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Return the first ``question`` values of JSON lines as prompts of the model's chat template, each (1, T)."""
    with file.open(encoding="utf-8") as lines:
        asked = [json.loads(line)["question"] for line in itertools.islice(lines, count)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for question in asked
    ]


def trained(model: PreTrainedModel, split: TextSplit, bits: float) -> tuple[Codebooks, float]:
    """Return codebooks trained on the calibration text, and the seconds that took."""
    from passes.kv_pq.fit import train
    from passes.kv_pq.parameters import KVPQParameters

    started = time.perf_counter()
    windows = split.calibration.separate_windows(SAMPLES, LENGTH)
    batches = list(windows.split(max(1, BATCH_TOKENS // LENGTH)))
    codebooks, _ = train(model, batches, KVPQParameters(bits=bits), seed=0)
    return codebooks, time.perf_counter() - started


def main() -> int:
    """Run what was asked for, and return how many misses there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILT_IN, help="a folder, or the built-in model's name")
    parser.add_argument("--codebooks", type=Path, help="a folder that kv-pq has written; else they are trained here")
    parser.add_argument("--bits", type=float, help=f"to train for ({BITS:g}; with --agreement {AGREEMENT_BITS:g})")
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--bytes-context", type=int, default=FILLED_CONTEXT)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--prefills", type=int, default=PREFILLS)
    parser.add_argument("--compile", action="store_true", help="time torch.compile over a static cache too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="the device's own, or float32")
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--questions", type=Path, help="with --agreement: JSON lines with a question each")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS)
    options = parser.parse_args()
    disable_progress_bar()
    device, _ = choose_device("auto")
    native = torch.bfloat16 if torch.bfloat16 in native_dtypes(device) else torch.float32
    dtype = getattr(torch, options.dtype or ("float32" if options.agreement else str(native).removeprefix("torch.")))
    folder = options.model
    if folder == BUILT_IN:
        from effcli import builtin_models

        folder = str(builtin_models.fetch(BUILT_IN))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    split = split_texts(tokenizer, model.config.get_text_config(decoder=True).vocab_size)
    if options.codebooks is None:
        bits = options.bits or (AGREEMENT_BITS if options.agreement else BITS)
        codebooks, seconds = trained(model, split, bits)
    else:
        codebooks, seconds = Codebooks.load(options.codebooks), None
    codebooks = codebooks.to(device)
    attach(model, codebooks)
    how = describe(model)
    detach(model)
    about = {
        "model": options.model,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "attention": how,
        "bits": codebooks.bits_per_value,
        "training_seconds": seconds,
    }
    lines = run(model, codebooks, split, tokenizer, options)
    missed = 0
    for line in lines:
        print(json.dumps(about | line), flush=True)
        missed += not line["reached"]
    return missed


def run(
    model: PreTrainedModel,
    codebooks: Codebooks,
    split: TextSplit,
    tokenizer: PreTrainedTokenizerBase,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield the results of what was asked for."""
    if options.agreement:
        if options.questions is None:
            prompts = [split.evaluation.separate_windows(options.prompts, options.prompt_tokens)]
        else:
            prompts = questions(options.questions, options.prompts, tokenizer)
        yield bench_agreement(model, codebooks, prompts, options.tokens, to_the_end=options.questions is not None)
        return
    yield bench_bytes(model, codebooks, options.bytes_context)
    limit = context_limit(model.config)
    for context in options.contexts:
        if limit is None or context <= limit:
            yield bench_decode(model, codebooks, context, options)


if __name__ == "__main__":
    sys.exit(main())
