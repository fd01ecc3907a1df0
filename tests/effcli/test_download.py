import contextlib
import errno
import io
import os

import pytest

from effcli import download as module
from effcli.download import download, index_url
from effcli.errors import EffcliError, NoRoomError, SourceError
from tests.effcli import package_index

FILE = "tiny-1.0-py3-none-any.whl"
DATA = os.urandom(300_000)


@pytest.fixture
def index(monkeypatch):
    with package_index.serve(package_index.Index("tiny", FILE, DATA)) as served:
        monkeypatch.setenv("PIP_INDEX_URL", served.url)
        yield served


class Steps:
    def __init__(self):
        self.steps = []

    @contextlib.contextmanager
    def task(self, description, total=None):
        self.description, self.total = description, total
        yield self

    def advance(self, steps=1.0):
        self.steps.append(steps)


def get(index, folder, **options):
    return download(
        **({"package": "tiny", "filename": FILE, "sha256": index.sha256, "size": len(DATA), "folder": folder} | options)
    )


def refusal(index, folder, kind=SourceError, **options) -> str:
    with pytest.raises(EffcliError) as caught:
        get(index, folder, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize("manner", ["json", "html"])
def test_whole_file(index, tmp_path, manner):
    index.manner = manner
    steps = Steps()
    path = get(index, tmp_path, progress=steps)
    assert path == tmp_path / FILE
    assert path.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [path]
    assert steps.total == sum(steps.steps) == len(DATA)
    assert FILE in steps.description


def test_wrong_hash(index, tmp_path):
    message = refusal(index, tmp_path, sha256="0" * 64)
    assert index.sha256 in message
    assert "0" * 64 in message
    assert "nothing was kept" in message


@pytest.mark.parametrize("manner", ["cut", "short", "long"])
def test_wrong_length(index, tmp_path, manner):
    index.manner = manner
    message = refusal(index, tmp_path)
    assert "nothing was kept" in message
    index.manner = "json"
    assert get(index, tmp_path).read_bytes() == DATA


def test_no_network(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused
    message = refusal(index, tmp_path)
    assert "127.0.0.1:9" in message
    assert "PIP_INDEX_URL" in message


def test_no_such_file_or_package(index, tmp_path):
    assert "404" in refusal(index, tmp_path, package="other")
    index.manner = "missing"
    assert FILE in refusal(index, tmp_path)
    index.manner = "broken"
    assert "no package index page" in refusal(index, tmp_path)


def test_password_is_not_shown(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("http://", "http://user:secret@"))
    for options in ({"package": "other"}, {"sha256": "0" * 64}):
        assert "secret" not in refusal(index, tmp_path, **options)
    monkeypatch.setenv("PIP_INDEX_URL", "ftp://user:secret@host/simple")
    assert "secret" not in refusal(index, tmp_path)


def test_interrupted(index, tmp_path):
    class Interrupt(Steps):
        def advance(self, steps=1.0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(index, tmp_path, progress=Interrupt())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, NoRoomError), (errno.EDQUOT, NoRoomError), (errno.EROFS, SourceError)]
)
def test_disk(index, tmp_path, monkeypatch, code, kind):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.Path, "open", lambda self, mode: Full(str(self), mode.replace("b", "")))
    with pytest.raises(kind, match="EFFCLI_CACHE"):
        get(index, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_index_from_environment_or_pip(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple/")
    assert index_url() == "https://mirror.example/simple"
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://other.example/simple\n")
    assert index_url() == "https://other.example/simple"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert index_url() == module.DEFAULT_INDEX
