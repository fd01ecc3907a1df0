"""What a node checks before it takes a job; the rest is tested on a cluster, in test_ray_engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from effcli.batch import ray_worker
from effcli.batch.model import Job
from effcli.batch.ray_worker import different_versions
from effcli.staging import folder_for

JOB = Job("job", "call", "", "none", "x")


def test_equal_versions_are_no_difference() -> None:
    assert different_versions({"effcli": "1", "ray": None}, {"effcli": "1"}) is None


def test_a_retry_waits_for_the_lock_of_the_attempt_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "LOCK_SECONDS", 0.2)
    staged = folder_for(tmp_path / "job")
    assert ray_worker._locked(JOB, str(tmp_path)) is None
    staged.mkdir()
    with FileLock(staged / "lock"):
        held = ray_worker._locked(JOB, str(tmp_path))
    assert held is not None
    assert held.retry
    assert "still held by an earlier attempt's process" in held.message
    assert ray_worker._locked(JOB, str(tmp_path)) is None
