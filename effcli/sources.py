"""Recognize what the user named as a model and find its files: folder, GGUF, config, built-in name, hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profilers.base import Progress


@dataclass(frozen=True)
class Source:
    """Where a model comes from; see ``docs/sources.md``.

    Attributes
    ----------
    spec : str
        As the user named it.
    kind : str
        ``hub``, ``folder``, ``gguf``, ``config``, ``builtin`` or ``diffusers``.
    path : Path or None
        Local folder (``hub``, ``folder``, ``builtin``, ``diffusers``) or file (``gguf``, ``config``).
    revision : str or None
        Commit of a hub snapshot.
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
    """Recognize ``spec`` and make its files local."""
    raise NotImplementedError
