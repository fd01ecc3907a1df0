"""What lies in a checkpoint folder: a config that can be trusted, and weight files that are whole.

Nothing here loads a tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcli.errors import SourceError, did_you_mean

CONFIG = "config.json"
PIPELINE = "model_index.json"
ONNX_EXPORT = "effcli-onnx.json"
"""What an ONNX export says of itself; a folder that has one is an export."""
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_LFS_POINTER = b"version https://git-lfs"
_HASH_THREADS = 8

# Bytes an element, and whether it is a floating-point type that a load converts, by safetensors' dtype names.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHERS = {
    "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "F4": 0.5, "F6_E2M3": 0.75, "F6_E3M2": 0.75,
}  # fmt: skip


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights, sorted by name, and whether they are pickled."""

    files: tuple[Path, ...]
    pickled: bool


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    SourceError
        If the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SourceError(f"'{path}' is not valid JSON (line {error.lineno}: {error.msg}); fetch it again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read '{path}': {error}") from None
    if not isinstance(data, dict):
        raise SourceError(f"'{path}' holds a JSON {type(data).__name__}, not an object; fetch it again")
    return data


def check_trust(config: dict[str, Any], where: str, *, trust_remote_code: bool) -> str | None:
    """Refuse a config that transformers can only load by running the checkpoint's own code, or cannot load at all.

    Parameters
    ----------
    config : dict
        The raw ``config.json``.
    where : str
        What to call it in messages.
    trust_remote_code : bool

    Returns
    -------
    str or None
        A note where code came with the checkpoint.

    Raises
    ------
    SourceError
        For an unknown architecture, or one that is known only to code that is not trusted.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    model_type = config.get("model_type")
    known = model_type in CONFIG_MAPPING_NAMES
    auto_map = config.get("auto_map")
    if not known and isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return None  # registered in this process, by a pass of ours: transformers takes that before the folder's code
    if auto_map and trust_remote_code:
        return "runs the code that came with the checkpoint, as asked with --trust-remote-code"
    if auto_map and known:
        return f"the checkpoint's own code is not run: transformers knows '{model_type}' itself"
    if auto_map:
        raise SourceError(
            f"{where} needs code that comes with the checkpoint (auto_map: {_first_target(auto_map)}); "
            "read it, and add --trust-remote-code if you trust it"
        )
    if not isinstance(model_type, str):
        raise SourceError(f"{where} has no model_type, so it is no transformers model; give one with a whole {CONFIG}")
    if not known:
        raise SourceError(
            f"{where} has the unknown architecture '{model_type}'{did_you_mean(model_type, CONFIG_MAPPING_NAMES)}; "
            f"a transformers newer than the installed {transformers.__version__} may know it: "
            "pip install -U transformers"
        )
    return None


def _first_target(auto_map: Any) -> str:
    target = next(iter(auto_map.values()), "") if isinstance(auto_map, dict) else auto_map
    return str(target[0] if isinstance(target, list) and target else target)


def find_weights(folder: Path, *, allow_pickle: bool = False) -> WeightFiles | None:
    """Return the weight files of ``folder`` in the order of preference transformers has, or None where there are none.

    Raises
    ------
    SourceError
        If a shard that the index names is missing, or only pickled weights are there and ``allow_pickle`` is off.
    """
    if files := _single_or_sharded(folder, SAFETENSORS):
        return WeightFiles(files, pickled=False)
    pickles = _single_or_sharded(folder, PICKLE)
    others = pickles or tuple(
        path
        for path in sorted(folder.iterdir())
        if path.suffix in PICKLE_SUFFIXES and path.name not in _NOT_WEIGHTS and path.is_file()
    )
    if others and not allow_pickle:
        raise SourceError(
            f"'{others[0]}' is pickled and loading it can run code hidden in it; "
            "use a safetensors checkpoint, or add --allow-pickle if you trust where it came from"
        )
    if others and not pickles:
        raise SourceError(f"'{others[0]}' is not a name transformers loads; rename it to '{PICKLE}'")
    if pickles:
        return WeightFiles(pickles, pickled=True)
    strangers = sorted(path.name for path in folder.glob("*.safetensors"))
    if strangers:
        raise SourceError(
            f"'{folder}' holds '{strangers[0]}' but neither '{SAFETENSORS}' nor '{SAFETENSORS}{INDEX_SUFFIX}'; "
            f"rename it to '{SAFETENSORS}' if it is the whole model"
        )
    return None


def _single_or_sharded(folder: Path, name: str) -> tuple[Path, ...]:
    single, index = folder / name, folder / (name + INDEX_SUFFIX)
    if single.is_file():
        return (single,)
    if not index.is_file():
        return ()
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise SourceError(f"'{index}' has no weight_map from tensor names to files; fetch it again")
    shards = tuple(folder / shard for shard in sorted(set(weight_map.values())))
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise SourceError(
            f"'{folder}' lacks {len(missing)} of the {len(shards)} weight files its index names, "
            f"first '{missing[0]}'; fetch it again"
        )
    return shards


def check_safetensors(files: Iterable[Path]) -> Counter[str]:
    """Open each safetensors file, check that header and length agree, and count elements by stored dtype name.

    Raises
    ------
    SourceError
        Naming the first file that is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    elements: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, framework="numpy") as opened:  # parses the header, reads no tensor
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    tensor = opened.get_slice(name)
                    count = 1
                    for size in tensor.get_shape():
                        count *= size
                    elements[tensor.get_dtype()] += count
        except (SafetensorError, OSError) as error:
            with path.open("rb") as opened_file:
                start = opened_file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise SourceError(
                    f"'{path}' is a Git LFS pointer, not weights; fetch them with: git lfs pull"
                ) from None
            size = path.stat().st_size
            raise SourceError(f"'{path}' is truncated or damaged at {size:,} bytes ({error}); fetch it again") from None
    return elements


