"""Checkpoints whose classes come with the passes that made them: from this installation, never from their folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def model_of(
    source: dict[str, Any], device: str, dtype: str, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Any:
    """Return the model that a pass is applied to, for a worker that does a part of it.

    Parameters
    ----------
    source : dict
        Fields of :class:`effcli.sources.Source`, JSON-ready.
    device, dtype, allow_pickle, trust_remote_code
        As in :func:`effcli.loading.load`.
    """
    from effcli import loading
    from effcli.quiet import quiet_transformers
    from effcli.sources import Source, check_seen

    check_seen(Path(source["path"]))
    described = Source(**{**source, "path": Path(source["path"]), "notes": tuple(source["notes"])})
    with quiet_transformers():
        return loading.load(
            described,
            device=device,
            dtype=dtype,
            kernels="plain",
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        ).model
