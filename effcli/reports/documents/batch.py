"""The document of ``effcli batch``: what became of every job, and what the searches found."""

from __future__ import annotations

from functools import partial

from effcli import formatting as fmt
from effcli import fronts
from effcli.formatting import printable
from effcli.gates import METRICS, PIPELINE_METRICS, Metric
from effcli.reports.blocks import Chart, Column, Facts, Link, Report, Section, Table, columns, items, texts
from effcli.reports.changes import mapping, number
from effcli.reports.documents.base import Document, Figure, Tile
from effcli.reports.front_chart import Mark, front_chart
from effcli.reports.sections.generic import named

STATUS = {"gate-failed": "failed a gate"}
"""What readers see of a stage, where that is not its own name."""
GOOD = ("passed", "kept")
OTHERWISE = {
    "failed a gate": ("gate-failed",),
    "failed": ("failed",),
    "skipped": ("skipped",),
    "not reached": ("waiting", "running"),
}
"""What else may have become of jobs, in the order in which the verdict says so."""
MOST_NAMES = 5
_METRICS: dict[str, Metric] = {**METRICS, **PIPELINE_METRICS}
HEADLINE = (
    *("ppl", "kl", "top1", "accuracy", "size", "ttft", "tpot", "peak_memory"),
    *("psnr", "ssim", "lpips", "time"),
)
WITH_PAGE = ("/report.json", ".failed.json")
"""Reports that have a page beside them."""
ALL_FIGURES = "summary.csv"
CHART_CAPTION = "Every trial that was measured; the line joins what no other beats among those that keep the gates."
NO_CHART = "No chart: fewer than two trials have both figures."
NOT_REACHED = "not reached"


def document(report: Report) -> Document:
    """Build the document."""
    jobs = _jobs(report)
    sections = [Section("jobs", "Jobs", (), (job_table(jobs),))]
    figures = _figure_table(jobs)
    if figures.rows:
        sections.append(Section("figures", "Figures", (), (figures,)))
    searches = [search for search in items(report, "searches") if isinstance(search, dict)]
    sections += [_search(search, jobs) for search in searches]
    sections.append(_setup(report))
    return Document(
        command="effcli batch",
        heading="Batch",
        name=printable(report.get("jobs_file") or "a batch"),
        subtitle=f"{_count(len(jobs), 'job')} · {named(report.get('engine'))} · {named(report.get('output'))}",
        verdict=_verdict(report),
        tiles=_tiles(report),
        sections=tuple(sections),
        setup=("setup",),
        figures={
            _chart_name(search): Figure(partial(_chart, search, jobs), CHART_CAPTION, NO_CHART) for search in searches
        },
    )


def _jobs(report: Report) -> list[Report]:
    return [job for job in items(report, "jobs") if isinstance(job, dict)]


def job_table(jobs: list[Report], title: str = "") -> Table:
    """Return one row a job; its name leads to its report and its status to its log, where they can be linked."""
    rows = tuple(
        (
            _name(job),
            _link(_status(job), job.get("log")),
            fmt.duration(number(job.get("seconds"))),
            fmt.data_size(number(job.get("peak_memory_bytes"))),
            _message(job),
        )
        for job in jobs
    )
    again = ", ".join(
        f"{named(job.get('name'))} ({fmt.integer(number(job['attempts']))})"
        for job in jobs
        if (number(job.get("attempts")) or 0) > 1
    )
    headings = (*columns("<job", "<status", "time", "peak memory"), Column("message", numeric=False, prose=True))
    return Table(title, headings, rows, (f"Tried more than once: {again}.",) if again else ())


def _figure_table(jobs: list[Report]) -> Table:
    measured = [(job, mapping(job.get("figures"))) for job in jobs]
    metrics = [name for name in HEADLINE if any(number(found.get(name)) is not None for _, found in measured)]
    rows = tuple(
        (_name(job), *(_figure(name, found) for name in metrics))
        for job, found in measured
        if any(number(found.get(name)) is not None for name in metrics)
    )
    names = "; ".join(f"{name}: {_METRICS[name].title}" for name in metrics)
    notes = (f"{names}. All that was measured is in {ALL_FIGURES}.",) if rows else ()
    return Table("", columns("<job", *metrics), rows, notes)


def _figure(metric: str, figures: Report) -> str:
    value = number(figures.get(metric))
    if value is None or metric not in _METRICS:
        return fmt.short(value)
    return fmt.significant(value, 4) if metric == "ppl" else _METRICS[metric].show(value)


def _name(job: Report) -> str:
    report = job.get("report")
    if isinstance(report, str) and report.endswith(WITH_PAGE):
        report = report.removesuffix(".json") + ".html"
    return _link(named(job.get("name")), report)


def _message(job: Report) -> str:
    """Return what is said of the job; of a gate that failed only by how much, as the job's name leads to the rest."""
    message = printable(job.get("message") or "")
    return message.partition(". ")[0] if job.get("stage") == "gate-failed" else message


def _link(text: str, path: object) -> str:
    return Link(text, path) if isinstance(path, str) and path else text


def _status(job: Report) -> str:
    stage = named(job.get("stage"))
    return STATUS.get(stage, NOT_REACHED if stage in ("waiting", "running") else stage)


def _count(number_of: int, what: str) -> str:
    return f"{number_of:,} {what}{'' if number_of == 1 else 's'}"


def _names(jobs: list[Report]) -> str:
    names = [named(job.get("name")) for job in jobs]
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _of(jobs: list[Report], *stages: str) -> list[Report]:
    return [job for job in jobs if job.get("stage") in stages]


