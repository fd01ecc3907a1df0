"""The table of what changed between two measured models, and its wording."""

from __future__ import annotations

from collections.abc import Sequence

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Table, columns, unique
from effcli.reports.changes import SPEED, Change

NOISE_NOTE = (
    "± is noise: 95 % of what two runs of the same model may differ by, from the spread of both timings (p90 − p10), "
    "at least 3 %; a change inside it is not claimed."
)
NOT_MEASURED = "not measured"
TIMES = (*SPEED, "tokens_per_second")
SIZES = ("stored_bytes", "bits_per_parameter", "weight_bytes", "peak_memory_bytes", "kv_bytes_per_token")
ONLY_AFTER = ("kl_mean", "kl_p99", "top1_agreement")


def figure(value: float | str | None, unit: str) -> str:
    """Return a figure in its unit."""
    if value is None:
        return fmt.MISSING
    if isinstance(value, str):
        return printable(value)
    if unit == "perplexity":
        return fmt.significant(value, 4)
    if unit == "joules":
        return f"{fmt.significant(value)} J"
    formats = {"bytes": fmt.data_size, "seconds": fmt.seconds, "fraction": fmt.percent}
    return formats[unit](value) if unit in formats else fmt.significant(value)


def signed_percent(fraction: float | None) -> str:
    """Return a relative change: ``+6.9 %``, ``−63 %``."""
    if fraction is None:
        return fmt.MISSING
    small = 0 < abs(fraction) < 0.0005
    text = f"{100 * abs(fraction):.2f} %" if small else fmt.percent(abs(fraction))
    sign = "" if text == "0 %" else ("+" if fraction > 0 else "−")
    return f"{sign}{text}"


def points(difference: float | None) -> str:
    """Return a difference of shares in percentage points: ``−1.5 pt``."""
    if difference is None:
        return fmt.MISSING
    return f"{100 * difference:+.1f} pt".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def times(ratio: float) -> str:
    """Return a factor: ``2.14×``."""
    return f"{fmt.short(ratio)}×"


def difference(change: Change) -> str:
    """Return the change as a reader expects it: percentage points of shares, percent of all else."""
    if not isinstance(change.before, (int, float)) or not isinstance(change.after, (int, float)):
        return fmt.MISSING
    if change.unit == "fraction":
        return points(change.after - change.before)
    if change.ratio is None or change.ratio <= 0:
        return fmt.MISSING
    if change.ratio >= 10:
        return times(change.ratio)
    return signed_percent(change.ratio - 1)


def words(change: Change) -> str:
    """Say what the change is, in words."""
    if change.status == "unknown":
        return _unknown(change)
    if change.status == "same":
        return "unchanged"
    if change.status == "changed":
        return "changed"
    if change.status == "noise":
        kind = "loss" if change.metric == "perplexity" or change.metric.startswith("task:") else "gain"
        kind = "change" if change.better is None or change.metric in SIZES else kind
        return f"no {kind} outside noise{_margin(change)}"
    gained = change.status == "better"
    if change.metric in TIMES:
        ratio = change.ratio or 1.0
        speedup = ratio if change.better == "higher" else 1 / ratio
        if gained:
            return f"{times(speedup)} as fast{_margin(change)}"
        return f"slower than before{_margin(change)}"
    if change.metric in SIZES:
        return "smaller" if gained else "larger than before"
    return "better" if gained else "worse than before"


def _margin(change: Change) -> str:
    if not change.noise:
        return ""
    return f" (±{fmt.percent(change.noise)})" if change.noise <= 1 else " (± over 100 %)"


def _unknown(change: Change) -> str:
    if change.before is None and change.after is None:
        return NOT_MEASURED
    if change.before is None and change.metric in ONLY_AFTER:
        return "against the original"
    if change.before is None or change.after is None:
        return f"{NOT_MEASURED} {'before' if change.before is None else 'after'}"
    return "noise not known"


def table(found: Sequence[Change], title: str, before: str = "before", after: str = "after") -> Table:
    """Return the table of changes, with reasons of missing figures below."""
    rows = tuple(
        (
            printable(change.label),
            figure(change.before, change.unit),
            figure(change.after, change.unit),
            difference(change),
            words(change),
        )
        for change in found
    )
    reasons = [
        f"{change.label}: {change.reason}".rstrip(".") + "."
        for change in found
        if change.reason and change.metric not in ONLY_AFTER
    ]
    intervals = [_interval(change) for change in found if change.before_interval or change.after_interval]
    noise = [NOISE_NOTE] if any(change.metric in TIMES for change in found) else []
    heads = columns("<figure", before, after, "change", "<in words")
    notes = unique(printable(note) for note in (*intervals, *noise, *reasons))
    return Table(title, heads, rows, notes)


def _interval(change: Change) -> str:
    parts = [
        f"{name} {span(limits, change.unit)}"
        for name, limits in (("before", change.before_interval), ("after", change.after_interval))
        if limits is not None
    ]
    return f"{change.label[:1].upper()}{change.label[1:]}, 95 % interval: {', '.join(parts)}."


def span(limits: tuple[float, float] | None, unit: str = "number") -> str:
    """Return an interval: ``14.9 to 15.6``."""
    if limits is None:
        return fmt.MISSING
    return f"{figure(limits[0], unit)} to {figure(limits[1], unit)}"


def change_span(limits: tuple[float, float] | None) -> str:
    """Return an interval of ratios as changes: ``+10 % to +14 %``."""
    if limits is None:
        return fmt.MISSING
    return f"{signed_percent(limits[0] - 1)} to {signed_percent(limits[1] - 1)}"