def bytes_when_loaded(elements: Counter[str], dtype_bytes: int, *, keep_stored: bool = False) -> int:
    """Return the bytes these elements take once floating-point ones are converted to a dtype of ``dtype_bytes``.

    ``keep_stored`` is for quantized checkpoints, which keep their stored types.
    """
    total = 0.0
    for name, count in elements.items():
        if name in _FLOATS:
            total += count * (_FLOATS[name] if keep_stored else dtype_bytes)
        else:
            total += count * _OTHERS.get(name, dtype_bytes)
    return round(total)


def stored_dtype(elements: Counter[str]) -> str | None:
    """Return torch's name of the floating-point type that most elements are stored in, None without any."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    floats = Counter({names[name]: count for name, count in elements.items() if name in names})
    return floats.most_common(1)[0][0] if floats else None


def sha256_of(path: Path) -> str:
    """Return the file's sha256 as hexadecimal text."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verify_files(folder: Path, files: Mapping[str, str], record: str) -> None:
    """Compare the files of a folder with the sha256 that its record gives of each.

    Parameters
    ----------
    folder : Path
    files : mapping
        sha256 by name.
    record : str
        Name of the file that says so.

    Raises
    ------
    SourceError
        If there is nothing to compare with, or naming the first file that is missing or has another sha256.
    """
    if not files:
        raise SourceError(f"'{folder / record}' lists no sha256, so there is nothing to verify it with; make it again")
    for name, expected in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            raise SourceError(f"'{folder}' lacks '{name}', which its {record} lists; fetch or copy the folder again")
        found = sha256_of(path)
        if found != expected:
            raise SourceError(
                f"'{path}' has sha256 {found[:12]}… and {record} says {expected[:12]}…: it was damaged or changed; "
                "fetch or copy the folder again"
            )


def fingerprint(files: Iterable[Path]) -> str:
    """Return the sha256 over every byte of the weight files, independent of folder and dates.

    It is the sha256 of the lines that ``sha256sum`` prints for the files in order of name, so that anyone can check it:
    ``LC_ALL=C sha256sum model*.safetensors | sha256sum``. Shards are hashed side by side.
    """
    return combined_sha256(sha256_each(files))


def sha256_each(files: Iterable[Path]) -> dict[Path, str]:
    """Return the sha256 of each file, hashed side by side."""
    ordered = list(files)
    with ThreadPoolExecutor(max_workers=min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(ordered, pool.map(sha256_of, ordered), strict=True))  # hashing releases the interpreter lock


def combined_sha256(digests: Mapping[Path, str]) -> str:
    """Return the fingerprint of files whose sha256 are known; see :func:`fingerprint`."""
    ordered = sorted(digests, key=lambda path: os.fsencode(path.name))
    lines = "".join(f"{digests[path]}  {path.name}\n" for path in ordered)
    return hashlib.sha256(lines.encode()).hexdigest()