def _asked(report: Report) -> list[Report]:
    """Return the jobs that count: of a search only what failed, as a trial that misses a gate is an answer too."""
    searches = [named(mapping(search).get("name")) for search in items(report, "searches")]
    return [
        job
        for job in _jobs(report)
        if job.get("stage") == "failed" or not any(_is_trial(job, search) for search in searches)
    ]


def _verdict(report: Report) -> tuple[str, ...]:
    jobs, sentences = _asked(report), []
    kept = _of(jobs, "kept")
    if jobs:
        first = f"{len(_of(jobs, *GOOD)):,} of {_count(len(jobs), 'job')} passed"
        for words, stages in OTHERWISE.items():
            those = _of(jobs, *stages)
            if those:
                first += f", {len(those):,} {words} ({_names(those)})"
        sentences.append(f"{first}.")
    sentences += [_found(search) for search in items(report, "searches") if isinstance(search, dict)]
    if kept:
        sentences.append(f"Kept from an earlier run, as nothing that they depend on has changed: {len(kept):,}.")
    spent = number(report.get("seconds_spent"))
    workers = len(items(report, "workers"))
    if spent is not None:
        work = sum(number(job.get("seconds")) or 0.0 for job in _jobs(report) if job.get("stage") != "kept")
        on = f" on {_count(workers, 'worker')}" if workers else ""
        sentences.append(f"Took {fmt.duration(spent)}{on} for {fmt.duration(work)} of work.")
    return tuple(sentences) or ("The report holds no job.",)


def _found(search: Report) -> str:
    """Return what a search found, as one sentence."""
    counts = [f"{fmt.integer(number(search.get('trials')))} trials"]
    for key, words in (("pruned", "given up early"), ("failed", "failed")):
        if number(search.get(key)):
            counts.append(f"{fmt.integer(number(search[key]))} {words}")
    message = printable(search.get("message") or "no result").rstrip(".")
    return f"Search {named(search.get('name'))}, {', '.join(counts)}: {message}."


def _tiles(report: Report) -> tuple[Tile, ...]:
    jobs = _asked(report)
    kept = len(_of(jobs, "kept"))
    workers = _count(len(items(report, "workers")), "worker")
    tiles = [
        Tile("Passed", f"{len(_of(jobs, *GOOD)):,} of {len(jobs):,}", f"{kept:,} from an earlier run"),
        Tile("Failed a gate", f"{len(_of(jobs, 'gate-failed')):,}", "exit code 3"),
        Tile("Failed", f"{len(_of(jobs, 'failed')):,}", "exit code 1"),
        Tile("Time", fmt.duration(number(report.get("seconds_spent"))), workers),
    ]
    peaks = [peak for job in _jobs(report) if (peak := number(job.get("peak_memory_bytes"))) is not None]
    if peaks:
        tiles.append(Tile("Peak memory", fmt.data_size(max(peaks)), "of one job's process"))
    return tuple(tiles)


def _search(search: Report, jobs: list[Report]) -> Section:
    """Return what a search found, and how the trials on its front lie to each other."""
    quality, cost, best = named(search.get("quality")), named(search.get("cost")), search.get("best")
    front = items(search, "front")
    rows = tuple(
        (
            _name(job),
            *(_figure(metric, mapping(job.get("figures"))) for metric in (quality, cost)),
            "best that keeps the gates" if job.get("name") == best else "",
        )
        for job in jobs
        if job.get("name") in front
    )
    facts = (
        ("target", named(search.get("minimize"))),
        ("subject to", ", ".join(texts(search, "subject_to")) or "nothing"),
        *((key, fmt.integer(number(search.get(key)))) for key in ("trials", "pruned", "failed")),
        ("best", named(best)),
    )
    note = f"Of all trials that keep the gates, no other is better in {quality} and in {cost} at once."
    table = Table("Pareto front", columns("<job", quality, cost, "<"), rows, (note,) if rows else ())
    blocks = (Facts("", facts), table, Chart(_chart_name(search)))
    return Section("search", f"Search {named(search.get('name'))}", (_found(search),), blocks)


def _chart_name(search: Report) -> str:
    return f"front-{named(search.get('name'))}"


def _chart(search: Report, jobs: list[Report]) -> str | None:
    """Draw every trial that was measured, the front as a line; None where its metrics are not known."""
    keys = [named(search.get(key)) for key in ("cost", "quality")]
    cost, quality = (fronts.METRICS.get(key) for key in keys)
    if cost is None or quality is None:
        return None
    marks = []
    for job in jobs:
        x, y = (number(mapping(job.get("figures")).get(key)) for key in keys)
        if x is not None and y is not None and _is_trial(job, named(search.get("name"))):
            standing = "front" if job.get("name") in items(search, "front") else ""
            marks.append(Mark(named(job.get("name")), x, y, standing))
    return front_chart(marks, cost, quality, _chart_name(search))


def _is_trial(job: Report, search: str) -> bool:
    return job.get("part") == search and named(job.get("name")).startswith(f"{search}.")


def _setup(report: Report) -> Section:
    versions = [printable(f"{name} {version}") for name, version in mapping(report.get("versions")).items()]
    pairs = (
        ("jobs file", named(report.get("jobs_file"))),
        ("output", named(report.get("output"))),
        ("command", named(report.get("command"))),
        ("engine", named(report.get("engine"))),
        *((f"worker {index}", worker) for index, worker in enumerate(texts(report, "workers"))),
        ("versions", ", ".join(versions) or fmt.MISSING),
    )
    notes = ("Names lead to reports, statuses to logs; links are relative to the output.",)
    return Section("setup", "How the batch ran", (), (Facts("", pairs, notes),))
