"""Run one job and put its folder into the output whole: the one way to do it, on every engine.

::

    Job ──> profile │ optimize │ export │ call ──> OUTPUT/NAME, complete or not at all ──> Outcome
               │
               └── any error ──> the line and the exit code that ``effcli`` would have ended with

What is there from an earlier run of the job stays until its replacement is complete. An optimize goes on with what an
earlier attempt has staged, if that is of the same work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.batch.commands import command_of
from effcli.batch.memory import MemoryWatch
from effcli.batch.model import Job, Outcome
from effcli.batch.model_cache import ModelCache
from effcli.batch.storage import is_url, run_on_url
from effcli.checkpoint_files import sha256_of
from effcli.errors import (
    EXIT_BUG,
    EXIT_GATE_FAILED,
    EXIT_NO_ROOM,
    BadInputError,
    GateFailedError,
    GivenUpError,
    did_you_mean,
    explain,
)
from effcli.reports.model import REPORT_FILE, read_report

if TYPE_CHECKING:
    from profilers.base import Progress

__all__ = ["ModelCache", "published", "run_job"]

RESULT_FILE = "result.json"
"""What a ``call`` returned."""
PAGE_FILE = "report.html"
_TICK_SECONDS = 0.01
"""By how much a file's time can lie before the clock's: kernels date files by their last tick."""
_PROFILE_SETTINGS = ("only", "context", "batch", "epsilon", "sequences", "text", "seed", "config_only")
_EXPORT_SETTINGS = ("format", "task", "opset", "tolerance", "seed")
_OPTIMIZE_SETTINGS = ("context", "batch", "kernels", "compile")


def run_job(
    job: Job,
    output: str,
    progress: Progress,
    models: ModelCache | None = None,
    attempt: int = 1,
    memory: MemoryWatch | None = None,
) -> Outcome:
    """Run a job in this process.

    Parameters
    ----------
    job : Job
    output : str
        The batch's folder, absolute, or a URL; the job writes ``NAME`` in it.
    progress : Progress
    models : ModelCache, optional
        What jobs of this process share.
    attempt : int
        Counted from 1.
    memory : MemoryWatch, optional
        What watches this process, if something does already.

    Returns
    -------
    Outcome
        Also of a job that fails: nothing is raised but what interrupts (Ctrl-C). What went wrong, and the traceback
        of a bug, are on stderr.
    """
    kept, started = models or ModelCache(), time.perf_counter()

    def attempt_in(folder: str) -> Outcome:
        return _attempt(job, Path(folder), progress, kept)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(job.environment))
        watch = memory or stack.enter_context(MemoryWatch())
        watch.restart(children=job.kind != "profile")
        try:
            outcome = run_on_url(output, job.name, job.model_from, attempt_in) if is_url(output) else attempt_in(output)
        except Exception as error:  # noqa: BLE001 - the URL's own; from another machine it may be reached
            outcome = dataclasses.replace(_failed(error), retry=True)
        return dataclasses.replace(outcome, seconds=time.perf_counter() - started, peak_memory_bytes=watch.peak_bytes())


def _attempt(job: Job, output: Path, progress: Progress, models: ModelCache) -> Outcome:
    target = output / job.name
    try:
        _KINDS[job.kind](job, target, progress, models)
        return _passed(job, target)
    except GateFailedError as error:
        return _gate_failed(error, target)
    except Exception as error:  # noqa: BLE001 - any error becomes what effcli says of it
        models.clear()  # a measurement that broke off may have left its model changed
        return _failed(error)


def begin(job: Job, output: str) -> float:
    """Return when an attempt begins, in seconds since the epoch: what is published already is older by a tick."""
    with contextlib.suppress(OSError):
        written = (Path(output) / job.name / _report_name(job)).stat().st_mtime
        time.sleep(min(max(written + _TICK_SECONDS - time.time(), 0.0), 2 * _TICK_SECONDS))
    return time.time()


def published(job: Job, output: str, since: float) -> Outcome | None:
    """Return how an attempt ended that was lost after it had published its folder, before anybody took note of it.

    Parameters
    ----------
    job : Job
    output : str
    since : float
        When the attempt began, as :func:`begin` said; what was published before it does not count.
    """
    from effcli.staging import drop_published

    target = Path(output) / job.name
    found = target / _report_name(job)
    try:
        if found.stat().st_mtime < since - _TICK_SECONDS:
            return None
        outcome = _passed(job, target)
        drop_published(target)
        return outcome
    except (OSError, BadInputError):
        return None


def _passed(job: Job, target: Path) -> Outcome:
    """Return the outcome that a published folder stands for."""
    for name in _failed_names(target):  # of an earlier run, whose gates did not hold
        target.with_name(name).unlink(missing_ok=True)
    report = target / _report_name(job)
    if job.kind == "call":
        return _with_report(Outcome("passed", f"returned {report.stat().st_size} bytes"), report, target)
    data = read_report(report)
    return _with_report(Outcome("passed", _verdict(data), figures=_figures(data)), report, target)


def _gate_failed(error: GateFailedError, target: Path) -> Outcome:
    if isinstance(error, GivenUpError):  # there is no report of it, and one of an earlier run says something else
        for name in _failed_names(target):
            target.with_name(name).unlink(missing_ok=True)
        _say(error)
        return Outcome("gate-failed", error.gates, exit_code=EXIT_GATE_FAILED, figures=error.figures)
    report = target.with_name(_failed_names(target)[0])
    _say(error)
    outcome = Outcome("gate-failed", error.gates, exit_code=EXIT_GATE_FAILED)
    try:
        return _with_report(dataclasses.replace(outcome, figures=_figures(read_report(report))), report, target)
    except (OSError, BadInputError):  # it is the gate that counts
        return outcome


def _with_report(outcome: Outcome, report: Path, target: Path) -> Outcome:
    name = report.relative_to(target.parent).as_posix()
    return dataclasses.replace(outcome, report=name, report_sha256=sha256_of(report))


def _failed(error: Exception) -> Outcome:
    message, code = _say(error)
    return Outcome("failed", message, exit_code=code, retry=code == EXIT_NO_ROOM)


def _say(error: Exception) -> tuple[str, int]:
    """Write an error to stderr, with the traceback of a bug; return its line and its exit code."""
    line, code = explain(error)
    with contextlib.suppress(OSError):  # the disk of the log may be what is full
        if code == EXIT_BUG or os.environ.get("EFFCLI_DEBUG") == "1":
            traceback.print_exception(error)
        sys.stderr.write(f"{' '.join(line.split())}\n")
    return " ".join(line.split()).removeprefix("error: "), code


def _verdict(report: Mapping[str, Any]) -> str:
    from effcli.reports.verdict import verdict

    return " ".join(verdict(dict(report))[0].split())


def _figures(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a report's figures by metric of gates, of an optimize those of its result."""
    from effcli.gating import values

    try:
        found = values(report)
    except BadInputError:  # an export, which was not measured
        return {}
    return {name: found.after.get(name) for name in found.known}


