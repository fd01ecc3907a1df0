import contextlib
import io
import sys
import warnings

import pytest
from transformers import modeling_gguf_pytorch_utils as gguf_loader
from transformers.utils import logging as hf_logging

from effcli.quiet import quiet_transformers


class Lines:
    def __init__(self):
        self.seen = []

    @contextlib.contextmanager
    def task(self, description, total=None):
        line = [description, total, 0.0, "open"]
        self.seen.append(line)

        class Task:
            def advance(self, steps=1.0):
                line[2] += steps

        yield Task()
        line[3] = "closed"


def state():
    hook = hf_logging.set_tqdm_hook(None)
    hf_logging.set_tqdm_hook(hook)
    return hf_logging.get_verbosity(), hook, gguf_loader.tqdm, sys.stdout, list(warnings.filters)


def test_silent_and_as_before(capsys):
    before = state()
    with quiet_transformers():
        hf_logging.get_logger("transformers.x").warning("a warning")
        warnings.warn("another", UserWarning, stacklevel=1)
        print("a print")
        for _ in hf_logging.tqdm(range(3), desc="Loading weights"):
            pass
    assert state() == before
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "warning" not in shown.err
    assert "Loading" not in shown.err


def test_restored_after_an_error():
    before = state()
    with pytest.raises(RuntimeError), quiet_transformers():
        raise RuntimeError
    assert state() == before


def test_bars_become_progress_lines():
    lines = Lines()
    with quiet_transformers(lines), contextlib.redirect_stderr(io.StringIO()) as shown:
        for _ in hf_logging.tqdm(range(3), desc="Loading weights..."):
            pass
        with hf_logging.tqdm(total=10, desc="By hand") as bar:
            bar.update(4)
        gguf_loader.tqdm(range(7))  # never run to its end: closed with the block
    assert lines.seen[:2] == [["loading weights", 3, 3.0, "closed"], ["by hand", 10, 4.0, "closed"]]
    assert lines.seen[2][3] == "closed"
    assert shown.getvalue() == ""
