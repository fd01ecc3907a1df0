"""Docs that are made from the code are up to date, and the example in the docs works."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from effcli.batch import driver, jobs_file, matrix
from effcli.batch.fingerprint import Fingerprints
from effcli.batch.local import LocalEngine

ROOT = Path(__file__).resolve().parent.parent


def pinned_version(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found.group(1)


@pytest.mark.skipif(
    any(importlib.metadata.version(name) != pinned_version(name) for name in ("typer", "pydantic")),
    reason="another typer or pydantic than the tested one words the generated files differently",
)
def test_generated_docs_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_example_profiler_in_the_docs_runs() -> None:
    (example,) = re.findall(
        r"```python\n(# my_package.*?)```", (ROOT / "docs" / "adding-a-profiler.md").read_text(), re.S
    )
    namespace: dict[str, object] = {"__name__": "my_package.gini"}
    sys.modules["my_package.gini"] = type(sys)("my_package.gini")
    exec(example, namespace)
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0]]))
    result = namespace["measure_gini"](model)  # type: ignore[operator]
    # Two weights, one of which has it all: Gini = 1 - 1/n = 0.5.
    assert result.gini == pytest.approx((0.5,))


@pytest.mark.slow
@pytest.mark.thorough
def test_the_example_of_a_sweep_counts_the_same_with_two_workers(tmp_path: Path, tiny_folder: Path) -> None:
    (example,) = re.findall(r"```yaml\n(version.*?)```", (ROOT / "docs" / "spread.md").read_text(), re.S)
    changes = {"smollm2-135m": str(tiny_folder), "[512]": "[64]", "[4096]": "[96]", "batch:": "sequences: 2, batch:"}
    for old, new in changes.items():
        assert old in example
        example = example.replace(old, new)
    (tmp_path / "sweep.yaml").write_text(example)
    jobs = matrix.jobs(jobs_file.read(tmp_path / "sweep.yaml", {}))
    found = []
    for workers in (1, 2):
        output = tmp_path / f"with-{workers}"
        ran = driver.run(jobs, str(output), LocalEngine(workers, threads=1), fingerprints=Fingerprints())
        assert [state.stage for state in ran.states] == ["passed"] * 4
        reports = {job.name: json.loads((output / job.name / "report.json").read_text()) for job in jobs}
        found.append({name: counted(report["profiles"]) for name, report in reports.items()})
    assert found[0] == found[1]
    points = {name: (report["kv"][0]["context"], report["kv"][0]["batch"]) for name, report in found[1].items()}
    assert points == {"m.c512-b1": (64, 1), "m.c512-b8": (64, 8), "m.c4096-b1": (96, 1), "m.c4096-b8": (96, 8)}
    assert found[1]["m.c4096-b1"]["sinks"]["points"][0]["context"] == 96


def counted(profiles: dict[str, Any]) -> dict[str, Any]:
    """Return what of a profile is counted and not timed: the cache, FLOP and bytes, sinks."""
    phases = ("phase", "batch", "context", "flops", "flops_needed", "bytes", "weight_bytes", "kv_bytes")
    return {
        "kv": profiles["kv"]["points"],
        "intensity": [{key: point[key] for key in phases} for point in profiles["intensity"]["points"]],
        "sinks": profiles.get("sinks"),
    }


def test_links_between_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
