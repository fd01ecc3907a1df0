"""What the trials of a search leave in a batch's output, be it a folder or any fsspec URL."""

from __future__ import annotations

import json
from typing import Any

WEIGHTS = "*.safetensors"


class TrialFiles:
    """Reports and weights of jobs.

    Parameters
    ----------
    output : str
        An absolute folder or a URL.
    """

    def __init__(self, output: str) -> None:
        self._output = output.rstrip("/")

    def gates(self, report: str) -> dict[str, dict[str, Any]]:
        """Return how a report judged each gate, by the gate's text; empty where there is no such report."""
        files, root = self._open()
        try:
            data = json.loads(files.cat_file(f"{root}/{report}"))
        except FileNotFoundError:
            return {}
        return {item["gate"]: item for item in data.get("gates") or ()}

    def drop(self, job: str) -> None:
        """Remove a job's weights and its staged work; its reports stay."""
        files, root = self._open()
        for path in files.glob(f"{root}/{job}/{WEIGHTS}"):
            files.rm_file(path)
        staged = f"{root}/.{job}.effcli"
        if files.exists(staged):
            files.rm(staged, recursive=True)

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        return url_to_fs(self._output)  # type: ignore[no-any-return]
