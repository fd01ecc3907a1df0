"""One driver an output, however the first one ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from effcli.batch.locking import hold, is_url, state_folder
from effcli.errors import BadInputError

HOLDER = """
import sys, time
from pathlib import Path
from effcli.batch.locking import hold
with hold(Path(sys.argv[1]), "runs"):
    print("held", flush=True)
    time.sleep(60)
"""


def _hold_elsewhere(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_and_told_who_was_first_until_kill_9(tmp_path: Path) -> None:
    with _hold_elsewhere(tmp_path) as holder:
        try:
            host = re.escape(socket.gethostname())
            who = rf"'runs' is in use by another batch \(process {holder.pid} on {host}, since 2"
            with pytest.raises(BadInputError, match=who), hold(tmp_path, "runs"):
                pass
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    with hold(tmp_path, "runs"):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_it_can_be_had_again_once_it_is_let_go(tmp_path: Path) -> None:
    with hold(tmp_path, "runs"), pytest.raises(BadInputError, match=f"process {os.getpid()}"), hold(tmp_path, "runs"):
        pass
    assert not (tmp_path / "lock.json").exists()
    with hold(tmp_path, "runs"):
        pass


@pytest.mark.parametrize("content", [None, "", "[]", '{"pid": 3}'])
def test_a_holder_that_is_not_known_is_still_a_holder(tmp_path: Path, content: str | None) -> None:
    with hold(tmp_path, "runs"):
        (tmp_path / "lock.json").unlink()
        if content is not None:
            (tmp_path / "lock.json").write_text(content)
        with pytest.raises(BadInputError, match="another batch; wait"), hold(tmp_path, "runs"):
            pass


def test_the_state_of_a_url_lies_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    one, other = state_folder("s3://bucket/runs"), state_folder("s3://bucket/other")
    assert one.is_relative_to(tmp_path)
    assert one != other
    assert one == state_folder("s3://bucket/runs")
    assert is_url("memory://runs")
    assert state_folder("/tmp/runs") == Path("/tmp/runs/.effcli-batch")