def _failed_names(target: Path) -> tuple[str, str]:
    return f"{target.name}.failed.json", f"{target.name}.failed.html"


def _report_name(job: Job) -> str:
    return RESULT_FILE if job.kind == "call" else REPORT_FILE


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set a job's variables, and put back what was there before it."""
    earlier = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _model(job: Job, target: Path) -> str:
    return job.model if job.model_from is None else str(target.with_name(job.model_from))


def _check_target(job: Job, target: Path) -> None:
    from effcli import staging

    model = Path(_model(job, target))
    staging.check_target(target, model if job.kind != "call" and model.exists() else None, force=True)


def _publish(target: Path, files: Mapping[str, str]) -> None:
    from effcli.staging import open_staging

    with open_staging(target, {}, resume=False, force=True) as staged:
        out = staged.begin(staged.out.name)
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
        staged.publish(force=True)


def _profile(job: Job, target: Path, progress: Progress, models: ModelCache) -> None:
    from effcli.diffusion.opening import is_pipeline
    from effcli.reports.render import render

    _check_target(job, target)
    model = _model(job, target)
    if is_pipeline(model):
        models.clear()
        data = _pipeline_profile(job, model, progress)
    else:
        models.keep_only(model)
        data = _model_profile(job, model, progress, models)
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    _publish(target, {REPORT_FILE: text, PAGE_FILE: render(data, "html")})


