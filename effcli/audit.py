"""Audit a checkpoint by the bytes on disk, apart from the code that wrote it.

::

    meta model of the source config ──> names and shapes that must be there ─┐
    safetensors headers ──────────────> what is there ───────────────────────┼─> AuditedClass rows, or AuditError
    config.json ──────────────────────> what quantization_config claims ─────┤
    pass records ─────────────────────> layers left alone, and why ──────────┘
    tensors, a block at a time ───────> NaN and infinity
    files beside the weights ─────────> a pass of the chain claims each, and holds its content against the model

What it checks, and against what, is listed in ``docs/optimize.md``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from effcli.checkpoint_files import CONFIG, read_json
from effcli.expected_tensors import Expected, expected_tensors
from effcli.quantization_claims import Claim, Claims
from effcli.reports.optimize_model import AuditedClass
from effcli.stored_tensors import DTYPES, AuditError, Stored, check_finite, read_header, read_headers, read_shapes
from passes.base import PassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from passes.base import Pass, PassRecord

_QUANTIZED_DTYPES = ("F8_E4M3", "F8_E5M2", "I8", "U8")
_PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
_CACHE_PARTS = ("k_scale", "v_scale", "k_zero_point", "v_zero_point", "q_scale")
_LISTED = 3


@dataclass(frozen=True)
class Audit:
    """What lies on disk.

    Attributes
    ----------
    rows : tuple of AuditedClass
    notes : tuple of str
    stored_bytes : int
        Of all tensors of the weights.
    file_bytes : int
        Of the weight files and of what passes put beside them, headers included.
    parameters : int
        Of the original model, each shared tensor once.
    """

    rows: tuple[AuditedClass, ...]
    notes: tuple[str, ...]
    stored_bytes: int
    file_bytes: int
    parameters: int

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits per parameter of the original, scales included."""
        return 8 * self.stored_bytes / self.parameters


@dataclass
class _Tally:
    modules: set[str] = field(default_factory=set)
    parameters: int = 0
    stored_bytes: int = 0
    elements: int = 0


def audit(
    folder: Path,
    model: PreTrainedModel,
    records: Sequence[PassRecord],
    passes: Sequence[Pass] = (),
    parameters: int | None = None,
) -> Audit:
    """Check every tensor of a checkpoint and say how it is stored.

    Parameters
    ----------
    folder : Path
        With ``config.json`` and safetensors files.
    model : PreTrainedModel
        On the meta device, as the checkpoint's tensors must be named and shaped before quantization.
    records : sequence of PassRecord
        Of the passes that made it; their ``skipped`` layers need not be quantized.
    passes : sequence of Pass
        That made it; each checks the files that it wrote.
    parameters : int, optional
        Of the original, where ``model`` has fewer; default: those of ``model``.

    Raises
    ------
    AuditError
        Naming the tensor and what is wrong with it.
    effcli.errors.SourceError
        If a file is missing, truncated or damaged.
    """
    stored, file_bytes = read_headers(folder)
    claims = Claims.from_config(read_json(folder / CONFIG))
    expected = expected_tensors(model)
    plain, parts, cache = _assign(stored, expected, claims)
    _check_missing(expected, plain, parts)
    reasons = {item.name: item.reason for record in records for item in record.skipped}
    shapes = read_shapes(found["weight_shape"] for found in parts.values() if "weight_shape" in found)
    tallies: dict[tuple[str, str, bool, str | None], _Tally] = defaultdict(_Tally)
    for module, names in _by_module(expected).items():
        weight = f"{module}.weight"
        quantized = None
        if weight in expected and (module in parts or _is_quantized(plain.get(weight))):
            quantized = _check_quantized(
                module, expected[weight], plain.get(weight), parts.get(module, {}), shapes, claims
            )
        for name in names:
            tensor = plain.get(name)
            if tensor is None and not (quantized and name == weight):
                continue  # a tied twin
            if tensor is not None and name != weight or not quantized:
                assert tensor is not None
                if tensor.shape != expected[name].shape:
                    raise AuditError(
                        f"'{name}' has shape {list(tensor.shape)} on disk, the model needs {list(expected[name].shape)}"
                    )
            reason = None
            if not quantized and expected[name].linear and claims.present:
                reason = _reason(name, expected[name], reasons, claims)
            label = quantized or DTYPES[plain[name].dtype][0]
            tally = tallies[_class_of(name), label, quantized is not None, reason]
            tally.modules.add(module)
            tally.parameters += math.prod(expected[name].shape)
            pieces = [*parts.get(module, {}).values()] if quantized and name == weight else []
            pieces += [tensor] if tensor is not None else []
            tally.stored_bytes += sum(piece.bytes for piece in pieces)
    for item in cache:
        tally = tallies[item.name.rpartition(".")[2], DTYPES[item.dtype][0], False, "scale of the KV cache"]
        tally.modules.add(item.name.rpartition(".")[0])
        tally.stored_bytes += item.bytes
        tally.elements += math.prod(item.shape)
    check_finite(stored.values())
    added, found_there = _beside(folder, {item.file for item in stored.values()}, model, passes)
    return Audit(
        rows=(*(_row(key, tally) for key, tally in tallies.items()), *added),
        notes=(*_notes(stored, cache, claims), *found_there),
        stored_bytes=sum(item.bytes for item in stored.values()),
        file_bytes=file_bytes + sum((folder / row.tensor_class).stat().st_size for row in added),
        parameters=parameters or sum(item.numel() for item in model.parameters()),
    )


