"""Tiny models on disk, and the command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers, and the processes they start, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

Run = Callable[..., subprocess.CompletedProcess[str]]


def save_tiny(name: str, folder: Path) -> Path:
    """Save a tiny model with a character tokenizer, as transformers does."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    from tests.tiny_models import VOCABULARY, build

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [chr(code) for code in range(32, 32 + VOCABULARY - len(special))]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    build(name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny llama and its tokenizer."""
    return save_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def effcli(tmp_path: Path) -> Run:
    """Run ``effcli`` as a process in an empty folder, without network for hub ids."""

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "effcli", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=cwd or tmp_path,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        )

    return run


@pytest.fixture(scope="session")
def builtin_model() -> str:
    """Return the built-in model's name; ``make test`` fetches it first."""
    from effcli import builtin_models

    if not builtin_models.cached("smollm2-135m"):
        builtin_models.fetch("smollm2-135m")
    return "smollm2-135m"
