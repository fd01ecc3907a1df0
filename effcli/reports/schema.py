"""The JSON Schemas of saved reports, generated from the dataclasses that they are made of, and of the jobs file.

Regenerate with ``python docs/generate.py``; print one with ``python -m effcli.reports.schema NAME``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from effcli.reports.model import (
    BATCH_SCHEMA,
    EXPORT_SCHEMA,
    FRONT_SCHEMA,
    OPTIMIZE_SCHEMA,
    PIPELINE_OPTIMIZE_SCHEMA,
    PIPELINE_PROFILE_SCHEMA,
    PLAN_SCHEMA,
    PROFILE_SCHEMA,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"

# What other tools may rely on; the rest may be added to freely. By dataclass name.
PROFILE_CONTRACT: dict[str, tuple[str, ...]] = {
    "ProfileReport": ("schema", "model", "environment", "profiles"),
    "ModelInfo": ("source", "architecture", "parameters", "weight_bytes"),
    "Environment": ("device", "peaks", "versions"),
    "Peaks": ("copy_bytes_per_second", "flops_per_second"),
    "IntensityResult": ("points",),
    "IntensityPoint": (
        *("phase", "batch", "context", "flops", "bytes", "flops_per_byte", "time_seconds", "attainable_seconds"),
        *("bound", "mfu", "mbu", "modules"),
    ),
    "ModuleIntensity": ("name", "flops", "bytes", "flops_per_byte"),
    "SinksResult": ("epsilon", "sequences", "points"),
    "SinkPoint": ("context", "bos", "sink_rate", "alpha"),
    "KVResult": ("dtype", "bytes_per_token", "fixed_bytes", "latent_bytes_per_token", "points", "max_context"),
    "KVPoint": ("batch", "context", "predicted_bytes", "measured_bytes"),
    "LatencyResult": ("points",),
    "LatencyPoint": ("batch", "context", "ttft_seconds", "tpot_seconds", "tokens_per_second"),
    "Distribution": ("p50", "p90", "p99"),
    "EnergyResult": ("joules_per_token", "reason"),
    "OutliersResult": (),
}
OPTIMIZE_CONTRACT: dict[str, tuple[str, ...]] = {
    "OptimizeReport": (*("schema", "before", "after", "quality", "size", "predicted", "passes", "audit", "gates"),),
    "Size": ("before_bytes", "after_bytes", "bits_per_parameter"),
    "QualityResult": ("perplexity", "kl", "top1_agreement"),
    "Perplexity": ("before", "after", "interval"),
    "Divergence": ("mean", "p99"),
    "PassRecord": ("name", "parameters"),
    "AuditedClass": ("tensor_class", "dtype", "bits"),
    "OnnxResult": ("folder", "profile", "quality", "provider", "weight_bytes", "max_absolute_error"),
    "GateResult": ("gate", "measured", "limit", "passed"),
    "Predicted": ("figures", "metrics"),
    "Figures": ("weight_bytes", "kv_bytes_per_token", "ttft_seconds", "tpot_seconds", "peak_memory_bytes"),
}
PLAN_CONTRACT: dict[str, tuple[str, ...]] = {
    "PlanReport": ("schema", "model", "measured", "passes"),
    "PlannedPass": ("name", "parameters", "prediction"),
    "Prediction": ("figures", "bits_per_parameter", "fits", "slower"),
    "Figures": ("weight_bytes", "kv_bytes_per_token", "ttft_seconds", "tpot_seconds", "peak_memory_bytes"),
    "ModelInfo": PROFILE_CONTRACT["ModelInfo"],
    "Environment": PROFILE_CONTRACT["Environment"],
    "Peaks": PROFILE_CONTRACT["Peaks"],
}
PIPELINE_PROFILE_CONTRACT: dict[str, tuple[str, ...]] = {
    "PipelineProfileReport": ("schema", "pipeline", "environment", "steps", "denoising", "error_map"),
    "PipelineInfo": ("source", "architecture", "denoiser", "mode", "scheduler"),
    "DenoisingResult": (
        *("steps", "run_seconds", "step_seconds", "call_seconds", "denoiser_calls", "denoiser_seconds"),
        *("denoiser_share", "blocks_share", "cost"),
    ),
    "CallCost": ("flops", "bytes", "flops_per_byte", "bound"),
    "Distribution": PROFILE_CONTRACT["Distribution"],
    "ErrorGraph": ("steps", "max_gap", "edges", "errors", "distance"),
    "Environment": PROFILE_CONTRACT["Environment"],
    "Peaks": PROFILE_CONTRACT["Peaks"],
}
PIPELINE_OPTIMIZE_CONTRACT: dict[str, tuple[str, ...]] = {
    **{name: keys for name, keys in PIPELINE_PROFILE_CONTRACT.items() if name != "PipelineProfileReport"},
    "PipelineOptimizeReport": (
        *("schema", "status", "pipeline", "environment", "steps", "denoising", "passes", "lemica", "schedules"),
        *("comparison", "sheets", "gates"),
    ),
    "LemicaFile": ("schedules", "default", "calibration", "graph"),
    "Schedule": ("name", "steps", "full", "reuse"),
    "Calibration": ("scheduler", "inputs", "seeds"),
    "ScheduleResult": (
        *("name", "steps", "full", "full_calls", "calls", "run_seconds_before", "run_seconds_after"),
        *("denoiser_seconds_before", "denoiser_seconds_after", "likeness"),
    ),
    "Likeness": ("samples", "psnr_db", "ssim", "lpips", "lpips_reason", "latent_l1"),
    "Spread": ("mean", "low", "high"),
    "ComparisonRow": ("method", "budget", "full_calls", "full", "likeness", "chosen", "reason"),
    "Sheet": ("rows", "columns", "cell_pixels", "png_base64"),
    "PassRecord": OPTIMIZE_CONTRACT["PassRecord"],
    "GateResult": OPTIMIZE_CONTRACT["GateResult"],
}
BATCH_CONTRACT: dict[str, tuple[str, ...]] = {
    "BatchReport": ("schema", "exit_code", "jobs", "searches"),
    "JobResult": ("name", "kind", "stage", "message", "exit_code", "report", "figures"),
    "SearchResult": ("name", "minimize", "subject_to", "best", "front"),
}
FRONT_CONTRACT: dict[str, tuple[str, ...]] = {
    "FrontReport": ("schema", "quality", "entries", "fronts"),
    "Entry": ("name", "path", "original", "figures"),
    "Front": ("target", "members", "near", "left_out"),
}
EXPORT_CONTRACT: dict[str, tuple[str, ...]] = {
    "ExportReport": (
        "schema",
        "format",
        "model",
        "task",
        "opset",
        "graphs",
        "max_absolute_error",
        "agreement",
        "speed",
    ),
    "ModelInfo": PROFILE_CONTRACT["ModelInfo"],
}


class _Definitions:
    """The definitions that a schema's ``$ref`` point to, one for each dataclass."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def reference(self, kind: type) -> dict[str, str]:
        """Add a dataclass and what it is made of; return a reference to it."""
        from pydantic import TypeAdapter

        schema = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        self.found.update(schema.pop("$defs", {}))
        self.found[kind.__name__] = schema
        return {"$ref": f"#/$defs/{kind.__name__}"}

    def optional(self, kind: type) -> dict[str, Any]:
        """Return a reference to a dataclass that may be null."""
        return {"anyOf": [self.reference(kind), {"type": "null"}]}

    def profile(self) -> dict[str, str]:
        """Add everything that a profile holds."""
        from effcli.reports.model import ProfileReport
        from effcli.reports.sections import BUILDERS
        from profilers.registry import load

        reference = self.reference(ProfileReport)
        results = {name: self.reference(load(name).result_type) for name in BUILDERS}
        properties = self.found["ProfileReport"]["properties"]
        properties["schema"] = {"const": PROFILE_SCHEMA}
        properties["profiles"] = {
            "type": "object",
            "properties": results,
            "description": "What each instrument found, by its name; other packages may add theirs.",
        }
        return reference

    def finished(self, root: str, contract: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """Return the schema whose top is the definition called ``root``."""
        from profilers.peaks import Peaks

        if "Environment" in self.found:
            self.found["Environment"]["properties"]["peaks"] = self.optional(Peaks)
        _require_contract(self.found, contract)
        for definition in self.found.values():
            _tidy(definition)
        top = self.found.pop(root)
        name = top["properties"]["schema"]["const"]
        return {
            "$schema": DIALECT,
            "$id": f"{name.replace('/', '-')}.schema.json",
            **top,
            "title": name,
            "$defs": dict(sorted(self.found.items())),
        }


def profile_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.profile/1`` (draft 2020-12).

    Every field that is present must have its type; ``required`` holds the contract only, and any object may hold
    more, so that a field added later leaves older reports valid. Imports the instruments, and with them torch.
    """
    definitions = _Definitions()
    definitions.profile()
    return definitions.finished("ProfileReport", PROFILE_CONTRACT)


def optimize_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.optimize/1``: the same rules, with whole profiles before and after."""
    from effcli.reports.optimize_model import OptimizeReport
    from profilers.quality import QualityResult

    definitions = _Definitions()
    definitions.reference(OptimizeReport)
    properties = definitions.found["OptimizeReport"]["properties"]
    properties["schema"] = {"const": OPTIMIZE_SCHEMA}
    for side in ("before", "after"):
        properties[side] = definitions.profile()
    properties["quality"] = definitions.optional(QualityResult)
    exported = definitions.found["OnnxResult"]["properties"]
    exported["profile"], exported["quality"] = properties["after"], properties["quality"]
    return definitions.finished("OptimizeReport", {**PROFILE_CONTRACT, **OPTIMIZE_CONTRACT})


def plan_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.plan/1``: the same rules."""
    from effcli.reports.optimize_model import PlanReport

    definitions = _Definitions()
    definitions.reference(PlanReport)
    definitions.found["PlanReport"]["properties"]["schema"] = {"const": PLAN_SCHEMA}
    return definitions.finished("PlanReport", PLAN_CONTRACT)


def pipeline_profile_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.pipeline-profile/1``: the same rules."""
    from effcli.reports.pipeline_model import PipelineProfileReport
    from passes.lemica.schedule import ErrorGraph
    from profilers.denoising import DenoisingResult

    definitions = _Definitions()
    definitions.reference(PipelineProfileReport)
    properties = definitions.found["PipelineProfileReport"]["properties"]
    properties["schema"] = {"const": PIPELINE_PROFILE_SCHEMA}
    properties["denoising"] = definitions.optional(DenoisingResult)
    properties["error_map"] = definitions.optional(ErrorGraph)
    return definitions.finished("PipelineProfileReport", PIPELINE_PROFILE_CONTRACT)


def pipeline_optimize_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.pipeline-optimize/1``: the same rules."""
    from effcli.reports.pipeline_model import PipelineOptimizeReport
    from passes.lemica.schedule import LemicaFile
    from profilers.denoising import DenoisingResult

    definitions = _Definitions()
    definitions.reference(PipelineOptimizeReport)
    properties = definitions.found["PipelineOptimizeReport"]["properties"]
    properties["schema"] = {"const": PIPELINE_OPTIMIZE_SCHEMA}
    properties["denoising"] = definitions.optional(DenoisingResult)
    properties["lemica"] = definitions.reference(LemicaFile)
    return definitions.finished("PipelineOptimizeReport", PIPELINE_OPTIMIZE_CONTRACT)


def batch_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.batch/1``: the same rules; ``summary.jsonl`` has a ``JobResult`` a line."""
    from effcli.batch.model import BatchReport

    return _plain_schema(BatchReport, BATCH_SCHEMA, BATCH_CONTRACT)


def front_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.front/1``: the same rules."""
    from effcli.fronts import FrontReport

    return _plain_schema(FrontReport, FRONT_SCHEMA, FRONT_CONTRACT)


def export_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.export/1``: the same rules."""
    from effcli.export.report import ExportReport

    return _plain_schema(ExportReport, EXPORT_SCHEMA, EXPORT_CONTRACT)


def _plain_schema(kind: type, name: str, contract: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    definitions = _Definitions()
    definitions.reference(kind)
    definitions.found[kind.__name__]["properties"]["schema"] = {"const": name}
    return definitions.finished(kind.__name__, contract)


def jobs_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.jobs/1``, which users write: it refuses what it does not know."""
    from effcli.batch.jobs_schema import jobs_schema as made

    return made()


SCHEMA_MAKERS = {
    "profile": profile_schema,
    "optimize": optimize_schema,
    "plan": plan_schema,
    "pipeline-profile": pipeline_profile_schema,
    "pipeline-optimize": pipeline_optimize_schema,
    "batch": batch_schema,
    "front": front_schema,
    "export": export_schema,
    "jobs": jobs_schema,
}


def _require_contract(definitions: dict[str, Any], contract: dict[str, tuple[str, ...]]) -> None:
    missing = contract.keys() - definitions.keys()
    if missing:
        raise ValueError(f"the contract names {', '.join(sorted(missing))}, which no result holds any more")
    for name, definition in definitions.items():
        required = contract.get(name, ())
        absent = set(required) - definition["properties"].keys()
        if absent:
            raise ValueError(f"{name} lost {', '.join(sorted(absent))}, which other tools read")
        definition.pop("required", None)
        if required:
            definition["required"] = list(required)


def _tidy(definition: dict[str, Any]) -> None:
    """Keep the first sentence of a docstring; drop titles that only repeat the name, and refusals of more fields."""
    definition.pop("additionalProperties", None)
    for property_ in definition["properties"].values():
        property_.pop("title", None)
    definition.pop("title", None)
    if "description" in definition:
        definition["description"] = " ".join(definition["description"].partition("\n\n")[0].split())


def schema_text(report: str = "profile") -> str:
    """Return a schema as the text that is checked in; ``report`` is a name of ``SCHEMA_MAKERS``."""
    return json.dumps(SCHEMA_MAKERS[report](), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text(*sys.argv[1:2]))
