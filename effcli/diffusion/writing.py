"""Put a pipeline's files into a checkpoint folder: linked, copied, or left where they are and named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from effcli.checkpoint_files import PICKLE_SUFFIXES, PIPELINE
from effcli.errors import BadInputError
from effcli.preflight import LEGAL
from effcli.staging import link_or_copy
from passes.lemica.schedule import COEFFICIENTS_FILE, FILE

CARD = "README.md"
_WEIGHTS = ".safetensors"
_KEPT = (".json", ".txt", ".model", ".jinja", ".md")
"""Besides weights: configurations, vocabularies, SentencePiece models, chat templates, cards."""


def pipeline_files(folder: Path) -> tuple[Path, ...]:
    """Return the files that a pipeline is loaded from, relative to its folder; notes and pictures stay out.

    Parameters
    ----------
    folder : Path
        With a ``model_index.json``.

    Raises
    ------
    BadInputError
        If a component has weights only as pickles.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if path.suffix in PICKLE_SUFFIXES and not any(path.parent.glob(f"*{_WEIGHTS}")):
            raise BadInputError(f"'{path}' is a pickle and no safetensors lie beside it; convert the pipeline first")
        top = len(name.parts) == 1
        wanted = name.name == PIPELINE or name.name == CARD or name.name.upper().startswith(LEGAL) if top else True
        if wanted and (path.suffix in (_WEIGHTS, *_KEPT) or name.name.upper().startswith(LEGAL)):
            found.append(name)
    return tuple(name for name in found if name.name not in (FILE, COEFFICIENTS_FILE))


def put(source: Path, target: Path, how: Literal["link", "copy", "reference"]) -> tuple[Path, ...]:
    """Put a pipeline's files into a folder.

    Parameters
    ----------
    source, target : Path
    how : str
        ``link``: weights as hard links where the disk allows, else copies; ``copy``; ``reference``: only the
        pipeline's index, and whoever loads it reads the source.

    Returns
    -------
    tuple of Path
        What was put there, relative.
    """
    names = pipeline_files(source)
    if how == "reference":
        names = tuple(name for name in names if len(name.parts) == 1)
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if how == "link" and name.suffix == _WEIGHTS:
            link_or_copy((source / name).resolve(), place)
        else:
            shutil.copyfile(source / name, place)
    return names
