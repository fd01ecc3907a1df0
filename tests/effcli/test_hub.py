"""The hub client against a small hub on this machine: the real client, real HTTP, real cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from effcli import sources
from effcli.errors import NoRoomError, SourceError
from tests.effcli import tiny_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub's API for one client: model info, tree, files."""

    repositories: dict[str, Path]
    gated: set[str]
    fetched: list[str]

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "models"]:
            return self._api("/".join(path[2:4]), path[4:])
        name, file = "/".join(path[:2]), "/".join(path[4:])
        source = self.repositories.get(name, Path("/nowhere")) / file
        if not source.is_file():
            return self._error(404, "EntryNotFound")
        data = source.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.fetched.append(file)
            self.wfile.write(data)
        return None

    def _api(self, name, rest):
        if name in self.gated:
            return self._error(403, "GatedRepo")
        if name not in self.repositories:
            return self._error(404, "RepoNotFound")
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound")
        files = sorted(path for path in self.repositories[name].rglob("*") if path.is_file())
        names = {str(path.relative_to(self.repositories[name])): path.stat().st_size for path in files}
        if rest[:1] == ["tree"]:
            return self._json([{"type": "file", "path": key, "size": size, "oid": "0"} for key, size in names.items()])
        siblings = [{"rfilename": key, "size": size, "blobId": "0"} for key, size in names.items()]
        return self._json({"id": name, "sha": COMMIT, "siblings": siblings})

    def _json(self, data):
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _error(self, code, name):
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("X-Error-Message", name)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    handler = type("Handler", (Hub,), {"repositories": {}, "gated": {"org/gated"}, "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    repository = tmp_path / "repository"
    tiny_files.save(repository)
    handler.repositories["org/tiny"] = repository

    def stop():
        server.shutdown()
        server.server_close()
        thread.join()

    handler.stop = staticmethod(stop)
    yield handler
    stop()


class Steps:
    """A progress that adds up."""

    def __init__(self):
        self.total = None
        self.done = 0.0

    @contextlib.contextmanager
    def task(self, description, total=None):
        self.total = total
        yield self

    def advance(self, steps=1.0):
        self.done += steps


def refusal(spec, **options) -> str:
    with pytest.raises(SourceError) as caught:
        sources.resolve(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fetch_then_offline(hub, monkeypatch, tmp_path):
    (hub.repositories["org/tiny"] / "pytorch_model.bin").write_bytes(b"pickle")
    (hub.repositories["org/tiny"] / "modeling.py").write_text("raise SystemExit")
    (hub.repositories["org/tiny"] / "onnx").mkdir()
    (hub.repositories["org/tiny"] / "onnx" / "model.json").write_text("{}")
    (hub.repositories["org/tiny"] / "model.fp16.safetensors").write_bytes(b"variant")
    steps = Steps()
    source = sources.resolve("org/tiny", progress=steps)
    assert (source.kind, source.revision, source.notes) == ("hub", COMMIT, ())
    names = {path.name for path in source.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling.py", "onnx", "model.fp16.safetensors"}
    assert steps.total == (hub.repositories["org/tiny"] / "model.safetensors").stat().st_size
    assert steps.done == steps.total
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = sources.resolve("org/tiny")
    assert (again.path, again.revision) == (source.path, COMMIT)
    assert "HF_HUB_OFFLINE" in again.notes[0]


def test_no_network(hub):
    sources.resolve("org/tiny")
    hub.stop()
    assert "cannot be reached" in sources.resolve("org/tiny").notes[0]
    message = refusal("org/other")
    assert "'org/other'" in message
    assert "cannot be reached" in message


def test_config_only_fetches_no_weights(hub):
    source = sources.resolve("org/tiny", config_only=True)
    assert (source.path / "config.json").is_file()
    assert "model.safetensors" not in hub.fetched


def test_code_is_fetched_only_when_trusted(hub):
    (hub.repositories["org/tiny"] / "modeling.py").write_text("raise SystemExit")
    assert (sources.resolve("org/tiny", trust_remote_code=True).path / "modeling.py").is_file()


def test_unknown_code_is_refused_before_weights_are_fetched(hub):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (hub.repositories["org/tiny"] / "config.json").write_text(json.dumps(config))
    message = refusal("org/tiny")
    assert "configuration_own.Own" in message
    assert "--trust-remote-code" in message
    assert "model.safetensors" not in hub.fetched


def test_only_pickles(hub):
    (hub.repositories["org/tiny"] / "model.safetensors").rename(hub.repositories["org/tiny"] / "pytorch_model.bin")
    assert "--allow-pickle" in refusal("org/tiny")
    assert "pytorch_model.bin" not in hub.fetched
    assert (sources.resolve("org/tiny", allow_pickle=True).path / "pytorch_model.bin").is_file()


def test_no_weights(hub):
    (hub.repositories["org/tiny"] / "model.safetensors").unlink()
    assert "--config-only" in refusal("org/tiny")


def test_only_gguf(hub, tmp_path):
    hub.repositories["org/gguf"] = tmp_path / "gguf"
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a-Q4.gguf").write_bytes(b"GGUF")
    assert "hf download org/gguf a-Q4.gguf" in refusal("org/gguf")


def test_diffusers(hub, tmp_path):
    hub.repositories["org/pipeline"] = tmp_path / "pipeline"
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert sources.resolve("org/pipeline").kind == "diffusers"


def test_no_such_model_or_revision_or_access(hub):
    assert "no such model on the hub" in refusal("org/other")
    assert "no revision 'v9'" in refusal("org/tiny", revision="v9")
    message = refusal("org/gated")
    assert "gated" in message
    assert "hf auth login" in message


def test_disk_too_small(hub, monkeypatch):
    monkeypatch.setattr("effcli.hub.free_bytes", lambda folder: 10)
    with pytest.raises(NoRoomError, match="HF_HOME"):
        sources.resolve("org/tiny")
