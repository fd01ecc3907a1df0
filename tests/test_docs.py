"""Docs that are made from the code are up to date, and the example in the docs works."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_links_between_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
