"""Quality of quantized KV caches: one table of methods over effective bits, perplexity and divergence.

Every method goes through the same harness (``kv_baselines/fake.py``): windows of text, the first tokens of each kept in
full precision, all other keys and values quantized, and every query sees the quantized ones. Effective bits count
codes, scales, zeros and norms; codebooks are a column of their own. Intervals are paired with the original by block of
text. What is trained is trained on calibration text that shares no run of 32 tokens with the text measured on.

    python -m tests.benchmarks.bench_kv_quality [--text FILE] [--windows N] [--first] [--only NAME ...]
        [--architecture NAME]

A table on a terminal, one JSON object a row in a pipe.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.utils.logging import disable_progress_bar

from passes.calibration_text import BATCH_TOKENS
from passes.kv_pq.codebooks import Codebooks
from profilers.quality import QualityResult, Reference, measure_quality, record_reference
from profilers.text import TextSplit, split_texts
from tests.benchmarks.kv_baselines.architectures import ARCHITECTURES
from tests.benchmarks.kv_baselines.base import Baseline, Samples, collect
from tests.benchmarks.kv_baselines.fake import KEPT_TOKENS, fake_quantized
from tests.benchmarks.kv_baselines.fp8 import FP8
from tests.benchmarks.kv_baselines.kv_pq import KVPQ, through_cache
from tests.benchmarks.kv_baselines.million import Million
from tests.benchmarks.kv_baselines.rotated import Rotated
from tests.benchmarks.kv_baselines.transformers_caches import BACKENDS, TransformersCache
from tests.benchmarks.kv_baselines.uniform import KIVI, HalfQuadratic, PerToken

BUILT_IN = "smollm2-135m"
CONTEXT, WINDOWS = 1_024, 16
SAMPLES, LENGTH = 32, 512
KV_PQ_BITS = (2.0, 3.0, 4.0, 4.25, 4.5)
LIMITS = ((4.25, 1.03), (4.5, 1.02))
"""Effective bits up to which a best kv-pq row must have at most this ratio of perplexity to the original's."""

METHODS: tuple[tuple[type[Baseline], tuple[Any, ...]], ...] = (
    (FP8, ()),
    *((KIVI, (bits, group)) for bits in (4, 3, 2) for group in (32, 64)),
    *((kind, (bits,)) for kind in (PerToken, HalfQuadratic) for bits in (4, 2)),
    *((TransformersCache, (backend, bits)) for backend in BACKENDS for bits in (4, 2)),
    *((Rotated, (bits, dim)) for bits in (4, 3, 2) for dim in (1, 2)),
    *((Million, (bits,)) for bits in (4, 3, 2)),
)
"""Classes of baselines and what each setting is made with."""


@dataclass(frozen=True)
class Row:
    """One method at one setting.

    Attributes
    ----------
    method : str
    bits : float or None
        Nominal; None for the original.
    effective_bits : float or None
        Codes, scales, zeros and norms, a value.
    codebook_bytes : int or None
    perplexity, ratio, kl, top1_agreement : float or None
        Of the quantized model; over the original's; in nats a token.
    ratio_interval, kl_interval : tuple of float or None
        95 %, over blocks of text; the ratio's is paired.
    fit_seconds, seconds : float or None
        Training, of kv-pq with the collecting of keys and values, of others without; measuring.
    reason : str or None
        Why there is no measurement.
    """

    method: str
    bits: float | None
    effective_bits: float | None = None
    codebook_bytes: int | None = None
    perplexity: float | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    top1_agreement: float | None = None
    fit_seconds: float | None = None
    seconds: float | None = None
    reason: str | None = None


