"""The saved report: what ``effcli profile`` found, as plain data that every renderer reads.

Numbers are SI base units with the unit in the name. What could not be measured is None beside a reason.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcli.errors import BadInputError

PROFILE_SCHEMA = "effcli.profile/1"
OPTIMIZE_SCHEMA = "effcli.optimize/1"
PLAN_SCHEMA = "effcli.plan/1"
EVAL_SCHEMA = "effcli.eval/1"
COMPARE_SCHEMA = "effcli.compare/1"
PIPELINE_PROFILE_SCHEMA = "effcli.pipeline-profile/1"
PIPELINE_OPTIMIZE_SCHEMA = "effcli.pipeline-optimize/1"
BATCH_SCHEMA = "effcli.batch/1"
FRONT_SCHEMA = "effcli.front/1"
EXPORT_SCHEMA = "effcli.export/1"
SCHEMAS = (
    PROFILE_SCHEMA,
    OPTIMIZE_SCHEMA,
    PLAN_SCHEMA,
    EVAL_SCHEMA,
    COMPARE_SCHEMA,
    PIPELINE_PROFILE_SCHEMA,
    PIPELINE_OPTIMIZE_SCHEMA,
    BATCH_SCHEMA,
    FRONT_SCHEMA,
    EXPORT_SCHEMA,
)
REPORT_FILE = "report.json"
"""What a checkpoint folder calls its report."""


@dataclass(frozen=True)
class ModelInfo:
    """Which model was measured, and what it is.

    Attributes
    ----------
    source : str
        As the user named it.
    kind : str
        ``hub``, ``folder``, ``gguf``, ``config``, ``builtin`` or ``live`` (a model object handed to the API).
    architecture : str
        Class name, ``LlamaForCausalLM``.
    parameters : int
        Each shared tensor once.
    weight_bytes : int
        As held in memory, each shared tensor once.
    dtype : str
    fingerprint : str or None
        sha256 over the weights' files, where there are files.
    """

    source: str
    kind: str
    architecture: str
    model_type: str
    parameters: int
    weight_bytes: int
    dtype: str
    dtype_reason: str
    layers: int | None
    hidden_size: int | None
    attention_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    context_limit: int | None
    revision: str | None
    fingerprint: str | None
    load_seconds: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    """The device and software that the numbers belong to. ``peaks`` is :class:`profilers.peaks.Peaks`."""

    device: str  # torch's name, "cpu" or "cuda:0"
    device_name: str
    device_reason: str
    threads: int | None
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    peaks: Any
    peaks_reason: str | None
    versions: dict[str, str]
    platform: str


@dataclass(frozen=True)
class ProfileReport:
    """One run of ``effcli profile``."""

    schema: str
    created: str  # ISO 8601, UTC
    command: str
    seconds_spent: float
    config_only: bool
    model: ModelInfo
    environment: Environment
    profiles: dict[str, Any]  # profiler name -> its result
    skipped: dict[str, str]  # profiler name -> why it did not run
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        data: dict[str, Any] = plain(self)
        return data

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def plain(value: Any) -> Any:
    """Turn nested dataclasses and tuples into dicts and lists.

    Raises
    ------
    ValueError
        For a NaN or infinity (an instrument reports None with a reason instead), or a type JSON does not have.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a report cannot hold {value}; use None with a reason")
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(f"a report cannot hold a {type(value).__name__}")


def read_report(path: Path | str) -> dict[str, Any]:
    """Read a saved report as plain data and check that this version understands it.

    Parameters
    ----------
    path : Path or str
        The file, or the folder of a checkpoint, which means the ``report.json`` in it.

    Raises
    ------
    BadInputError
        If the file is missing, is not JSON, or has another schema.
    """
    path = Path(path)
    if path.is_dir():
        path = path / REPORT_FILE
        if not path.is_file():
            raise BadInputError(f"folder '{path.parent}' has no {REPORT_FILE}; name a report or a checkpoint of effcli")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(
            f"no report at '{path}'; make one with: effcli profile MODEL --format json -o {path}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot read report '{path}': {error}") from None
    except json.JSONDecodeError as error:
        raise BadInputError(f"'{path}' is not a report: not JSON at line {error.lineno}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in SCHEMAS:
        name, _, number = str(schema).partition("/")
        if any(known.partition("/")[0] == name for known in SCHEMAS) and number.isdecimal():
            raise BadInputError(
                f"'{path}' has schema {schema!r}, from a newer release; this one reads {name}/1: pip install -U effcli"
            )
        raise BadInputError(f"'{path}' has schema {schema!r}; this version reads {', '.join(SCHEMAS)}")
    return dict(data)
