"""A package index on this machine that serves one file, and can be told to misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Index:
    """What is served and how; change the attributes between requests.

    ``manner`` is ``json``, ``html``, ``cut`` (the connection ends halfway), ``short`` (a shorter file, properly ended),
    ``long``, ``missing`` or ``broken`` (a page that is no index).
    """

    def __init__(self, package: str, filename: str, data: bytes) -> None:
        self.package, self.filename, self.data = package, filename, data
        self.manner = "json"
        self.requests: list[str] = []
        self.url = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(handler.path)
        if handler.path == f"/simple/{self.package}/":
            return self._page(handler)
        if handler.path != f"/files/{self.filename}":
            return _send(handler, 404, "text/plain", b"")
        if self.manner == "cut":
            _send(handler, 200, "application/zip", self.data[: len(self.data) // 2], claimed=len(self.data))
            return handler.wfile.flush()
        data = {"short": self.data[:-1], "long": self.data + b"x"}.get(self.manner, self.data)
        return _send(handler, 200, "application/zip", data)

    def _page(self, handler: BaseHTTPRequestHandler) -> None:
        if self.manner == "html":
            page = f'<html><a href="../../files/{self.filename}#sha256={self.sha256}">{self.filename}</a></html>'
            return _send(handler, 200, "text/html; charset=utf-8", page.encode())
        files = [] if self.manner == "missing" else [{"filename": self.filename, "url": f"/files/{self.filename}"}]
        page = "[]" if self.manner == "broken" else json.dumps({"files": files})
        return _send(handler, 200, "application/vnd.pypi.simple.v1+json", page.encode())


def _send(handler: BaseHTTPRequestHandler, code: int, kind: str, data: bytes, claimed: int | None = None) -> None:
    handler.send_response(code)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data) if claimed is None else claimed))
    handler.end_headers()
    handler.wfile.write(data)


@contextlib.contextmanager
def serve(index: Index) -> Iterator[Index]:
    """Serve ``index`` on 127.0.0.1 until the block ends; ``index.url`` is what PIP_INDEX_URL should be."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            index.answer(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
