"""What is left of a batch when it ends: one report, as JSON lines, CSV, a page that links every job's, and data."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from effcli.batch.model import BatchReport, JobResult, JobState, SearchResult
from effcli.errors import EXIT_OK
from effcli.gates import METRICS, PIPELINE_METRICS
from effcli.reports.model import BATCH_SCHEMA, plain
from effcli.reports.render import render

REPORT, LINES, TABLE, PAGE = "batch.json", "summary.jsonl", "summary.csv", "index.html"


def result(state: JobState) -> JobResult:
    """Return a job's line of the summary."""
    job, outcome = state.job, state.outcome
    return JobResult(
        name=job.name,
        kind=job.kind,
        model=job.model_name,
        part=job.part,
        device=job.device,
        stage=state.stage,
        attempts=state.attempt,
        seconds=(outcome.seconds or None) if outcome else None,  # a job that was skipped took no time at all
        worker=state.worker,
        message=outcome.message if outcome else "",
        exit_code=outcome.exit_code if outcome else EXIT_OK,
        report=outcome.report if outcome else None,
        log=state.log if state.attempt or state.stage == "kept" else None,  # what never ran has none
        peak_memory_bytes=outcome.peak_memory_bytes if outcome else None,
        figures=dict(outcome.figures) if outcome else {},
    )


def batch_report(
    states: Sequence[JobState],
    *,
    command: str,
    jobs_file: str,
    output: str,
    engine: str,
    workers: Sequence[str],
    seconds_spent: float,
    exit_code: int,
    searches: Sequence[SearchResult] = (),
) -> BatchReport:
    """Return the report of a batch from where its jobs are now."""
    from effcli.api import VERSIONED_PACKAGES

    return BatchReport(
        schema=BATCH_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        jobs_file=jobs_file,
        output=output,
        engine=engine,
        workers=tuple(workers),
        seconds_spent=seconds_spent,
        exit_code=exit_code,
        jobs=tuple(result(state) for state in states),
        searches=tuple(searches),
        versions={"python": platform.python_version()} | {name: version(name) for name in VERSIONED_PACKAGES},
    )


def json_lines(report: BatchReport) -> str:
    """Return one JSON object a line, one line a job."""
    return "".join(json.dumps(plain(job), allow_nan=False, ensure_ascii=False) + "\n" for job in report.jobs)


def csv_table(report: BatchReport) -> str:
    """Return one row a job; each metric that a job has is a column, empty where another has not measured it."""
    measured = {name for job in report.jobs for name in job.figures}
    known = [name for name in (*METRICS, *PIPELINE_METRICS) if name in measured]
    metrics = [*known, *sorted(measured - set(known))]
    text = io.StringIO()
    fixed = [name for name in JobResult.__dataclass_fields__ if name != "figures"]
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*fixed, *metrics])
    for job in report.jobs:
        rows.writerow([*(getattr(job, name) for name in fixed), *(job.figures.get(name) for name in metrics)])
    return text.getvalue()


def write(report: BatchReport, output: str) -> tuple[str, ...]:
    """Write the summary's files to the batch's output, each whole or not at all; return their names.

    Raises
    ------
    BadInputError, NoRoomError
    """
    data = report.to_dict()
    texts = {
        LINES: json_lines(report),
        TABLE: csv_table(report),
        REPORT: render(data, "json"),
        PAGE: render(data, "html"),
    }
    write_one = _writer(output)
    for name, text in texts.items():
        write_one(name, text)
    return tuple(texts)


def _writer(output: str) -> Callable[[str, str], None]:
    """Return what writes a file of the output, whole or not at all."""
    if "://" in output:
        from effcli.batch.storage import Storage

        storage = Storage(output)
        return lambda name, text: storage.write(name, text.encode())
    from effcli.cli.output import write_file

    return lambda name, text: write_file(Path(output) / name, text)
