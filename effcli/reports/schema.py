"""The JSON Schema of a saved report, generated from the dataclasses that it is made of.

Regenerate with ``python -m effcli.reports.schema > docs/schema/effcli.profile-1.schema.json``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from effcli.reports.model import PROFILE_SCHEMA

SCHEMA_ID = "effcli.profile-1.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

# What other tools may rely on; the rest may be added to freely. By dataclass name.
CONTRACT: dict[str, tuple[str, ...]] = {
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


def profile_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``effcli.profile/1`` (draft 2020-12).

    Every field that is present must have its type; ``required`` holds the contract only, and any object may hold
    more, so that a field added later leaves older reports valid. Imports the instruments, and with them torch.
    """
    from pydantic import TypeAdapter

    from effcli.reports.model import ProfileReport
    from effcli.reports.sections import BUILDERS
    from profilers.peaks import Peaks
    from profilers.registry import load

    definitions: dict[str, Any] = {}

    def reference(kind: type) -> dict[str, str]:
        schema = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        definitions[kind.__name__] = schema
        return {"$ref": f"#/$defs/{kind.__name__}"}

    reference(ProfileReport)
    results = {name: reference(load(name).result_type) for name in BUILDERS}
    definitions["Environment"]["properties"]["peaks"] = {"anyOf": [reference(Peaks), {"type": "null"}]}
    report = definitions.pop("ProfileReport")
    report["properties"]["schema"] = {"const": PROFILE_SCHEMA}
    report["properties"]["profiles"] = {
        "type": "object",
        "properties": results,
        "description": "What each instrument found, by its name; other packages may add theirs.",
    }
    _require_contract({**definitions, "ProfileReport": report})
    for definition in (report, *definitions.values()):
        _tidy(definition)
    return {
        "$schema": DIALECT,
        "$id": SCHEMA_ID,
        **report,
        "title": PROFILE_SCHEMA,
        "$defs": dict(sorted(definitions.items())),
    }


def _require_contract(definitions: dict[str, Any]) -> None:
    missing = CONTRACT.keys() - definitions.keys()
    if missing:
        raise ValueError(f"the contract names {', '.join(sorted(missing))}, which no result holds any more")
    for name, definition in definitions.items():
        required = CONTRACT.get(name, ())
        absent = set(required) - definition["properties"].keys()
        if absent:
            raise ValueError(f"{name} lost {', '.join(sorted(absent))}, which other tools read")
        definition.pop("required", None)
        if required:
            definition["required"] = list(required)


def _tidy(definition: dict[str, Any]) -> None:
    """Keep the first sentence of a docstring; drop titles that only repeat the name."""
    for property_ in definition["properties"].values():
        property_.pop("title", None)
    definition.pop("title", None)
    if "description" in definition:
        definition["description"] = " ".join(definition["description"].partition("\n\n")[0].split())


def schema_text() -> str:
    """Return the schema as the text that is checked in."""
    return json.dumps(profile_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
