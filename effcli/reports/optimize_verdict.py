"""The three lines that a user reads first: what was gained, what it cost, what to do next."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report, items
from effcli.reports.changes import Change, interval, mapping, number, onnx_changes, optimize_changes
from effcli.reports.sections.change import change_span, figure, signed_percent, times
from effcli.reports.sections.onnx import provider
from effcli.reports.sections.run import gates
from effcli.reports.sections.written import source_sentence

if TYPE_CHECKING:
    from passes.base import Pass

NOTABLE_LOSS = 1.10
"""Perplexity ratio from which a gentler recipe is named before serving is."""
HEAVY_LOSS = 2.0
"""Perplexity ratio from which the result is called unusable."""
NOTABLE_MEMORY = 0.05


def optimize_verdict(report: Report) -> tuple[str, ...]:
    """Return three lines for an ``effcli.optimize/1`` report, and one more where the result was exported."""
    found = {change.metric: change for change in optimize_changes(report)}
    return gained(report, found), cost(report, found), *on_onnx(report), following(report, found)


def on_onnx(report: Report) -> tuple[str, ...]:
    """Say what running the export on ONNX Runtime brings and costs against torch; nothing without an export."""
    found = {change.metric: change for change in onnx_changes(report)}
    if not found:
        return ()
    about = mapping(report.get("after_onnx"))
    parts = [_on_onnx(found, key, name) for key, name in (("tpot_seconds", "decode"), ("ttft_seconds", "first token"))]
    perplexity, kl = found.get("perplexity"), found.get("kl_mean")
    if perplexity is None:
        parts.append("quality was not measured")
    else:
        parts.append(
            f"perplexity {figure(perplexity.after, 'perplexity')} (torch {figure(perplexity.before, 'perplexity')})"
        )
    if kl is not None:
        parts.append(f"KL {figure(kl.after, 'number')} nats a token")
    parts.append(f"logits within {fmt.significant(number(about.get('max_absolute_error')))} of torch's")
    size = fmt.data_size(number(about.get("file_bytes")))
    place = f"{folder(report)}/{printable(about.get('folder') or 'onnx')}"
    return (f"ONNX Runtime ({provider(about)}): {', '.join(parts)}; {size} in {place}.",)


def _on_onnx(found: dict[str, Change], key: str, name: str) -> str:
    timed = found[key]
    if timed.before is None or timed.after is None:
        return f"{name} was not timed on both sides"
    rate = found.get("tokens_per_second") if key == "tpot_seconds" else None
    ours, theirs = (
        (figure(rate.before, "number"), f"{figure(rate.after, 'number')} tokens/s")
        if rate is not None
        else (figure(timed.before, "seconds"), figure(timed.after, "seconds"))
    )
    ratio = timed.ratio or 1.0
    said = {
        "better": f"{times(1 / ratio)} as fast as torch",
        "worse": "slower than torch",
        "noise": "no gain outside noise",
    }
    return f"{name} {said.get(timed.status, 'beside torch, noise not known')} ({ours} → {theirs})"


def gained(report: Report, found: dict[str, Change]) -> str:
    """Say what got smaller or faster, and what did not."""
    won, still, level = [], [], []
    for key, name in (("tpot_seconds", "decode"), ("ttft_seconds", "first token")):
        timed = found.get(key)
        if timed is None or timed.before is None or timed.after is None:
            level.append(f"{name} was not timed on both sides")
        elif timed.status == "better":
            assert timed.ratio is not None
            won.append(f"{name} {times(1 / timed.ratio)} as fast ({_pace(found, key)}{_at(report)})")
        elif timed.status == "noise":
            still.append(f"{name} ({_pace(found, key)})")
        elif timed.status == "unknown":
            level.append(f"{name}: noise not known, so no gain is claimed ({_pace(found, key)})")
    size = found.get("stored_bytes")
    if size is not None and size.ratio is not None:
        bits = number(mapping(report.get("size")).get("bits_per_parameter"))
        at = f", {fmt.significant(bits)} bits a parameter" if bits is not None else ""
        text = f"weights {figure(size.before, 'bytes')} → {figure(size.after, 'bytes')}"
        if size.status == "better":
            won.append(f"{text} ({signed_percent(size.ratio - 1)}{at})")
        else:
            level.append(f"{text}, no smaller")
    cache = found.get("kv_bytes_per_token")
    if cache is not None and cache.status == "better" and cache.ratio is not None:
        text = f"KV cache {figure(cache.before, 'bytes')} → {figure(cache.after, 'bytes')} a token"
        won.append(f"{text} ({signed_percent(cache.ratio - 1)})")
    memory = found.get("peak_memory_bytes")
    if memory is not None and memory.status == "better" and (memory.ratio or 1.0) <= 1 - NOTABLE_MEMORY:
        won.append(f"peak memory {figure(memory.before, 'bytes')} → {figure(memory.after, 'bytes')}")
    if still:
        level.insert(0, f"no gain outside noise in {', '.join(still)}")
    if not won:
        level.insert(0, "nothing")
    return f"Gained: {'; '.join([*([', '.join(won)] if won else []), *level])}."


def _pace(found: dict[str, Change], key: str) -> str:
    rate = found.get("tokens_per_second")
    if key == "tpot_seconds" and rate is not None and rate.before is not None and rate.after is not None:
        return f"{figure(rate.before, 'number')} → {figure(rate.after, 'number')} tokens/s"
    return f"{figure(found[key].before, 'seconds')} → {figure(found[key].after, 'seconds')}"


def _at(report: Report) -> str:
    batch, context = number(report.get("batch")), number(report.get("context"))
    return f" at batch {batch:,}, context {context:,}" if batch is not None and context is not None else ""


def cost(report: Report, found: dict[str, Change]) -> str:
    """Say what got slower, larger or worse."""
    slower = [
        f"{name} {_pace(found, key)}"
        for key, name in (("tpot_seconds", "decode"), ("ttft_seconds", "first token"))
        if key in found and found[key].status == "worse"
    ]
    parts = [f"slower than before: {', '.join(slower)}"] if slower else []
    memory = found.get("peak_memory_bytes")
    if memory is not None and memory.status == "worse":
        parts.append(f"peak memory rose {figure(memory.before, 'bytes')} → {figure(memory.after, 'bytes')}")
    parts.append(_quality(report, found))
    source = source_sentence(report)
    after_source = f" {source} The loss is measured against that, not against its original." if source else ""
    return f"Cost: {'; '.join(parts)}.{after_source}"


def _quality(report: Report, found: dict[str, Change]) -> str:
    quality = report.get("quality")
    perplexity = found.get("perplexity")
    if not isinstance(quality, dict) or perplexity is None or perplexity.ratio is None:
        why = printable(report.get("quality_reason") or "the report does not say why").rstrip(".")
        return f"quality was not measured ({why})"
    limits = interval(mapping(quality.get("perplexity")).get("ratio_interval"))
    span = f", 95 % interval {change_span(limits)}" if limits is not None else ""
    text = (
        f"perplexity {fmt.significant(_float(perplexity.before), 4)} → {fmt.significant(_float(perplexity.after), 4)} "
        f"({signed_percent(perplexity.ratio - 1)}{span})"
    )
    start = {"noise": "no loss outside noise: ", "better": "no loss: ", "same": "no loss: "}
    parts = [
        ("better on this text, but another model: " if _strayed(found) else start.get(perplexity.status, "")) + text
    ]
    kl = found.get("kl_mean")
    if kl is not None and kl.after is not None:
        p99 = found.get("kl_p99")
        tail = f", p99 {figure(p99.after, 'number')}" if p99 is not None and p99.after is not None else ""
        parts.append(f"KL {figure(kl.after, 'number')} nats a token{tail}")
    agreement = found.get("top1_agreement")
    if agreement is not None and agreement.after is not None:
        parts.append(f"same top token at {figure(agreement.after, 'fraction')} of positions")
    return ", ".join(parts)


def _strayed(found: dict[str, Change]) -> bool:
    """Whether the result predicts the text better than the original, and yet has become another model."""
    perplexity, kl = found.get("perplexity"), found.get("kl_mean")
    apart = None if kl is None else _float(kl.after)
    better = perplexity is not None and perplexity.status == "better"
    return better and apart is not None and apart >= math.log(NOTABLE_LOSS)


def _float(value: float | str | None) -> float | None:
    return None if isinstance(value, str) else value


def following(report: Report, found: dict[str, Change]) -> str:
    """Say what to do with the result."""
    failed = [gate for gate in gates(report) if gate.get("passed") is not True]
    if failed or report.get("status") not in (None, "passed"):
        why = "; ".join(
            f"{printable(gate.get('gate'))}: {printable(gate.get('explanation') or 'not met')}".rstrip(".")
            for gate in failed
        )
        return f"Next: nothing was published, a gate failed{f' ({why})' if why else ''}; {_gentler(report)}."
    perplexity = found.get("perplexity")
    ratio = perplexity.ratio if perplexity is not None and perplexity.status == "worse" else None
    speed, size = found.get("tpot_seconds"), found.get("stored_bytes")
    if ratio is not None and ratio >= HEAVY_LOSS:
        return f"Next: do not serve this, it lost too much; {_gentler(report)}."
    if _strayed(found):
        return (
            "Next: it predicts this text better than the original and says other things; measure it on other text "
            f"before serving: effcli eval {folder(report)} --against ORIGINAL --eval-text FILE. "
            f"To use it: {_use(report)}."
        )
    if speed is not None and speed.status == "worse":
        cache = found.get("kv_bytes_per_token")
        smaller = any(change is not None and change.status == "better" for change in (size, cache))
        memory = "take the result only where memory or disk is what you lack" if smaller else "keep the original"
        return f"Next: for speed keep the original on this device; {memory}. To use it: {_use(report)}."
    if ratio is not None and ratio >= NOTABLE_LOSS:
        return f"Next: weigh the loss before serving; {_gentler(report)}. To use it: {_use(report)}."
    return f"Next: {_use(report)}."


def _gentler(report: Report) -> str:
    names = pass_names(report)
    declared = {name: found.gentler for name, found in _known(report).items() if found.gentler}
    weights = not names or not names <= set(declared)
    offers = ["scheme=w8a16, or scheme=auto,bits=5"] if weights else []
    offers += [f"{name}:{parameters}" for name, parameters in declared.items()]
    return f"try a gentler recipe ({'; '.join(offers)}){' or smaller groups' if weights else ''}"


def pass_names(report: Report) -> set[str]:
    """Return the names of the passes that ran."""
    return {str(record.get("name")) for record in items(report, "passes") if isinstance(record, dict)}


def _known(report: Report) -> dict[str, type[Pass]]:
    """Return the passes that ran by name; those that are not installed here are left out."""
    from passes.base import PassError
    from passes.registry import load

    known = {}
    for name in sorted(pass_names(report)):
        with contextlib.suppress(PassError):
            known[name] = load(name)
    return known


def folder(report: Report) -> str:
    """Return how the user named the checkpoint's folder, ``out`` where that is not recorded."""
    return printable(report.get("output") or "out")


