"""Checkpoints whose classes come with the passes that made them: from this installation, never from their folder."""

from __future__ import annotations

from pathlib import Path

from effcli import provenance
from effcli.errors import SourceError


def register(folder: Path) -> None:
    """Let the passes that made a checkpoint, or the one that it was made from, make its classes known to transformers.

    Raises
    ------
    SourceError
        If ``effcli.json`` is damaged, or a pass does not know what the checkpoint needs.
    passes.base.PassError
        If a pass that it names is not installed.
    """
    from passes import registry
    from passes.base import PassError

    made = provenance.read(folder)
    if made is None:
        return
    for name in dict.fromkeys([*made.source.get("passes", ()), *(record.name for record in made.passes)]):
        kind = registry.load(name)
        try:
            kind.register_model(folder)
        except PassError as error:
            raise SourceError(str(error)) from error
