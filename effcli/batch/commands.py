"""The command that does what a job does: what its report records as the way to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from effcli.batch.model import Job


def command_of(job: Job, model: str) -> str:
    """Return a job as a command line.

    Parameters
    ----------
    job : Job
    model : str
        The source, also where that is the output of another job.
    """
    words = ["effcli", job.kind, model]
    settings = dict(job.settings)
    if job.kind == "optimize":
        words += _recipe(settings.pop("recipe"))
    for name in ("device", "dtype"):
        if (value := getattr(job, name)) != "auto":
            words += [f"--{name}", value]
    if job.revision is not None:
        words += ["--revision", job.revision]
    settings |= {name: True for name in ("trust_remote_code", "allow_pickle") if getattr(job, name)}
    words += _options(settings)
    if job.kind != "profile":
        words += ["--output", job.name]
    return shlex.join(words)


def _options(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, (list, tuple)):
            words += [option, ",".join(map(str, value))]
        elif value is not None and value is not False:
            words += [option, str(value)]
    return words


def _recipe(data: Mapping[str, Any]) -> list[str]:
    from effcli.recipes import from_mapping

    recipe = from_mapping(data)
    words = [word for step in recipe.passes for word in ("--pass", step.label)]
    words += [word for gate in recipe.gates for word in ("--gate", gate)]
    chosen = recipe.evaluation
    return words + _options(
        {
            "calibration_text": recipe.calibration.text,
            "eval_text": chosen.text,
            "eval_dataset": chosen.dataset,
            "eval_tokens": chosen.tokens if "tokens" in chosen.model_fields_set else None,
            "tasks": chosen.tasks,
            "seed": recipe.seed or None,
        }
    )
