"""What a batch is made of: jobs, what becomes of them, and what they say while they run. Plain data, JSON-ready.

::

    jobs.yaml ──jobs_file, matrix──> Job ──engine──> Event … Event ──driver──> JobState ──summary──> BatchReport
                                      │                                          ▲
                                      └── fingerprint ── journal.jsonl ──────────┘
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from effcli.reports.model import plain

STATE_FOLDER = ".effcli-batch"
"""In the output folder: the journal, the lock, logs and searches' storage."""

Kind = Literal["profile", "optimize", "export", "call"]
"""``call`` runs a named function: how work is spread over workers. It cannot be written in a jobs file."""

Status = Literal["passed", "gate-failed", "failed", "skipped"]
"""How a job ended; ``skipped`` where one that it needs did not pass, or a search gave it up."""

Stage = Literal["waiting", "running", "kept", "passed", "gate-failed", "failed", "skipped"]
"""Where a job is; ``kept`` is what an earlier run finished and nothing has changed since."""


@dataclass(frozen=True)
class Limits:
    """What a job may take.

    Attributes
    ----------
    time_seconds : float or None
        A job that takes longer is stopped, and fails.
    memory_bytes : int or None
        What to reserve for it, instead of an estimate. It is no ceiling that the system enforces.
    retries : int
        How often a job is tried again after its worker was lost or it ran out of memory. Bad input is never retried.
    """

    time_seconds: float | None = None
    memory_bytes: int | None = None
    retries: int = 1


