"""Any number of saved reports side by side: quality against size, time and memory, and what no other beats.

::

    reports ──> Entry a model (of an optimize report: original and result) ── same conditions? ──> Front a target
                Entry a schedule (of a pipeline)                                  no: refused

An entry is *on the front* of quality against a target when no other is at least as good in both and better in one. It
is *within noise* of the front when every entry that beats it does so by less than two runs of one model may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from effcli.comparison import Measured, mismatches, of_report, shared_places
from effcli.errors import BadInputError, did_you_mean
from effcli.formatting import seconds
from effcli.reports.blocks import items
from effcli.reports.changes import METRICS as CHANGES
from effcli.reports.changes import Metric, Value, change, interval, mapping, measured, number
from effcli.reports.model import (
    FRONT_SCHEMA,
    PIPELINE_OPTIMIZE_SCHEMA,
    plain,
    read_report,
)

_KEYS = {
    "ppl": "perplexity",
    "kl": "kl_mean",
    "kl_p99": "kl_p99",
    "top1": "top1_agreement",
    "size": "stored_bytes",
    "bits": "bits_per_parameter",
    "tpot": "tpot_seconds",
    "ttft": "ttft_seconds",
    "tokens_per_second": "tokens_per_second",
    "peak_memory": "peak_memory_bytes",
    "kv_bytes": "kv_bytes_per_token",
    "joules_per_token": "joules_per_token",
}
METRICS = {name: next(metric for metric in CHANGES if metric.key == key) for name, key in _KEYS.items()} | {
    "accuracy": Metric("accuracy", "accuracy on the tasks", "fraction", "higher")
}
"""What models can be sorted by, under the names that gates use."""
PIPELINE_METRICS = {
    "psnr": Metric("psnr", "PSNR against all steps, dB", "number", "higher"),
    "ssim": Metric("ssim", "SSIM against all steps", "number", "higher"),
    "lpips": Metric("lpips", "LPIPS against all steps", "number", "lower"),
    "latent_l1": Metric("latent_l1", "difference of the final latents", "number", "lower"),
    "time": Metric("time", "time of a run", "seconds", "lower"),
    "denoiser_time": Metric("denoiser_time", "time of the denoiser in a run", "seconds", "lower"),
}
QUALITY = ("ppl", "kl", "kl_p99", "top1", "accuracy")
PIPELINE_QUALITY = ("psnr", "ssim", "lpips", "latent_l1")
TARGETS = ("size", "tpot", "peak_memory")
_SAME_TIME = 1.25
"""Ratio up to which two runs' times of one original are those of one machine in one state."""
PIPELINE_TARGETS = ("time", "denoiser_time")


@dataclass(frozen=True)
class Entry:
    """One model, or one schedule of a pipeline.

    Attributes
    ----------
    name : str
    path : str
        Of the report.
    original : bool
        What the others were made from.
    figures : dict of str to float or None
        By metric.
    reasons : dict of str to str
        Why a figure is None, where that is known.
    """

    name: str
    path: str
    original: bool
    figures: dict[str, float | None]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Front:
    """Quality against one target.

    Attributes
    ----------
    target : str
    members : tuple of str
        Names of the entries that no other beats, best quality first.
    near : tuple of str
        Names of those that are beaten only within noise.
    left_out : tuple of str
        Names of those that lack one of the two figures.
    """

    target: str
    members: tuple[str, ...]
    near: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class FrontReport:
    """Several reports side by side.

    Attributes
    ----------
    quality : str
        The metric on the fronts' other axis.
    sort : str or None
        What the entries are sorted by, best first.
    batch, context : int or None
        Of the point that times and memory are of.
    device, text : str or None
        What all were measured on.
    mismatches : tuple of str
        Conditions that differ although they were let pass.
    warnings : tuple of str
        Why figures do not compare although conditions are the same.
    """

    schema: str
    created: str
    quality: str
    sort: str | None
    batch: int | None
    context: int | None
    device: str | None
    text: str | None
    entries: tuple[Entry, ...]
    fronts: tuple[Front, ...]
    mismatches: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data


def metrics_of(report: Mapping[str, Any]) -> dict[str, Metric]:
    """Return the metrics that a saved front's figures are of."""
    return PIPELINE_METRICS if report.get("quality") in PIPELINE_QUALITY else METRICS


@dataclass(frozen=True)
class _Row:
    """An entry with what is known of its figures' noise."""

    entry: Entry
    values: Mapping[str, Value]


