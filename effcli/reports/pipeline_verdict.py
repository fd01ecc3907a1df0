"""What a user of a diffusion pipeline reads first: what was gained, what it cost, what does better, what to do next."""

from __future__ import annotations

import shlex

from effcli import formatting as fmt
from effcli.formatting import printable
from effcli.reports.blocks import Report
from effcli.reports.changes import mapping, number
from effcli.reports.pipeline_reading import (
    ErrorMap,
    Result,
    Row,
    frames,
    other_passes,
    psnr_text,
    results,
    rows,
    spread,
    whole,
)
from effcli.reports.sections import pipeline_denoising
from effcli.reports.sections.change import times
from effcli.reports.sections.run import gates

REACHED = 0.9
"""Share of what a schedule allows from which the denoiser counts as being as fast as it should be."""
NOISE = 1.03
"""A speed-up that is claimed at all."""
SAME_COST = 1.03
"""Full calls over those of the chosen schedule up to which another way counts as the same budget."""


def optimize_verdict(report: Report) -> tuple[str, ...]:
    """Return the sentences for an ``effcli.pipeline-optimize/1`` report; at least one."""
    found = results(report)
    if not found:
        return ("The report holds no measured schedule.", following(report))
    main, *others = found
    sentences = [
        gained(main, report),
        *shortfalls(found, report),
        *_others(others),
        *better_ways(report, found),
        *_perceptual(main),
        following(report),
    ]
    return tuple(sentences)


def gained(result: Result, report: Report) -> str:
    """Say how much faster a schedule runs and how far its pictures are from those of all steps."""
    gain, denoiser, allowed = result.gain("run"), result.gain("denoiser"), result.allowed
    at = f"with {result.of_steps} steps in full"
    if gain is None:
        said = f"Speed was not measured {at}"
    elif gain < 1:
        said = f"Slower: {times(gain)} as fast {at}"
    elif gain < NOISE:
        said = f"No faster: {times(gain)} as fast {at}"
    else:
        said = f"Runs {times(gain)} as fast {at}"
    if denoiser is not None:
        others = other_passes(report)
        most = f" of at most {times(allowed)}" if allowed is not None else ""
        most = f" by the schedule and {', '.join(others)}" if others else most
        said += f" (denoiser {times(denoiser)}{most})"
    return f"{said}; {likeness(result, report)}."


def likeness(result: Result, report: Report) -> str:
    """Say how far pictures are from those of all steps."""
    data = mapping(result.data.get("likeness"))
    what = "videos" if frames(report) else "pictures"
    samples = whole(data.get("samples"))
    on = f" on {samples:,} held-out {'sample' if samples == 1 else 'samples'}" if samples else ""
    psnr, latents = spread(data.get("psnr_db")), spread(data.get("latent_l1"))
    if psnr is not None:
        return f"{what} have {psnr_text(psnr)} against those of all steps{on}"
    if latents is not None and latents.mean == 0:
        return f"{what} are the same to the bit as those of all steps{on}"
    return f"how far {what} are from those of all steps was not measured"


def shortfalls(found: tuple[Result, ...], report: Report) -> list[str]:
    """Say where the denoiser is not as fast as its schedule allows, where nothing else changed its speed."""
    if other_passes(report):
        return []
    short = []
    for result in found:
        gain, allowed = result.gain("denoiser"), result.allowed
        if gain is not None and allowed is not None and gain < REACHED * allowed:
            reached = f"{times(gain)} where {times(allowed)} is allowed"
            short.append(f"{result.name} {reached}{_outside(result, report)}")
    if not short:
        return []
    return [f"The denoiser is less than {fmt.percent(REACHED)} as fast as its schedule allows: {'; '.join(short)}."]


def _outside(result: Result, report: Report) -> str:
    """Say what is left of a speed-up when only the blocks are skipped."""
    gain, allowed = result.gain("denoiser"), result.allowed
    share = number(pipeline_denoising.denoising(report).get("blocks_share"))
    if gain is None or allowed is None or allowed < 1 or result.mode == "output":
        return ""
    if share is None or not 0 < share < 1:
        return ""
    most = 1 / (1 / allowed + (1 - 1 / allowed) * (1 - share))
    if gain >= most:
        return " (all that embedders and heads leave, which run at every step)"
    return f" (embedders and heads run at every step and leave {times(most)})"


def _others(found: list[Result]) -> list[str]:
    told = []
    for result in found:
        gain, psnr = result.gain("run"), spread(mapping(result.data.get("likeness")).get("psnr_db"))
        parts = [f"{result.of_steps} steps"]
        parts += [f"{times(gain)} as fast"] if gain is not None else []
        parts += [f"{fmt.significant(psnr.mean)} dB"] if psnr is not None else []
        told.append(f"{result.name} ({', '.join(parts)})")
    return [f"Also written: {'; '.join(told)}."] if told else []


