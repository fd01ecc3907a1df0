from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from effcli.reports.model import read_report
from effcli.reports.schema import SCHEMA_MAKERS, profile_schema, schema_text

from . import optimize_samples, pipeline_examples, samples

SCHEMAS = Path(__file__).parents[3] / "docs" / "schema"
REPORTS = {
    "full": samples.full,
    "config_only": samples.config_only,
    "bare": samples.bare,
    "hostile": samples.hostile,
}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return profile_schema()


def validate(report: Any, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema).validate(report)


@pytest.mark.parametrize("report", SCHEMA_MAKERS)
def test_checked_in_schema_is_the_generated_one(report: str) -> None:
    checked_in = SCHEMAS / f"effcli.{report}-1.schema.json"
    assert checked_in.read_text(encoding="utf-8") == schema_text(report), "regenerate it: python docs/generate.py"


def test_schema_is_a_schema(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", REPORTS)
def test_reports_are_valid(name: str, schema: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(REPORTS[name]().to_json(), encoding="utf-8")
    validate(read_report(path), schema)


def test_fields_may_be_added(schema: dict[str, Any]) -> None:
    report = samples.full().to_dict()
    report["later"] = report["model"]["later"] = report["profiles"]["kv"]["points"][0]["later"] = {"any": [1]}
    report["profiles"]["later"] = "text"
    validate(report, schema)


# Spelled out from the published contract, not read from the schema.
CONTRACT_PATHS = [
    *["schema", "model", "environment", "profiles"],
    *[f"model.{key}" for key in ("source", "architecture", "parameters", "weight_bytes")],
    *[f"environment.{key}" for key in ("device", "peaks", "versions")],
    *[f"environment.peaks.{key}" for key in ("copy_bytes_per_second", "flops_per_second")],
    *[
        f"profiles.intensity.points.0.{key}"
        for key in (
            *("phase", "batch", "context", "flops", "bytes", "flops_per_byte", "time_seconds", "attainable_seconds"),
            *("bound", "mfu", "mbu", "modules"),
        )
    ],
    *[f"profiles.intensity.points.0.modules.0.{key}" for key in ("name", "flops", "bytes", "flops_per_byte")],
    *[f"profiles.sinks.{key}" for key in ("epsilon", "sequences", "points")],
    *[f"profiles.sinks.points.0.{key}" for key in ("context", "bos", "sink_rate", "alpha")],
    *[
        f"profiles.kv.{key}"
        for key in ("dtype", "bytes_per_token", "fixed_bytes", "latent_bytes_per_token", "points", "max_context")
    ],
    *[f"profiles.kv.points.0.{key}" for key in ("batch", "context", "predicted_bytes", "measured_bytes")],
    *[
        f"profiles.latency.points.0.{key}"
        for key in ("batch", "context", "ttft_seconds", "tpot_seconds", "tokens_per_second")
    ],
    *[
        f"profiles.latency.points.0.{timing}.{key}"
        for timing in ("ttft_seconds", "tpot_seconds")
        for key in ("p50", "p90", "p99")
    ],
    *["profiles.energy.joules_per_token", "profiles.energy.reason"],
]


def parent_of(report: Any, path: str) -> tuple[Any, str]:
    *way, last = path.split(".")
    for step in way:
        report = report[int(step) if isinstance(report, list) else step]
    return report, last


@pytest.fixture(scope="module")
def valid() -> dict[str, Any]:
    return samples.full().to_dict()


@pytest.mark.parametrize("path", CONTRACT_PATHS)
def test_a_report_without_a_contract_key_fails(path: str, schema: dict[str, Any], valid: dict[str, Any]) -> None:
    broken = copy.deepcopy(valid)
    parent, key = parent_of(broken, path)
    del parent[key]
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(broken))
    messages = [inner.message for error in errors for inner in [error, *(error.context or [])]]
    assert f"'{key}' is a required property" in messages


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "effcli.profile/2"),
        ("model.parameters", "135M"),
        ("model.parameters", None),
        ("profiles.intensity.points.0.flops", 1.5),
        ("profiles.sinks.points.0.alpha", [["high"]]),
        ("profiles.kv.points.0.measured_bytes", "11.8 MB"),
        ("profiles.latency.points.0.ttft_seconds", 0.8),
        ("environment.peaks", []),
    ],
)
def test_a_report_with_a_wrong_type_fails(path: str, value: Any, schema: dict[str, Any], valid: dict[str, Any]) -> None:
    broken = copy.deepcopy(valid)
    parent, key = parent_of(broken, path)
    parent[key] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(broken, schema)