def front(
    paths: Sequence[Path | str], *, quality: str | None = None, sort: str | None = None, anyway: bool = False
) -> FrontReport:
    """Put saved reports side by side and find what no other beats.

    Parameters
    ----------
    paths : sequence of Path or str
        Profiles and optimize reports of language models, or optimize reports of pipelines; files or folders.
    quality : str, optional
        One of ``QUALITY`` or ``PIPELINE_QUALITY``; default ``ppl`` or ``psnr``.
    sort : str, optional
        A metric; best first, what lacks it last.
    anyway : bool
        Let conditions differ.

    Raises
    ------
    BadInputError
        If a report cannot be read or compared, conditions differ, or a metric is not known.
    """
    reports = [(str(path), read_report(path)) for path in paths]
    pipelines = [path for path, report in reports if report["schema"] == PIPELINE_OPTIMIZE_SCHEMA]
    if pipelines and len(pipelines) < len(reports):
        other = next(path for path, report in reports if path not in pipelines)
        raise BadInputError(f"'{pipelines[0]}' is of a pipeline and '{other}' of a language model; compare them apart")
    known = PIPELINE_METRICS if pipelines else METRICS
    qualities = PIPELINE_QUALITY if pipelines else QUALITY
    quality = quality or qualities[0]
    if quality not in qualities:
        raise BadInputError(
            f"--quality '{quality}' is not known{did_you_mean(quality, qualities)}; known: {', '.join(qualities)}"
        )
    if sort is not None and sort not in known:
        raise BadInputError(f"--sort '{sort}' is not known{did_you_mean(sort, known)}; known: {', '.join(known)}")
    targets = PIPELINE_TARGETS if pipelines else TARGETS
    if pipelines:
        rows, found, place, device, text = _schedules(reports)
        warnings: list[str] = []
    else:
        rows, found, place, device, text, warnings = _models(reports)
    if found and not anyway:
        raise BadInputError(f"{'; '.join(found)}; add --anyway to compare all the same")
    if sort is not None:
        rows = sorted(rows, key=lambda row: _rank(row.entry.figures.get(sort), known[sort]))
    return FrontReport(
        schema=FRONT_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        quality=quality,
        sort=sort,
        batch=place[0] if place else None,
        context=place[1] if place else None,
        device=device,
        text=text,
        entries=tuple(row.entry for row in rows),
        fronts=tuple(_front(rows, quality, target, known) for target in targets),
        mismatches=tuple(found),
        warnings=tuple(warnings),
    )


_Rows = tuple[list[_Row], list[str], tuple[int, int] | None, str | None, str | None]


def _models(reports: Sequence[tuple[str, dict[str, Any]]]) -> tuple[*_Rows, list[str]]:
    sides: list[tuple[Measured, bool]] = []
    originals: dict[str, Measured] = {}
    again: list[tuple[Measured, Measured]] = []
    for path, report in reports:
        for side, original in of_report(path, report):
            fingerprint = mapping(side.side.profile.get("model")).get("fingerprint")
            if original and (known := originals.setdefault(fingerprint or path, side)) is not side:
                again.append((known, side))
                continue
            sides.append((side, original))
    first = sides[0][0]
    found = [
        f"{item.what} differs: {item.a} in '{first.about.path}' against {item.b} in '{side.about.path}'"
        for side, _ in sides[1:]
        for item in mismatches(first, side)
    ]
    shared = shared_places([side for side, _ in sides])
    place = shared[0] if shared else None
    names = _names([(side.about.path, side.about.name.removesuffix(", before"), original) for side, original in sides])
    rows = []
    for (side, original), name in zip(sides, names, strict=True):
        values = measured(side.side, place)
        of = {metric: values[key] for metric, key in _KEYS.items()}
        of["accuracy"] = next(iter(side.side.tasks.values()), Value(reason="no tasks were given"))
        if original:  # it is at no distance from itself
            of |= {"kl": Value(0.0), "kl_p99": Value(0.0), "top1": Value(1.0)}
        rows.append(_Row(_entry(name, side.about.path, original, of), of))
    text = next((side.side.text for side, _ in sides if side.side.text), None)
    return rows, found, place, first.about.device, text, _other_times(again, place)


def _other_times(again: Sequence[tuple[Measured, Measured]], place: tuple[int, int] | None) -> list[str]:
    """Name the reports in which an original took another time than in the first: the machine was not the same."""
    found = []
    for first, later in again:
        one, other = (number(measured(side.side, place)["tpot_seconds"].value) for side in (first, later))
        if one and other and not 1 / _SAME_TIME <= other / one <= _SAME_TIME:
            found.append(
                f"the same original takes {seconds(one)} a token in '{first.about.path}' and {seconds(other)} in "
                f"'{later.about.path}': the machine was busy in one of these runs, so their times do not compare; "
                "measure again, one after the other"
            )
    return found


