"""Writes jobs files for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from effcli.batch import jobs_file
from effcli.batch.jobs_file import JobsFile

BASE = """version: 1
output: runs
models: {m: smollm2-135m, n: ./n}
profiles: {q: {only: [kv]}}
recipes: {w: {passes: [{quantize: {scheme: w4a16}}]}}
"""


def read_text(folder: Path, text: str, variables: Mapping[str, str] | None = None) -> JobsFile:
    path = folder / "jobs.yaml"
    path.write_text(text, encoding="utf-8")
    return jobs_file.read(path, variables or {})