def better_ways(report: Report, found: tuple[Result, ...]) -> list[str]:
    """Name every way that came nearer to all steps than the published schedule at the same cost."""
    sentences, ahead = [], []
    for result in found:
        at = [row for row in rows(report) if row.budget == len(result.full) and row.psnr is not None]
        chosen = next((row for row in at if row.chosen), None)
        others = [row for row in at if not row.chosen]
        if chosen is None or not others:
            continue
        most = (chosen.full_calls or chosen.budget) * SAME_COST
        better = [row for row in others if _psnr(row) > _psnr(chosen) and (row.full_calls or row.budget) <= most]
        if better:
            named = ", ".join(f"{row.label} ({_decibels(row)})" for row in better)
            sentences.append(f"Better at {result.of_steps} steps than what was chosen ({_decibels(chosen)}): {named}.")
        else:
            second = max((row for row in others if _psnr(row) <= _psnr(chosen)), key=_psnr, default=None)
            next_ = f", next {second.label} with {_decibels(second)}" if second is not None else ""
            ahead.append(f"{result.of_steps}{next_}")
    if ahead:
        sentences.append(
            f"No other way that was run comes nearer to all steps for the same full steps ({'; '.join(ahead)})."
        )
    return sentences


def _psnr(row: Row) -> float:
    return row.psnr.mean if row.psnr is not None else 0.0


def _decibels(row: Row) -> str:
    return f"{fmt.significant(_psnr(row))} dB"


def _perceptual(result: Result) -> list[str]:
    data = mapping(result.data.get("likeness"))
    if spread(data.get("lpips")) is not None or not data.get("lpips_reason"):
        return []
    return [f"LPIPS was not measured: {printable(data['lpips_reason']).rstrip('.')}."]


def following(report: Report) -> str:
    """Say what to do next."""
    failed = [
        printable(gate.get("explanation") or gate.get("gate")) for gate in gates(report) if gate.get("passed") is False
    ]
    if failed or report.get("status") == "gate failed":
        why = f" ({'; '.join(failed)})" if failed else ""
        return f"Next: nothing was published, a gate failed{why}; allow more full steps."
    folder = printable(report.get("output") or "out")
    _, *others = results(report) or (None,)
    picks = " or ".join(f'schedule="{result.name}"' for result in others if result is not None)
    return f'Next: effcli.load_pipeline("{folder}") runs it{f"; {picks} picks another" if picks else ""}.'


def profile_verdict(report: Report, errors: ErrorMap | None) -> tuple[str, ...]:
    """Return the sentences for an ``effcli.pipeline-profile/1`` report; ``errors`` is the map that it holds."""
    found = [
        *pipeline_denoising.sentences(report),
        *reusable(errors, printable(mapping(report.get("pipeline")).get("source") or "PIPELINE")),
    ]
    if not pipeline_denoising.denoising(report):
        found.insert(0, "The time of a run was not measured.")
    if errors is None:
        reason = printable(report.get("error_map_reason") or "the report does not say why")
        found.append(f"What reuse would cost is not known: {reason.rstrip('.')}.")
    return tuple(found)


def reusable(errors: ErrorMap | None, source: str) -> list[str]:
    """Say how many steps could reuse at no more than what every second step in full costs, and where."""
    if errors is None:
        return []
    even = tuple(dict.fromkeys((*range(0, errors.steps, 2), errors.steps - 1)))
    limit = errors.worst(even)
    fewest = errors.fewest(limit) if limit is not None else None
    low = min(errors.weights, key=errors.weights.__getitem__)
    high = max(errors.weights, key=errors.weights.__getitem__)
    sentences = []
    if limit is not None and fewest is not None:
        sentences.append(
            f"Reusing at every second step costs up to {fmt.significant(limit)} ({errors.unit}) in one segment; picked "
            f"by the map, {errors.steps - fewest} of {errors.steps} steps can reuse at no more than that, "
            f"not {errors.steps - len(even)}."
        )
    if errors.weights[low] > 0:
        share = errors.weights[high] / errors.weights[low]
        sentences.append(
            f"Where to reuse matters: the dearest segment ({high[0]} to {high[1]}) costs {fmt.short(share, 2)} times "
            f"as much as the cheapest ({low[0]} to {low[1]})."
        )
    words = ["effcli", "optimize", source, "--pass", f"lemica:budget={fewest or errors.steps},steps={errors.steps}"]
    return [*sentences, f"Next: {shlex.join([*words, '-o', 'out'])}"]
