"""``effcli.json``: what a checkpoint was made from, how, with which versions, and the sha256 of every file in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcli.checkpoint_files import read_json
from effcli.errors import SourceError
from effcli.reports.model import plain
from passes.base import LayerRecord, PassRecord, Skipped

FILE = "effcli.json"
FORMAT = "effcli.checkpoint/1"


@dataclass(frozen=True)
class Provenance:
    """Content of ``effcli.json``.

    Attributes
    ----------
    format : str
    created : str
        ISO 8601, UTC.
    source : dict
        ``spec``, ``kind``, ``revision``, ``fingerprint``, ``files`` (sha256 by name), ``licence``, ``base_model``,
        ``quantized``, ``passes`` (names of those that made it).
    recipe : dict
        As :class:`effcli.recipes.Recipe` reads it.
    passes : tuple of PassRecord
        In the order in which they ran.
    dtype : str
        Of weights that are not quantized: ``bfloat16``.
    device : str
        Name of the device that the passes ran on.
    versions : dict of str to str
    files : dict of str to str
        sha256 of every other file of the checkpoint that loading reads, by name.
    """

    format: str
    created: str
    source: dict[str, Any]
    recipe: dict[str, Any]
    passes: tuple[PassRecord, ...]
    dtype: str
    device: str
    versions: dict[str, str]
    files: dict[str, str]

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(plain(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read(folder: Path) -> Provenance | None:
    """Read ``effcli.json`` from a checkpoint folder; None where there is none.

    Raises
    ------
    SourceError
        If it is damaged or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise SourceError(f"'{path}' has format {data.get('format')!r}; this release reads {FORMAT!r}: update effcli")
    try:
        records = tuple(record_from(item) for item in data.pop("passes"))
        return Provenance(passes=records, **data)
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"'{path}' lacks a part or has one too many ({error}); fetch the checkpoint again") from None


def record_from(data: dict[str, Any]) -> PassRecord:
    """Return the record that :func:`effcli.reports.model.plain` made this data from."""
    layers = tuple(LayerRecord(**item) for item in data["layers"])
    skipped = tuple(Skipped(**item) for item in data["skipped"])
    return PassRecord(**{**data, "layers": layers, "skipped": skipped, "notes": tuple(data["notes"])})
