"""The checkpoint's model card: a README.md for the Hugging Face hub, made from the report."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Chart, HeatMap, Report, Section, items
from effcli.reports.changes import mapping, number, optimize_changes, place_of
from effcli.reports.markdown import escape, fenced, section_lines, verdict_lines
from effcli.reports.optimize_verdict import folder, optimize_verdict, readers
from effcli.reports.sections import change, quality, run, steps, written

# Identifiers that the hub knows and models often carry; any other becomes "other" with its name beside it.
HUB_LICENCES = frozenset(
    (
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "wtfpl", "bsl-1.0"),
        *("mpl-2.0", "lgpl-2.1", "lgpl-3.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", "epl-2.0", "eupl-1.2", "ms-pl"),
        *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),
        *("cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "odbl", "odc-by", "pddl"),
        *("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigscience-bloom-rail-1.0"),
        *("bigcode-openrail-m", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma"),
        *("apple-amlr", "cdla-permissive-1.0", "cdla-permissive-2.0", "unknown", "other"),
    )
)
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HEADING = re.compile(r"^(#+)\s+(.*)$")
ATTRIBUTION = re.compile(r"licen[cs]e|citation|attribution|acknowledg", re.IGNORECASE)
MOST_QUOTED_LINES = 60


def model_card(report: Report, *, licence: str | None, base_model: str | None, original_card: str | None) -> str:
    """Return the model card of an optimized checkpoint.

    Parameters
    ----------
    report : dict
        ``effcli.optimize/1``.
    licence : str or None
        Of the original, as an SPDX name; None takes it from ``original_card``.
    base_model : str or None
        Hub id of the original.
    original_card : str or None
        The original's README.md: its licence, language and task are carried over, its sections on licence, citation and
        attribution are quoted.

    Returns
    -------
    str
        Markdown with a YAML front matter.
    """
    report = _without_paths(report)
    carried, body = split_card(original_card or "")
    front = front_matter(report, licence, base_model, carried)
    source = printable(base_model or mapping(report.get("source")).get("spec") or "a model")
    lines = ["---", *_yaml(front).splitlines(), "---", "", f"# {escape(source)}, {escape(_what(report))}", ""]
    lines += verdict_lines(optimize_verdict(report))
    found = optimize_changes(report)
    place = place_of(report)
    at = f", batch {place[0]}, context {place[1]:,}" if place else ""
    device = printable(mapping(mapping(report.get("after")).get("environment")).get("device_name") or "")
    where = f"Measured before and after on {device}{at}." if device else f"Measured before and after{at}."
    for section in (
        Section("changes", "Before and after", (where,), (change.table(found, ""),)),
        quality.section(report.get("quality"), report.get("quality_reason")),
        written.audit_section(report),
    ):
        lines += section_lines(_plain(section))
    lines += _loading(report)
    lines += ["## What was done", ""]
    lines += [f"- {escape(str(entry.get('summary') or entry.get('name')))}" for entry in steps.passes(report)]
    lines += ["", *section_lines(_plain(run.recipe_section(report)))]
    lines += _attribution(front, source, base_model, body)
    made = [f"{name} {value}" for name, value in _versions(report).items()]
    lines += [
        "---",
        "",
        escape(f"Made by effcli on {report.get('created') or 'an unknown date'}; {', '.join(made)}."),
        "",
    ]
    return "\n".join(lines).rstrip() + "\n"


def _without_paths(report: Report) -> Report:
    """Return the report with names in place of paths: a card is published, where a user keeps files is not."""
    source = dict(mapping(report.get("source")))
    if source.get("spec"):
        source["spec"] = _short(source["spec"])
    return {**report, "source": source, "output": _short(report.get("output") or "out")}


def _plain(section: Section) -> Section:
    """Leave out what a card has no place for."""
    blocks: tuple[Block, ...] = tuple(block for block in section.blocks if not isinstance(block, (Chart, HeatMap)))
    return Section(section.name, section.title, section.lead, blocks)


def _yaml(data: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    return text


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Return the front matter of a model card (empty if there is none or it is no YAML mapping), and its body."""
    import yaml

    if not text.startswith("---"):
        return {}, text
    head, separator, body = text[3:].partition("\n---")
    if not separator:
        return {}, text
    try:
        data = yaml.safe_load(head)
    except yaml.YAMLError:
        data = None
    return (data if isinstance(data, dict) else {}), body.partition("\n")[2]


def front_matter(
    report: Report, licence: str | None, base_model: str | None, carried: dict[str, Any]
) -> dict[str, Any]:
    """Return the card's metadata, as the hub reads it."""
    data: dict[str, Any] = {key: value for key in CARRIED if (value := _simple(carried.get(key))) is not None}
    if licence is not None and not _same_licence(licence, data):
        name = printable(licence)
        data = {key: value for key, value in data.items() if not key.startswith("license")}
        data["license"] = name.lower() if name.lower() in HUB_LICENCES else "other"
        if data["license"] == "other":
            data["license_name"] = name
    data.setdefault("license", "unknown")
    if base_model is not None and HUB_ID.fullmatch(base_model):
        data["base_model"] = [base_model]
        data["base_model_relation"] = "quantized"
    data["library_name"] = "transformers"
    data.setdefault("pipeline_tag", "text-generation")
    data["tags"] = ["effcli", *_tags(report)]
    data["quantization"] = _quantization(report)
    order = ("license", "license_name", "license_link", "base_model", "base_model_relation", "library_name")
    return {key: data[key] for key in (*order, *(key for key in data if key not in order)) if key in data}


