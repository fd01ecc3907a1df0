"""The journal keeps what counts through any end of its writer, and says so where it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from effcli.batch.journal import FORMAT, Entry, Journal, read
from effcli.batch.model import Outcome
from effcli.errors import BadInputError

PASSED = Outcome("passed", "done", report="a/report.json", report_sha256="12", figures={"ppl": 3.5, "kl": None})
FAILED = Outcome("failed", "it broke", 2)


def _finished(job: str, outcome: Outcome = PASSED, **more: object) -> Entry:
    return Entry("finished", job, 1.0, 1, "fake 0", fingerprint={"x": [1, {"y": "é"}]}, outcome=outcome, **more)  # type: ignore[arg-type]


def _write(folder: Path, *entries: Entry) -> Path:
    with Journal(folder) as journal:
        for entry in entries:
            journal.append(entry)
    return folder / "journal.jsonl"


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    started, finished = Entry("started", "a", 0.5, 1, "fake 0"), _finished("a")
    path = _write(tmp_path, started, finished, Entry("lost", "b", 2.0, 2, "fake 1", "killed"))
    assert json.loads(path.read_text().splitlines()[0]) == {"format": FORMAT}
    records = read(tmp_path)
    assert records["a"].last == finished
    assert records["a"].passed == finished
    assert records["b"].last.reason == "killed"
    assert records["b"].passed is None


def test_a_later_failure_or_stop_does_not_hide_an_output_that_passed(tmp_path: Path) -> None:
    _write(tmp_path, _finished("a"), Entry("started", "a", 3.0, 1), _finished("a", FAILED))
    record = read(tmp_path)["a"]
    assert record.last.outcome == FAILED
    assert record.passed == _finished("a")


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = _write(tmp_path, _finished("a"), _finished("b"))
    os.truncate(path, path.stat().st_size - cut)
    assert set(read(tmp_path)) == {"a"}
    torn = path.read_bytes()
    read(tmp_path)
    assert path.read_bytes() == torn, "reading alone changes nothing"
    _write(tmp_path, _finished("c"))
    assert set(read(tmp_path)) == {"a", "c"}
    assert path.read_bytes().endswith(b"\n")


def test_a_last_line_of_zeros_is_cut_off(tmp_path: Path) -> None:
    path = _write(tmp_path, _finished("a"))
    with path.open("ab") as file:
        file.write(b"\0" * 300)
    assert set(read(tmp_path)) == {"a"}


@pytest.mark.parametrize("content", [b"", b'{"format": "effcli.jou'])
def test_a_journal_that_was_just_begun_is_begun_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    _write(tmp_path, _finished("a"))
    assert set(read(tmp_path)) == {"a"}


@pytest.mark.parametrize(
    "damage", [b"not json", b"[1]", b'{"event": "finished"}', b'{"event": "x", "job": "b"}', b"\xff"]
)
def test_a_damaged_line_in_the_middle_is_refused_by_number(tmp_path: Path, damage: bytes) -> None:
    path = _write(tmp_path, _finished("a"), _finished("b"), _finished("c"))
    lines = path.read_bytes().splitlines()
    lines[2] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    with pytest.raises(BadInputError, match=r"line 3 of the journal .* is damaged; remove that line"):
        Journal(tmp_path)
    assert path.read_bytes() == before


def test_a_first_line_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"format": "other/1"}\n{}\n')
    with pytest.raises(BadInputError, match="line 1 of the journal .* put back"):
        read(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"format": "effcli.journal/2"}\n')
    with pytest.raises(BadInputError, match="effcli.journal/2, newer than .*pip install -U effcli"):
        Journal(tmp_path)


def test_it_does_not_grow_with_the_number_of_runs(tmp_path: Path) -> None:
    sizes = []
    for _ in range(5):
        path = _write(tmp_path, *(_finished(name) for name in "abc"))
        sizes.append(path.stat().st_size)
    assert sizes[1] == sizes[-1]
    with Journal(tmp_path):
        assert len(path.read_text().splitlines()) == 4
    assert set(read(tmp_path)) == {"a", "b", "c"}
    assert [item.name for item in tmp_path.iterdir()] == ["journal.jsonl"]


def test_compaction_keeps_what_passed_and_what_came_last(tmp_path: Path) -> None:
    _write(tmp_path, _finished("a"), _finished("a"), _finished("a", FAILED), Entry("started", "a", 9.0, 2))
    before = read(tmp_path)
    with Journal(tmp_path) as journal:
        assert len(journal.path.read_text().splitlines()) == 3
        assert journal.records == before
    assert read(tmp_path) == before


def test_compaction_that_is_stopped_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, _finished("a"), _finished("a", FAILED), _finished("a"))
    before = (tmp_path / "journal.jsonl").read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_line_that_does_not_fit_on_the_disk_leaves_the_journal_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path) as journal:
        journal.append(_finished("a"))
        write, full = os.write, os.open("/dev/full", os.O_WRONLY)

        def half_then_full(descriptor: int, data: bytes) -> int:
            return write(descriptor, data[: len(data) // 2]) if len(data) > 100 else write(full, data)

        monkeypatch.setattr(os, "write", half_then_full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(_finished("b"))
        monkeypatch.undo()
        os.close(full)
        journal.append(_finished("c"))
    assert set(read(tmp_path)) == {"a", "c"}
    assert all(json.loads(line) for line in journal.path.read_text().splitlines())