def _common(job: Job, model: str) -> dict[str, Any]:
    return {
        "device": job.device,
        "dtype": job.dtype,
        "revision": job.revision,
        "trust_remote_code": job.trust_remote_code,
        "command": command_of(job, model),
    }


def _model_profile(job: Job, model: str, progress: Progress, models: ModelCache) -> dict[str, Any]:
    from effcli.api import profile
    from effcli.eval_text import read_text

    settings = _known(job, _PROFILE_SETTINGS, f"a profile of the language model '{model}'")
    if settings.get("text") is not None:
        settings["text"] = read_text(Path(settings["text"]))
    result = profile(
        model, **settings, **_common(job, model), allow_pickle=job.allow_pickle, progress=progress, kept=models
    )
    _warn(result.warnings)
    return result.to_dict()


def _pipeline_profile(job: Job, model: str, progress: Progress) -> dict[str, Any]:
    from effcli.diffusion.profile import PARTS, Sampling, profile_pipeline

    sampling = tuple(item.name for item in dataclasses.fields(Sampling))
    settings = _known(job, ("only", "seed", *sampling), f"a profile of the diffusion pipeline '{model}'")
    only, seed, batch = settings.pop("only", None), settings.pop("seed", 0), settings.pop("batch", (1,))
    sizes = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if len(sizes) > 1:
        raise BadInputError(f"batch {list(sizes)} of the diffusion pipeline '{model}' must be one number")
    result = profile_pipeline(
        model, Sampling(batch=sizes[0], **settings), only=only or PARTS, seed=seed, **_common(job, model),
        progress=progress,
    )  # fmt: skip
    _warn(result.warnings)
    return result.to_dict()


def _known(job: Job, names: tuple[str, ...], what: str) -> dict[str, Any]:
    """Return a job's settings that were given; refuse one that means nothing for its model."""
    given = {name: value for name, value in job.settings.items() if value is not None}
    for name in given:
        if name not in names:
            raise BadInputError(
                f"'{name}' means nothing for {what}{did_you_mean(name, names)}; leave it out, or exclude the pair"
            )
    return given


def _optimize(job: Job, target: Path, progress: Progress, models: ModelCache) -> None:
    from effcli import recipes
    from effcli.pipeline import optimize
    from effcli.staging import UnusableWorkError

    models.clear()
    model = _model(job, target)
    recipe = recipes.from_mapping(job.settings.get("recipe"), f"the recipe of job '{job.name}'")
    settings = _known(job, ("recipe", *_OPTIMIZE_SETTINGS), "an optimize")
    del settings["recipe"]

    def run(*, resume: bool) -> None:
        optimize(
            model, recipe, target, **_common(job, model), **settings, allow_pickle=job.allow_pickle, resume=resume,
            force=True, progress=progress, on_warning=lambda line: _warn((line,)),
        )  # fmt: skip

    try:
        run(resume=True)
    except UnusableWorkError as error:
        sys.stderr.write(f"staged work is dropped: {error}\n")
        run(resume=False)


def _export(job: Job, target: Path, progress: Progress, models: ModelCache) -> None:
    from effcli.export.exporting import export

    models.clear()
    model = _model(job, target)
    settings = _known(job, _EXPORT_SETTINGS, "an export")
    export(
        model, target, **_common(job, model), **settings, allow_pickle=job.allow_pickle, force=True, progress=progress
    )


def _call(job: Job, target: Path, progress: Progress, models: ModelCache) -> None:
    models.clear()
    _check_target(job, target)
    module, _, name = job.settings["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    shown = {"progress": progress} if "progress" in inspect.signature(function).parameters else {}
    value = function(**job.settings["arguments"], **shown)
    _publish(target, {RESULT_FILE: json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n"})


def _warn(lines: tuple[str, ...]) -> None:
    for line in lines:
        sys.stderr.write(f"warning: {' '.join(line.split())}\n")


_KINDS: Mapping[str, Callable[[Job, Path, Progress, ModelCache], None]] = {
    "profile": _profile,
    "optimize": _optimize,
    "export": _export,
    "call": _call,
}