@dataclass(frozen=True)
class Job:
    """One unit of work, the same on every engine.

    Attributes
    ----------
    name : str
        Unique; also the name of its folder in the output. Letters, digits, ``.``, ``_``, ``-``.
    kind : str
    model : str
        A source as on the command line, as the worker has to open it (local paths are absolute), or the empty string
        where it is the output of another job, ``model_from``.
    model_name, part : str
        What the jobs file calls the model, and the profile, recipe or export.
    settings : mapping
        Of a ``profile``: keyword arguments of :func:`effcli.profile` (``only``, ``context``, ``batch``, ``epsilon``,
        ``sequences``, ``text`` (a path), ``seed``, ``config_only``). Of an ``optimize``: ``recipe`` (as
        :func:`effcli.recipes.from_mapping` takes it, gates included) and ``context``, ``batch``, ``kernels``,
        ``compile``. Of an ``export``: keyword arguments of :func:`effcli.export.exporting.export`. Of a ``call``:
        ``function`` (``"module:name"``) and ``arguments``.
    device, dtype : str
        ``auto`` or a torch name.
    revision : str or None
    trust_remote_code, allow_pickle : bool
    model_from : str or None
        Name of the job whose output folder is this one's model.
    needs : tuple of str
        Names of jobs that must have passed; holds ``model_from``.
    environment : mapping
        Variables that the job runs with.
    limits : Limits
    gpus : float
        GPUs to reserve.
    labels : mapping
        A Ray node's labels that the job needs.
    """

    name: str
    kind: Kind
    model: str
    model_name: str
    part: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    model_from: str | None = None
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = Limits()
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the job on one line."""
        return json.dumps(plain(self), allow_nan=False, ensure_ascii=False)

    @staticmethod
    def from_mapping(data: Mapping[str, Any]) -> Job:
        """Return the job that :func:`effcli.reports.model.plain` made this data from."""
        return Job(**{**data, "limits": Limits(**data["limits"]), "needs": tuple(data["needs"])})


@dataclass(frozen=True)
class Outcome:
    """How one attempt at a job ended.

    Attributes
    ----------
    status : str
    message : str
        One line: the verdict of its report, or what went wrong and the remedy.
    exit_code : int
        What ``effcli`` would have returned for this job alone.
    seconds : float
        Of the attempt, in the worker.
    report : str or None
        Path of its report in the output, relative: ``smol.w4/report.json``; that of a gate that failed,
        ``smol.w4.failed.json``.
    report_sha256 : str or None
    figures : mapping
        By metric of :data:`effcli.gates.METRICS`; what was not measured is None.
    peak_memory_bytes : int or None
        Of the worker's process while the job ran.
    retry : bool
        Whether another attempt may help: the worker was lost, or memory ran out.
    """

    status: Status
    message: str
    exit_code: int = 0
    seconds: float = 0.0
    report: str | None = None
    report_sha256: str | None = None
    figures: Mapping[str, float | None] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    retry: bool = False


@dataclass(frozen=True)
class Event:
    """What an engine says of a job.

    Attributes
    ----------
    job : str
    kind : str
        ``started``, ``progress``, ``finished`` (with ``outcome``) or ``lost`` (its worker is gone; with ``reason``).
    worker : str
        Which worker: ``"local 0 (pid 4711)"``, ``"node 10.0.0.3"``.
    time : float
        Seconds since the epoch.
    stage : str or None
        Of ``progress``: what is being done, ``"pass: quantize"``.
    done : float or None
        Share of the whole job, 0 to 1; it never falls.
    memory_bytes, gpu_memory_bytes : int or None
        Held by the worker now.
    """

    job: str
    kind: Literal["started", "progress", "finished", "lost"]
    worker: str
    time: float
    stage: str | None = None
    done: float | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    outcome: Outcome | None = None
    reason: str | None = None


@dataclass
class JobState:
    """Where a job is; the driver keeps one a job, views and summaries read them.

    Attributes
    ----------
    job : Job
    stage : str
    attempt : int
        Counted from 1; 0 before the first.
    worker, step : str or None
        Where it runs, what it is doing.
    done : float or None
    started, ended : float or None
        Seconds since the epoch.
    memory_bytes, gpu_memory_bytes : int or None
    outcome : Outcome or None
        Of the last attempt, or of an earlier run where ``stage`` is ``kept``.
    log : str or None
        Path of its log in the output, relative.
    """

    job: Job
    stage: Stage = "waiting"
    attempt: int = 0
    worker: str | None = None
    step: str | None = None
    done: float | None = None
    started: float | None = None
    ended: float | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    outcome: Outcome | None = None
    log: str | None = None


@dataclass(frozen=True)
class JobResult:
    """One line of a batch's summary.

    Attributes
    ----------
    stage : str
        As it ended: ``kept``, ``passed``, ``gate-failed``, ``failed`` or ``skipped``.
    """

    name: str
    kind: str
    model: str
    part: str
    device: str
    stage: str
    attempts: int
    seconds: float | None
    worker: str | None
    message: str
    exit_code: int
    report: str | None
    log: str | None
    peak_memory_bytes: int | None
    figures: dict[str, float | None]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes
    ----------
    name : str
    minimize : str
        Metric of :data:`effcli.gates.METRICS`.
    subject_to : tuple of str
        Gates.
    trials, pruned, failed : int
    best : str or None
        Name of the best job that keeps the gates; None where none does.
    front : tuple of str
        Names of the jobs that no other beats in quality and in cost at once.
    quality, cost : str
        Metrics that the front is drawn over.
    message : str
    """

    name: str
    minimize: str
    subject_to: tuple[str, ...]
    trials: int
    pruned: int
    failed: int
    best: str | None
    front: tuple[str, ...]
    quality: str
    cost: str
    message: str


@dataclass(frozen=True)
class BatchReport:
    """One run of ``effcli batch``.

    Attributes
    ----------
    schema : str
    created : str
        ISO 8601, UTC.
    command, jobs_file, output, engine : str
    workers : tuple of str
    seconds_spent : float
    exit_code : int
        0 all passed, 1 a job failed, 3 a gate failed and no job did.
    jobs : tuple of JobResult
        In the order of the jobs file.
    searches : tuple of SearchResult
    versions : dict of str to str
    """

    schema: str
    created: str
    command: str
    jobs_file: str
    output: str
    engine: str
    workers: tuple[str, ...]
    seconds_spent: float
    exit_code: int
    jobs: tuple[JobResult, ...]
    searches: tuple[SearchResult, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data
