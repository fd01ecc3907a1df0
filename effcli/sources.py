"""Recognize what the user named as a model and make its files local; nothing is loaded here.

::

    an existing path ─┬─ folder ─┬─ config.json       -> folder
                      │          ├─ model_index.json  -> diffusers
                      │          └─ effcli-onnx.json  -> onnx
                      ├─ *.gguf                       -> gguf
                      └─ *.json with a model_type     -> config
    a built-in name ─────────────────────────────────> builtin (or diffusers)
    NAME or ORG/NAME ────────────────────────────────> hub (or diffusers)

Weights are safetensors or GGUF; pickles and code that comes with a checkpoint are refused unless asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effcli import builtin_models
from effcli.checkpoint_files import (
    CONFIG,
    ONNX_EXPORT,
    PICKLE_SUFFIXES,
    PIPELINE,
    check_safetensors,
    find_weights,
    read_json,
)
from effcli.errors import SourceError, did_you_mean

if TYPE_CHECKING:
    from profilers.base import Progress

PIPELINE_NOTE = "a diffusers pipeline: 'effcli profile' and 'effcli optimize' take a local folder of one"
CONFIG_NOTE = "only a config is given: counted without weights, as with --config-only"
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


@dataclass(frozen=True)
class Source:
    """Where a model comes from; see ``docs/sources.md``.

    Attributes
    ----------
    spec : str
        As the user named it.
    kind : str
        ``hub``, ``folder``, ``gguf``, ``config``, ``builtin``, ``diffusers`` or ``onnx``.
    path : Path or None
        Local folder (``hub``, ``folder``, ``builtin``, ``diffusers``, ``onnx``) or file (``gguf``, ``config``).
    revision : str or None
        Commit of a hub snapshot; ``package==version`` that a built-in model comes from.
    notes : tuple of str
        What the user should know about how the source is read, one line each.
    """

    spec: str
    kind: str
    path: Path | None
    revision: str | None = None
    notes: tuple[str, ...] = ()


def resolve(
    spec: str,
    *,
    config_only: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Source:
    """Recognize ``spec`` and make its files local.

    Parameters
    ----------
    spec : str
        Folder, ``.gguf`` file, ``config.json``, built-in name or hub id. A path that exists wins over names.
    config_only : bool
        No weights are needed, so none are fetched or checked.
    allow_pickle : bool
        Accept pickled weights (``.bin``) where there are no safetensors.
    trust_remote_code : bool
        Fetch and accept the ``.py`` files of a hub repository.
    revision : str or None
        Branch, tag or commit of a hub id.
    progress : Progress or None

    Raises
    ------
    SourceError
        Naming what is missing, damaged, not trusted or not a model, and the remedy.
    NoRoomError
        If a download does not fit the disk.
    """
    options = {"config_only": config_only, "allow_pickle": allow_pickle}
    found = resolve_local(spec, revision=revision, progress=progress, **options)
    if found is not None:
        return found
    return _from_hub(spec, trust_remote_code=trust_remote_code, revision=revision, progress=progress, **options)


def resolve_local(
    spec: str,
    *,
    config_only: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Source | None:
    """Recognize ``spec`` as :func:`resolve` does; return None where only the hub can know it."""
    if not spec.strip():
        raise SourceError("the model's name is empty; give a folder, a .gguf file, a built-in name or a hub id")
    path = Path(spec).expanduser()
    try:
        if path.exists():
            if revision is not None:
                raise SourceError(f"'{spec}' is a local path and has no revision; leave --revision out")
            return _from_path(spec, path, config_only=config_only, allow_pickle=allow_pickle)
    except OSError as error:
        raise SourceError(f"cannot read '{spec}' ({error}); check the path and who may read it") from None
    if spec in builtin_models.CATALOGUE:
        if revision is not None:
            raise SourceError(
                f"built-in model '{spec}' is pinned and has no revision '{revision}'; leave --revision out"
            )
        model, folder = builtin_models.CATALOGUE[spec], builtin_models.fetch(spec, progress)
        if isinstance(model, builtin_models.ShippedModel):
            return Source(spec, "diffusers", folder, model.origin, (PIPELINE_NOTE,))
        return Source(spec, "builtin", folder, model.origin)
    _refuse_what_looks_like_a_path(spec, path)
    hint = did_you_mean(spec, builtin_models.CATALOGUE)
    if hint and "/" not in spec:
        raise SourceError(f"no file, folder or built-in model '{spec}'{hint}")
    if not _HUB_ID.fullmatch(spec):
        raise SourceError(
            f"'{spec}' is no file or folder here, no built-in model and no hub id (NAME or ORG/NAME); "
            f"built-in: {', '.join(builtin_models.CATALOGUE)}"
        )
    return None


def _from_hub(
    spec: str,
    *,
    config_only: bool,
    allow_pickle: bool,
    trust_remote_code: bool,
    revision: str | None,
    progress: Progress | None,
) -> Source:
    from effcli.hub import HubModel

    wanted = HubModel(spec, revision, config_only, allow_pickle, trust_remote_code)
    snapshot = wanted.fetch(progress)
    if snapshot.folder is None:
        return Source(spec, "diffusers", None, snapshot.revision, (PIPELINE_NOTE,))
    local = _from_folder(spec, snapshot.folder, config_only=config_only, allow_pickle=allow_pickle)
    kind = "hub" if local.kind == "folder" else local.kind
    return Source(spec, kind, snapshot.folder, snapshot.revision, snapshot.notes + local.notes)


def _from_path(spec: str, path: Path, *, config_only: bool, allow_pickle: bool) -> Source:
    if path.is_dir():
        return _from_folder(spec, path, config_only=config_only, allow_pickle=allow_pickle)
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        with path.open("rb") as opened:
            magic = opened.read(4)
        if magic != b"GGUF":
            raise SourceError(f"'{path}' is not a GGUF file (starts with {magic!r}); fetch it again")
        return Source(spec, "gguf", path)
    if suffix == ".json":
        config = read_json(path)
        if path.name == PIPELINE or "_diffusers_version" in config:
            return Source(spec, "diffusers", path.parent, notes=(PIPELINE_NOTE,))
        if "model_type" not in config and "auto_map" not in config:
            raise SourceError(f"'{path}' has no model_type, so it is no model config; give a transformers {CONFIG}")
        return Source(spec, "config", path, notes=(CONFIG_NOTE,))
    if suffix == ".safetensors" or suffix in PICKLE_SUFFIXES:
        raise SourceError(f"'{path}' is only weights; give the folder that holds it and its {CONFIG}")
    raise SourceError(f"'{path}' is no model; give a transformers folder, a .gguf file or a {CONFIG}")


def _from_folder(spec: str, folder: Path, *, config_only: bool, allow_pickle: bool) -> Source:
    if not (folder / CONFIG).is_file():
        if (folder / PIPELINE).is_file():
            read_json(folder / PIPELINE)
            return Source(spec, "diffusers", folder, notes=(PIPELINE_NOTE,))
        raise SourceError(f"no {CONFIG} in folder '{folder}'{_what_is_there_instead(folder)}")
    read_json(folder / CONFIG)
    if is_export(folder):
        return Source(spec, "onnx", folder)
    if config_only:
        return Source(spec, "folder", folder)
    weights = find_weights(folder, allow_pickle=allow_pickle)
    if weights is None:
        raise SourceError(f"folder '{folder}' has a {CONFIG} but no weights; add --config-only to count without them")
    if not weights.pickled:
        check_safetensors(weights.files)
    return Source(spec, "folder", folder)


def is_export(folder: Path) -> bool:
    """Return whether a folder is one that ``effcli export`` wrote."""
    try:
        return (folder.expanduser() / ONNX_EXPORT).is_file()
    except (OSError, RuntimeError):  # a name that no path can have
        return False


def export_refused(spec: str, folder: Path) -> SourceError:
    """Return the error for a command that needs the torch model and was given its export."""
    made_from = (read_json(folder / ONNX_EXPORT).get("source") or {}).get("spec")
    return SourceError(
        f"'{spec}' is an ONNX export, which 'effcli profile' and effcli.load run; "
        f"here, give the model that it was made from{f': {made_from}' if isinstance(made_from, str) else ''}"
    )


def _what_is_there_instead(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; it holds an adapter, not a whole model: merge it into its base model first"
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"; give the GGUF file itself: '{ggufs[0]}'"
    if inner := sorted(path.parent for path in folder.glob(f"*/{CONFIG}")):
        return f"; did you mean '{inner[0]}'?"
    return "; give a transformers folder, or a .gguf file"


def _refuse_what_looks_like_a_path(spec: str, path: Path) -> None:
    """Say that a path is missing rather than ask the hub for it, where ``spec`` can only be a path."""
    looks = spec.startswith((".", "~", "/")) or os.sep in spec.replace("/", "", 1) or spec.endswith((os.sep, "/"))
    if looks or path.suffix.lower() in {".gguf", ".json", ".safetensors", *PICKLE_SUFFIXES}:
        with contextlib.suppress(OSError):
            siblings = {str(Path(spec).parent / other.name): other for other in path.parent.iterdir()}
            hint = did_you_mean(str(Path(spec)), siblings) or "; check the path, or see the names of: effcli models"
            raise SourceError(f"no file or folder '{spec}'{hint}")
        raise SourceError(f"no file or folder '{spec}': there is no folder '{path.parent}' either")


def check_seen(path: Path) -> None:
    """Refuse a model that this machine, which is to do a part of a pass, does not see.

    Raises
    ------
    SourceError
    """
    if not path.exists():
        raise SourceError(
            f"'{path}' is not on {socket.gethostname()}, which does a part of the pass; on a cluster every node needs "
            "the model under the same path: put it, or the cache that it is in, into a folder that all nodes share"
        )
