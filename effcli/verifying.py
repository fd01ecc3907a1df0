"""``effcli verify``: whether a checkpoint is what its report says.

::

    SHA256SUMS   ──> every file is there, unchanged, and none was added
    effcli.json  ──> the same recipe, source and passes as in report.json
    report.json  ──> the fingerprint of the weights that were measured is that of the weights here
    tensors      ──> the audit again: names, shapes, types, bits, NaN; the same rows as in the report
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcli import provenance, signature
from effcli.checkpoint_files import ONNX_EXPORT, find_weights, fingerprint, read_json
from effcli.errors import BadInputError, SourceError
from effcli.onnx_stage import FOLDER
from effcli.provenance import Provenance
from effcli.recipes import from_mapping
from effcli.reports.changes import mapping
from effcli.reports.model import (
    EXPORT_SCHEMA,
    OPTIMIZE_SCHEMA,
    PIPELINE_OPTIMIZE_SCHEMA,
    REPORT_FILE,
    plain,
    read_report,
)
from effcli.sources import Source


@dataclass(frozen=True)
class Verification:
    """What was found to be so.

    Attributes
    ----------
    folder : str
    signature : str
        sha256 of ``SHA256SUMS``: one number for the whole folder.
    checks : tuple of str
        What holds, one line each.
    notes : tuple of str
        What could not be checked, and why.
    """

    folder: str
    signature: str
    checks: tuple[str, ...]
    notes: tuple[str, ...]


def verify(folder: Path | str, *, expected: str | None = None) -> Verification:
    """Check a folder that ``effcli optimize`` or ``effcli export`` wrote; nothing is loaded or run.

    Parameters
    ----------
    folder : Path or str
    expected : str, optional
        The signature that the maker published; at least its first 12 digits.

    Raises
    ------
    BadInputError
        If it is no such folder, or the signature is another.
    SourceError
        Naming the first thing that is not as the report says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInputError(f"'{folder}' is no folder; give the one that effcli optimize or effcli export wrote")
    made = provenance.read(folder)
    exported = (folder / ONNX_EXPORT).is_file()
    if made is None and not exported:
        raise BadInputError(f"'{folder}' has neither {provenance.FILE} nor {ONNX_EXPORT}, so effcli did not write it")
    count, signed = signature.check(folder)
    if expected is not None and (len(expected) < 12 or not signed.startswith(expected.lower())):
        raise SourceError(f"'{folder}' has signature {signed}, not '{expected}': it is not the same checkpoint")
    checks, notes = [f"sha256 of {count} files"], []
    if made is None:
        _check_exported(folder)
        checks.append("the report is of these files")
        notes.append("an export's tensors are not audited: its outputs were held against torch when it was made")
        return Verification(str(folder), signed, tuple(checks), tuple(notes))
    report = read_report(folder)
    _check_provenance(folder, made, report)
    checks.append(f"report and {provenance.FILE} name the same source, recipe and passes")
    if report["schema"] == PIPELINE_OPTIMIZE_SCHEMA:
        notes.append("a pipeline's tensors are not audited: only that their files are as they were written")
        return Verification(str(folder), signed, tuple(checks), tuple(notes))
    _check_weights(folder, report)
    checks.append("the weights are those that the report measured")
    rows = _audit(folder, made, report)
    checks.append(f"audit: {rows} classes of tensors as the report lists them, no NaN")
    if report.get("after_onnx") is not None or (folder / FOLDER).exists():
        _check_export_of(folder, report)
        checks.append(f"{FOLDER}: an export of these weights, and the one that the report measured")
    return Verification(str(folder), signed, tuple(checks), tuple(notes))


def _check_provenance(folder: Path, made: Provenance, report: Mapping[str, Any]) -> None:
    if report["schema"] not in (OPTIMIZE_SCHEMA, PIPELINE_OPTIMIZE_SCHEMA):
        raise SourceError(f"'{folder / REPORT_FILE}' has schema {report['schema']!r}: it is no report of a checkpoint")
    said = {
        "recipe": (made.recipe, report.get("recipe")),
        "source": (made.source.get("fingerprint"), mapping(report.get("source")).get("fingerprint")),
        "passes": (plain(made.passes), report.get("passes")),
    }
    for what, (ours, theirs) in said.items():
        if plain(ours) != theirs:
            raise SourceError(
                f"'{folder}': {what} in {provenance.FILE} and {REPORT_FILE} differ, so the report is of another "
                "checkpoint; fetch both again"
            )


def _check_weights(folder: Path, report: Mapping[str, Any]) -> None:
    weights = find_weights(folder, allow_pickle=False)
    if weights is None:
        raise SourceError(f"'{folder}' has no weights; fetch the checkpoint again")
    found = fingerprint(weights.files)
    measured = mapping(mapping(report.get("after")).get("model")).get("fingerprint")
    if found != measured:
        raise SourceError(
            f"the weights in '{folder}' have fingerprint {found[:12]}… and the report measured {str(measured)[:12]}…: "
            "it is of other weights"
        )


def _audit(folder: Path, made: Provenance, report: Mapping[str, Any]) -> int:
    """Audit again, hold the rows against the report's, and return how many there are."""
    from effcli import loading
    from effcli.audit import audit
    from effcli.quiet import quiet_transformers
    from effcli.stored_tensors import AuditError

    chain = from_mapping(made.recipe, f"the recipe in '{folder / provenance.FILE}'").chain()
    with quiet_transformers():
        model = loading.load(Source(str(folder), "folder", folder), config_only=True).model
    size = mapping(report.get("size"))
    try:
        found = audit(folder, model, made.passes, chain, parameters=size.get("parameters"))
    except AuditError as error:
        raise SourceError(f"'{folder}' does not pass the audit: {error}") from None
    if plain(found.rows) != report.get("audit") or found.stored_bytes != size.get("after_bytes"):
        raise SourceError(f"the tensors in '{folder}' are not as the report's audit lists them: it is of other weights")
    return len(found.rows)


def _check_exported(folder: Path) -> None:
    report, record, sums = read_report(folder), read_json(folder / ONNX_EXPORT), signature.read(folder)
    files, source = mapping(record.get("files")), mapping(record.get("source"))
    same = files and all(sums.get(name) == digest for name, digest in files.items())
    measured = mapping(report.get("model")).get("fingerprint")
    if not same or report["schema"] != EXPORT_SCHEMA or source.get("fingerprint") != measured:
        raise SourceError(
            f"'{folder}': {ONNX_EXPORT} lists other files than those here, or another model than {REPORT_FILE}, so the "
            "report is of another export"
        )


def _check_export_of(folder: Path, report: Mapping[str, Any]) -> None:
    """Check that the export in a checkpoint was made from it, and is what its report measured."""
    export, measured = folder / FOLDER, mapping(report.get("after_onnx"))
    if not measured or not (export / ONNX_EXPORT).is_file():
        raise SourceError(
            f"'{export}' and {REPORT_FILE} do not belong together: one of them knows of no export; fetch both again"
        )
    _check_exported(export)
    record = read_json(export / ONNX_EXPORT)
    made_from = mapping(record.get("source")).get("fingerprint")
    weights = fingerprint([export / str(record.get("weights"))])
    after, ours = (mapping(mapping(side).get("model")) for side in (report.get("after"), measured.get("profile")))
    if made_from != after.get("fingerprint") or weights != ours.get("fingerprint"):
        raise SourceError(
            f"'{export}' was made from other weights than those in '{folder}', or is not what was measured"
        )
