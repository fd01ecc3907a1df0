"""KV cache: bytes a token, predicted and measured, and what fits this device."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Chart, Facts, Report, Section, Table, columns, items, unique

OWN = "quantized"
"""Kind of layers whose model makes a cache of its own, in few bits already."""


def cache_bytes(result: Report) -> Callable[[float, float], float]:
    """Return bytes of one sequence's cache as a function of its context and of the width of a cached value.

    ::

        layer    min(fixed + slope x context, state + growing x context)    the second only with a window
        at b     state + (layer - state) x b / native width                 recurrent states keep theirs
                 layer                                                       of a cache that the model makes itself
    """
    native = bits_of(result.get("dtype"))
    layers = items(result, "layers") or [result]
    terms = Counter(
        (
            float(layer.get("bytes_per_token") or 0),
            float(layer.get("fixed_bytes") or 0),
            float(layer.get("bytes_per_token_growing") or 0) if layer.get("window") else None,
            float(layer.get("state_bytes") or 0),
            layer.get("kind") == OWN,
        )
        for layer in layers
    )

    def total(context: float, bits: float) -> float:
        whole = 0.0
        for (slope, fixed, growing, state, own), count in terms.items():
            held = fixed + slope * context
            if growing is not None:
                held = min(held, state + growing * context)
            whole += count * (held if own else state + (held - state) * bits / native)
        return whole

    return total


def bits_of(dtype: object) -> int:
    """Return the width of a dtype by its name (``bfloat16``, ``float8_e4m3fn``); 16 where the name has none."""
    found = re.search(r"\d+", str(dtype))
    return int(found.group()) if found else 16


def section(result: Report, report: Report) -> Section:
    """Build the section."""
    blocks: list[Block] = [_facts(result), Chart("kv")]
    if items(result, "layers"):
        blocks.append(_layers(result))
    blocks += [_points(result), _fits(result)]
    return Section("kv", "KV cache", (), tuple(blocks))


def _facts(result: Report) -> Facts:
    latent = result.get("latent_bytes_per_token")
    cross = result.get("cross_attention_bytes_per_token")
    crossover = result.get("crossover_context")
    growing = result.get("bytes_per_token_growing")
    slope = result.get("bytes_per_token")
    pairs = [
        (
            "attention",
            f"{printable(result.get('attention') or fmt.MISSING)}, cached in {printable(result.get('dtype'))}",
        ),
        ("bytes a token", f"{_exact(slope)} a sequence"),
        ("fixed bytes", _exact(result.get("fixed_bytes"))),
    ]
    if growing is not None and growing != slope:
        pairs.append(("before windows fill", f"{_exact(growing)} a token"))
    if latent is not None:
        pairs.append(("latent, as a serving engine holds it", f"{_exact(latent)} a token"))
    if result.get("shared_bytes"):
        pairs.append(("codebooks, once for all sequences", fmt.data_size(result["shared_bytes"])))
    if cross is not None:
        pairs.append(("cross-attention", f"{_exact(cross)} an encoder token"))
    pairs.append(("as large as the weights at", f"{crossover:,} tokens" if crossover is not None else fmt.MISSING))
    if result.get("memory_bytes") is not None:
        memory, weights = fmt.data_size(result["memory_bytes"]), fmt.data_size(result.get("weight_bytes"))
        pairs.append(("memory", f"{memory} for {weights} of weights and the cache"))
    if result.get("workspace_bytes") is not None:
        pairs.append(
            ("one decode step writes", f"at most {fmt.data_size(result['workspace_bytes'])}, kept free of the cache")
        )
    reasons = [
        ("Memory", result.get("memory_bytes"), result.get("memory_reason")),
        ("Latent size", latent, result.get("latent_reason")),
    ]
    notes = [f"{name}: {printable(reason)}" for name, value, reason in reasons if value is None and reason]
    return Facts("", tuple(pairs), tuple(notes))


def _exact(value: float | None) -> str:
    return fmt.MISSING if value is None else f"{value:,.0f} B" if float(value).is_integer() else f"{value:,.1f} B"


def _layers(result: Report) -> Table:
    groups = Counter(
        (
            printable(layer.get("kind")),
            printable(layer.get("cache_class")),
            _exact(layer.get("bytes_per_token")),
            _exact(layer.get("fixed_bytes")),
            fmt.integer(layer.get("window")),
        )
        for layer in items(result, "layers")
    )
    rows = tuple((f"{count} ×", *group) for group, count in groups.items())
    heads = columns("layers", "<kind", "<cache class", "bytes a token", "fixed", "window")
    return Table("By kind of layer, one sequence", heads, rows)


def _points(result: Report) -> Table:
    points = items(result, "points")
    rows = tuple(
        (
            fmt.integer(point.get("batch")),
            fmt.integer(point.get("context")),
            fmt.data_size(point.get("predicted_bytes")),
            fmt.data_size(point.get("measured_bytes")),
            _exact(point.get("difference_bytes")),
            fmt.data_size(point.get("allocator_bytes")),
        )
        for point in points
    )
    notes = [
        f"Not measured: {printable(point[f'{name}_reason'])}."
        for point in points
        for name in ("measured", "allocator")
        if point.get(f"{name}_bytes") is None and point.get(f"{name}_reason")
    ]
    heads = columns("batch", "context", "predicted", "measured", "difference", "allocator")
    return Table("Predicted and measured", heads, rows, unique(notes))


def _fits(result: Report) -> Table:
    longest = result.get("max_context") or {}
    batches = result.get("max_batch") or {}
    bits = sorted({*longest, *batches}, key=int, reverse=True)
    contexts = sorted({context for by_context in batches.values() for context in by_context or {}}, key=int)
    rows = tuple(
        (
            f"{width} bits",
            fmt.integer(longest.get(width)),
            *(fmt.integer((batches.get(width) or {}).get(context)) for context in contexts),
        )
        for width in bits
    )
    limit = result.get("model_context_limit")
    notes = ["By memory alone; payload bits, scales not counted. Longest context: tokens of one sequence."]
    if contexts:
        notes.append("Batch at a context: sequences of so many tokens.")
    if any(layer.get("kind") == OWN for layer in items(result, "layers")):
        notes.append("Layers that are quantized already are counted as they are, whatever the width.")
    if limit is not None:
        notes.append(f"The model itself is limited to {limit:,} tokens.")
    if result.get("memory_reason"):
        notes.append(printable(result["memory_reason"]))
    heads = columns(
        "<KV in", "longest context", *(f"{'batch ' * (not at)}at {int(tokens):,}" for at, tokens in enumerate(contexts))
    )
    return Table("What fits this device", heads, rows, unique(notes))
