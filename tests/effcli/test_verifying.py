"""A checkpoint is what its report says, or verify names what is not; push sends what was verified, if asked to."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from effcli import optimize, pushing, signature
from effcli.cli.main import main
from effcli.errors import BadInputError, SourceError
from effcli.recipes import from_options
from effcli.verifying import verify


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that optimize wrote."""
    out = tmp_path_factory.mktemp("verify") / "out"
    recipe = from_options(["quantize:scheme=w8a16,method=rtn"], evaluation={"tokens": 256, "context": 64})
    optimize(str(tiny_folder), recipe, out, device="cpu", context=64)
    return out


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def signed_again(folder: Path) -> None:
    """Do what someone does who changes a file and knows of the sums."""
    signature.write(folder)


def test_what_optimize_wrote_holds(made: Path) -> None:
    found = verify(made)
    assert len(found.checks) == 4 and not found.notes
    assert found.signature == hashlib.sha256((made / "SHA256SUMS").read_bytes()).hexdigest()
    assert verify(made, expected=found.signature[:12]).signature == found.signature
    with pytest.raises(SourceError, match="not the same checkpoint"):
        verify(made, expected="0" * 12)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_anyone_can_check_the_sums(made: Path) -> None:
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=made, capture_output=True, text=True)
    assert done.returncode == 0 and "report.json: OK" in done.stdout
    listed = set(signature.read(made))
    assert listed == {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()} - {"SHA256SUMS"}


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _edit_report(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    change(report)
    path.write_text(json.dumps(report), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_flip, "model.safetensors' has sha256"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks 'tokenizer.json'"),
        (lambda folder: (folder / "extra.py").write_text("pass"), "extra.py' is not in SHA256SUMS"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "was not signed"),
        (lambda folder: (folder / "SHA256SUMS").write_text("../x\n"), "line 1 is no sha256"),
        (lambda folder: (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../x\n"), "line 1 is no sha256"),
    ],
)
def test_a_changed_file_is_named(copy: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(copy)
    with pytest.raises(SourceError, match=says):
        verify(copy)


def test_other_weights_under_the_report_are_found_although_the_sums_fit(copy: Path) -> None:
    _flip(copy)
    signed_again(copy)
    with pytest.raises(SourceError, match="it is of other weights"):
        verify(copy)


def test_nan_in_weights_is_found_although_everything_else_fits(copy: Path) -> None:
    from effcli.checkpoint_files import fingerprint

    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key, value in tensors.items() if value.is_floating_point())
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    _edit_report(copy, lambda report: report["after"]["model"].update(fingerprint=fingerprint([path])))
    signed_again(copy)
    with pytest.raises(SourceError, match="does not pass the audit: .*NaN"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: report["recipe"].update(seed=7), "recipe in effcli.json and report.json differ"),
        (lambda report: report["source"].update(fingerprint="0" * 64), "source in effcli.json"),
        (lambda report: report["audit"][0].update(bits=1.0), "not as the report's audit lists them"),
        (lambda report: report["size"].update(after_bytes=1), "not as the report's audit lists them"),
    ],
)
def test_a_report_of_something_else_is_found(copy: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    _edit_report(copy, change)
    signed_again(copy)
    with pytest.raises(SourceError, match=says):
        verify(copy)


def test_what_effcli_did_not_write_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="effcli did not write it"):
        verify(tiny_folder)
    with pytest.raises(BadInputError, match="is no folder"):
        verify(tmp_path / "none")


def test_the_commands_say_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    assert capsys.readouterr().out.count("holds  ") == 4
    assert main(["push", str(copy), "org/name"]) == 0
    said = capsys.readouterr().out
    assert "dry run: 10 files" in said and "report.json" in said and "add --upload" in said
    _flip(copy)
    assert main(["verify", str(copy)]) == 2 and main(["push", str(copy), "org/name"]) == 2
    assert capsys.readouterr().err.count("was damaged or changed") == 2


class _Hub:
    """Stands for the hub's client, and keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, name: str, **given: Any) -> None:
        self.calls.append(("repo", (name, given)))

    def create_branch(self, name: str, **given: Any) -> None:
        self.calls.append(("branch", (name, given)))

    def create_commit(self, name: str, operations: list[Any], **given: Any) -> SimpleNamespace:
        self.calls.append(("commit", (name, operations, given)))
        return SimpleNamespace(commit_url=f"https://hub/{name}/commit/1")


def test_push_sends_each_verified_file_once_and_nothing_unasked(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    assert pushing.push(made, "org/name").url is None and not hub.calls
    done = pushing.push(made, "org/name", upload=True, revision="v2")
    assert done.url == "https://hub/org/name/commit/1"
    assert [kind for kind, _ in hub.calls] == ["repo", "branch", "commit"]
    assert hub.calls[0][1][1]["private"] is True
    operations = hub.calls[2][1][1]
    sent = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}
    assert sent == {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["name", "a b/c", "org/name/more", ""])
def test_a_name_that_the_hub_does_not_take_is_refused_before_anything(made: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="ORG/NAME"):
        pushing.push(made, name)


def test_without_token_or_connection_one_line_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(BadInputError, match="no token for the hub"):
        pushing.push(made, "org/name", upload=True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInputError, match="cannot reach the hub"):
        pushing.push(made, "org/name", upload=True)


def test_an_export_holds_and_its_record_is_of_its_files(tmp_path: Path) -> None:
    """By hand, as ``effcli export`` leaves a folder."""
    report = {"schema": "effcli.export/1", "model": {"fingerprint": "a" * 64}}
    (tmp_path / "weights.bin").write_bytes(b"1234")
    (tmp_path / "report.json").write_text(json.dumps(report))
    files = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("weights.bin", "report.json")
    }
    record = {"format": "effcli.onnx/1", "files": files, "source": {"fingerprint": "a" * 64}}
    (tmp_path / "effcli-onnx.json").write_text(json.dumps(record))
    signed_again(tmp_path)
    assert verify(tmp_path).notes[0].startswith("an export's tensors are not audited")
    (tmp_path / "weights.bin").write_bytes(b"4321")
    signed_again(tmp_path)
    with pytest.raises(SourceError, match="the report is of another export"):
        verify(tmp_path)
