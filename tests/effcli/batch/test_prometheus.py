"""The text file, read by Prometheus' own parser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from effcli.batch import prometheus
from effcli.batch.prometheus import PrometheusView, exposition

from . import states

parser = pytest.importorskip("prometheus_client.parser")

NOW = states.START + 200


def samples(text: str) -> dict[tuple[str, str], float]:
    """Return each value by its metric and its job, or its stage."""
    return {
        (sample.name, sample.labels.get("job") or sample.labels.get("stage", "")): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_every_figure() -> None:
    read = samples(exposition(states.batch(), NOW))
    assert {stage: value for (name, stage), value in read.items() if name == "effcli_batch_jobs"} == dict.fromkeys(
        ("waiting", "running", "kept", "passed", "gate-failed", "failed", "skipped"), 1.0
    )
    assert read["effcli_batch_job_seconds", "smol.w4"] == 84.2
    assert read["effcli_batch_job_seconds", "big.w4"] == 110.0
    assert read["effcli_batch_job_memory_bytes", "big.w4"] == 2.1e9
    assert read["effcli_batch_job_memory_bytes", "smol.w4"] == 1.24e9
    assert read["effcli_batch_job_gpu_memory_bytes", "big.w4"] == 7.3e9
    assert read["effcli_batch_job_progress_ratio", "big.w4"] == 0.42
    assert read["effcli_batch_updated_timestamp_seconds", ""] == NOW
    assert ("effcli_batch_job_seconds", "big.quick") not in read  # not known is no sample, not 0


def test_labels_are_escaped() -> None:
    hostile = [replace(state, worker='a"b\\c\nd') for state in states.batch()]
    (family,) = (
        family
        for family in parser.text_string_to_metric_families(exposition(hostile, NOW))
        if family.name == "effcli_batch_job_info"
    )
    assert {sample.labels["worker"] for sample in family.samples} == {'a"b\\c\nd'}


def test_the_file_follows_the_batch_and_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "SECONDS_BETWEEN", 0.01)
    warnings: list[str] = []
    path = tmp_path / "batch.prom"
    jobs = states.batch()
    view = PrometheusView(path, warnings.append, now=lambda: NOW)
    view.opened(jobs, ())
    assert samples(path.read_text(encoding="utf-8"))["effcli_batch_jobs", "passed"] == 1
    jobs[5].stage = "passed"
    for _ in range(200):
        read = samples(path.read_text(encoding="utf-8"))
        assert read["effcli_batch_updated_timestamp_seconds", ""] == NOW  # the last line is always there
    view.closed()
    assert samples(path.read_text(encoding="utf-8"))["effcli_batch_jobs", "passed"] == 2
    assert warnings == [] and [found.name for found in tmp_path.iterdir()] == ["batch.prom"]


def test_a_place_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    warnings: list[str] = []
    view = PrometheusView(tmp_path / "gone" / "batch.prom", warnings.append)
    view.opened(states.batch(), ())
    view.closed()
    assert len(warnings) == 1 and "the batch goes on without it" in warnings[0]
