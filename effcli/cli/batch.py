"""``effcli batch``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effcli.cli.options import AddressOption, EngineName, EngineOption, QuietOption
from effcli.cli.output import check_writable, perhaps_unread, warn
from effcli.errors import EXIT_OK, BadInputError, did_you_mean

if TYPE_CHECKING:
    from effcli.batch.engine import View
    from effcli.batch.model import Job, JobState

MOST_ROWS = 60
"""Of the table at the end; a longer batch shows only what did not pass, and the page shows all."""
GOOD = ("passed", "kept")
SEARCH_JOBS = 4
"""Jobs of a search at a time where neither the file nor --workers says how many: more at once learn less from each."""


def command(
    jobs_file: Annotated[Path, typer.Argument(metavar="JOBS_FILE", help="YAML: models, profiles, recipes, exports.")],
    engine: EngineOption = EngineName.local,
    address: AddressOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, where, and about how long, and stop.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Jobs at a time at most; default: what the file says.")
    ] = None,
    variables: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="What ${NAME} in the jobs file stands for; repeatable."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FOLDER|URL", help="Instead of the output that the jobs file names."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help="Only these jobs and what they need, and a summary of these alone, e.g. 'smol.*'; repeatable.",
        ),
    ] = None,
    prometheus: Annotated[
        Path | None,
        typer.Option("--prometheus", metavar="FILE", help="Keep the batch's state in this file for Prometheus."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Run the jobs of a file, several at a time: what is missing, failed before or changed, then one summary.

    Exit code: 0 all passed, 3 a gate failed, 1 a job failed; their names are the last lines on stderr.
    """
    from effcli.batch.engines import check, engine_for

    check(engine.value, address)
    if prometheus is not None:
        check_writable(prometheus)
    from effcli.batch import driver, matrix, summary
    from effcli.batch import jobs_file as files
    from effcli.batch.fingerprint import Fingerprints
    from effcli.batch.locking import state_folder
    from effcli.batch.search import searches

    file = files.read(jobs_file, _variables(variables or ()))
    where = _absolute(output or file.output)
    on = engine_for(engine.value, address, workers or file.workers)
    jobs, names = _chosen(matrix.jobs(file), {name: matrix.search_job(file, name) for name in file.search}, only)
    parallel = workers or file.workers or (len(on.workers()) if engine is EngineName.local else SEARCH_JOBS)
    prints = Fingerprints(None if dry_run else state_folder(where) / "hashes.json", on.device_class)
    found = searches(file, where, prints, parallel=parallel)
    sources = [source for source in found if source.name in names]
    if dry_run:
        with on:
            for line in driver.dry_run(jobs, where, on, fingerprints=prints, sources=sources):
                typer.echo(line)
        return
    ran = driver.run(jobs, where, on, fingerprints=prints, sources=sources, view=_view(prometheus, quiet=quiet))
    report = summary.batch_report(
        ran.states,
        command=shlex.join(["effcli", *sys.argv[1:]]),
        jobs_file=str(jobs_file),
        output=where,
        engine=engine.value,
        workers=ran.workers,
        seconds_spent=ran.seconds_spent,
        exit_code=ran.exit_code,
        searches=[source.result() for source in sources],
    )
    summary.write(report, where)
    if not quiet:
        with perhaps_unread(sys.stdout):
            _show(report.to_dict(), where)
    if ran.exit_code != EXIT_OK:
        with perhaps_unread(sys.stderr):
            _name_failed(ran.states, {job.name for job in jobs})
        raise typer.Exit(ran.exit_code)


def _variables(given: Sequence[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    for item, (name, equals, _) in zip(given, pairs, strict=True):
        if not name or not equals:
            raise BadInputError(f"--set '{item}' is not NAME=VALUE; write e.g. --set MODEL=smollm2-135m")
    return {name: value for name, _, value in pairs}


def _absolute(output: str) -> str:
    return output if "://" in output else str(Path(output).absolute())


def _chosen(
    jobs: Sequence[Job], searches: Mapping[str, Job], only: Sequence[str] | None
) -> tuple[list[Job], list[str]]:
    """Return the jobs and the names of the searches that any pattern names, with all that they need, in their order."""
    if not only:
        return list(jobs), list(searches)
    by_name = {job.name: job for job in jobs} | dict(searches)
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in by_name):
            raise BadInputError(
                f"--only '{pattern}' names no job of this file{did_you_mean(pattern, by_name)}; --dry-run lists them"
            )
    ahead = [name for name in by_name if any(fnmatchcase(name, pattern) for pattern in only)]
    wanted: set[str] = set()
    while ahead:
        name = ahead.pop()
        if name not in wanted:
            wanted.add(name)
            ahead += by_name[name].needs
    return [job for job in jobs if job.name in wanted], [name for name in searches if name in wanted]


def _view(prometheus: Path | None, *, quiet: bool) -> View:
    from effcli.batch.live import Views, view_for

    view = view_for(quiet=quiet)
    if prometheus is None:
        return view
    from effcli.batch.prometheus import PrometheusView

    return Views(view, PrometheusView(prometheus, lambda line: warn((line,))))


def _show(data: dict[str, Any], output: str) -> None:
    """Print the verdict and a compact table: messages only of jobs that did not pass."""
    from rich.console import Console

    from effcli.batch.summary import PAGE, TABLE
    from effcli.reports.documents.batch import job_table
    from effcli.reports.terminal import rich_table
    from effcli.reports.verdict import verdict

    jobs = [job | {"message": ""} if job["stage"] in GOOD else job for job in data["jobs"]]
    if len(jobs) > MOST_ROWS:
        jobs = [job for job in jobs if job["stage"] not in GOOD]
    console = Console(highlight=False)
    with console.capture() as table:  # rich itself would end the process where nobody reads
        if jobs:
            console.print(rich_table(job_table(jobs)))
    lines = [*verdict(data), f"wrote {output}/{PAGE}", f"wrote {output}/{TABLE}"]
    text = table.get() + "".join(f"{line}\n" for line in lines)
    sys.stdout.write(text.encode(console.encoding, "replace").decode(console.encoding))


def _name_failed(states: Sequence[JobState], asked: set[str]) -> None:
    """Say last which jobs the exit code is about: a search's trial that misses a gate is an answer, no failure."""
    for stage, words in (("gate-failed", "failed a gate"), ("failed", "failed")):
        names = [
            state.job.name
            for state in states
            if state.stage == stage and (stage == "failed" or state.job.name in asked)
        ]
        if names:
            typer.echo(f"error: {len(names)} of {len(states)} jobs {words}: {', '.join(names)}", err=True)
