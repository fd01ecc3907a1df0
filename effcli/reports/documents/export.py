"""The document of ``effcli export``."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Facts, Report, Section, Table, columns, items, texts
from effcli.reports.changes import mapping, number
from effcli.reports.documents.base import Document, Tile
from effcli.reports.documents.profile import subtitle
from effcli.reports.sections import setup
from effcli.reports.sections.change import signed_percent
from effcli.reports.sections.generic import named

PAIRS = (("ttft", "first token"), ("tpot", "per token"))


def document(report: Report) -> Document:
    """Build the document."""
    notes = texts(report, "notes")
    sections = [
        Section("agreement", "Against torch", (), (_agreement(report),)),
        Section("speed", "Speed", (), (_speed(report),)),
        Section("files", "What was written", (), _files(report)),
        setup.model(report),
        setup.environment(report),
    ]
    if notes:
        sections.append(Section("notes", "Notes", notes, ()))
    return Document(
        command="effcli export",
        heading="Export of",
        name=printable(mapping(report.get("model")).get("source") or "a model"),
        subtitle=subtitle(report),
        verdict=_verdict(report),
        tiles=_tiles(report),
        sections=tuple(sections),
        setup=("model", "environment", "notes"),
    )


def _entries(report: Report, key: str) -> list[Report]:
    return [entry for entry in items(report, key) if isinstance(entry, dict)]


def _positions(report: Report) -> float:
    return sum(number(entry.get("positions")) or 0 for entry in _entries(report, "agreement"))


def _ratio(report: Report, key: str) -> tuple[float, float] | None:
    speed = mapping(report.get("speed"))
    before, after = (number(speed.get(f"{side}_{key}_seconds")) for side in ("torch", "onnx"))
    return (before, after) if before and after else None


def _verdict(report: Report) -> tuple[str, ...]:
    sentences = []
    largest, tolerance = number(report.get("max_absolute_error")), number(report.get("tolerance"))
    if largest is not None:
        allowed = f" ({fmt.significant(tolerance)} is let pass)" if tolerance is not None else ""
        sentences.append(
            f"onnxruntime gives torch's outputs within {fmt.significant(largest)}{allowed} at "
            f"{fmt.integer(_positions(report))} positions of real text."
        )
    agreement = [number(entry.get("top1_agreement")) for entry in _entries(report, "agreement")]
    lowest = min((value for value in agreement if value is not None), default=None)
    if lowest is not None:
        sentences.append(f"Same top token as torch at {fmt.percent(lowest)} of positions or more.")
    for key, label in reversed(PAIRS):
        pair = _ratio(report, key)
        if pair is not None:
            times = pair[0] / pair[1]
            word = f"{fmt.significant(times)} times as fast as" if times >= 1 else "slower than"
            sentences.append(
                f"It is {word} torch eager {label}: {fmt.seconds(pair[1])} against {fmt.seconds(pair[0])}, in turns."
            )
    size, overhead = number(report.get("file_bytes")), number(report.get("size_overhead"))
    if size is not None and overhead is not None:
        sentences.append(f"The files take {fmt.data_size(size)}: the weights and {signed_percent(overhead)}.")
    return tuple(sentences) or ("The report holds no check.",)


def _tiles(report: Report) -> tuple[Tile, ...]:
    tiles = []
    largest, mean = number(report.get("max_absolute_error")), number(report.get("mean_absolute_error"))
    if largest is not None:
        tiles.append(Tile("Largest difference", fmt.significant(largest), f"mean {fmt.significant(mean)}"))
    for key, label in PAIRS:
        pair = _ratio(report, key)
        if pair is not None:
            tiles.append(
                Tile(
                    label.capitalize(),
                    f"{fmt.seconds(pair[0])} → {fmt.seconds(pair[1])}",
                    f"{fmt.significant(pair[0] / pair[1])}× torch eager",
                )
            )
    size = number(report.get("file_bytes"))
    if size is not None:
        tiles.append(Tile("Files", fmt.data_size(size), f"opset {named(report.get('opset'))}"))
    return tuple(tiles)


def _agreement(report: Report) -> Table:
    rows = tuple(
        (
            named(entry.get("phase")),
            named(entry.get("output")),
            fmt.integer(number(entry.get("positions"))),
            fmt.significant(number(entry.get("max_absolute_error"))),
            fmt.significant(number(entry.get("mean_absolute_error"))),
            fmt.significant(number(entry.get("kl_mean"))),
            fmt.percent(number(entry.get("top1_agreement"))),
        )
        for entry in _entries(report, "agreement")
    )
    notes = (
        f"text: {named(report.get('text'))}; provider {named(report.get('provider'))} "
        f"({named(report.get('provider_reason'))})",
        f"tolerance {fmt.significant(number(report.get('tolerance')))} ({named(report.get('tolerance_reason'))})",
    )
    titles = columns("<", "<output", "positions", "largest difference", "mean", "KL, nats", "same top token")
    return Table("Outputs of the written files", titles, rows, notes)


def _speed(report: Report) -> Table:
    speed = mapping(report.get("speed"))
    rows = []
    for key, label in PAIRS:
        pair = _ratio(report, key)
        if pair is not None:
            rows.append((label, fmt.seconds(pair[0]), fmt.seconds(pair[1]), f"{fmt.significant(pair[0] / pair[1])}×"))
    notes = [
        f"batch 1, prompt of {fmt.integer(number(speed.get('context')))} tokens, medians of "
        f"{fmt.integer(number(speed.get('rounds')))} rounds in turns, threads: {named(speed.get('threads'))}"
    ]
    if report.get("speed_reason"):
        notes = [printable(report["speed_reason"])]
    return Table("", columns("<", "torch eager", "onnxruntime", "ratio"), tuple(rows), tuple(notes))


def _files(report: Report) -> tuple[Block, ...]:
    rows = tuple(
        (
            named(entry.get("file")),
            fmt.data_size(number(entry.get("file_bytes"))),
            fmt.integer(number(entry.get("nodes"))),
            _operators(entry),
        )
        for entry in _entries(report, "graphs")
    )
    facts = [
        ("format", named(report.get("format"))),
        ("task", f"{named(report.get('task'))} ({named(report.get('task_reason'))})"),
        ("opset", f"{named(report.get('opset'))} ({named(report.get('opset_reason'))})"),
        ("dtype", f"{named(report.get('dtype'))} ({named(report.get('dtype_reason'))})"),
        ("weights", fmt.data_size(number(report.get("weight_bytes")))),
        ("files", fmt.data_size(number(report.get("file_bytes")))),
    ]
    if report.get("quantization"):
        facts.append(("quantization", named(report.get("quantization"))))
    blocks: list[Block] = [
        Facts("", tuple(facts)),
        Table("Graphs", columns("<file", "size", "nodes", "<most frequent ops"), rows),
    ]
    layers = _entries(report, "quantized_layers")
    if layers:
        keys = ("layer_class", "operator", "bits", "block", "layers")
        table = tuple(tuple(named(entry.get(key)) for key in keys) for entry in layers)
        blocks.append(
            Table("Layers in the checkpoint's integers", columns("<layers", "<op", "bits", "block", "count"), table)
        )
    return tuple(blocks)


def _operators(entry: Report) -> str:
    found = mapping(entry.get("operators"))
    counts = sorted(((number(count) or 0, name) for name, count in found.items()), reverse=True)[:5]
    return ", ".join(f"{printable(name)} {fmt.integer(count)}" for count, name in counts)
