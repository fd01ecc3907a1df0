"""Predict what passes would do on this device, from a measured profile, before any of them runs.

::

    saved or fresh profile ──> ModelProfile (meta model, peaks, figures) ──> Pass.plan ──> Prediction
                                     ▲                                                        │
                                     └────────── figures of the pass before ──────────────────┘   in a chain
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.devices import DTYPES
from effcli.errors import BadInputError
from effcli.recipes import Recipe, Step
from effcli.reports.model import PROFILE_SCHEMA, Environment, ModelInfo
from effcli.reports.optimize_model import PLAN_SCHEMA, PlannedPass, PlanReport
from passes.base import Figures, ModelProfile, Pass, PassError, Prediction

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from profilers.base import Progress
    from profilers.peaks import Peaks

# What a prediction stands on; sinks, energy and outliers do not enter it.
PROFILERS = ("latency", "intensity", "kv")
DEFAULT_CONTEXT = 512


def plan(
    model: str | Path,
    *,
    recipe: Recipe | None = None,
    profile: Mapping[str, Any] | None = None,
    batch: int = 1,
    context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> PlanReport:
    """Predict what passes would buy on this device.

    Parameters
    ----------
    model : str or Path
        A source as on the command line.
    recipe : Recipe, optional
        Its passes are planned as a chain. Without one, the alternatives of every installed pass are planned, each
        from the model as it is.
    profile : dict, optional
        A saved ``effcli.profile/1`` of this model on this device; without one the model is measured now.
    batch, context : int, optional
        The point to plan for; default: a context of 512 tokens, or the one that ``profile`` holds.
    device, dtype, revision, allow_pickle, trust_remote_code, progress, command
        As in :func:`effcli.profile`.

    Raises
    ------
    effcli.errors.EffcliError
        If the source or the profile cannot be used.
    passes.base.PassError
        For an unknown pass or parameter, or a pass named in the recipe that does not suit the model.
    """
    from effcli import loading, sources
    from effcli.api import profile as measure
    from effcli.preflight import check_chain

    started = time.perf_counter()
    chain = recipe.chain() if recipe is not None else ()  # a wrong name is said before anything is measured
    trust: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    source = sources.resolve(str(model), revision=revision, progress=progress, **trust)
    bare = loading.load(source, device=device, dtype=dtype, config_only=True, progress=progress, **trust)
    check_chain(chain, bare.model)
    if profile is None:
        limit = getattr(bare.config.get_text_config(decoder=True), "max_position_embeddings", None)
        chosen = context or min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
        profile = measure(
            str(model), only=PROFILERS, batch=(batch,), context=(chosen,), device=device, dtype=dtype,
            revision=revision, progress=progress, command=command, **trust,
        ).to_dict()  # fmt: skip
    else:
        check_profile(profile, architecture=type(bare.model).__name__, device=bare.device)
    known = model_profile(profile, bare.model, bare.device, batch=batch, context=context)
    planned = plan_alternatives(known) if recipe is None else plan_chain(chain, known, recipe.passes)
    return PlanReport(
        schema=PLAN_SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command or f"effcli.plan({str(model)!r}, ...)",
        seconds_spent=time.perf_counter() - started,
        model=ModelInfo(**{**profile["model"], "notes": tuple(profile["model"]["notes"])}),
        environment=Environment(**profile["environment"]),
        batch=known.batch,
        context=known.context,
        measured=known.figures,
        alternatives=recipe is None,
        passes=planned,
        warnings=slower_warnings(planned) if recipe is not None else (),
    )


def check_profile(profile: Mapping[str, Any], *, architecture: str, device: torch.device) -> None:
    """Refuse a saved profile that is not of this model on this device.

    Raises
    ------
    BadInputError
        Naming what differs.
    """
    from profilers.device import device_name

    if profile.get("schema") != PROFILE_SCHEMA:
        raise BadInputError(
            f"the profile has schema {profile.get('schema')!r}; give one that 'effcli profile --format json' wrote"
        )
    of, on = profile["model"]["architecture"], profile["environment"]["device_name"]
    if of != architecture:
        raise BadInputError(f"the profile is of a {of}, the model is a {architecture}; profile this model")
    if on != (here := device_name(device)):
        raise BadInputError(f"the profile was measured on '{on}', this device is '{here}'; profile the model here")


def model_profile(
    report: Mapping[str, Any],
    meta_model: PreTrainedModel,
    device: torch.device,
    *,
    batch: int | None = None,
    context: int | None = None,
) -> ModelProfile:
    """Return what passes plan from.

    Parameters
    ----------
    report : dict
        ``effcli.profile/1`` as plain data.
    meta_model : PreTrainedModel
        The model that it is of, on the meta device.
    device : torch.device
    batch, context : int, optional
        Which of the report's points to plan for; default: the first.

    Raises
    ------
    BadInputError
        If the report lacks the device's peaks, or has not that point.
    """
    import torch

    peaks = peaks_of(report)
    point = _point(report, batch, context)
    kv = (report["profiles"].get("kv") or {}).get("bytes_per_token")
    latency = point or {}
    return ModelProfile(
        model=meta_model,
        dtype=getattr(torch, DTYPES[report["model"]["dtype"]]),
        device=device,
        peaks=peaks,
        batch=latency.get("batch", batch or 1),
        context=latency.get("context", context or DEFAULT_CONTEXT),
        figures=Figures(
            weight_bytes=report["model"]["weight_bytes"],
            kv_bytes_per_token=kv,
            ttft_seconds=latency["ttft_seconds"]["p50"] if point else None,
            tpot_seconds=latency["tpot_seconds"]["p50"] if point else None,
            peak_memory_bytes=latency.get("peak_memory_bytes"),
        ),
        report=report,
    )


def _point(report: Mapping[str, Any], batch: int | None, context: int | None) -> dict[str, Any] | None:
    points = (report["profiles"].get("latency") or {}).get("points") or []
    suited = [
        point
        for point in points
        if (batch is None or point["batch"] == batch) and (context is None or point["context"] == context)
    ]
    if points and not suited:
        there = ", ".join(f"batch {point['batch']} context {point['context']}" for point in points)
        raise BadInputError(f"the profile has no timing at batch {batch}, context {context}; it has: {there}")
    return suited[0] if suited else None


def peaks_of(report: Mapping[str, Any]) -> Peaks:
    """Return the device's ceilings that a profile holds.

    Raises
    ------
    BadInputError
        If it holds none.
    """
    from profilers.peaks import Peaks, WorkingSetBandwidth

    stored = report["environment"].get("peaks")
    if stored is None:
        raise BadInputError("the profile holds no measured peaks of the device; profile the model again")
    levels = tuple(WorkingSetBandwidth(**level) for level in stored["by_working_set"])
    return Peaks(**{**stored, "by_working_set": levels, "notes": tuple(stored["notes"])})


def plan_chain(chain: Sequence[Pass], profile: ModelProfile, steps: Sequence[Step]) -> tuple[PlannedPass, ...]:
    """Predict each pass of a chain after the ones before it.

    Raises
    ------
    passes.base.PassError
        If one does not suit the model.
    """
    planned = []
    for item, step in zip(chain, steps, strict=True):
        prediction = item.plan(profile)
        planned.append(_planned(item, step, prediction))
        known = {key: value for key, value in dataclasses.asdict(prediction.figures).items() if value is not None}
        profile = dataclasses.replace(
            profile,
            model=item.shapes_after(profile.model),
            figures=dataclasses.replace(profile.figures, **known),
        )
    return tuple(planned)


def plan_alternatives(profile: ModelProfile) -> tuple[PlannedPass, ...]:
    """Predict, each from the model as it is, what every installed pass offers; one that does not suit says why."""
    from passes import registry

    planned = []
    for name in registry.names():
        kind = registry.load(name)
        for values in kind.alternatives():
            item, step = kind.from_mapping(values), Step(name=name, parameters=values)
            try:
                item.check(profile.model)
                planned.append(_planned(item, step, item.plan(profile)))
            except PassError as error:
                planned.append(_planned(item, step, None, str(error)))
    return tuple(planned)


def _planned(item: Pass, step: Step, prediction: Prediction | None, reason: str | None = None) -> PlannedPass:
    return PlannedPass(
        name=item.name,
        parameters=item.parameters.model_dump(mode="json"),
        label=step.label,
        prediction=prediction,
        reason=reason,
    )


def slower_warnings(planned: Sequence[PlannedPass]) -> tuple[str, ...]:
    """Return a warning for each pass that is predicted to slow decode down, or that does not fit."""
    lines = []
    for item in planned:
        if item.prediction is None:
            continue
        if item.prediction.slower:
            lines.append(f"{item.label} is predicted to make decode slower on this device")
        if item.prediction.fits is False:
            lines.append(f"{item.label} is predicted to need more memory than this device has free")
    return tuple(lines)
