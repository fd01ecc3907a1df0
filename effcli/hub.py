"""Fetch a model from the Hugging Face hub into its cache: only what is needed, nothing that could run code unasked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli import builtin_models, pass_models
from effcli.checkpoint_files import CONFIG, PICKLE_SUFFIXES, PIPELINE, check_trust, read_json
from effcli.disk import free_bytes
from effcli.errors import NoRoomError, SourceError, did_you_mean
from effcli.formatting import data_size

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

    from profilers.base import Progress, Task

# Files of a hub repository that are fetched, at its top level only: what names variants (model.fp16.safetensors),
# other frameworks' weights or exported graphs is left where it is.
_DESCRIPTIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_WEIGHTS = ("model.safetensors", "model-*.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin")
_CODE = ("*.py",)
_SUBFOLDERS = ("*/*",)


@dataclass(frozen=True)
class Snapshot:
    """A hub model's files in the local cache.

    Attributes
    ----------
    folder : Path or None
        None for a diffusers pipeline, of which nothing is fetched.
    revision : str or None
        Commit.
    notes : tuple of str
    """

    folder: Path | None
    revision: str | None
    notes: tuple[str, ...] = ()


def network_errors() -> tuple[type[Exception], ...]:
    """Return what a broken connection raises: httpx's error under huggingface_hub 1, httpx2's under 2."""
    clients = [import_module(name) for name in ("httpx", "httpx2") if find_spec(name)]
    return (ConnectionError, *(client.RequestError for client in clients))


@dataclass(frozen=True)
class HubModel:
    """One hub id with what is wanted of it and what may be fetched."""

    spec: str
    revision: str | None
    config_only: bool
    allow_pickle: bool
    trust_remote_code: bool

    def fetch(self, progress: Progress | None) -> Snapshot:
        """Fetch the files, or use the local copy where the hub cannot be reached.

        Raises
        ------
        SourceError
            No such model, no access, no network and no copy, nothing that can be trusted, or a download that broke off.
        NoRoomError
            If the download does not fit the disk.
        """
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        broken: tuple[type[Exception], ...] = (HfHubHTTPError, OfflineModeIsEnabled, *network_errors())
        try:
            info = self._info()
        except broken as error:
            return self._cached(error)
        names = {sibling.rfilename for sibling in info.siblings or ()}
        if CONFIG not in names:
            return self._without_config(names, info.sha)
        patterns = list(_DESCRIPTIONS)
        if self.trust_remote_code:
            patterns += _CODE
        try:
            folder = self._download(info, patterns, None)  # small files first: a refusal should not cost a download
            pass_models.register(folder)
            check_trust(
                read_json(folder / CONFIG), f"hub model '{self.spec}'", trust_remote_code=self.trust_remote_code
            )
            if not self.config_only:
                folder = self._download(info, patterns + self._weight_patterns(names), progress)
        except broken as error:
            raise SourceError(f"fetching '{self.spec}' from the hub broke off ({_brief(error)}); try again") from None
        return Snapshot(folder, info.sha)

    def _info(self) -> ModelInfo:
        """Ask the hub which files there are; what only the user can put right is a SourceError."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            return HfApi().model_info(self.spec, revision=self.revision, files_metadata=True)
        except GatedRepoError:
            raise SourceError(
                f"'{self.spec}' is gated: accept its terms on its hub page, then sign in with: hf auth login"
            ) from None
        except RepositoryNotFoundError:
            raise SourceError(
                f"no file or folder '{self.spec}' here, and no such model on the hub"
                f"{did_you_mean(self.spec, builtin_models.CATALOGUE)}; if it is private, sign in with: hf auth login"
            ) from None
        except RevisionNotFoundError:
            raise SourceError(f"'{self.spec}' has no revision '{self.revision}'; leave --revision out") from None
        except HFValidationError as error:
            raise SourceError(f"'{self.spec}' is no file or folder here and no hub id ({_brief(error)})") from None

    def _without_config(self, names: set[str], revision: str | None) -> Snapshot:
        if PIPELINE in names:
            return Snapshot(None, revision)
        if ggufs := sorted(name for name in names if name.endswith(".gguf")):
            raise SourceError(
                f"hub model '{self.spec}' has no {CONFIG}, only GGUF files; download one and give its path: "
                f"hf download {self.spec} {ggufs[0]} --local-dir ."
            )
        raise SourceError(f"hub model '{self.spec}' has no {CONFIG}; it is no transformers model")

    def _weight_patterns(self, names: set[str]) -> list[str]:
        if {"model.safetensors", "model.safetensors.index.json"} & names:
            return list(_WEIGHTS)
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES) and "/" not in name)
        if pickles and not self.allow_pickle:
            raise SourceError(
                f"hub model '{self.spec}' has only pickled weights ('{pickles[0]}') and loading them can run code "
                "hidden in them; use a safetensors revision, or add --allow-pickle if you trust it"
            )
        if not pickles:
            raise SourceError(
                f"hub model '{self.spec}' has a {CONFIG} but no weights that transformers loads; "
                "add --config-only to count without them"
            )
        return list(_PICKLES)

    def _download(self, info: ModelInfo, patterns: list[str], progress: Progress | None) -> Path:
        from huggingface_hub import snapshot_download, try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.utils._paths import filter_repo_objects

        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        wanted = filter_repo_objects(sizes, allow_patterns=patterns, ignore_patterns=list(_SUBFOLDERS))
        todo = sum(
            sizes[name]
            for name in wanted
            if not isinstance(try_to_load_from_cache(self.spec, name, revision=info.sha), str)
        )
        free = free_bytes(Path(HF_HUB_CACHE))
        if todo > free:
            raise NoRoomError(
                f"'{self.spec}' needs {data_size(todo)} of disk at '{HF_HUB_CACHE}' and {data_size(free)} are "
                "free; free some, or set HF_HOME to a larger disk"
            )
        with _byte_bars(progress, f"fetching {self.spec}", todo) as tqdm_class:
            return Path(
                snapshot_download(
                    self.spec,
                    revision=self.revision,
                    allow_patterns=patterns,
                    ignore_patterns=list(_SUBFOLDERS),
                    tqdm_class=tqdm_class,
                )
            )

    def _cached(self, why: Exception) -> Snapshot:
        """Use the local copy of a model whose hub cannot be asked."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(
                snapshot_download(
                    self.spec, revision=self.revision, local_files_only=True, allow_patterns=[CONFIG, PIPELINE]
                )
            )
        except HFValidationError as error:
            raise SourceError(f"'{self.spec}' is no file or folder here and no hub id ({_brief(error)})") from None
        except LocalEntryNotFoundError:
            raise SourceError(
                f"no file or folder '{self.spec}' here, no copy of it in the hub cache, and {_unreachable(why)}; "
                "connect and try again, give a local path, or use a built-in model: "
                f"{', '.join(builtin_models.CATALOGUE)}"
            ) from None
        if (folder / CONFIG).is_file():
            pass_models.register(folder)
            check_trust(
                read_json(folder / CONFIG), f"hub model '{self.spec}'", trust_remote_code=self.trust_remote_code
            )
        return Snapshot(folder, folder.name, (f"{_unreachable(why)}: the copy in the local cache is used",))


def _brief(error: Exception) -> str:
    """Return the first line of an error, or its class name where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _unreachable(why: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(why, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps the hub from being asked"
    return f"the hub cannot be reached ({_brief(why)})"


@contextlib.contextmanager
def _byte_bars(progress: Progress | None, description: str, total: int) -> Iterator[type[Any]]:
    """Yield a bar class for ``snapshot_download`` that shows nothing itself and moves one progress line by bytes.

    The hub client opens one byte bar, or two that count the same bytes at different stages: the furthest one counts.
    """
    from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

    counts: list[float] = []
    lock = threading.Lock()  # files are fetched side by side

    def bar_class(task: Task | None) -> type[Any]:
        class Bar(hub_tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._slot = len(counts) if kwargs.get("unit") == "B" else None
                if self._slot is not None:
                    counts.append(0.0)
                super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                if self._slot is None or task is None:
                    return
                with lock:
                    before = max(counts)
                    counts[self._slot] += n or 0
                    task.advance(max(counts) - before)

        return Bar

    if progress is None or total == 0:
        yield bar_class(None)
        return
    with progress.task(description, total) as task:
        yield bar_class(task)
