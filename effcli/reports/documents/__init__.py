"""From a saved report to the document that every rendering shows; one module for each schema."""

from __future__ import annotations

from collections.abc import Callable

from effcli.reports.blocks import Report
from effcli.reports.documents import (
    batch,
    compare,
    evaluation,
    export,
    front,
    optimize,
    pipeline_optimize,
    pipeline_profile,
    plan,
    profile,
)
from effcli.reports.documents.base import Document
from effcli.reports.model import (
    BATCH_SCHEMA,
    COMPARE_SCHEMA,
    EVAL_SCHEMA,
    EXPORT_SCHEMA,
    FRONT_SCHEMA,
    OPTIMIZE_SCHEMA,
    PIPELINE_OPTIMIZE_SCHEMA,
    PIPELINE_PROFILE_SCHEMA,
    PLAN_SCHEMA,
)

BUILDERS: dict[str, Callable[[Report], Document]] = {
    OPTIMIZE_SCHEMA: optimize.document,
    PLAN_SCHEMA: plan.document,
    EVAL_SCHEMA: evaluation.document,
    COMPARE_SCHEMA: compare.document,
    FRONT_SCHEMA: front.document,
    EXPORT_SCHEMA: export.document,
    PIPELINE_PROFILE_SCHEMA: pipeline_profile.document,
    PIPELINE_OPTIMIZE_SCHEMA: pipeline_optimize.document,
    BATCH_SCHEMA: batch.document,
}


def document(report: Report) -> Document:
    """Return the document of a saved report, by its schema; a profile's where there is none."""
    schema = report.get("schema")
    build = BUILDERS.get(schema, profile.document) if isinstance(schema, str) else profile.document
    return build(report)
