"""A pass from a package of its own, installed with pip, is listed, planned and run like a built-in one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.conftest import Run

PACKAGE = Path(__file__).resolve().parent / "third_party_pass"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package into a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "package"  # the build writes into the source tree
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    return site


@pytest.fixture
def environment(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}


def test_it_is_listed_with_its_parameters(effcli: Run, environment: dict[str, str]) -> None:
    done = effcli("passes", "magnitude", "--json", **environment)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["before"] == ["quantize"]
    assert row["parameters"] == [
        {
            "name": "sparsity",
            "type": "number",
            "default": 0.1,
            "description": "Share of each layer's weights that become zero.",
        }
    ]
    shown = effcli("passes", **environment)
    assert "Magnitude pruning" in shown.stdout
    assert "quantize" in shown.stdout


def test_its_parameters_are_checked(effcli: Run, environment: dict[str, str], tiny_folder: Path) -> None:
    for given, message in (
        ("magnitude:sparsty=0.5", "no parameter 'sparsty'; did you mean 'sparsity'?"),
        ("magnitude:sparsity=2", "parameter 'sparsity'"),
    ):
        done = effcli("optimize", tiny_folder, "--pass", given, "-o", "out", **environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_its_order_is_enforced(effcli: Run, environment: dict[str, str], tiny_folder: Path) -> None:
    chain = ("--pass", "quantize:scheme=w8a16,method=rtn", "--pass", "magnitude")
    done = effcli("optimize", tiny_folder, *chain, "-o", "out", **environment)
    assert done.returncode == 2
    assert "must come after 'magnitude'; give --pass magnitude before --pass quantize" in done.stderr


@pytest.mark.slow
def test_it_runs_from_end_to_end(effcli: Run, environment: dict[str, str], tiny_folder: Path, tmp_path: Path) -> None:
    done = effcli(
        *("optimize", tiny_folder, "--pass", "magnitude:sparsity=0.5", "-o", "out"),
        *("--context", 32, "--eval-tokens", 512),
        **environment,
    )
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(tiny_folder / "model.safetensors")
    assert written.keys() == original.keys()
    for name, weight in written.items():
        pruned = name.endswith("_proj.weight")
        assert (weight == 0).mean() == pytest.approx(0.5 if pruned else (original[name] == 0).mean(), abs=0.01)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passes"][0]["name"] == "magnitude"
    assert report["quality"]["kl"]["mean"] > 0