def _beside(
    folder: Path, weights: Collection[Path], model: PreTrainedModel, passes: Sequence[Pass]
) -> tuple[list[AuditedClass], list[str]]:
    """Account for every safetensors file beside the weights; return a row for each, and what its pass found there."""
    there = {path.name: path for path in sorted(folder.glob("*.safetensors")) if path not in weights}
    claimed = {name for item in passes for name in item.files}
    for name in there:
        if name not in claimed:
            raise AuditError(f"'{name}' lies beside the weights and no pass of this run puts it there")
    rows = []
    for name in sorted(claimed):
        if name not in there:
            raise AuditError(f"'{name}' is missing, which a pass of this run was to write")
        tensors = read_header(there[name])
        check_finite(tensors.values())
        held = sum(tensor.bytes for tensor in tensors.values())
        kinds = sorted({DTYPES[tensor.dtype][0] for tensor in tensors.values()})
        rows.append(
            AuditedClass(
                tensor_class=name,
                dtype="+".join(kinds),
                bits=8 * held / sum(math.prod(tensor.shape) for tensor in tensors.values()),
                modules=len({tensor.rpartition(".")[0] for tensor in tensors}),
                parameters=0,
                stored_bytes=held,
                quantized=False,
                reason="beside the weights, not counted with them",
            )
        )
    try:
        return rows, [note for item in passes for note in item.check_files(folder, model)]
    except PassError as error:
        raise AuditError(str(error)) from error


def _assign(
    stored: Mapping[str, Stored], expected: Mapping[str, Expected], claims: Claims
) -> tuple[dict[str, Stored], dict[str, dict[str, Stored]], list[Stored]]:
    """Account for every stored tensor: plain ones by name, parts of quantized weights by module, the KV cache's."""
    plain: dict[str, Stored] = {}
    parts: dict[str, dict[str, Stored]] = defaultdict(dict)
    cache = []
    modules = {name.rpartition(".")[0].rpartition(".")[0] for name in expected}
    unexpected = []
    for name, tensor in stored.items():
        module, _, last = name.rpartition(".")
        if name in expected:
            plain[name] = tensor
        elif last in _PARTS and f"{module}.weight" in expected:
            parts[module][last] = tensor
        elif last in _CACHE_PARTS and module in modules and claims.kv_cache:
            cache.append(tensor)
        else:
            unexpected.append(name)
    if unexpected:
        raise AuditError(f"{len(unexpected)} tensors on disk belong to no layer of the model: {_some(unexpected)}")
    return plain, dict(parts), cache


def _check_missing(
    expected: Mapping[str, Expected], plain: Mapping[str, Stored], parts: Mapping[str, Mapping[str, Stored]]
) -> None:
    def there(name: str) -> bool:
        module, _, last = name.rpartition(".")
        return name in plain or (last == "weight" and "weight_packed" in parts.get(module, {}))

    missing = [
        name
        for name, item in expected.items()
        if not item.optional and not there(name) and not any(there(twin) for twin in item.twins)
    ]
    if missing:
        raise AuditError(f"{len(missing)} tensors of the model are not on disk: {_some(missing)}")


def _by_module(expected: Mapping[str, Expected]) -> dict[str, list[str]]:
    modules: dict[str, list[str]] = defaultdict(list)
    for name in expected:
        modules[name.rpartition(".")[0]].append(name)
    return modules


def _is_quantized(tensor: Stored | None) -> bool:
    return tensor is not None and tensor.dtype in _QUANTIZED_DTYPES


