"""How the run went: gates, stages, the recipe and how to repeat it."""

from __future__ import annotations

import shlex
from typing import Any

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Block, Code, Facts, Report, Section, Table, columns, items
from effcli.reports.changes import mapping, number
from effcli.reports.sections.generic import named

SHOWN_DIGITS = 16  # of a sha256; the JSON has all


def gates(report: Report) -> list[Report]:
    """Return the gates."""
    return [gate for gate in items(report, "gates") if isinstance(gate, dict)]


def gates_section(report: Report) -> Section:
    """Show each gate and whether it was passed."""
    found = gates(report)
    if not found:
        return Section("gates", "Gates", ('No gate was set; add one with --gate "ppl<=+3%".',), ())
    rows = tuple(
        (
            named(gate.get("gate")),
            "passed" if gate.get("passed") is True else "failed",
            printable(gate.get("explanation") or fmt.MISSING),
        )
        for gate in found
    )
    return Section("gates", "Gates", (), (Table("", columns("<gate", "<result", "<why"), rows),))


def stages_section(report: Report) -> Section:
    """Show where the time of the run went."""
    found = [stage for stage in items(report, "stages") if isinstance(stage, dict)]
    total = number(report.get("seconds_spent"))
    rows = tuple(
        (
            named(stage.get("stage")),
            fmt.seconds(number(stage.get("seconds"))),
            fmt.percent((number(stage.get("seconds")) or 0.0) / total) if total else fmt.MISSING,
            "yes" if stage.get("own") is True else "",
        )
        for stage in found
    )
    overhead = number(report.get("overhead_fraction"))
    lead = [f"The run took {fmt.seconds(total)}." if total is not None else "The run's time is not recorded."]
    if overhead is not None:
        lead.append(
            f"The pipeline's own overhead (neither passes, nor profiles, nor quality): {fmt.percent(overhead)}."
        )
    blocks = (Table("", columns("<stage", "time", "of run", "<overhead"), rows),) if rows else ()
    return Section("stages", "Where the time went", tuple(lead), blocks)


def recipe_yaml(recipe: Any) -> str:
    """Return a recorded recipe as the YAML that ``--recipe`` reads."""
    import yaml

    data = {key: _without_none(value) for key, value in mapping(recipe).items()}
    data = {key: value for key, value in data.items() if value not in (None, {}, [])}
    steps = data.get("passes")
    if isinstance(steps, list):
        data["passes"] = [_step(step) for step in steps]
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(line for line in text.splitlines() if line.isprintable())


def _without_none(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _step(step: Any) -> Any:
    if isinstance(step, dict) and set(step) == {"name", "parameters"}:
        return {step["name"]: step["parameters"]} if isinstance(step["name"], str) else step
    return step


def repeat_command(report: Report) -> str:
    """Return the command that repeats the run from its recipe."""
    source = mapping(report.get("source"))
    words = ["effcli", "optimize", printable(source.get("spec") or "MODEL"), "--recipe", "recipe.yaml", "-o", "out"]
    if source.get("revision"):
        words += ["--revision", printable(source["revision"])]
    return shlex.join(words)


def recipe_section(report: Report) -> Section:
    """Show the recipe and how to repeat the run."""
    blocks: list[Block] = []
    if mapping(report.get("recipe")):
        blocks.append(Code("recipe.yaml", "yaml", recipe_yaml(report["recipe"])))
        blocks.append(Code("To repeat it", "bash", repeat_command(report)))
        lead = ("The same recipe, source and versions give the same checkpoint.",)
    else:
        lead = ("The report holds no recipe.",)
    return Section("recipe", "Recipe", lead, tuple(blocks))


def source_facts(report: Report) -> Facts:
    """Describe what the run started from."""
    source = mapping(report.get("source"))
    files = mapping(source.get("files"))
    pairs = [
        ("source", printable(source.get("spec") or fmt.MISSING)),
        *(
            (key.replace("_", " "), printable(source[key]))
            for key in ("kind", "revision", "licence", "base_model", "quantized")
            if source.get(key)
        ),
        *((printable(name), f"sha256 {printable(digest)[:SHOWN_DIGITS]}…") for name, digest in files.items() if digest),
    ]
    return Facts("Source", tuple(pairs))