def test_schema_is_json_with_nothing_outside_it() -> None:
    assert "http" not in json.dumps(profile_schema()["$defs"])


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, Any]]:
    return {name: make() for name, make in SCHEMA_MAKERS.items()}


EXAMPLES: dict[str, Any] = {
    **optimize_samples.OPTIMIZED,
    **optimize_samples.PLANS,
    **pipeline_examples.OPTIMIZED,
    **pipeline_examples.PROFILED,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_reports_of_other_commands_are_valid(name: str, made: dict[str, dict[str, Any]]) -> None:
    report = EXAMPLES[name]().to_dict()
    schema = made[report["schema"].removeprefix("effcli.").removesuffix("/1")]
    jsonschema.Draft202012Validator.check_schema(schema)
    validate(json.loads(json.dumps(report)), schema)


# Spelled out from the published contract, not read from the schema.
OPTIMIZE_PATHS = [
    *["schema", "before", "after", "quality", "size", "predicted", "passes", "audit", "gates"],
    *[f"quality.{key}" for key in ("perplexity", "kl", "top1_agreement")],
    *[f"quality.perplexity.{key}" for key in ("before", "after", "interval")],
    *["quality.kl.mean", "quality.kl.p99"],
    *[f"size.{key}" for key in ("before_bytes", "after_bytes", "bits_per_parameter")],
    *[f"audit.0.{key}" for key in ("tensor_class", "dtype", "bits")],
    *["before.profiles", "after.profiles", "before.model.weight_bytes"],
]


def every_message(errors: Iterable[jsonschema.ValidationError]) -> list[str]:
    """Return the messages of errors and of the alternatives inside them."""
    return [text for error in errors for text in (error.message, *every_message(error.context or []))]


@pytest.mark.parametrize("path", OPTIMIZE_PATHS)
def test_an_optimize_report_without_a_contract_key_fails(path: str, made: dict[str, dict[str, Any]]) -> None:
    broken = optimize_samples.optimized().to_dict()
    parent, key = parent_of(broken, path)
    del parent[key]
    errors = jsonschema.Draft202012Validator(made["optimize"]).iter_errors(broken)
    assert f"'{key}' is a required property" in every_message(errors)


@pytest.mark.parametrize(
    ("path", "value"),
    [("size.after_bytes", "98 MB"), ("quality.kl.mean", None), ("audit.0.bits", "4"), ("before.schema", "other")],
)
def test_an_optimize_report_with_a_wrong_type_fails(path: str, value: Any, made: dict[str, dict[str, Any]]) -> None:
    broken = optimize_samples.optimized().to_dict()
    parent, key = parent_of(broken, path)
    parent[key] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(broken, made["optimize"])


# Spelled out from the published contract, not read from the schema.
PIPELINE_PATHS = {
    "pipeline_profile": [
        *["schema", "pipeline", "environment", "steps", "denoising", "error_map", "denoising.denoiser_share"],
        *["denoising.cost.flops_per_byte", "pipeline.scheduler", "error_map.edges", "error_map.errors"],
    ],
    "pipeline": [
        *["schema", "status", "lemica", "schedules", "comparison", "sheets", "lemica.default", "lemica.graph.max_gap"],
        *["schedules.0.full", "schedules.0.likeness.lpips_reason", "schedules.0.likeness.latent_l1.mean"],
        *["comparison.0.method", "comparison.0.reason", "sheets.0.png_base64", "lemica.calibration.scheduler"],
    ],
}


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in PIPELINE_PATHS.items() for path in paths])
def test_a_report_of_a_pipeline_without_a_contract_key_fails(
    name: str, path: str, made: dict[str, dict[str, Any]]
) -> None:
    broken = copy.deepcopy(EXAMPLES[name]().to_dict())
    schema = made[broken["schema"].removeprefix("effcli.").removesuffix("/1")]
    validate(broken, schema)
    parent, key = parent_of(broken, path)
    del parent[key]
    assert f"'{key}' is a required property" in every_message(
        jsonschema.Draft202012Validator(schema).iter_errors(broken)
    )


def test_fields_may_be_added_to_what_lemica_refuses_to_read(made: dict[str, dict[str, Any]]) -> None:
    report = pipeline_examples.optimized().to_dict()
    report["lemica"]["later"] = report["lemica"]["schedules"][0]["later"] = 1
    validate(report, made["pipeline-optimize"])
