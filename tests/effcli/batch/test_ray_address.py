"""Addresses at which no Ray cluster answers."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from effcli.batch import ray_address
from effcli.batch.ray_address import connect
from effcli.errors import BadInputError

pytest.importorskip("ray", reason="ray is not installed: pip install 'effcli[ray]'")


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
@pytest.mark.parametrize("listens", [False, True])
def test_an_address_that_does_not_answer(address: str, listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 1.0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listens:
            mute.listen()
        before, started = set(threading.enumerate()), time.monotonic()
        place = address.format(port=mute.getsockname()[1])
        with pytest.raises(BadInputError, match=f"^no Ray cluster answers at '{place}' within 1 s; check host"):
            connect(place)
        assert time.monotonic() - started < 10
        assert [thread for thread in threading.enumerate() if thread not in before and not thread.daemon] == []


def test_an_address_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 0.2)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere.invalid:6379")
    with pytest.raises(BadInputError, match=r"'nowhere.invalid:6379' \(from RAY_ADDRESS\)"):
        connect("auto")


def test_no_cluster_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray as package

    def none_found(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(package, "init", none_found)
    with pytest.raises(BadInputError, match=r"start one with `ray start --head`"):
        connect("auto")


@pytest.mark.parametrize("address", ["head", "head:x", "http://head:80", "head:6379/x"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(BadInputError, match=f"address '{address}' is neither auto, host:port nor ray://host:port"):
        connect(address)
