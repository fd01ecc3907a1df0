"""Put the finished checkpoint together: files, ``effcli.json``, reports, model card; hold it against the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli import fitting, gating, planning, provenance, signature
from effcli.errors import GateFailedError
from effcli.preflight import LEGAL, Job, installed_versions, original_card, quantized_before
from effcli.reports.model import plain
from effcli.reports.optimize_model import (
    OPTIMIZE_SCHEMA,
    AuditedClass,
    CompiledDecode,
    GateResult,
    KernelAgreement,
    OnnxResult,
    OptimizeReport,
    PlannedPass,
    Size,
)
from effcli.staging import Staging, link_or_copy
from passes.base import KernelUse, Measured, MeasuredColumn, MeasuredTable, PassRecord

if TYPE_CHECKING:
    from effcli.stage_times import Times

REPORT, PAGE, CARD = "report.json", "report.html", "README.md"
GENERATION = "generation_config.json"
_TOKENIZER_PREFIXES = (
    "tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template", "spiece", "sentencepiece",
    "tekken", "preprocessor_config", "processor_config",
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """What the stages left.

    Attributes
    ----------
    before, after : dict
        Of :func:`effcli.measuring.before` and :func:`effcli.measuring.after`.
    planned : tuple of PlannedPass
    passes : tuple of dict
        ``record`` and ``audit`` of each.
    exported : OnnxResult or None
    """

    before: Mapping[str, Any]
    planned: tuple[PlannedPass, ...]
    passes: tuple[Mapping[str, Any], ...]
    after: Mapping[str, Any]
    exported: OnnxResult | None = None


def is_companion(path: Path) -> bool:
    """Say whether a file of a source goes along with its weights: tokenizer, generation config, licence."""
    return path.name == GENERATION or path.name.upper().startswith(LEGAL) or path.name.startswith(_TOKENIZER_PREFIXES)


def finish(job: Job, staging: Staging, results: Results, times: Times) -> OptimizeReport:
    """Hold the result against the gates; publish it, or keep its report beside the target and refuse.

    Raises
    ------
    GateFailedError
    """
    records = tuple(provenance.record_from(dict(stage["record"])) for stage in results.passes)
    last = f"pass-{len(job.chain)}"
    report = build_report(job, results, records, times)
    failed = [gate for gate in report.gates if not gate.passed]
    if failed:
        _refuse(job, staging, report, failed)
    with times.stage("assembling", own=True):
        out = staging.begin(staging.out.name)
        made = staging.path(last)
        manifest = dict(staging.manifest(last))
        manifest.pop(provenance.FILE, None)
        for name in manifest:
            link_or_copy(made / name, out / name)
        exported = {}
        if results.exported is not None:
            folder = results.exported.folder
            exported = {f"{folder}/{name}": digest for name, digest in staging.manifest(folder).items()}
            for name in exported:
                link_or_copy(staging.folder / name, out / name)
        described = provenance_of(job, results.before["dtype"], records, manifest)
        (out / provenance.FILE).write_text(described.to_json(), encoding="utf-8")
    report = build_report(job, results, records, times)
    data = _write_reports(report, out / REPORT, out / PAGE)
    from effcli.reports.model_card import model_card

    card = model_card(
        data,
        licence=report.source["licence"],
        base_model=report.source["base_model"],
        original_card=original_card(job.source),
    )
    (out / CARD).write_text(card, encoding="utf-8")
    signature.write(out, manifest | exported)
    staging.publish(force=job.options.force)
    return report


def provenance_of(
    job: Job, dtype: str, records: tuple[PassRecord, ...], files: Mapping[str, str]
) -> provenance.Provenance:
    """Return the content of ``effcli.json``."""
    from profilers.device import device_name

    return provenance.Provenance(
        format=provenance.FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=job.provenance_source(),
        recipe=job.recipe.model_dump(mode="json"),
        passes=records,
        dtype=dtype,
        device=device_name(job.device),
        versions=installed_versions(),
        files=dict(files),
    )


def build_report(job: Job, results: Results, records: tuple[PassRecord, ...], times: Times) -> OptimizeReport:
    """Return the report of a run from what its stages left."""
    before, after = results.before["profile"], results.after["profile"]
    audit = results.passes[-1]["audit"]
    point = {"batch": job.options.batch, "context": job.context}
    figures_before, figures_after = (
        planning.model_profile(report, job.bare.model, job.device, **point).figures for report in (before, after)
    )
    quantized, bits, file_bytes = quantized_before(job.source)
    size = Size(
        before_bytes=before["model"]["weight_bytes"],
        after_bytes=audit["stored_bytes"],
        bits_per_parameter=8 * audit["stored_bytes"] / audit["parameters"],
        parameters=audit["parameters"],
        before_file_bytes=file_bytes,
        after_file_bytes=audit["file_bytes"],
        source_quantized=quantized,
        source_bits_per_parameter=bits,
    )
    kernels = tuple(KernelUse(**use) for use in results.after["kernels"])
    predicted, predicted_reason = fitting.fit(
        results.planned,
        figures_before,
        figures_after,
        after,
        kernels,
        sum(record.seconds for record in records),
    )
    quality_reason = results.before["quality_reason"]
    judged = gating.values(
        {
            "schema": OPTIMIZE_SCHEMA,
            "before": before,
            "after": after,
            "figures_before": plain(figures_before),
            "figures_after": plain(figures_after),
            "quality": results.after["quality"],
            "quality_reason": quality_reason,
            "size": plain(size),
        }
    ).evaluate(job.gates)
    own = sum(item.seconds for item in times.stages if item.own)
    total = sum(item.seconds for item in times.stages)
    agreement, compiled, exported = results.after["agreement"], results.after["compiled"], results.exported
    return OptimizeReport(
        schema=OPTIMIZE_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=job.command,
        seconds_spent=total,
        status="passed" if all(gate.passed for gate in judged) else "gate failed",
        source={**job.provenance_source(), "notes": [*results.before["notes"], *job.texts.notes]},
        recipe=job.recipe.model_dump(mode="json"),
        seed=job.recipe.seed,
        before=before,
        after=after,
        batch=job.options.batch,
        context=job.context,
        figures_before=figures_before,
        figures_after=figures_after,
        quality=results.after["quality"],
        quality_reason=quality_reason,
        size=size,
        predicted=predicted,
        predicted_reason=predicted_reason,
        passes=records,
        audit=tuple(AuditedClass(**row) for row in audit["rows"]),
        audit_notes=tuple(audit["notes"]),
        gates=judged,
        kernels=kernels,
        kernel_agreement=None if agreement is None else KernelAgreement(**agreement),
        compiled=None if compiled is None else CompiledDecode(**compiled),
        stages=tuple(times.stages),
        overhead_fraction=own / total if total else 0.0,
        warnings=(
            *planning.slower_warnings(results.planned),
            *profile_warnings("before", results.before),
            *profile_warnings("after", results.after),
            *(profile_warnings("ONNX Runtime", {"profile": exported.profile}) if exported is not None else ()),
        ),
        output=job.output,
        measured=tuple(_measured_from(data) for data in results.after["measured"]),
        after_onnx=exported,
    )


def _measured_from(data: Mapping[str, Any] | None) -> Measured | None:
    """Return what :func:`effcli.reports.model.plain` made this data from."""
    if data is None:
        return None
    tables = tuple(
        MeasuredTable(
            table["title"],
            tuple(MeasuredColumn(**column) for column in table["columns"]),
            tuple(tuple(row) for row in table["rows"]),
        )
        for table in data["tables"]
    )
    return Measured(data["summary"], tables, tuple(data["notes"]), dict(data["details"]))


def profile_warnings(stage: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the warnings of a measuring stage's profile."""
    return tuple(f"{stage}: {line}" for line in result["profile"]["warnings"])


def _refuse(job: Job, staging: Staging, report: OptimizeReport, failed: Sequence[GateResult]) -> None:
    data, page = (job.target.with_name(f"{job.target.name}.failed.{suffix}") for suffix in ("json", "html"))
    _write_reports(report, data, page)
    what = "; ".join(f"gate '{gate.gate}' failed: {gate.explanation}" for gate in failed)
    raise GateFailedError(
        f"{what}. Nothing was published; report: '{page}' and '{data}'. The work is kept in '{staging.folder}': run "
        "again with --resume and other gates to publish it",
        what,
    )


def _write_reports(report: OptimizeReport, data_path: Path, page: Path) -> dict[str, Any]:
    """Write a report as JSON and as a page; return its data."""
    from effcli.reports.render import render

    data_path.write_text(report.to_json(), encoding="utf-8")
    data = report.to_dict()
    page.write_text(render(data, "html"), encoding="utf-8")
    return data
