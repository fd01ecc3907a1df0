"""One export of each kind, made once for all tests that look at it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import PreTrainedModel

from effcli.export.exporting import export
from effcli.export.report import ExportReport
from tests.effcli.export import small


class Exported(NamedTuple):
    """An export, what it was made from, and what was reported."""

    model: PreTrainedModel
    folder: Path
    report: ExportReport


def _export(model: PreTrainedModel, work: Path) -> Exported:
    report = export(str(small.save(model, work / "source")), work / "out")
    assert isinstance(report, ExportReport)
    return Exported(model, work / "out", report)


@pytest.fixture(scope="session")
def text_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return an exported llama with grouped heads and tied embeddings."""
    return _export(small.build("llama", tie_word_embeddings=True), tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def encoder_export(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return an exported encoder."""
    return _export(small.build_encoder(), tmp_path_factory.mktemp("encoder"))