def _check_quantized(
    module: str,
    expected: Expected,
    plain: Stored | None,
    parts: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
    claims: Claims,
) -> str:
    """Hold one quantized weight against what the config claims; return what it is stored as, ``int4``."""
    claim = claims.of(module, expected)
    held = parts.get("weight_packed", plain)
    if claim is None:
        first = held.name if held is not None else next(iter(parts.values())).name
        raise AuditError(f"'{first}' is quantized on disk, and quantization_config in {CONFIG} does not name it")
    if held is None:
        raise AuditError(f"'{module}' has scales on disk and no weight")
    if plain is not None and "weight_packed" in parts:
        raise AuditError(f"'{module}' has both a plain and a packed weight on disk")
    rows, columns = expected.shape[0], math.prod(expected.shape[1:])
    found = _stored_bits(held, rows, columns, claim)
    if found != claim.bits:
        raise AuditError(
            f"'{held.name}' is stored at {f'{found:g}' if found else 'an unknown number of'} bits a weight "
            f"({DTYPES[held.dtype][0]}, shape {list(held.shape)} for {[rows, columns]}), and {CONFIG} claims "
            f"{claim.bits}"
        )
    scale = parts.get("weight_scale")
    if scale is None:
        raise AuditError(f"'{module}' is quantized on disk and has no weight_scale")
    wanted = claim.scale_shapes(rows, columns)
    if scale.shape not in wanted:
        raise AuditError(
            f"'{scale.name}' has shape {list(scale.shape)}; {claim.described} of {[rows, columns]} need "
            f"{list(wanted[0])}"
        )
    if not claim.symmetric and "weight_zero_point" not in parts:
        raise AuditError(f"'{module}' is quantized with zero points as {CONFIG} claims, and has none on disk")
    said = shapes.get(f"{module}.weight_shape")
    if said is not None and said != expected.shape:
        raise AuditError(f"'{module}.weight_shape' says {list(said)}, the model needs {list(expected.shape)}")
    if claim.kind == "float" and claim.bits == 4:
        return "nvfp4" if scale.dtype == "F8_E4M3" else "mxfp4"
    return DTYPES[held.dtype][0] if claim.kind == "float" else f"int{claim.bits}"


def _stored_bits(held: Stored, rows: int, columns: int, claim: Claim) -> float:
    """Return the bits that a weight takes as stored, 0 where the shape fits none.

    Packed integers lie densely in int32, each row padded to a whole one; so several widths can fit a short row, and of
    these the claimed one is taken.
    """
    if len(held.shape) != 2 or held.shape[0] != rows:
        return 0
    width = held.shape[1]
    if held.dtype == "I32":
        fitting = [bits for bits in range(1, 9) if math.ceil(columns * bits / 32) == width]
        return claim.bits if claim.bits in fitting else (fitting[0] if fitting else 0)
    if held.name.endswith("weight_packed"):
        return 4 if held.dtype == "U8" and width == math.ceil(columns / 2) else 0
    integer = held.dtype in ("I8", "U8")
    if width != columns or integer != (claim.kind == "int"):
        return 0
    return DTYPES[held.dtype][1]


def _reason(name: str, expected: Expected, reasons: Mapping[str, str], claims: Claims) -> str:
    """Return why a linear layer was left as it is.

    Raises
    ------
    AuditError
        If the config claims that it is quantized, or no pass recorded that it skipped it.
    """
    module = name.removesuffix(".weight")
    if claims.of(module, expected) is not None:
        raise AuditError(f"'{name}' is not quantized on disk, and quantization_config in {CONFIG} says that it is")
    for known in (module, *expected.modules):
        while known:
            if known in reasons:
                return reasons[known]
            known = known.rpartition(".")[0]
    raise AuditError(f"linear layer '{module}' is neither quantized nor recorded as skipped")


def _class_of(name: str) -> str:
    """Return the class that a tensor is reported under: the last part of its module's name."""
    parts = name.split(".")
    last = parts[-1] if parts[-1] not in ("weight", "bias") or len(parts) == 1 else parts[-2]
    return f"experts.{last}" if "experts" in parts[:-1] and last != "experts" else last


def _row(key: tuple[str, str, bool, str | None], tally: _Tally) -> AuditedClass:
    tensor_class, label, quantized, reason = key
    return AuditedClass(
        tensor_class=tensor_class,
        dtype=label,
        bits=8 * tally.stored_bytes / (tally.parameters or tally.elements),
        modules=len(tally.modules),
        parameters=tally.parameters,
        stored_bytes=tally.stored_bytes,
        quantized=quantized,
        reason=reason,
    )


def _notes(stored: Mapping[str, Stored], cache: Sequence[Stored], claims: Claims) -> tuple[str, ...]:
    files = len({item.file for item in stored.values()})
    notes = [
        f"{len(stored)} tensors in {files} {'file' if files == 1 else 'files'}, each accounted for; none holds NaN"
    ]
    if cache:
        notes.append(f"{len(cache)} scales of the KV cache are stored with the model")
    if not claims.present:
        notes.append("no quantization is claimed and none was found")
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in sorted(names)[:_LISTED])
    return listed + (", …" if len(names) > _LISTED else "")