def _same_licence(licence: str, carried: dict[str, Any]) -> bool:
    """Return whether the original's card says the same, perhaps with a link that is worth keeping."""
    names = [str(carried.get(key, "")).lower() for key in ("license", "license_name")]
    return printable(licence).lower() in names


def _simple(value: Any) -> Any:
    """Return a short text, or a list of such, without control characters; None for anything else."""
    if isinstance(value, str) and value.strip():
        return printable(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [printable(item) for item in value]
    return None


def _tags(report: Report) -> list[str]:
    tags = []
    for record in steps.passes(report):
        parameters = mapping(record.get("parameters"))
        found = [record.get("name"), parameters.get("scheme"), parameters.get("algorithm")]
        tags += [printable(entry) for entry in found if isinstance(entry, str) and entry]
    if any(record.get("name") == "quantize" for record in steps.passes(report)):
        tags.append("compressed-tensors")
    return list(dict.fromkeys(tags))


def _quantization(report: Report) -> dict[str, Any]:
    """Return what was quantized and how, as plain numbers."""
    size = mapping(report.get("size"))
    bits = number(size.get("bits_per_parameter"))
    found: dict[str, Any] = {}
    for record in steps.passes(report):
        parameters = mapping(record.get("parameters"))
        for key in ("scheme", "algorithm"):
            if isinstance(parameters.get(key), str):
                found[key] = printable(parameters[key])
    if bits is not None:
        found["bits_per_parameter"] = round(bits, 3)
    return found


def _what(report: Report) -> str:
    bits = number(mapping(report.get("size")).get("bits_per_parameter"))
    names = [
        str(mapping(record.get("parameters")).get("scheme") or record.get("name")) for record in steps.passes(report)
    ]
    at = f", {fmt.significant(bits)} bits a parameter" if bits is not None else ""
    return f"{' + '.join(names) or 'optimized'}{at}"


def _short(spec: Any) -> str:
    """Return a hub id as it is, and a path without the folders above it."""
    text = printable(spec or "")
    return text if HUB_ID.fullmatch(text) else PurePath(text).name


def _loading(report: Report) -> list[str]:
    name = folder(report)
    lines = ["## How to load it", "", "With the fastest kernels that the device has (`pip install effcli`):", ""]
    lines += fenced(f'import effcli\n\nmodel, tokenizer = effcli.load("{name}")', "python")
    lines += ["With plain transformers:", ""]
    lines += fenced(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "python",
    )
    if "vLLM" in readers(report):
        lines += ["With vLLM:", "", *fenced(f"vllm serve {name}", "bash")]
    kernels = [use for use in items(report, "kernels") if isinstance(use, dict)]
    if kernels:
        lines += section_lines(
            _plain(Section("kernels", "Kernels that ran", (), written.kernels_section(report).blocks))
        )
    return lines


def _attribution(front: dict[str, Any], source: str, base_model: str | None, body: str) -> list[str]:
    known = front.get("license_name") or front["license"]
    lines = ["## Licence and attribution", ""]
    if known == "unknown":
        lines += [f"The licence of {escape(source)} is not recorded: find it out before you use or share this.", ""]
    else:
        lines += [
            f"The original, {escape(source)}, is under: {escape(str(known))}. This derived model is under the same.",
            "",
        ]
    if front.get("license_link"):
        lines += [f"Licence text: {escape(str(front['license_link']))}", ""]
    if base_model is not None and HUB_ID.fullmatch(base_model):
        lines += [f"Original: <https://huggingface.co/{base_model}>", ""]
    quoted = quoted_sections(body)
    if quoted:
        lines += ["From the original's model card, as it stands there:", "", *fenced("\n".join(quoted), "text")]
    return lines


def quoted_sections(body: str) -> list[str]:
    """Return the sections on licence, citation and attribution of a card, line by line, without control characters."""
    quoted: list[str] = []
    depth = 0
    in_code = False
    for line in body.splitlines():
        in_code ^= line.lstrip().startswith(("```", "~~~"))
        heading = None if in_code else HEADING.match(line)
        if heading:
            level = len(heading[1])
            if depth and level <= depth:
                depth = 0
            if not depth and ATTRIBUTION.search(heading[2]):
                depth = level
        if depth:
            quoted.append("".join(character if character.isprintable() else " " for character in line).rstrip())
    if len(quoted) > MOST_QUOTED_LINES:
        quoted = [*quoted[:MOST_QUOTED_LINES], "…"]
    return quoted


def _versions(report: Report) -> dict[str, str]:
    found = mapping(mapping(mapping(report.get("after")).get("environment")).get("versions"))
    return {str(name): str(value) for name, value in found.items()}
