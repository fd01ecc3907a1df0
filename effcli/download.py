"""Fetch one pinned file from a Python package index, whole and with the right sha256, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

from effcli.disk import disk_errors
from effcli.errors import SourceError

if TYPE_CHECKING:
    import httpx

    from profilers.base import Progress

DEFAULT_INDEX = "https://pypi.org/simple"
# PEP 691 JSON first; indexes that only have PEP 503 pages answer with those.
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TIMEOUT_SECONDS = 30.0
_PIP_TIMEOUT_SECONDS = 30.0


def index_url() -> str:
    """Return the package index that pip uses here: ``PIP_INDEX_URL``, ``pip config``'s index-url, or PyPI."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url.strip().rstrip("/")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        shown = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],  # "get" of older pips does not see PIP_CONFIG_FILE
            capture_output=True,
            text=True,
            timeout=_PIP_TIMEOUT_SECONDS,
            check=False,
        )
        found = re.search(r"^global\.index-url='(.+)'$", shown.stdout, re.MULTILINE)
        if found:
            return found[1].strip().rstrip("/")
    return DEFAULT_INDEX


def download(
    package: str, filename: str, sha256: str, size: int, folder: Path, progress: Progress | None = None
) -> Path:
    """Download ``filename`` of ``package`` from the index into ``folder``.

    The file has its name only once it is complete and its hash is right; whatever ends the download before that,
    nothing of it stays.

    Parameters
    ----------
    package : str
        Normalized name on the index.
    filename : str
    sha256 : str
        Of the whole file, pinned by the caller; what the index claims is not relied on.
    size : int
        Bytes of the whole file.
    folder : Path
    progress : Progress or None

    Returns
    -------
    Path

    Raises
    ------
    SourceError
        If the index cannot be reached or does not have the file, the transfer breaks off, or the hash is wrong.
    NoRoomError
        If the disk is full.
    """
    import httpx

    index = index_url()
    if urllib.parse.urlsplit(index).scheme not in ("http", "https"):
        raise SourceError(
            f"the package index '{_shown(index)}' is no http(s) address; set PIP_INDEX_URL to one that is"
        )
    target, partial = folder / filename, folder / f"{filename}.partial"
    try:
        with (
            disk_errors(folder, size),
            httpx.Client(follow_redirects=True, timeout=_TIMEOUT_SECONDS, verify=_certificates()) as client,
        ):
            url = _find(client, index, package, filename)
            try:
                received = _stream(client, url, partial, size, progress, filename)
                if received != sha256:
                    raise SourceError(
                        f"'{filename}' from {_shown(url)} has sha256 {received}, not the pinned {sha256}; nothing was "
                        "kept: the file was changed on the way, check the index or proxy in use"
                    )
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    except httpx.HTTPStatusError as error:
        raise SourceError(
            f"{_shown(str(error.request.url))} answered {error.response.status_code}; nothing was kept: "
            "check the package index (PIP_INDEX_URL)"
        ) from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise SourceError(
            f"fetching '{filename}' from {_shown(index)} failed ({_words(error)}); nothing was kept: "
            "connect to the network or set PIP_INDEX_URL to an index that can be reached, and try again"
        ) from None
    return target


def _find(client: httpx.Client, index: str, package: str, filename: str) -> str:
    """Return the address of ``filename`` on the index's page of ``package``."""
    answer = client.get(f"{index}/{package}/", headers={"Accept": _ACCEPT})
    answer.raise_for_status()
    page = str(answer.url)
    if "json" in answer.headers.get("content-type", ""):
        try:
            links = {str(entry["filename"]): str(entry["url"]) for entry in answer.json()["files"]}
        except (json.JSONDecodeError, KeyError, TypeError):
            raise SourceError(f"{_shown(page)} is no package index page; check PIP_INDEX_URL") from None
    else:
        parser = _Links()
        parser.feed(answer.text)
        links = parser.links
    if filename not in links:
        raise SourceError(
            f"the package index has no '{filename}' ({_shown(page)}); set PIP_INDEX_URL to one that mirrors PyPI"
        )
    return urllib.parse.urljoin(page, links[filename])


class _Links(HTMLParser):
    """Collect file name → address from a PEP 503 page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Read one link; the file name is the last part of its path."""
        href = dict(attrs).get("href")
        if tag == "a" and href:
            path = urllib.parse.urlsplit(href).path
            self.links[urllib.parse.unquote(path.rsplit("/", 1)[-1])] = href


def _stream(client: httpx.Client, url: str, partial: Path, size: int, progress: Progress | None, filename: str) -> str:
    """Write the file and return its sha256."""
    digest = hashlib.sha256()
    with (
        client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer,
        partial.open("xb") as opened,
        contextlib.ExitStack() as stack,
    ):
        answer.raise_for_status()
        task = stack.enter_context(progress.task(f"downloading {filename}", size)) if progress else None
        for chunk in answer.iter_bytes():
            opened.write(chunk)
            digest.update(chunk)
            if task:
                task.advance(len(chunk))
            if opened.tell() > size:
                break
        received = opened.tell()
    if received != size:
        how = "broke off after" if received < size else "went on past"
        raise SourceError(
            f"the download of '{filename}' {how} {min(received, size):,} of {size:,} bytes; nothing was kept: try again"
        )
    return digest.hexdigest()


def _certificates() -> ssl.SSLContext | bool:
    """Trust the bundle that ``REQUESTS_CA_BUNDLE`` names, as pip does; httpx reads ``SSL_CERT_FILE`` itself."""
    bundle = os.environ.get("REQUESTS_CA_BUNDLE")
    if bundle and Path(bundle).is_file() and not os.environ.get("SSL_CERT_FILE"):
        return ssl.create_default_context(cafile=bundle)
    return True


def _shown(url: str) -> str:
    """Return an address without the name and password it may hold."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _words(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
