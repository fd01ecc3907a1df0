"""Jobs of a made-up batch, at every stage that a job can be at."""

from __future__ import annotations

from dataclasses import replace

from effcli.batch.model import BatchReport, Job, JobState, Outcome, SearchResult
from effcli.batch.summary import batch_report

START = 1_700_000_000.0
HOSTILE = '<script>alert(1)</script>|"\x1b[31m'


def job(name: str, kind: str = "optimize", part: str = "w4") -> Job:
    return Job(name, kind, "smollm2-135m", name.partition(".")[0], part)  # type: ignore[arg-type]


def batch() -> list[JobState]:
    """Return one job at each stage."""
    passed = Outcome(
        "passed",
        "Weights 0.31 x as large, decode 2.1 x as fast.",
        seconds=84.2,
        report="smol.w4/report.json",
        report_sha256="0" * 64,
        figures={"ppl": 17.25, "size": 8.4e7, "tpot": 0.0123, "kl": None},
        peak_memory_bytes=1_240_000_000,
    )
    missed = Outcome(
        "gate-failed",
        "perplexity rose by 4.1 % (16.6 → 17.3), at most +3 % allowed",
        exit_code=3,
        seconds=80.0,
        report="smol.w3.failed.json",
        figures={"ppl": 17.3, "size": 6.1e7, "accuracy": 0.5},
    )
    failed = Outcome(
        "failed", "source './gone' does not exist; give a folder, a file or a hub id", exit_code=2, seconds=0.4
    )
    kept = replace(passed, seconds=12.0, report="smol.quick/report.json")
    skipped = Outcome("skipped", "needs gone.w4, which failed")
    log = ".effcli-batch/logs/{}.log"
    return [
        JobState(
            job("smol.w4"), "passed", 2, "local 0 (pid 71)", None, None, START, START + 84.2, outcome=passed,
            log=log.format("smol.w4"),
        ),
        JobState(job("smol.quick", "profile", "quick"), "kept", 0, outcome=kept),
        JobState(
            job("smol.w3"), "gate-failed", 1, "local 1 (pid 72)", None, None, START, START + 80, outcome=missed,
            log=log.format("smol.w3"),
        ),
        JobState(
            job("gone.w4"), "failed", 1, "local 1 (pid 72)", None, None, START, START + 1, outcome=failed,
            log=log.format("gone.w4"),
        ),
        JobState(job("gone.onnx", "export", "onnx"), "skipped", 0, outcome=skipped),
        JobState(
            job("big.w4"), "running", 2, "local 0 (pid 71)", "pass: quantize", 0.42, START + 90, None,
            memory_bytes=2_100_000_000, gpu_memory_bytes=7_300_000_000,
        ),
        JobState(job("big.quick", "profile", "quick")),
    ]  # fmt: skip


def ended() -> list[JobState]:
    """Return the jobs of a batch that has ended."""
    return [state for state in batch() if state.stage not in ("running", "waiting")]


SEARCH = SearchResult(
    name="smallest",
    minimize="tpot",
    subject_to=("ppl<=+2%",),
    trials=12,
    pruned=5,
    failed=1,
    best="smol.w4",
    front=("smol.w4", "smol.w3"),
    quality="ppl",
    cost="tpot",
    message="smol.w4 has tpot 12.3 ms",
)


def report(states: list[JobState] | None = None) -> BatchReport:
    """Return the report of a batch that has ended."""
    return batch_report(
        ended() if states is None else states,
        command="effcli batch jobs.yaml",
        jobs_file="jobs.yaml",
        output="/data/runs",
        engine="local",
        workers=("local 0: cpu, 1 thread", "local 1: cpu, 1 thread"),
        seconds_spent=187.0,
        exit_code=1,
        searches=(SEARCH,),
    )


def hostile() -> BatchReport:
    """Return a report whose every text tries to be markup, and whose links try to leave the folder."""
    states = [
        replace(
            state,
            worker=HOSTILE,
            log="javascript:alert(1)",
            outcome=state.outcome and replace(state.outcome, message=HOSTILE, report="//evil.example/../x/report.json"),
        )
        for state in ended()
    ]
    made = report(states)
    return replace(made, jobs_file=HOSTILE, output=HOSTILE, command=HOSTILE, workers=(HOSTILE,))