def _schedules(reports: Sequence[tuple[str, dict[str, Any]]]) -> _Rows:
    rows: list[_Row] = []
    found = []
    facts = [_pipeline_facts(report) for _, report in reports]
    for (path, report), own, folder in zip(reports, facts, _folders([path for path, _ in reports]), strict=True):
        found += [
            f"{what} differs: {value} in '{reports[0][0]}' against {own[what]} in '{path}'"
            for what, value in facts[0].items()
            if own[what] != value
        ]
        schedules = [entry for entry in items(report, "schedules") if isinstance(entry, dict)]
        for schedule in schedules:
            like = mapping(schedule.get("likeness"))
            of = {name: _spread(like.get("psnr_db" if name == "psnr" else name)) for name in PIPELINE_QUALITY}
            of["time"] = Value(number(schedule.get("run_seconds_after")), None)
            of["denoiser_time"] = Value(number(schedule.get("denoiser_seconds_after")), None)
            name = f"{folder}:{schedule.get('name')}" if len(schedules) > 1 else folder
            rows.append(_Row(_entry(name, path, False, of), of))
    return rows, found, None, facts[0]["device"], None


def _pipeline_facts(report: Mapping[str, Any]) -> dict[str, str]:
    environment, pipeline = mapping(report.get("environment")), mapping(report.get("pipeline"))
    arguments = mapping(report.get("arguments"))
    return {
        "device": str(environment.get("device_name") or environment.get("device")),
        "pipeline": str(pipeline.get("architecture")),
        "weights": str(pipeline.get("fingerprint")),
        "steps": str(report.get("steps")),
        "batch": str(report.get("batch")),
        "arguments": ", ".join(f"{key}={value}" for key, value in sorted(arguments.items())),
    }


def _spread(data: Any) -> Value:
    found = mapping(data)
    return Value(number(found.get("mean")), None, interval(found.get("interval")), None if found else "not measured")


def _entry(name: str, path: str, original: bool, values: Mapping[str, Value]) -> Entry:
    figures = {metric: float(v.value) if isinstance(v.value, (int, float)) else None for metric, v in values.items()}
    reasons = {metric: v.reason for metric, v in values.items() if v.reason and figures[metric] is None}
    return Entry(name, path, original, figures, reasons)


def _names(sides: Sequence[tuple[str, str, bool]]) -> list[str]:
    """Name results after the folders of their reports, originals after themselves."""
    folders = _folders([path for path, _, _ in sides])
    return [
        f"{spec} (original)" if original else folder for (_, spec, original), folder in zip(sides, folders, strict=True)
    ]


def _folders(paths: Sequence[str]) -> list[str]:
    """Return what tells paths apart: the folder of a ``report.json``, else the file's name; all of it where needed."""
    short = []
    for path in map(Path, paths):
        short.append(path.parent.name if path.name == "report.json" and path.parent.name else path.stem or path.name)
    by_name: dict[str, set[str]] = {}
    for name, whole in zip(short, paths, strict=True):
        by_name.setdefault(name, set()).add(whole)
    return [name if len(by_name[name]) == 1 else whole for name, whole in zip(short, paths, strict=True)]


def _rank(value: float | None, metric: Metric) -> tuple[bool, float]:
    return value is None, 0.0 if value is None else -value if metric.better == "higher" else value


def _front(rows: Sequence[_Row], quality: str, target: str, known: Mapping[str, Metric]) -> Front:
    pair = (quality, target)
    whole = [row for row in rows if all(row.entry.figures.get(metric) is not None for metric in pair)]

    def beats(one: _Row, other: _Row, *, clearly: bool) -> bool:
        ranks = [
            (_rank(one.entry.figures[metric], known[metric]), _rank(other.entry.figures[metric], known[metric]))
            for metric in pair
        ]
        if any(a > b for a, b in ranks) or all(a == b for a, b in ranks):
            return False
        return not clearly or any(
            change(known[metric], other.values[metric], one.values[metric]).status == "better" for metric in pair
        )

    members = [row for row in whole if not any(beats(other, row, clearly=False) for other in whole)]
    near = [row for row in whole if row not in members and not any(beats(other, row, clearly=True) for other in whole)]
    members.sort(key=lambda row: _rank(row.entry.figures[quality], known[quality]))
    return Front(
        target,
        tuple(row.entry.name for row in members),
        tuple(row.entry.name for row in near),
        tuple(row.entry.name for row in rows if row not in whole),
    )


def to_csv(report: Mapping[str, Any]) -> str:
    """Return a saved front as comma-separated values: SI base units, an empty cell where a figure is not known."""
    import csv
    import io

    metrics = list(metrics_of(report))
    targets = [mapping(found) for found in items(dict(report), "fronts")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["name", "path", "original", *metrics, *(f"front_{found.get('target')}" for found in targets)])
    for entry in map(mapping, items(dict(report), "entries")):
        name, figures = entry.get("name"), mapping(entry.get("figures"))
        places = [
            "front" if name in items(found, "members") else "within noise" if name in items(found, "near") else ""
            for found in targets
        ]
        cells = ["" if figures.get(metric) is None else repr(figures[metric]) for metric in metrics]
        writer.writerow([name, entry.get("path"), "yes" if entry.get("original") else "no", *cells, *places])
    return stream.getvalue()
