"""Redundancy: which layers resemble each other, and what tying or skipping them costs."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, HeatMap, Report, Section, Table, columns, items, unique

MOST_GROUPS_OF_A_SIZE = 6


def cheapest(result: Report) -> list[str]:
    """Return what is cheapest to tie and to skip, in one sentence; none where nothing was measured."""
    parts = []
    ties = [group for group in items(result, "groups") if group.get("kl_nats_per_token") is not None]
    if ties:
        best = min(ties, key=lambda group: float(group["kl_nats_per_token"]))
        parts.append(
            f"cheapest to tie are layers {_span(best)}, {fmt.significant(best['kl_nats_per_token'])} nats of KL a token"
        )
    skips = [layer for layer in items(result, "layers") if layer.get("skip_kl_nats_per_token") is not None]
    if skips:
        best = min(skips, key=lambda layer: float(layer["skip_kl_nats_per_token"]))
        worst = max(skips, key=lambda layer: float(layer["skip_kl_nats_per_token"]))
        dearest = f" (dearest: layer {worst['layer']}, {fmt.significant(worst['skip_kl_nats_per_token'])})"
        parts.append(
            f"cheapest to skip is layer {best['layer']}, {fmt.significant(best['skip_kl_nats_per_token'])} nats"
            f"{dearest if worst is not best else ''}"
        )
    return [f"Redundancy, before any healing: {'; '.join(parts)}."] if parts else []


def section(result: Report, report: Report) -> Section:
    """Build the section."""
    lead = [
        *cheapest(result),
        f"KL(original || changed), mean over {fmt.integer(result.get('damage_tokens'))} tokens in windows of "
        f"{fmt.integer(result.get('context'))} of: {printable(result.get('text'))}. Tied layers run with the "
        f"{_weights(result)} of their linear weights and keep their own norms and biases.",
    ]
    blocks: list[Block] = []
    rows = [row for row in result.get("cka") or [] if isinstance(row, list)]
    if rows:
        values = tuple(tuple(row) for row in rows)
        blocks.append(HeatMap("Likeness of the layers' outputs (linear CKA)", values, None, "layer", "linear CKA"))
    blocks.append(_layers(result))
    if items(result, "groups"):
        blocks.append(_groups(result))
    return Section("redundancy", "Redundancy of layers", tuple(lead), tuple(blocks))


def _weights(result: Report) -> str:
    return "first one's set" if result.get("tie_weights") == "first" else "average"


def _span(group: Report) -> str:
    layers = group["layers"]
    return f"{layers[0]}–{layers[-1]}"


def _interval(interval: list[float] | None) -> str:
    return fmt.MISSING if not interval else f"{fmt.significant(interval[0])} to {fmt.significant(interval[1])}"


def _layers(result: Report) -> Table:
    layers = items(result, "layers")
    several = len(result.get("kinds") or []) > 1
    rows = []
    for layer in layers:
        kind = [chr(ord("A") + layer["kind"]) if layer["kind"] < 26 else str(layer["kind"])] if several else []
        rows.append(
            (
                fmt.integer(layer["layer"]),
                *kind,
                fmt.significant(layer.get("input_output_cosine")),
                fmt.significant(layer.get("input_output_angular_distance")),
                fmt.significant(layer.get("skip_kl_nats_per_token")),
                _interval(layer.get("skip_kl_interval")),
            )
        )
    by_reason: dict[str, list[str]] = {}
    for layer in layers:
        for what, key in (("cannot share weights", "unshareable_reason"), ("skip not measured", "skip_reason")):
            if layer.get(key):
                by_reason.setdefault(f"{what}: {printable(layer[key])}", []).append(str(layer["layer"]))
    notes = [
        f"Cosine and angle (arccos of it, over π) between a layer's input and output, over "
        f"{fmt.integer(result.get('similarity_tokens'))} tokens; CKA over {fmt.integer(result.get('cka_tokens'))}, "
        f"without the first of each window. Intervals: {fmt.percent(result.get('confidence'))}, over blocks of text.",
        f"No CKA: {printable(result['cka_reason'])}" if result.get("cka_reason") else None,
        *(f"Layer {', '.join(found)}: {reason}" for reason, found in by_reason.items()),
        "Only layers of one kind share weights." if several else None,
    ]
    heads = columns("layer", *(["<kind"] if several else []), "cosine", "angle", "skip, KL nats", "interval")
    return Table("By layer", heads, tuple(rows), unique(notes))


def _groups(result: Report) -> Table:
    sizes: dict[int, list[Report]] = {}
    for group in items(result, "groups"):
        sizes.setdefault(len(group["layers"]), []).append(group)
    rows = []
    for size, groups in sorted(sizes.items()):
        known = [group for group in groups if group.get("kl_nats_per_token") is not None]
        for group in sorted(known, key=lambda found: float(found["kl_nats_per_token"]))[:MOST_GROUPS_OF_A_SIZE]:
            rows.append(
                (
                    fmt.integer(size),
                    _span(group),
                    fmt.significant(group["kl_nats_per_token"]),
                    _interval(group.get("kl_interval")),
                    fmt.significant(_distance(result, group)),
                )
            )
    notes: list[str | None] = [
        f"The {MOST_GROUPS_OF_A_SIZE} cheapest of each size; all are in the JSON."
        if len(rows) < len(items(result, "groups"))
        else None,
        "Angle: between what the first of them is given and what the last returns.",
        *(
            f"Layers {_span(group)}: {printable(group['reason'])}"
            for group in items(result, "groups")
            if group.get("reason")
        ),
        *(printable(note) for note in items(result, "notes")),
    ]
    heads = columns("layers", "<group", "tie, KL nats", "interval", "angle")
    return Table("Groups of adjacent layers, by damage", heads, tuple(rows), unique(notes))


def _distance(result: Report, group: Report) -> float | None:
    by_size = items(result, "block_angular_distances")
    size, first = len(group["layers"]), group["layers"][0]
    if size > len(by_size) or first >= len(by_size[size - 1]):
        return None
    found: float | None = by_size[size - 1][first]
    return found