def readers(report: Report) -> Sequence[str]:
    """Return what else reads the checkpoint: a pass that only changes weights writes the portable format."""
    names = pass_names(report)
    if any("kv-cache" in found.changes for found in _known(report).values()):
        return ("plain transformers, with a cache of its own,",)
    return ("plain transformers", "vLLM") if names == {"quantize"} else ("plain transformers",)


def _fallback(report: Report) -> str:
    """Say why no fast kernel ran, by the reason that most layers have."""
    layers: Counter[str] = Counter()
    for use in items(report, "kernels"):
        if isinstance(use, dict) and use.get("fallback_reason"):
            layers[printable(use["fallback_reason"])] += int(number(use.get("layers")) or 1)
    return f", on this device without a fast kernel ({layers.most_common(1)[0][0]})" if layers else ""


def _use(report: Report) -> str:
    kernels = list(
        dict.fromkeys(
            printable(use.get("kernel"))
            for use in items(report, "kernels")
            if isinstance(use, dict) and use.get("kernel") and not use.get("fallback_reason")
        )
    )
    fast = f" with {', '.join(kernels[:2])}" if kernels else _fallback(report)
    others = " and ".join(readers(report))
    read = "read" if " and " in others else "reads"
    return f'effcli.load("{folder(report)}") runs it{fast}; {others} {read} the same folder'
