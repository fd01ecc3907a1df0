"""Imports run one way: effcli → passes → profilers; and importing a package does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {"profilers": {"passes", "effcli"}, "passes": {"effcli"}, "effcli": set()}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found |= {str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant)}
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_run_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    backward = {
        str(path.relative_to(ROOT)): sorted(wrong)
        for path in files
        if (wrong := imported_packages(path) & FORBIDDEN[package])
    }
    assert backward == {}


def test_the_rule_sees_a_backward_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from effcli.api import profile\n    return profile\n")
    assert imported_packages(wrong) & FORBIDDEN["profilers"] == {"effcli"}


@pytest.mark.parametrize("module", ["effcli", "effcli.cli.main", "passes", "profilers", "profilers.registry"])
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'pydantic'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['pydantic']") if module == "effcli.cli.main" else done.stdout.strip() == "[]"
