"""What was measured, and where: the model and the device."""

from __future__ import annotations

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Facts, Report, Section, Table, columns, unique

SHOWN_DIGITS = 16  # of a sha256; the JSON has all


def _facts(*pairs: tuple[str, str | None]) -> tuple[tuple[str, str], ...]:
    return tuple((name, printable(value)) for name, value in pairs if value)


def _beside(value: str | None, reason: str | None) -> str | None:
    return f"{value} ({reason})" if value and reason else value


def model(report: Report) -> Section:
    """Describe the model."""
    info = report.get("model") or {}
    heads = info.get("attention_heads")
    shape = [
        f"{fmt.integer(info[key])} {label}"
        for key, label in (("layers", "layers"), ("hidden_size", "hidden"))
        if info.get(key) is not None
    ]
    if heads is not None:
        kv_heads = info.get("kv_heads")
        shape.append(f"{heads} query heads" + (f" / {kv_heads} KV heads" if kv_heads is not None else ""))
    if info.get("head_dim") is not None:
        shape.append(f"head size {info['head_dim']}")
    limit = info.get("context_limit")
    load = info.get("load_seconds")
    pairs = _facts(
        ("source", _beside(info.get("source"), info.get("kind"))),
        ("architecture", info.get("architecture")),
        ("parameters", f"{fmt.parameters(info.get('parameters'))} ({fmt.integer(info.get('parameters'))})"),
        ("weights", f"{fmt.data_size(info.get('weight_bytes'))} in memory, each shared tensor once"),
        ("dtype", _beside(info.get("dtype"), info.get("dtype_reason"))),
        ("shape", ", ".join(shape)),
        ("context limit", f"{limit:,} tokens" if limit is not None else None),
        ("load time", fmt.seconds(load) if load is not None else None),
        ("revision", info.get("revision")),
        ("fingerprint", f"sha256 {info['fingerprint'][:SHOWN_DIGITS]}…" if info.get("fingerprint") else None),
    )
    notes = unique(printable(note) for note in info.get("notes") or [])
    return Section("model", "Model", (), (Facts("", pairs, notes),))


def environment(report: Report) -> Section:
    """Describe the device, its measured ceilings and the software."""
    info = report.get("environment") or {}
    peaks = info.get("peaks")
    total, available = info.get("memory_total_bytes"), info.get("memory_available_bytes")
    memory = None
    if total is not None:
        memory = fmt.data_size(total) + (f", {fmt.data_size(available)} free" if available is not None else "")
    pairs = _facts(
        ("device", _beside(info.get("device_name"), info.get("device"))),
        ("chosen because", info.get("device_reason")),
        ("threads", fmt.integer(info.get("threads")) if info.get("threads") is not None else None),
        ("memory", memory),
        ("software", ", ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items())),
        ("platform", info.get("platform")),
        ("config only", "yes: counted without weights, nothing was run" if report.get("config_only") else None),
        ("command", report.get("command")),
        ("made", report.get("created")),
        ("took", fmt.seconds(report["seconds_spent"]) if report.get("seconds_spent") is not None else None),
    )
    notes = unique(printable(note) for note in report.get("warnings") or [])
    return Section("environment", "Device and software", (), (Facts("", pairs, notes), _peaks(info, peaks)))


def _peaks(info: Report, peaks: Report | None) -> Table:
    title, heads = "Measured ceilings of this device", columns("<ceiling", "measured")
    if not peaks:
        reason = printable(info.get("peaks_reason") or "the report holds no peaks")
        return Table(title, heads, (("peaks", fmt.MISSING),), (reason,))
    rows = [
        (label, fmt.bandwidth(peaks[key]))
        for key, label in (
            ("copy_bytes_per_second", "memory, copy (read + written)"),
            ("read_bytes_per_second", "memory, read"),
        )
        if peaks.get(key) is not None
    ]
    for dtype, rate in (peaks.get("flops_per_second") or {}).items():
        rows.append((f"matrix product, {printable(dtype)}", fmt.flop_rate(rate)))
    if peaks.get("op_overhead_seconds") is not None:
        rows.append(("one empty op", fmt.seconds(peaks["op_overhead_seconds"])))
    return Table(title, heads, tuple(rows), unique(printable(note) for note in peaks.get("notes") or []))
