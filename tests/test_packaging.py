"""The wheel and the sdist build, and the wheel works from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return folder


def test_the_wheel_holds_the_three_packages_and_their_data(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} <= {"effcli", "passes", "profilers"} | {
        name.split("/")[0] for name in names if ".dist-info/" in name
    }
    for needed in ("effcli/py.typed", "profilers/py.typed", "passes/py.typed", "profilers/sinks.py"):
        assert needed in names
    assert any(name.startswith("effcli/reports/") and name.endswith(".jinja") for name in names)
    pipeline = ROOT / "effcli" / "dit_tiny" / "pipeline"
    shipped = {path.relative_to(ROOT).as_posix() for path in pipeline.rglob("*") if path.is_file()}
    assert shipped <= set(names) and "effcli/dit_tiny/pipeline/model_index.json" in shipped


def test_the_sdist_holds_what_a_packager_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "profilers/base.py"} <= names


def test_the_wheel_works_from_an_empty_folder(built: Path, tmp_path: Path, tiny_folder: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import effcli; print(effcli.__file__)"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    done = subprocess.run(
        [sys.executable, "-m", "effcli", "profile", str(tiny_folder), "--config-only", "--format", "json"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["profiles"]["kv"]["bytes_per_token"] > 0
    assert list(empty.iterdir()) == []
