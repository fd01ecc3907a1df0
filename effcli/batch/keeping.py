"""Whether what an earlier run of a batch finished is still good, and if not, why its job runs again.

A job is kept where the journal says that it passed with the fingerprint that it has now, and its report is still there,
byte for byte. Gates are no part of the work: where only they changed, they are held against the saved report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from effcli.batch.journal import Entry, Record
from effcli.batch.model import Job, Outcome
from effcli.batch.storage import Storage, is_url
from effcli.checkpoint_files import sha256_of
from effcli.errors import EXIT_GATE_FAILED, EXIT_OK, BadInputError
from effcli.reports.model import read_report


class Fingerprinting(Protocol):
    """What :class:`effcli.batch.fingerprint.Fingerprints` does for the driver."""

    def of(self, job: Job) -> Mapping[str, Any]:
        """Return what the job depends on, JSON-ready."""
        ...

    def difference(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        """Say in words what changed, an empty string where nothing did."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What is to be done about a job.

    Attributes
    ----------
    fingerprint : dict
        What the job depends on: ``job``, ``gates`` and, by job, the report of the ``output_of`` that is its model.
    kept : Outcome or None
        Of the earlier run, with gates that failed since; None where the job has to run.
    why : str
        Why it has to run.
    unnoted : bool
        Whether the journal does not know yet that it is finished: the driver was killed just then.
    """

    fingerprint: dict[str, Any]
    kept: Outcome | None
    why: str = ""
    unnoted: bool = False


class Keeper:
    """Judges the jobs of one output.

    Parameters
    ----------
    output : str
    fingerprints : Fingerprinting
    records : dict of str to Record
        What the journal says.
    """

    def __init__(self, output: str, fingerprints: Fingerprinting, records: Mapping[str, Record]) -> None:
        self._output = output
        self._fingerprints = fingerprints
        self._records = dict(records)

    def judge(self, job: Job, model_report: str | None) -> Verdict:
        """Say whether a job is kept; asked a second time about a job, it is not.

        Parameters
        ----------
        job : Job
        model_report : str or None
            The sha256 of the report of ``job.model_from``.

        Raises
        ------
        effcli.errors.EffcliError
            If the job's model cannot be found or read.
        """
        work, gates = _without_gates(job)
        fingerprint: dict[str, Any] = {"job": dict(self._fingerprints.of(work)), "gates": list(gates)}
        if job.model_from is not None:
            fingerprint["output_of"] = {job.model_from: model_report}
        record = self._records.pop(job.name, None)
        if record is None:
            return Verdict(fingerprint, None, "new")
        outcome = self._finished_unnoted(job, record.last, fingerprint)
        if outcome is not None:
            return Verdict(fingerprint, outcome, unnoted=True)
        if record.passed is None:
            return Verdict(fingerprint, None, _tried(record))
        return self._judge_passed(record.passed, fingerprint)

    def begin(self, job: Job) -> float:
        """Return when an attempt begins, for :meth:`published`."""
        from effcli.batch.running import begin

        return time.time() if is_url(self._output) else begin(job, self._output)

    def published(self, job: Job, since: float) -> Outcome | None:
        """Return how an attempt ended that published its output and was killed before the journal knew; else None."""
        from effcli.batch.running import published

        return None if is_url(self._output) else published(job, self._output, since)

    def _finished_unnoted(self, job: Job, last: Entry, fingerprint: dict[str, Any]) -> Outcome | None:
        """Return the outcome of this very work where the driver was killed before it could note it."""
        begun = last.fingerprint if last.event == "started" else None
        if begun is None or begun.get("gates") != fingerprint["gates"] or self._difference(begun, fingerprint):
            return None
        return self.published(job, last.time)

    def _judge_passed(self, passed: Entry, fingerprint: dict[str, Any]) -> Verdict:
        outcome, recorded = passed.outcome, passed.fingerprint or {}
        assert outcome is not None
        difference = self._difference(recorded, fingerprint)
        if difference:
            return Verdict(fingerprint, None, f"changed: {difference}")
        if not self._is_there(outcome):
            return Verdict(fingerprint, None, f"its output '{outcome.report}' is gone or was changed")
        if recorded.get("gates") == fingerprint["gates"]:
            return Verdict(fingerprint, outcome)
        regated = self._regated(outcome, fingerprint["gates"])
        return Verdict(fingerprint, regated, "" if regated else "its gates ask for what was not measured")

    def estimate_seconds(self, job: str) -> float | None:
        """Return how long a job took when it last passed, None where it never did."""
        record = self._records.get(job)
        return None if record is None or record.passed is None else _seconds(record.passed.outcome)

    def completed(self, job: Job, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Return the fingerprint of a job that has run, with what only its run could find out: commit, device."""
        now = dict(self._fingerprints.of(_without_gates(job)[0]))
        unchanged = not self._fingerprints.difference(now, fingerprint["job"])
        return {**fingerprint, "job": now} if unchanged else fingerprint

    def _difference(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        """Say what changed in a job's work; gates are judged for themselves."""
        words = self._fingerprints.difference(old.get("job") or {}, new["job"])
        if not words and old.get("output_of") != new.get("output_of"):
            return f"its model, the output of '{next(iter(new.get('output_of') or old['output_of']))}'"
        return words

    def _is_there(self, outcome: Outcome) -> bool:
        if outcome.report is None or outcome.report_sha256 is None:
            return False
        if is_url(self._output):
            storage = Storage(self._output)
            return storage.exists(outcome.report) and storage.sha256(outcome.report) == outcome.report_sha256
        path = Path(self._output) / outcome.report
        return path.is_file() and sha256_of(path) == outcome.report_sha256

    def _regated(self, outcome: Outcome, gates: Sequence[str]) -> Outcome | None:
        """Return the outcome under other gates, None where the report does not hold what they ask for."""
        from effcli.gating import check

        assert outcome.report is not None
        if is_url(self._output):
            report = json.loads(Storage(self._output).read(outcome.report))
        else:
            report = read_report(Path(self._output) / outcome.report)
        results = check(report, gates)
        if any(result.measured is None for result in results):
            return None
        failed = [f"gate '{result.gate}' failed: {result.explanation}" for result in results if not result.passed]
        if not failed:
            return replace(outcome, status="passed", exit_code=EXIT_OK)
        message = f"{'; '.join(failed)}. What was published under the earlier gates is left as it is"
        return replace(outcome, status="gate-failed", exit_code=EXIT_GATE_FAILED, message=message)


def check_needs(jobs: Sequence[Job], known: Iterable[str] = ()) -> None:
    """Refuse a job that needs one that is neither among the jobs nor known.

    Raises
    ------
    BadInputError
    """
    names = {job.name for job in jobs}.union(known)
    for job in jobs:
        missing = next((need for need in job.needs if need not in names), None)
        if missing is not None:
            raise BadInputError(f"job '{job.name}' needs the job '{missing}', which is not in this batch; add it")


def _without_gates(job: Job) -> tuple[Job, tuple[str, ...]]:
    recipe = job.settings.get("recipe")
    if not isinstance(recipe, Mapping):
        return job, ()
    bare = {key: value for key, value in recipe.items() if key != "gates"}
    return replace(job, settings={**job.settings, "recipe": bare}), tuple(recipe.get("gates") or ())


def _tried(record: Record) -> str:
    """Say how it ended before, of a job that never passed."""
    last = record.last
    if last.event == "finished" and last.outcome is not None:
        how = "its gates failed before" if last.outcome.status == "gate-failed" else "failed before"
        return f"{how}: {last.outcome.message}"
    if last.event == "started":
        return "was not finished before"
    return f"was {last.event} before: {last.reason}"


def _seconds(outcome: Outcome | None) -> float | None:
    return None if outcome is None else outcome.seconds
