"""Text from files and data sets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from effcli.errors import BadInputError
from effcli.eval_text import read_dataset, read_text


def rows(path: Path, texts: list[str], column: str = "text") -> None:
    path.write_text("".join(json.dumps({"id": index, column: text}) + "\n" for index, text in enumerate(texts)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that is a data set with two splits."""
    pytest.importorskip("datasets")
    found = tmp_path / "poems"
    found.mkdir()
    rows(found / "train.jsonl", ["learned"])
    rows(found / "test.jsonl", ["one", "two", "three"])
    return found


def test_a_folder_is_a_data_set_and_its_test_split_comes_first(folder: Path) -> None:
    assert read_dataset(str(folder), 10_000) == ("one\n\ntwo\n\nthree", "poems:test")


def test_no_more_is_read_than_needed(folder: Path) -> None:
    assert read_dataset(str(folder), 6)[0] == "one\n\ntwo"


def test_the_first_column_of_text_stands_in_for_a_missing_one(folder: Path) -> None:
    rows(folder / "test.jsonl", ["verse"], column="poem")
    (folder / "train.jsonl").unlink()
    assert read_dataset(str(folder), 10_000) == ("verse", "poems:test")


def test_data_sets_without_text(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    (folder / "test.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(BadInputError, match="has no column of text; it has: id"):
        read_dataset(str(folder), 100)
    rows(folder / "test.jsonl", ["", " "])
    with pytest.raises(BadInputError, match="split 'test' of data set '.*poems' has no text in column 'text'"):
        read_dataset(str(folder), 100)


def test_an_unreachable_data_set_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def offline(*arguments: object, **options: object) -> None:
        assert (arguments, options) == (("wikitext", "wikitext-2-raw-v1"), {"streaming": True})
        raise ConnectionError("Couldn't reach 'wikitext' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        BadInputError, match=r"cannot read data set 'wikitext:.*OfflineModeIsEnabled\); check"
    ) as caught:
        read_dataset("wikitext:wikitext-2-raw-v1:test", 100)
    assert "\n" not in str(caught.value)


def test_a_named_split_is_read_and_an_unknown_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": [{"text": "a"}], "validation": [{"text": "b"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, streaming: splits)
    assert read_dataset("name::train", 100) == ("a", "name:train")
    assert read_dataset("name", 100) == ("b", "name:validation")
    with pytest.raises(BadInputError, match="no split 'dev'; it has: train, validation"):
        read_dataset("name:config:dev", 100)
    with pytest.raises(BadInputError, match="'a:b:c:d' is not NAME"):
        read_dataset("a:b:c:d", 100)


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInputError, match="pip install datasets"):
        read_dataset("wikitext", 100)


def test_text_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no text file at"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(BadInputError, match="cannot read text file"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(BadInputError, match="is empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInputError, match="cannot read text file"):
        read_text(tmp_path / "latin.txt")