class Harness:
    """A model, the windows it is measured on, and the calibration text that methods may learn from.

    Parameters
    ----------
    model : PreTrainedModel
    windows : torch.Tensor
        Token ids to measure on, shape (n, T).
    calibration : torch.Tensor
        Token ids to learn from, shape (m, T').
    text : str
        What the windows are of.
    kept : int
        First tokens of each window in full precision.
    """

    def __init__(
        self, model: PreTrainedModel, windows: torch.Tensor, calibration: torch.Tensor, text: str, kept: int
    ) -> None:
        self.model = model
        self.windows = windows
        self.calibration = calibration
        self.text = text
        self.kept = kept
        self.reference: Reference = record_reference(model, windows)
        config = model.config.get_text_config(decoder=True)
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kinds, _ = get_layer_types_and_kwargs(config)
        # Sliding windows are short already, and linear attention has no keys: neither is quantized, by any method.
        self.layers = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        self._samples: Samples | None = None

    def samples(self) -> Samples:
        """Return keys and values of the calibration text, collected once."""
        if self._samples is None:
            found = collect(self.model, self.calibration, kept=self.kept)
            self._samples = {layer: found[layer] for layer in self.layers}
        return self._samples

    def original(self) -> Row:
        """Measure the model as it is."""
        started = time.perf_counter()
        found = measure_quality(self.model, self.windows, self.reference, text_name=self.text)
        return _row(f"original, {self.model.dtype}".replace("torch.", ""), None, found, time.perf_counter() - started)

    def row(self, method: Baseline) -> Row:
        """Fit a method if it has something to learn, and measure it."""
        samples = self.samples() if method.needs_samples else {}
        started = time.perf_counter()
        if method.needs_samples:
            method.fit(samples)
        fitted = time.perf_counter()
        with fake_quantized(self.model, method, kept=self.kept, layers=self.layers):
            found = measure_quality(self.model, self.windows, self.reference, text_name=self.text)
        return _row(
            method.name,
            method.bits,
            found,
            time.perf_counter() - fitted,
            effective_bits=method.effective_bits(self.head_dim),
            codebook_bytes=method.codebook_bytes,
            fit_seconds=fitted - started if method.needs_samples else None,
        )

    def kv_pq(self, bits: float, codebooks: Codebooks, fit_seconds: float | None) -> Iterator[Row]:
        """Measure codebooks as every other method, and through the real cache, recent block included."""
        method = KVPQ(bits, codebooks.to(self.model.device))
        yield replace(self.row(method), fit_seconds=fit_seconds)
        started = time.perf_counter()
        with through_cache(self.model, method.codebooks):
            found = measure_quality(self.model, self.windows, self.reference, text_name=self.text)
        yield _row(
            f"{KVPQ.name}, through its cache, {codebooks.recent_tokens} recent tokens exact",
            bits,
            found,
            time.perf_counter() - started,
            effective_bits=codebooks.bits_per_value,
            codebook_bytes=codebooks.bytes,
        )

    def train(self, bits: float) -> tuple[Codebooks, float]:
        """Return codebooks for a budget of bits, and the seconds that training them took."""
        from passes.kv_pq.fit import train
        from passes.kv_pq.parameters import KVPQParameters

        started = time.perf_counter()
        batches = list(torch.split(self.calibration, max(1, BATCH_TOKENS // self.calibration.shape[1])))
        codebooks, _ = train(self.model, batches, KVPQParameters(bits=bits, kept=self.kept), seed=0)
        return codebooks, time.perf_counter() - started


def _row(method: str, bits: float | None, found: QualityResult, seconds: float, **more: Any) -> Row:
    assert found.kl is not None
    return Row(
        method=method,
        bits=bits,
        perplexity=found.perplexity.after,
        ratio=found.perplexity.ratio,
        ratio_interval=found.perplexity.ratio_interval,
        kl=found.kl.mean,
        kl_interval=found.kl.interval,
        top1_agreement=found.top1_agreement,
        seconds=seconds,
        **more,
    )


def rows(harness: Harness, only: list[str], bits: list[float], folders: list[Path]) -> Iterator[Row]:
    """Yield the original's row and each method's; a backend that is not installed gives a row with the reason.

    kv-pq is trained for each of ``bits``, and read from each of ``folders``.
    """
    yield harness.original()
    for kind, settings in METHODS:
        try:
            method = kind(*settings)
        except ImportError as error:
            name = TransformersCache.title(settings[0])
            if _wanted(name, only):
                yield Row(name, settings[1], reason=f"not installed: {str(error).splitlines()[0].strip()}")
            continue
        if _wanted(method.name, only):
            yield harness.row(method)
    if _wanted(KVPQ.name, only):
        for folder in folders:
            codebooks = Codebooks.load(folder)
            yield from harness.kv_pq(codebooks.bits_per_value, codebooks, None)
        for budget in bits:
            yield from harness.kv_pq(budget, *harness.train(budget))


def _wanted(name: str, only: list[str]) -> bool:
    return not only or any(part.lower() in name.lower() for part in only)


def verdicts(found: list[Row]) -> list[dict[str, object]]:
    """Hold the kv-pq rows against their limits and against the baselines."""
    ours = [row for row in found if row.method == KVPQ.name]
    lines: list[dict[str, object]] = []
    for most, limit in LIMITS:
        best = min((row for row in ours if _bits(row) <= most), key=_ratio, default=None)
        lines.append(
            {
                "benchmark": "kv_quality_limit",
                "effective_bits": None if best is None else best.effective_bits,
                "ratio": None if best is None else best.ratio,
                "must_reach": f"ratio <= {limit} at <= {most} effective bits",
                "reached": best is not None and _ratio(best) <= limit,
            }
        )
    baselines = [row for row in found if row.effective_bits is not None and not row.method.startswith(KVPQ.name)]
    for row in ours:
        rivals = [item for item in baselines if item.bits == int(row.bits or 0) and _bits(item) >= _bits(row)]
        above = [f"{item.method}, {item.effective_bits} bits" for item in rivals if _ratio(item) <= _ratio(row)]
        lines.append(
            {
                "benchmark": "kv_quality_against_baselines",
                "bits": row.bits,
                "effective_bits": row.effective_bits,
                "ratio": row.ratio,
                "rivals": len(rivals),
                "not_below": above,
                "must_reach": "below every baseline of the same nominal bits that takes as many effective bits or more",
                "reached": bool(rivals) and not above,
            }
        )
    return lines


def _bits(row: Row) -> float:
    assert row.effective_bits is not None
    return row.effective_bits


def _ratio(row: Row) -> float:
    assert row.ratio is not None
    return row.ratio


def table(found: list[Row], title: str) -> Table:
    """Return the rows as a table, by effective bits."""
    made = Table(title=title)
    made.add_column("method")
    for name in ("bits", "effective", "codebooks, kB", "perplexity", "change %", "95 %", "KL, nats", "top-1 %"):
        made.add_column(name, justify="right")
    for row in sorted(found, key=lambda row: (row.effective_bits is None, -(row.effective_bits or 0))):
        if row.reason is not None:
            made.add_row(row.method, f"{row.bits:g}", "", "", row.reason)
            continue
        assert row.perplexity is not None and row.kl is not None and row.top1_agreement is not None
        low, high = row.ratio_interval or (float("nan"), float("nan"))
        made.add_row(
            row.method,
            "" if row.bits is None else f"{row.bits:g}",
            "" if row.effective_bits is None else f"{row.effective_bits:.3f}",
            "" if row.codebook_bytes is None else f"{row.codebook_bytes / 1e3:,.1f}",
            f"{row.perplexity:.3f}",
            f"{100 * (_ratio(row) - 1):+.2f}",
            f"{100 * (low - 1):+.2f} … {100 * (high - 1):+.2f}",
            f"{row.kl:.4f}",
            f"{100 * row.top1_agreement:.1f}",
        )
    return made


def prepared(options: argparse.Namespace) -> tuple[Harness, TextSplit]:
    """Load the model and cut the texts into windows."""
    disable_progress_bar()
    folder = options.model
    if folder == BUILT_IN:
        from effcli import builtin_models

        folder = str(builtin_models.fetch(BUILT_IN))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if options.architecture is not None:
        model = ARCHITECTURES[options.architecture](model)
    texts = [None if path is None else path.read_text(encoding="utf-8") for path in (options.text, options.calibration)]
    split = split_texts(
        AutoTokenizer.from_pretrained(folder),
        model.config.get_text_config(decoder=True).vocab_size,
        evaluation_text=texts[0],
        calibration_text=texts[1],
        evaluation_name=options.text.name if options.text else "",
        calibration_name=options.calibration.name if options.calibration else "",
    )
    if options.first:
        count = min(options.windows, split.evaluation.ids.numel() // options.context)
        windows = split.evaluation.ids[: count * options.context].view(count, options.context)
    else:
        windows = split.evaluation.separate_windows(options.windows, options.context)
    calibration = split.calibration.separate_windows(options.samples, options.length)
    return Harness(model, windows, calibration, split.evaluation.name, options.kept), split


def main() -> int:
    """Measure, print, and return how many limits kv-pq misses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUILT_IN, help="a folder, or the built-in model's name")
    parser.add_argument(
        "--architecture",
        choices=sorted(ARCHITECTURES),
        help="put a Llama model's weights into this one first (kv_baselines/architectures.py; the model as it is)",
    )
    parser.add_argument("--text", type=Path, help="file to measure on (the default text's held-out part)")
    parser.add_argument("--calibration", type=Path, help="file to learn from (the default text's other part)")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--first", action="store_true", help="the text's first windows instead of evenly spaced ones")
    parser.add_argument("--kept", type=int, default=KEPT_TOKENS, help="first tokens kept in full precision")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a calibration window")
    parser.add_argument("--bits", type=float, nargs="*", default=KV_PQ_BITS, help="to train kv-pq for")
    parser.add_argument("--codebooks", type=Path, nargs="*", default=[], help="folders that kv-pq has written")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="methods whose name contains one of these"
    )
    options = parser.parse_args()
    name = options.model if options.architecture is None else f"{options.model} as {options.architecture}"
    harness, split = prepared(options)
    about = {
        "benchmark": "kv_quality",
        "model": options.model,
        "architecture": options.architecture,
        "dtype": options.dtype,
        "text": harness.text,
        "windows": list(harness.windows.shape),
        "calibration_text": split.calibration.name,
        "calibration_windows": list(harness.calibration.shape),
        "kept_tokens": options.kept,
        "layers_quantized": len(harness.layers),
    }
    console = Console()
    found = []
    for row in rows(harness, options.only, options.bits, options.codebooks):
        found.append(row)
        if console.is_terminal:
            print(f"{row.method}, {row.bits} bits: {row.reason or row.perplexity}", file=sys.stderr)
        else:
            print(json.dumps(about | asdict(row)), flush=True)
    if console.is_terminal:
        console.print(table(found, f"{name}, {options.dtype}, {tuple(harness.windows.shape)} of {harness.text}"))
    judged = verdicts(found) if any(row.method == KVPQ.name for row in found) else []
    for line in judged:
        print(json.dumps(line), flush=True)
    return sum(not line["reached"] for line in judged)


if __name__ == "__main__":
    sys.exit(main())
